"""Block reconstruction: cuts, what is minimised, what is trained, against NumPy from the equations."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PARAMS, QUICK, TOKENS, D, F, X, net, perceptron, recipe, uniform

import qjax
from qjax.errors import DataError
from qjax.passes.units import find_units
from qjax.settling import run, settle
from qjax.settling.cuts import blocks_of_units, evaluated, prefix
from qjax.settling.reconstruct import distance, passed_on, push, rates_of, soft_log, soft_uniform


def test_blocks_are_cut_where_little_passes():
    program = qjax.trace(net, PARAMS, X)
    level, units = find_units(program, recipe().decide(program.sites))
    blocks = blocks_of_units(level, units, len(program.leaf_names))
    assert [b.name for b in blocks] == [u.name for u in units]  # no numbers in these names: each by itself
    assert [len(b.inputs) for b in blocks] == [1, 4, 2, 1, 2, 1]  # q, k, v and the residual stream; and so on
    env = dict(zip(level.inputs, [*jax.tree.leaves(PARAMS), X], strict=True))
    for block in blocks:
        env |= dict(zip(block.outputs, evaluated(level, block, env, {}), strict=True))
    np.testing.assert_allclose(env[level.outputs[0]], net(PARAMS, X), rtol=1e-4, atol=1e-5)
    names = ("a/0/w", "a/0/mlp/w", "a/b/w", "layers/12/attn/q")
    assert [prefix(name) for name in names] == ["a/0", "a/0", "a/b/w", "layers/12"]


@pytest.mark.parametrize("fn", [perceptron, pytest.param(net, marks=pytest.mark.slow)])
def test_blocks_are_trained_to_keep_their_outputs(fn, tmp_path):
    params = {name: PARAMS[name] for name in ("up", "down")} if fn is perceptron else PARAMS
    rules = recipe().rules[1 if fn is perceptron else 0 :]
    trained = qjax.Recipe(rules, settle=dataclasses.replace(QUICK, reconstruct=1500))
    kept = settle(fn, params, [(X,)], recipe=trained, resume=tmp_path)
    said = [re.findall(r"^(.*): reconstructed, .* output ([^ ]+) before, ([^ ]+) after", note) for note in kept.notes]
    gains = {found[0][0]: tuple(map(float, found[0][1:])) for found in said if found}
    assert all(after <= before for before, after in gains.values())
    better = [site for site, (before, after) in gains.items() if after < 0.999 * before]
    assert len(better) >= (1 if fn is perceptron else 3)
    program = qjax.trace(fn, params, X)
    weights = dict(zip(program.leaf_names, kept.leaves, strict=True))
    for site in better:
        if site in kept.scales:  # codes, and nothing between them; not those of rounding to nearest
            w = np.asarray(weights[site]).T
            np.testing.assert_allclose(uniform(w, kept.scales[site]), w, atol=1e-5)
    model = qjax.quantize(fn, params, recipe=trained, batches=[(X,)], resume=tmp_path)  # all is there
    assert [rule.match for rule in model.recipe.rules] == [rule.match for rule in kept.recipe.rules]
    plain = dataclasses.replace(trained.settle, reconstruct=0)
    other = qjax.quantize(fn, params, recipe=qjax.Recipe(rules, settle=plain), batches=[(X,)])
    want = np.asarray(fn(params, X))
    got, plainly = (np.asarray(m(m.params, X)) for m in (model, other))
    if fn is perceptron:
        assert np.mean((got - want) ** 2) < np.mean((plainly - want) ** 2)
    else:  # a matrix of logits at the end is compared by KL divergence
        p, *others = (jax.nn.log_softmax(y) for y in (want, got, plainly))
        kl = [float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))) for q in others]
        assert kl[0] < kl[1]
        (attention,) = (rule for rule in model.recipe.rules if rule.op == "attention")
        assert attention.operands["p"].scale == (1.0,) and attention.operands["q"].scale != (1.0, 1.0)
        assert "log_attention" in str(jax.make_jaxpr(model)(model.params, X))


def split(params, x):
    """A perceptron on tokens, with the number of examples among its shapes."""
    return perceptron(params, x.reshape(x.shape[0] * TOKENS, D)).reshape(x.shape)


@pytest.mark.slow
def test_steps_of_the_training_have_a_size_of_their_own():
    params, rules = {name: PARAMS[name] for name in ("up", "down")}, recipe(3).rules[1:]

    def kept(batches, batch):
        how = dataclasses.replace(QUICK, reconstruct=60, batch=batch)
        made = settle(split, params, batches, recipe=qjax.Recipe(rules, settle=how))
        said = re.findall(r"output ([^ ]+) before, ([^ ]+) after", "\n".join(made.notes))
        losses = [tuple(map(float, pair)) for pair in said]
        assert len(losses) == 2 and any(after < 0.95 * before for before, after in losses)
        return [np.asarray(leaf) for leaf in made.leaves], losses

    whole, losses = kept([(X,)], 8)
    parts, same = kept([(X[:4],), (X[4:],)], 8)  # the trace of a batch has other shapes than a step
    np.testing.assert_allclose(losses, same, rtol=1e-2)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    kept([(X,)], 6)  # 6 does not divide 8: some are counted twice when the error of all is measured


@pytest.mark.slow
def test_a_block_can_be_trained_on_what_the_quantized_blocks_before_put_out(tmp_path, monkeypatch):
    params, rules = {name: PARAMS[name] for name in ("up", "down")}, recipe().rules[1:]
    how = dataclasses.replace(QUICK, reconstruct=60, batch=6, block_inputs="quantized")
    how, seen = qjax.Recipe(rules, settle=how), []

    def recorded(*args):
        seen.append((args[6], passed_on(*args)))
        return seen[-1][1]

    monkeypatch.setattr(run, "passed_on", recorded)
    kept = settle(split, params, [(X[:4],), (X[4:],)], recipe=how, resume=tmp_path)
    ((x,), (up,)), (entered, (down,)) = seen
    np.testing.assert_array_equal(np.asarray(x).reshape(X.shape), X)
    np.testing.assert_array_equal(entered[0], up)  # the next block gets what this one puts out
    rule = {rule.match: rule for rule in kept.recipe.rules}["up/kernel"]
    assert rule.inputs.fmt.bits == 4
    found = kept.constants["up/kernel"]
    scale, zero = (np.asarray(found[k], F).reshape(()) for k in ("scale", "zero"))
    rounded = (np.clip(np.rint(X / scale) + zero, 0, 15) - zero) * scale
    leaf = dict(zip(qjax.trace(split, params, X).leaf_names, kept.leaves, strict=True))["up/kernel"]
    want = rounded @ uniform(np.asarray(leaf).T, kept.scales["up/kernel"]).T  # the bias belongs to the next block
    np.testing.assert_allclose(np.asarray(up).reshape(want.shape), want, rtol=1e-4, atol=1e-4)
    model = qjax.quantize(split, params, recipe=how, batches=[(X[:4],), (X[4:],)], resume=tmp_path)
    for a, b in zip(seen[:2], seen[2:], strict=True):  # what was kept goes on as what was trained
        np.testing.assert_allclose(a[1][0], b[1][0], rtol=1e-4, atol=1e-4)
    got, exact = np.asarray(model(model.params, X)), np.asarray(split(params, X))
    off = np.asarray(down).reshape(got.shape) - got  # fractions of Log's table, and the power of its base
    assert np.mean(off**2) < 0.02 * np.mean((got - exact) ** 2)


def test_examples_come_first_where_blocks_are_trained():
    def turned(params, x):  # tokens first
        return perceptron(params, x.swapaxes(0, 1)).swapaxes(0, 1)

    params, rules = {name: PARAMS[name] for name in ("up", "down")}, recipe().rules[1:]
    how = dataclasses.replace(QUICK, reconstruct=2)
    with pytest.raises(DataError, match="up/kernel.*first axis"):
        settle(turned, params, [(X,)], recipe=qjax.Recipe(rules, settle=how))


def test_what_is_minimised_is_what_the_equations_say():
    rng = np.random.default_rng(3)
    got, want = rng.standard_normal((2, 4, 3, 5)).astype(F)
    assert distance(got, want, True) == pytest.approx(((got - want) ** 2).sum(1).mean() / 10, rel=1e-5)
    p, q = (np.exp(a[:, 0]) / np.exp(a[:, 0]).sum(-1, keepdims=True) for a in (want, got))
    assert distance(got[:, 0], want[:, 0], True) == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-4)
    assert distance(got[:, 0], want[:, 0], False) == pytest.approx(
        ((got - want)[:, 0] ** 2).sum(1).mean() / 10, rel=1e-5
    )
    vs = [rng.standard_normal((3, 4)).astype(F), F([-9, 0.3, 9])]
    h = np.clip(1.2 / (1 + np.exp(-np.concatenate([v.ravel() for v in vs]))) - 0.1, 0, 1)
    for at, beta in ((0, None), (19, None), (20, 20), (60, 11), (100, 2)):
        term = 0 if beta is None else 0.01 * (1 - np.abs(2 * h - 1) ** beta).sum()
        assert push(vs, jnp.int32(at), 100) == pytest.approx(term, rel=1e-4, abs=1e-7)


def test_quantizers_in_training_are_the_formats_with_a_derivative():
    x = np.random.default_rng(4).uniform(-1, 1, 50).astype(F)
    s, z = F(0.1), F(6)

    def even(scale):
        return soft_uniform(x, scale=scale, zero=z, bits=4)

    codes = np.rint(x / s) + z
    inside = (codes >= 0) & (codes <= 15)
    np.testing.assert_allclose(even(s), (np.clip(codes, 0, 15) - z) * s, atol=1e-6)
    slope = np.where(inside, codes - z - x / s, np.clip(codes, 0, 15) - z)
    np.testing.assert_allclose(jax.jacfwd(even)(s), slope, atol=1e-4)

    x = np.append(x**8, [0, 1]).astype(F)
    s, q = F(0.7), F(25)
    for zero in ("mask", "reserve", "clamp"):

        def log(scale, zero=zero):
            return soft_log(x, scale=scale, q=q, bits=3, shift=0.05, zero=zero)

        u = np.clip((x.astype(np.float64) + 0.05) / s, 1e-15, 1)
        code, last = np.rint(-np.log2(u) * 37 / 25), 6 if zero == "reserve" else 7
        power = 2.0 ** (-np.minimum(code, last) * 25 / 37)  # the power itself, and no fraction
        kept = (code <= last) | (zero == "clamp")
        np.testing.assert_allclose(log(s), np.where(kept, s * power, 0) - 0.05, atol=1e-6)
        slope = np.where(kept & ((u == 1) | (code > last)), power, 0)  # between, u / s and the power cancel
        np.testing.assert_allclose(jax.jacfwd(log)(s), slope, atol=1e-5)


def test_rates_are_those_of_the_authors_at_their_number_of_steps():
    assert rates_of(20_000) == rates_of(50_000) == (1e-3, 4e-5)
    np.testing.assert_allclose(rates_of(200), (1e-2, 4e-4))
