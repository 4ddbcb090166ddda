"""AdaLog from a plain function to a saved model, against a NumPy forward pass with the numbers that were found."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import (
    HEADS,
    HIDDEN,
    PARAMS,
    QUICK,
    RNG,
    TOKENS,
    D,
    F,
    X,
    dense,
    layer_norm,
    net,
    perceptron,
    recipe,
    uniform,
)

import qjax
from qjax.errors import CheckpointError, DataError, RecipeError
from qjax.formats import Int, Log
from qjax.passes import AdaLog
from qjax.passes.adalog import moves
from qjax.passes.fpcs import Pairs
from qjax.passes.units import LinearUnit, find_units
from qjax.settling import settle
from qjax.settling.capture import separable
from qjax.settling.results import moved_channels


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def settled(job):
    return settle(net, PARAMS, [(X[:4],), (X[4:],)], recipe=recipe(), resume=job)


def test_units_are_found_on_the_program():
    program = qjax.trace(net, PARAMS, X)
    _, units = find_units(program, recipe().decide(program.sites))
    kinds = [(u.sites, u.kind) for u in units if isinstance(u, LinearUnit)]
    assert kinds == [
        (("query/kernel", "key/kernel", "value/kernel"), "norm"),
        (("out/kernel",), "plain"),
        (("up/kernel",), "norm"),
        (("down/kernel",), "gelu"),
        (("head/kernel",), "plain"),  # a slice of what the norm gives
    ]
    down = next(u for u in units if u.name == "down/kernel")
    assert down.shift == pytest.approx(0.1700407506, abs=1e-7) and down.shift > 0.1700407506
    assert sum(not isinstance(u, LinearUnit) for u in units) == 1
    exact = qjax.trace(lambda p, x: jax.nn.gelu(x @ p["a"], approximate=False) @ p["b"],
                       {"a": np.ones((4, 4), F), "b": np.ones((4, 2), F)}, np.ones((3, 4), F))  # fmt: skip
    found = find_units(exact, recipe().decide(exact.sites, strict=False))[1]
    assert [u.kind for u in found] == ["plain", "gelu"] and found[1].shift == 0.16997124254703522


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_flax_attention_is_found_and_runs_as_one_op(library):
    from flax import linen, nnx

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = x + linen.MultiHeadDotProductAttention(num_heads=HEADS)(linen.LayerNorm()(x))
            return x + linen.Dense(D)(linen.gelu(linen.Dense(D)(linen.LayerNorm()(x))))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.norms = nnx.List([nnx.LayerNorm(D, rngs=rngs) for _ in range(2)])
            self.attend = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)

        def __call__(self, x):
            x = x + self.attend(self.norms[0](x))
            return x + self.down(nnx.gelu(self.up(self.norms[1](x))))

    if library == "nnx":
        fn, params = qjax.from_nnx(Nnx(nnx.Rngs(0)))
    else:
        fn, params = qjax.from_linen(Linen(), Linen().init(jax.random.key(0), X))
    program = qjax.trace(fn, params, X)
    _, units = find_units(program, recipe().decide(program.sites))
    assert sorted(u.kind for u in units if isinstance(u, LinearUnit)) == ["gelu", "norm", "norm", "plain"]
    (attention,) = (u for u in units if not isinstance(u, LinearUnit))
    assert not separable(attention)
    fixed = qjax.Rule("**", op="attention", operands={"p": qjax.fixed(Log(4, 25), 1.0)})
    rewritten = qjax.quantize(fn, params, X, recipe=qjax.Recipe([fixed]))
    assert str(jax.make_jaxpr(lambda x: rewritten(rewritten.params, x))(X)).count("log_attention[") == 1


def test_a_layer_norm_is_found_behind_windows_and_their_shifts():
    def fn(params, x, pad=0, twice=False):
        h = jnp.pad(layer_norm(params["norm"], x), ((0, 0), (0, pad), (0, 0), (0, 0)))
        h = jnp.concatenate([h[:, 1:], h[:, 1:]], 1) if twice else jnp.roll(h, (-1, -1), (1, 2))
        h = h.reshape(2, -1, 2, 2, 2, D).swapaxes(2, 3).reshape(-1, 4, D)
        return dense(params["query"], h) + dense(params["key"], h)

    x = np.ones((2, 4, 4, D), F)
    for settings, kind in (({}, "norm"), ({"pad": 2}, "plain"), ({"twice": True, "pad": 1}, "plain")):
        program = qjax.trace(functools.partial(fn, **settings), PARAMS, x)
        (unit,) = find_units(program, recipe().decide(program.sites, strict=False))[1]
        assert (unit.sites, unit.kind) == (("query/kernel", "key/kernel"), kind), settings
    assert unit.norm is None


def test_what_is_no_gelu():
    quick = qjax.trace(lambda p, x: (lambda h: h * jax.nn.sigmoid(1.702 * h))(x @ p["a"]) @ p["b"],
                       {"a": np.ones((4, 4), F), "b": np.ones((4, 2), F)}, np.ones((3, 4), F))  # fmt: skip
    found = find_units(quick, recipe().decide(quick.sites, strict=False))[1]
    assert found[1].kind == "plain" and "no GELU" in found[1].notes[0]


def test_a_layer_norm_takes_up_the_scales_of_channels_and_the_function_stays(settled):
    program = qjax.trace(net, PARAMS, X)
    _, units = find_units(program, recipe().decide(program.sites))
    leaves = qjax.passes.Leaves(program.leaf_names, jax.tree.leaves(PARAMS))
    wide = X * np.array([1, 8, 0.1, 1, 3, 1, 1, 1], F)
    for unit in (u for u in units if isinstance(u, LinearUnit) and u.kind == "norm"):
        rows = np.array(layer_norm(PARAMS[unit.norm[0].split("/")[0]], wide)).reshape(-1, D)
        rows[:, 3] = 0.7  # a channel that never changes
        weights = np.concatenate([PARAMS[name.split("/")[0]]["kernel"].T for name in unit.sites])
        found = QUICK.settled(unit, (rows,), weights)
        assert found["rho"][3] == 1 and found["beta"][3] == 0 and np.ptp(np.log2(found["rho"])) > 1
        assert "moved into norm" in moved_channels(program, leaves, unit, found)
    moved = jax.tree.unflatten(jax.tree.structure(PARAMS), [leaves[name] for name in leaves])
    want = net(PARAMS, X)
    assert np.abs(net(moved, X) - want).max() <= 2e-5 * np.abs(want).max()
    assert np.abs(moved["norm"]["scale"] - PARAMS["norm"]["scale"]).max() > 0.1


def logarithmic(x, fmt, scale):
    """x + shift on the logarithmic grid, from the equations."""
    n, below = 2**fmt.bits, 2 ** (fmt.bits + 1) - 2
    code = np.rint(-np.log2(np.clip((x + fmt.shift) / scale, 1e-15, 1)) * 37 / fmt.q).astype(int)
    at = np.clip(code, 0, n - 1) * fmt.q
    return scale * np.rint(2.0 ** (-(at % 37) / 37) * below) / below * 2.0 ** -(at // 37) * (code < n)


def test_the_shift_of_a_gelu_is_in_the_bias_behind_it(settled):
    """Outputs are those of the shift taken off the rounded inputs, W^ (x^ - shift) + b, with the bias as it was."""
    fmt = next(rule.inputs.fmt for rule in settled.recipe.rules if rule.match == "down/kernel")
    assert fmt.folded and fmt.shift > 0.17
    bias = jax.tree.unflatten(jax.tree.structure(PARAMS), settled.leaves)["down"]["bias"]
    weight = uniform(PARAMS["down"]["kernel"].T, settled.scales["down/kernel"])
    x = np.asarray(jax.nn.gelu(np.random.default_rng(1).standard_normal((20, HIDDEN))), np.float64)
    near = logarithmic(x, fmt, float(settled.constants["down/kernel"]["scale"][0, 0]))
    want = (near - fmt.shift) @ weight.T + PARAMS["down"]["bias"]
    np.testing.assert_allclose(near @ weight.T + np.asarray(bias), want, atol=1e-6)


def test_one_scale_behind_a_moved_layer_norm_gives_the_codes_of_channels():
    rng = np.random.default_rng(2)
    channels = rng.standard_normal((6, 50)) * rng.uniform(0.2, 3, (6, 1)) + rng.standard_normal((6, 1))
    scale, zero = rng.uniform(0.05, 0.4, 6).astype(F), rng.integers(0, 16, 6).astype(F)
    rho, beta = moves(channels.astype(F), Pairs(scale, zero, np.zeros(6), 0))
    s, z = scale.mean(), np.rint(zero.mean())
    moved = channels / rho[:, None] - beta[:, None]
    np.testing.assert_allclose(moved / s + z, channels / scale[:, None] + zero[:, None], atol=1e-4)


def test_the_model_is_what_the_numbers_say(settled, job, tmp_path):
    model = qjax.quantize(net, PARAMS, recipe=recipe(), batches=[(X[:4],), (X[4:],)], resume=job)  # all is there
    rules = {rule.match: rule for rule in settled.recipe.rules}
    attention = next(rule for rule in rules.values() if rule.op == "attention").operands
    leaves = iter(settled.leaves)
    p = jax.tree.map(lambda a: np.asarray(next(leaves), np.float64), PARAMS)

    def linear(name, x):
        site, rule = f"{name}/kernel", rules[f"{name}/kernel"]
        weight = uniform(p[name]["kernel"].T, settled.scales[site]).T
        scale = np.asarray(settled.constants[site]["scale"], np.float64)
        fmt = rule.inputs.fmt
        near = logarithmic(x, fmt, scale) if isinstance(fmt, Log) else uniform(x, settled.constants[site])
        return near @ weight + p[name]["bias"]

    def operand(name, x):
        source = attention[name]
        if isinstance(source.fmt, Log):
            assert source.scale == (1.0,)
            return logarithmic(x, source.fmt, 1.0)
        assert len(source.scale) == HEADS
        return uniform(x, {k: np.reshape(getattr(source, k), (HEADS, 1, 1)) for k in ("scale", "zero")})

    def norm(name, x):
        return np.asarray(layer_norm(p[name], jnp.asarray(x, jnp.float32)), np.float64)

    def split(x):
        return x.reshape(*x.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)

    x = X.astype(np.float64)
    h = norm("norm", x)
    q, k, v = (operand(n[0], split(linear(n, h))) for n in ("query", "key", "value"))
    prob = operand("p", np.asarray(jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / 2.0, axis=-1)))
    x = x + linear("out", (prob @ v).transpose(0, 2, 1, 3).reshape(x.shape))
    hidden = np.asarray(jax.nn.gelu(jnp.asarray(linear("up", norm("norm2", x)), jnp.float32)), np.float64)
    assert rules["down/kernel"].inputs.fmt.folded
    x = x + linear("down", hidden)
    want = linear("head", norm("last", x)[:, 0])
    got = np.asarray(model(model.params, X))
    close = np.abs(got - want) <= 1e-4 * np.abs(want).max()
    assert close.mean() > 0.9  # a number on the edge between two codes may fall to either side

    row = next(r for r in model.report.rows if r.op == "attention")
    assert row.quantized and "log4" in row.inputs and model.recipe.settle is None
    assert qjax.Recipe.from_toml(model.recipe.to_toml()) == model.recipe
    qjax.save(tmp_path / "model", model)
    again = qjax.load(tmp_path / "model", net, like=jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_array_equal(again(again.params, X), got)
    np.testing.assert_allclose(model(model.params, X[:2]), got[:2], atol=1e-5 * np.abs(got).max())


def test_a_killed_search_goes_on(settled, tmp_path):
    batches = [(X[:4],), (X[4:],)]

    def kill(done, total, name):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settle(net, PARAMS, batches, recipe=recipe(), resume=tmp_path, progress=kill)
    seen = []

    class Watched(AdaLog):
        def settled(self, unit, data, weights):
            seen.append(unit.name)
            return super().settled(unit, data, weights)

    watched = Watched(**dataclasses.asdict(QUICK))
    begun = recipe()
    object.__setattr__(begun, "settle", watched)
    object.__setattr__(begun, "hash", recipe().hash)
    resumed = settle(net, PARAMS, batches, recipe=begun, resume=tmp_path)
    assert len(seen) == 3 and resumed.recipe == settled.recipe
    for mine, other in zip(resumed.leaves, settled.leaves, strict=True):
        np.testing.assert_array_equal(mine, other)
    with pytest.raises(CheckpointError, match="batches differ"):
        settle(net, PARAMS, [(X + 1,)], recipe=recipe(), resume=tmp_path)


def test_what_cannot_be_searched():
    with pytest.raises(DataError, match="4 calibration examples.*needs 8"):
        settle(net, PARAMS, [(X[:4],)], recipe=recipe())
    with pytest.raises(RecipeError, match="not int4 g4"):
        settle(net, PARAMS, [(X,)], recipe=recipe(weights=Int(4, group=4)))
    with pytest.raises(RecipeError, match="AdaLog searches for formats"):
        qjax.quantize(net, PARAMS, X, recipe=recipe())
    with pytest.raises(RecipeError, match="static scale of its operand"):
        qjax.quantize(net, PARAMS, X, recipe=recipe(settle=None), batches=[(X,)])

    with pytest.raises(RecipeError, match="give batches=, and no state"):
        qjax.quantize(net, PARAMS, X, recipe=recipe(), state={})
    with pytest.raises(RecipeError, match="fake_quant does not train the operands of"):
        rule = qjax.Rule("**", op="attention", operands={"q": Int(8, per="token")})
        qjax.fake_quant(net, qjax.Recipe([rule])).init(PARAMS, X)
    planned = qjax.plan(net, PARAMS, X, recipe=recipe())
    assert planned.stored_bytes < planned.float_bytes

    def scanned(params, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, params["w"])[0]

    with pytest.raises(RecipeError, match="inside a loop over layers"):
        stacked = qjax.Recipe([qjax.Rule("**", weights=Int(4, symmetric=False))], settle=QUICK)
        settle(scanned, {"w": np.ones((2, 4, 4), F)}, [(np.ones((8, 4), F),)], recipe=stacked)
    with pytest.raises(RecipeError, match="did you mean 'mask'"):
        AdaLog(zero="maks")
    with pytest.raises(RecipeError, match="settle is a search"):
        qjax.Recipe([qjax.Rule("**", weights=Int(4))], settle=3)


def test_operands_with_scales_of_their_own():
    q, k = (RNG.standard_normal((2, 3, 4)).astype(F) for _ in range(2))
    operands = {"lhs": qjax.fixed(Int(4, per="tensor"), 0.3), "rhs": Int(8, per="token", scale="qmax")}
    bias_free = qjax.Recipe([qjax.Rule("**", op="matmul", operands=operands)])
    fn = lambda params, q, k: jnp.einsum("btd,bsd->bts", q * params["one"], k)  # noqa: E731
    model = qjax.quantize(fn, {"one": jnp.ones(())}, q, k, recipe=bias_free)
    near_q = np.clip(np.rint(q / F(0.3)), -8, 7) * F(0.3)
    scale = np.abs(k).max(-1, keepdims=True) / 127
    near_k = np.clip(np.rint(k / scale), -128, 127) * scale
    np.testing.assert_allclose(
        model(model.params, q, k), np.einsum("btd,bsd->bts", near_q, near_k), rtol=1e-4, atol=1e-4
    )
    assert qjax.Recipe.from_toml(bias_free.to_toml()) == bias_free
    for wrong, words in (
        (dict(scale=()), "positive numbers"),
        (dict(scale=0.1, zero=3), "1 zero points where 0"),
    ):
        with pytest.raises(RecipeError, match=words):
            qjax.Rule("**", op="matmul", operands={"lhs": qjax.fixed(Int(4, per="tensor"), **wrong)})


@pytest.mark.every(4)
@pytest.mark.parametrize(
    ("settings", "gelu", "probabilities"),
    [
        (dict(softmax="twin", gelu="twin", reparameterize=False), "twin4", "twin4"),
        (dict(softmax="log_sqrt2", gelu="uniform", uniform="percentile"), "uint4", "log4 q1/2"),
        (dict(softmax="uniform", gelu="uniform", uniform="minmax"), "uint4", "uint4"),
        (dict(softmax="log2", gelu="log2"), "log4 q37", "log4 q37"),
    ],
    ids=["twin", "repq", "minmax", "log2"],
)
def test_the_methods_it_is_compared_with(settings, gelu, probabilities):
    how = dataclasses.replace(QUICK, **settings)
    model = qjax.quantize(net, PARAMS, recipe=recipe(settle=how), batches=[(X,)])
    rules = {rule.match: rule for rule in model.recipe.rules}
    assert rules["down/kernel"].inputs.fmt.name.startswith(gelu)
    (attention,) = (rule for rule in rules.values() if rule.op == "attention")
    assert attention.operands["p"].fmt.name.startswith(probabilities)
    want, got = net(PARAMS, X), model(model.params, X)
    assert float(jnp.sum((got - want) ** 2) / jnp.sum(want**2)) < 0.3
    assert qjax.Recipe.from_toml(model.recipe.to_toml()) == model.recipe
    if settings.get("uniform") == "minmax":
        w = PARAMS["out"]["kernel"].T
        low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
        scale = np.asarray(model.params["out"]["kernel"].aux["scale"]).ravel()
        np.testing.assert_allclose(scale, (high - low) / 15, rtol=1e-6)


def narrow(params, x):
    """A perceptron for rows of 5 x 8 and no others."""
    return perceptron(params, x.reshape(-1, TOKENS, D))


def test_batches_that_cannot_be_searched_are_named():
    params, rules = {name: PARAMS[name] for name in ("up", "down")}, recipe().rules[1:]

    def run_with(batches, fn=narrow, **settings):
        settle(fn, params, batches, recipe=qjax.Recipe(rules, settle=dataclasses.replace(QUICK, **settings)))

    other = np.ones((3, 3, D), F)
    with pytest.raises(DataError, match=r"batch 1, of shapes \[3, 3, 8\], .* batch 0, of shapes \[8, 5, 8\]"):
        run_with([(X,), (other,)])
    bad = X.copy()
    bad[3, 1, 2] = np.nan
    with pytest.raises(DataError, match="batch 1: NaN or infinity among the inputs of up/kernel"):
        run_with([(X,), (bad,)])
    with pytest.raises(DataError, match="batches of one shape"):  # before anything is searched
        run_with([(X,), (np.ones((2, TOKENS, D), F),)], reconstruct=1)
    with pytest.raises(DataError, match=r"step of reconstruction has 3 examples.*\[3, 5, 8\].*examples first"):
        run_with([(X,)], lambda p, x: narrow(p, x.reshape(64, -1)), reconstruct=1, batch=3)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (dict(candidates=16), "candidates=16; a multiple of 32"),
        (dict(candidates=0), "a multiple of 32"),
        (dict(best="x"), "best='x'"),
        (dict(seed="a"), "seed='a'; a whole number"),
        (dict(block_inputs="quantised"), "block_inputs='quantised'.*did you mean 'quantized'"),
    ],
)
def test_settings_are_checked(setting, words):
    with pytest.raises(RecipeError, match=words):
        AdaLog(**setting)


def test_probabilities_that_others_read_stay_as_they_are():
    def both(params, x):
        q, k, v = (dense(params[n], x).reshape(*x.shape[:2], HEADS, -1) for n in ("query", "key", "value"))
        p = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2.0, axis=-1)
        return dense(params["out"], jnp.einsum("bhqk,bkhd->bqhd", p, v).reshape(x.shape)), p

    params = {n: PARAMS[n] for n in ("query", "key", "value", "out")}
    model = qjax.quantize(both, params, recipe=recipe(), batches=[(X,)])
    assert any("also read by something else" in note for note in model.report.notes)
    (attention,) = (rule for rule in model.recipe.rules if rule.op == "attention")
    rounded = [attention.operands[n] for n in "qk"]
    _, p = model(model.params, X)
    inputs = [model.params[n]["kernel"] for n in ("query", "key")]
    q, k = (
        (
            uniform(X, {n: w.aux[f"input.{n}"] for n in ("scale", "zero")}) @ np.asarray(w.dequantize())
            + params[name]["bias"]
        )
        for w, name in zip(inputs, ("query", "key"), strict=True)
    )
    q, k = (a.reshape(*X.shape[:2], HEADS, -1) for a in (q, k))
    shape = (1, 1, HEADS, 1)
    q, k = (
        uniform(a, {"scale": np.reshape(o.scale, shape), "zero": np.reshape(o.zero, shape)})
        for a, o in zip((q, k), rounded, strict=True)
    )
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / 2
    want = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(p, want / want.sum(-1, keepdims=True), atol=1e-5)
    assert "uint4 per head" in str(model.report) and "uint4 per tensor, k" not in str(model.report)
    only = qjax.quantize(lambda *a: both(*a)[0], params, recipe=recipe(), batches=[(X,)])
    assert not any("also read by" in note for note in only.report.notes)


def test_a_shift_without_a_bias_to_fold_it_into_is_said():
    def late(params, x):  # the residual is added before the bias
        return x + jax.nn.gelu(dense(params["up"], x)) @ params["down"]["kernel"] + params["down"]["bias"]

    params, rules = {name: PARAMS[name] for name in ("up", "down")}, recipe().rules[1:]
    model = qjax.quantize(late, params, recipe=qjax.Recipe(rules, settle=QUICK), batches=[(X,)])
    assert any("down/kernel: the shift of its inputs is not folded" in note for note in model.report.notes)
    (rule,) = (rule for rule in model.recipe.rules if rule.match == "down/kernel")
    assert not rule.inputs.fmt.folded
    want, got = late(params, X), model(model.params, X)
    assert float(jnp.sum((got - want) ** 2) / jnp.sum((want - X) ** 2)) < 0.1


def test_a_method_that_needs_a_search_says_so():
    with pytest.raises(RecipeError, match="softmax='log3'.*did you mean 'log2'"):
        AdaLog(softmax="log3")
    with pytest.raises(RecipeError, match="gelu='adalog' is searched"):
        settle(net, PARAMS, [(X,)], recipe=recipe(settle=dataclasses.replace(QUICK, uniform="minmax")))
