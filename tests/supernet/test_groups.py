"""Supernets with steps for groups along the contracted axis, against the equations in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gauge_models import case
from jax import lax

import qjax
from qjax.errors import RecipeError
from qjax.evaluate import logit_divergence
from qjax.supernet import At, Schedule, Space, init_steps, sample_choice, train

LENGTHS = (8, 4)
SPACE = Space((2, 3, 8), (0,), groups=LENGTHS, at=(At("conv", groups=(4,)),), ends=None)


def network(p, x):
    """A convolution, two scanned layers, a product with its weight on the left, and a head read transposed."""
    y = lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = jax.nn.relu(y).mean((1, 2))
    y, _ = lax.scan(lambda y, w: (y + jnp.tanh(y @ w), None), y, p["layers"])
    y = jnp.tanh(jnp.einsum("ihd,bi->bhd", p["heads"], y)).reshape(y.shape)
    return y @ p["head"].T


@pytest.fixture(scope="module")
def net():
    k = jax.random.split(jax.random.key(0), 5)
    p = {
        "conv": jax.random.normal(k[0], (3, 3, 4, 8)) * 0.4,
        "layers": jax.random.normal(k[1], (2, 8, 8)) * 0.4 + 0.1,
        "heads": jax.random.normal(k[2], (8, 2, 4)),
        "head": jax.random.normal(k[3], (5, 8)),
    }
    x = jax.random.normal(k[4], (6, 5, 5, 4))
    t = qjax.elastic(network, SPACE)
    return t, p, x, t.init(p, x), t.domain(p, x)


def matrices(p):
    """[N, K] of each site in float64, and how it is put back."""
    conv, layers, heads, head = (np.asarray(p[n], np.float64) for n in ("conv", "layers", "heads", "head"))
    return {
        "conv": (conv.reshape(36, 8).T, lambda m: m.T.reshape(3, 3, 4, 8)),
        "layers/0": (layers[0].T, lambda m: m.T),
        "layers/1": (layers[1].T, lambda m: m.T),
        "heads": (heads.reshape(8, 8).T, lambda m: m.T.reshape(8, 2, 4)),
        "head": (head, lambda m: m),
    }


def rounded(p, state, choice, names):
    """The parameters of a subnet, from equations 1 to 5 of LSQ+ for each group of each row."""
    out = {}
    for name, row in zip(names, np.asarray(choice), strict=True):
        w, back = matrices(p)[name]
        bits, length = int(row[0]), LENGTHS[row[5]]
        table = {k: np.asarray(a, np.float64)[:, bits - 2] for k, a in state[name].items()}
        mark = "" if row[3] else ".asymmetric"
        step = np.abs(table[f"weight.scale.group{length}{mark}"].reshape(len(w), -1, 1)) + 1e-6
        beta = 0.0 if row[3] else table[f"weight.offset.group{length}"].reshape(len(w), -1, 1)
        groups = w.reshape(len(w), -1, length)
        code = np.rint(np.clip((groups - beta) / step, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
        out[name] = back((code * step + beta).reshape(w.shape)).astype(np.float32)
    layers = np.stack([out.pop("layers/0"), out.pop("layers/1")])
    return {**out, "layers": layers}


def test_groups_are_the_equations_in_one_program_and_become_a_model(net):
    t, p, x, state, domain = net
    assert domain.shape == (5, 6) and t.space.per_channel == (True,)
    assert state["conv"]["weight.scale.group4"].shape == (8 * 9, 7)  # 8 does not divide 36
    assert "weight.scale.group8" not in state["conv"] and state["head"]["weight.offset.group8"].shape == (5, 7)
    # init tries 80 ranges for each group, as for a tensor, and not the 5 of the authors' channels
    rows = jnp.asarray(matrices(p)["heads"][0], jnp.float32).reshape(-1, 4)
    for n in (0, 13):
        want = init_steps(rows[n], symmetric=True)[0][0]
        np.testing.assert_allclose(state["heads"]["weight.scale.group4"][n], want, rtol=1e-5)

    traced = []

    def one(choice):
        traced.append(1)
        return t.apply(p, state, choice, x)[0]

    run = jax.jit(one)
    choices = [sample_choice(jax.random.key(n), domain) for n in range(2)]
    choices.append(jnp.asarray(domain.uniform(3, group=8)))
    outs = [run(choice) for choice in choices]
    assert len(traced) == 1 and {int(g) for c in choices for g in c[:, 5]} == {0, 1}
    for choice, out in zip(choices, outs, strict=True):
        want = network(jax.tree.map(jnp.asarray, rounded(p, state, choice, domain.sites)), x)
        np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
    together = jax.jit(jax.vmap(one))(jnp.stack(choices))
    np.testing.assert_allclose(together, jnp.stack(outs), rtol=1e-3, atol=1e-3)

    picked = [(3, 1, 1), (2, 0, 0), (8, 1, 1), (3, 0, 1), (2, 1, 0)]  # bits, symmetric, position of the length
    choice = np.array([[bits, 0, 1, symmetric, 1, group] for bits, symmetric, group in picked])
    model = t.convert(p, state, choice, x)
    np.testing.assert_allclose(model(model.params, x), run(jnp.asarray(choice)), rtol=1e-4, atol=1e-4)
    assert model.params["head"].fmt == qjax.Int(2, group=8)
    assert model.params["heads"].fmt == qjax.formats.Affine(3, group=4)
    assert t.recipe(p, state, choice, x) == model.recipe


def test_derivatives_reach_the_groups_that_are_chosen():
    """Of 0.5 sum w^2 in the steps: the rule of LSQ+ in float64, with LSQ's gain of a group; nothing elsewhere."""
    w = np.random.default_rng(3).standard_normal((8, 8)) * 0.4 + 0.1
    t = qjax.elastic(lambda p, x: x @ p["w"], Space((3, 8), (0,), weight_symmetric=(False,), groups=(4, 8), ends=None))
    p, x = {"w": jnp.asarray(w, jnp.float32)}, np.eye(8, dtype=np.float32)
    state = t.init(p, x)
    choice = t.domain(p, x).uniform(3, group=4, form=(True, False, True))
    found = jax.jit(jax.grad(lambda s: 0.5 * jnp.sum(t.apply(p, s, choice, x)[0] ** 2)))(state)["w"]
    used = ("weight.scale.group4.asymmetric", "weight.offset.group4")
    for field, g in found.items():
        columns = np.flatnonzero(np.abs(np.asarray(g)).sum(0)).tolist()
        assert columns == ([1] if field in used else []), (field, columns)
    scale, beta = (np.asarray(state["w"][field], np.float64)[:, 1:2] for field in used)
    step = np.abs(scale) + 1e-6
    v = (w.T.reshape(16, 4) - beta) / step
    inside, near = (v >= -4) & (v <= 3), np.rint(np.clip(v, -4, 3))
    y, gain = near * step + beta, 1 / np.sqrt(3 * 4)
    by_step = (y * np.where(inside, near - v, np.clip(v, -4, 3))).sum(1) * gain
    np.testing.assert_allclose(found[used[0]][:, 1], by_step, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[used[1]][:, 1], np.where(inside, 0, y).sum(1) * gain, rtol=1e-4, atol=1e-5)


def test_a_length_that_does_not_divide_is_an_error_that_names_the_site(net):
    _, p, x, _, _ = net
    with pytest.raises(RecipeError, match=r"conv: groups of 8 do not divide the 36 numbers .*At\('conv', groups"):
        qjax.elastic(network, Space(act_bits=(0,), groups=(4, 8))).init(p, x)


@pytest.mark.slow
def test_a_scanned_language_model_is_taught_by_its_float_self_and_packed():
    model = case("scanned")
    fn, p, (tokens,) = model.fn, model.params, model.args
    t = qjax.elastic(fn, Space((2, 4, 8), (0,), weight_symmetric=(True,), groups=(8, 16), ends=None))
    state, domain = t.init(p, tokens), t.domain(p, tokens)

    def batches(step):
        words = np.random.default_rng(step).integers(0, 61, (8, 13)).astype(np.int32)
        return (words[:, :-1],), words[:, 1:]

    teacher = functools.partial(jax.jit(fn), p)
    schedule = Schedule(40, lam=1.0, wdr=0, learning_rate=2e-3, steps_rate=5e-4)
    done = train(t, p, state, batches, schedule, teacher=teacher)
    run = jax.jit(lambda p, s, c: t.apply(p, s, c, tokens)[0])
    lowest = domain.uniform(2, group=16)
    before, after = (
        logit_divergence(teacher(tokens), run(*of, lowest)).kl for of in ((p, state), (done.params, done.state))
    )
    assert after < 0.7 * before, (before, after)
    choice = np.asarray(sample_choice(jax.random.key(0), domain))
    model = t.convert(done.params, done.state, choice, tokens)
    np.testing.assert_allclose(model(model.params, tokens), run(done.params, done.state, choice), rtol=1e-4, atol=1e-4)
