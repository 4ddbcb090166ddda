"""AutoRound: the equations, and blocks in which it is trained."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.applying.storage import LeafPlan, Stored
from qjax.blockwise.schedule import blocks_of
from qjax.blockwise.tuning import canonical_slice, from_canonical, own_outputs, with_weights
from qjax.errors import DataError, FormatError, RecipeError
from qjax.passes.autoround import _draws, soft_rounded

D, LAYERS = 12, 2
FMT = qjax.Int(3, group=6, symmetric=False)


def rng(seed=0):
    return np.random.default_rng(seed)


def oracle(w: np.ndarray, offset, low, high, group: int, bits: int) -> np.ndarray:
    """Equations 3 to 6 in float64."""
    out = np.empty_like(w, np.float64)
    for n in range(w.shape[0]):
        for g in range(w.shape[1] // group):
            at = slice(g * group, (g + 1) * group)
            least, most = min(w[n, at].min(), 0) * low[n, g], max(w[n, at].max(), 0) * high[n, g]
            scale = (most - least) / (2**bits - 1)
            zero = np.clip(np.round(-least / scale), 0, 2**bits - 1)
            code = np.clip(np.round(w[n, at] / scale + offset[n, at]) + zero, 0, 2**bits - 1)
            out[n, at] = (code - zero) * scale
    return out


@pytest.mark.parametrize("seed", range(3))
def test_the_equations(seed):
    r = rng(seed)
    w = r.standard_normal((5, 18)).astype(np.float32)
    theta = {
        "offset": r.uniform(-0.5, 0.5, w.shape),
        "low": r.uniform(0.6, 1, (5, 3)),
        "high": r.uniform(0.6, 1, (5, 3)),
    }
    theta = {k: v.astype(np.float32) for k, v in theta.items()}
    want = oracle(w.astype(np.float64), group=6, bits=3, **theta)
    got = soft_rounded(jnp.asarray(w), FMT, theta)
    codes, aux = qjax.AutoRound().round(w, FMT, statistics=theta)
    near = np.abs(got - want) < 1e-5
    assert near.mean() > 0.98  # float32 may fall on the other side of the middle between two codes
    assert (np.abs(FMT.decode(codes, aux) - want) < 1e-5).mean() > 0.98


def test_derivatives_pass_straight_through():
    r = rng(3)
    w = jnp.asarray(r.standard_normal((2, 6)), jnp.float32)
    theta = {"offset": jnp.zeros((2, 6)), "low": jnp.full((2, 1), 0.8), "high": jnp.full((2, 1), 0.8)}
    slope = jax.grad(lambda t: soft_rounded(w, FMT, t).sum())(theta)
    aux = FMT.from_range(*(a * 0.8 for a in FMT.range_of(w)))
    steps = np.asarray(w / aux["scale"])
    code = np.round(steps) + np.asarray(aux["zero"], np.float32)
    inside = (code >= 0) & (code <= 7)
    want = np.where(inside, np.asarray(aux["scale"]), 0)
    np.testing.assert_allclose(slope["offset"], want, rtol=1e-5)  # d(scale * (u - zero)) / du inside, 0 where clipped
    # In the scale: code - zero - w / scale inside, code - zero where clipped; the scale is (high - low) / 7.
    clipped = np.clip(code, 0, 7) - np.asarray(aux["zero"], np.float32)
    in_scale = (clipped - np.where(inside, steps, 0)).sum(1, keepdims=True)
    low, high = FMT.range_of(w)
    np.testing.assert_allclose(slope["high"], in_scale * high / 7, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slope["low"], -in_scale * low / 7, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "in_axes", "stack_axes", "key_axes", "keys"),
    [
        ((3, 4, 6), (1,), (0,), (0,), [(0,), (2,)]),  # layers of a stack
        ((4, 3, 6), (0,), (1,), (1,), [(1,)]),  # another stack axis
        ((3, 2, 4, 6), (2,), (0, 1), (0,), [(1,)]),  # experts in layers
        ((3, 3, 4, 5), (0, 1, 2), (), (), [()]),  # a convolution
    ],
)
def test_slices_are_put_back_where_they_were(shape, in_axes, stack_axes, key_axes, keys):
    value = jnp.asarray(rng(1).standard_normal(shape), jnp.float32)
    slices = {key: Stored(FMT) for key in keys}
    plan = LeafPlan(0, "w", shape, np.dtype(np.float32), in_axes, stack_axes, key_axes, slices)
    for key in keys:
        index = tuple(
            slice(dict(zip(key_axes, key, strict=True))[a], dict(zip(key_axes, key, strict=True))[a] + 1)
            if a in key_axes
            else slice(None)
            for a in range(len(shape))
        )
        part = value[index]
        matrix = canonical_slice(plan, part)
        np.testing.assert_array_equal(from_canonical(matrix, plan, part.shape), part)
        got = with_weights(plan, value, None, {key: matrix * 2}, {key: part.shape})
        np.testing.assert_array_equal(got, value.at[index].set(part * 2))
        if key_axes[:1] == (0,):
            for i in range(shape[0]):
                got = with_weights(plan, value[i], i, {key: matrix * 2}, {key: part.shape})
                np.testing.assert_array_equal(got, value.at[index].set(part * 2)[i])
        if key_axes == (1,):
            got = with_weights(plan, value[2], 2, {key: matrix * 2}, {key: part.shape})
            np.testing.assert_array_equal(got, value.at[index].set(part * 2)[2])


def params() -> dict:
    make = lambda seed, *shape: jnp.asarray(rng(seed).standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)  # noqa: E731
    return {"layers": {"up": make(0, LAYERS, D, 2 * D), "down": make(1, LAYERS, 2 * D, D)}}


def layer(h, w):
    return h + jnp.tanh(h @ w["up"]) @ w["down"]


def scanned(p, x):
    return lax.scan(lambda h, w: (layer(h, w), None), x, p["layers"])[0]


def unrolled(p, x):
    for w in p["layers"]:
        x = layer(x, w)
    return x


def listed(p):
    return {"layers": [jax.tree.map(lambda a, i=i: a[i], p["layers"]) for i in range(LAYERS)]}


MIX = np.random.default_rng(9).standard_normal((D, D))
BATCHES = [(jnp.asarray(rng(s).standard_normal((64, D)) @ MIX, jnp.float32),) for s in (2, 3, 4)]
TEST = jnp.asarray(rng(7).standard_normal((200, D)) @ MIX, jnp.float32)


def recipe(rounding, fmt=FMT):
    return qjax.Recipe([qjax.Rule("**", weights=fmt, rounding=rounding)])


def error(model, fn, p) -> float:
    want = fn(p, TEST)
    return float(jnp.mean((model(model.params, TEST) - want) ** 2) / jnp.mean(want**2))


@pytest.fixture(scope="module")
def trained():
    return qjax.quantize(scanned, params(), recipe=recipe(qjax.AutoRound(iters=60)), batches=BATCHES)


def test_it_beats_rounding_to_nearest_on_other_data(trained):
    nearest = qjax.quantize(scanned, params(), *BATCHES[0], recipe=recipe(None))
    assert error(trained, scanned, params()) < 0.8 * error(nearest, scanned, params())


def test_layers_in_a_list_and_in_a_scan_are_the_same(trained):
    model = qjax.quantize(unrolled, listed(params()), recipe=recipe(qjax.AutoRound(iters=60)), batches=BATCHES)
    ratio = error(model, unrolled, listed(params())) / error(trained, scanned, params())
    assert 0.8 < ratio < 1.25  # signs of derivatives near 0 depend on last bits


def test_a_killed_job_goes_on_to_the_same_result(tmp_path, trained):
    class Killed(Exception):
        pass

    def kill(done, total, name):
        raise Killed

    job = dict(recipe=recipe(qjax.AutoRound(iters=60)), batches=BATCHES, resume=tmp_path / "job")
    with pytest.raises(Killed):
        qjax.quantize(scanned, params(), progress=kill, **job)
    again = qjax.quantize(scanned, params(), **job)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(trained.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(FormatError, match="iters"):
        qjax.AutoRound(iters=0)
    with pytest.raises(FormatError, match="lr"):
        qjax.AutoRound(lr=2)
    with pytest.raises(RecipeError, match="trains the rounding of integers"):
        qjax.quantize(scanned, params(), recipe=recipe(qjax.AutoRound(iters=1), qjax.NF4(group=6)), batches=BATCHES)
    with pytest.raises(DataError, match="one shape"):
        qjax.quantize(
            scanned, params(), recipe=recipe(qjax.AutoRound(iters=1)), batches=[*BATCHES, (BATCHES[0][0][:5],)]
        )
    with pytest.raises(FormatError, match="offset"):
        qjax.AutoRound().round(np.ones((2, 6)), FMT)


def test_what_follows_from_another_output_is_no_target():
    """The sum of squares of the next layer's norm is large, and runs in this layer's block beside the residual."""

    def normed(p, x):
        for w in p["layers"]:
            x = x + layer(x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)), w)
        return x

    program = qjax.trace(normed, listed(params()), TEST)
    first = next(block for block in blocks_of(program).blocks if block.name == "layers/0")
    assert len(first.gives) == 2
    own = own_outputs(first, {use.value for use in first.reads})
    given = [next(item for item in first.items if value in item.results) for value in first.gives]
    assert [given[i].eqn.outvars[0].aval.shape for i in own] == [(200, D)]
    assert own_outputs(first, set()) == (0, 1)


def test_batches_are_drawn_without_repeats():
    for count, size in [(8, 1), (8, 3), (2, 5)]:
        draws = _draws(count, size, 9, seed=1)
        assert len(draws) == 9 and all(len(set(d)) == len(d) == min(size, count) for d in draws)
        turn = count // min(size, count)
        for at in range(0, 9 - turn + 1, turn):
            seen = [i for d in draws[at : at + turn] for i in d]
            assert len(set(seen)) == len(seen)
    with pytest.raises(FormatError, match="per_step"):
        qjax.AutoRound(per_step=0)


def test_several_batches_a_step():
    model = qjax.quantize(scanned, params(), recipe=recipe(qjax.AutoRound(iters=30, per_step=2)), batches=BATCHES)
    nearest = qjax.quantize(scanned, params(), *BATCHES[0], recipe=recipe(None))
    assert error(model, scanned, params()) < 0.9 * error(nearest, scanned, params())
