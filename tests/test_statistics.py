"""Statistics of activations: monoids, and what they say of products of every kind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import qjax
from qjax.errors import FormatError, RecipeError
from qjax.rewriting.taps import Collector, Tap
from qjax.statistics import ChannelRange, MeanMagnitude, Samples, SecondMoment

ALL = (ChannelRange(), SecondMoment(), Samples(count=5, seed=3), MeanMagnitude())


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 99))
def test_cutting_and_order_do_not_matter(cuts, k, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((sum(cuts), k)).astype(np.float32)
    parts = np.split(x, np.cumsum(cuts)[:-1])
    for part in ALL:
        whole = part.see(x)
        state = part.init(x.shape)
        for i in rng.permutation(len(parts)):
            state = part.merge(part.see(parts[i]), state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), whole, state)
        rows = jax.tree.map(lambda *a: jnp.stack(a), *(part.see(p) for p in parts))
        merged = part.merged(rows)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), whole, merged)


def test_what_they_are():
    x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    channels, moment, sample, mean = (part.see(x) for part in ALL)
    np.testing.assert_allclose(mean["magnitude"] / mean["magnitude_rows"], np.abs(x).mean(0), rtol=1e-5)
    factor = np.array([[1.0, 2.0, 0.5, 3.0]], np.float32)
    want = MeanMagnitude().see(x * factor)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), MeanMagnitude().scaled(mean, factor), want)
    np.testing.assert_array_equal(channels["channel_above"], x.max(0))
    np.testing.assert_array_equal(channels["channel_below"], -x.min(0))
    np.testing.assert_allclose(moment["second_moment"], x.T @ x, rtol=1e-5, atol=1e-4)
    assert moment["rows"] == 50
    assert {tuple(r) for r in np.asarray(sample["sample"]).tolist()} <= {tuple(r) for r in x.tolist()}
    assert len(set(np.asarray(sample["sample_key"]).tolist())) == 5
    assert SecondMoment().nbytes((8, 16)) == 4 * (16 * 16 + 1)
    other = Samples(count=5, seed=4).see(x)
    assert not np.array_equal(sample["sample"], other["sample"])
    with pytest.raises(FormatError, match="1 or more"):
        Samples(count=0)


@pytest.mark.slow
def test_every_row_is_as_likely_as_any_other():
    """Rows of a stream of 1,000, of which 100 are kept: over seeds each is kept about a tenth of the time."""
    x = np.arange(1000, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    counts = np.zeros(1000)
    see = jax.jit(lambda x, seed: Samples(count=100, seed=seed).see(x)["sample"][:, 0], static_argnums=1)
    for seed in range(60):
        counts[np.asarray(see(x, seed)).astype(int)] += 1
    assert counts.sum() == 6000 and counts[:500].sum() == pytest.approx(3000, abs=200)
    assert counts.max() < 20 and (counts == 0).sum() < 20


def observed(fn, p, x, taps):
    program = qjax.trace(fn, p, x)
    return Collector(program, taps).observe(jax.tree.leaves((p, x)))[1]


def test_experts_have_moments_of_their_own():
    rng = np.random.default_rng(0)
    p = {"experts": jnp.asarray(rng.standard_normal((3, 8, 5)), jnp.float32)}
    x = jnp.asarray(rng.standard_normal((3, 7, 8)), jnp.float32)
    tap = Tap(statistics=(SecondMoment(), ChannelRange(), MeanMagnitude()))
    state = observed(lambda p, x: jnp.einsum("erk,ekn->ern", x, p["experts"]), p, x, {"experts": tap})["experts"]
    want = np.einsum("erk,erl->ekl", x, x)
    np.testing.assert_allclose(state["second_moment"], want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state["channel_above"], np.asarray(x).reshape(-1, 8).max(0))

    sizes = jnp.array([4, 0, 6])
    flat = jnp.asarray(rng.standard_normal((10, 8)), jnp.float32)
    state = observed(lambda p, x: lax.ragged_dot(x, p["experts"], sizes), p, flat, {"experts": tap})["experts"]
    np.testing.assert_array_equal(state["magnitude_rows"], [4, 0, 6])
    for e, group in enumerate(np.split(np.asarray(flat), [4, 4])):
        np.testing.assert_allclose(state["magnitude"][e], np.abs(group).sum(0), rtol=1e-5)
        np.testing.assert_allclose(state["second_moment"][e], group.T @ group, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(state["rows"], [4, 0, 6])


@pytest.mark.every(2)
@pytest.mark.parametrize("strides,padding,dilation", [((1, 1), "SAME", (1, 1)), ((2, 1), "VALID", (1, 2))])
@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")])
def test_rows_of_a_convolution_are_its_patches(strides, padding, dilation, layout):
    """y = patches @ kernel, in the order in which the kernel is stored."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 2, 4, 6) if layout[1] == "HWIO" else (6, 4, 3, 2)).astype(np.float32)
    image = rng.standard_normal((2, 7, 6, 4) if layout[0] == "NHWC" else (2, 4, 7, 6)).astype(np.float32)

    def fn(p, x):
        return lax.conv_general_dilated(x, p["conv"], strides, padding, rhs_dilation=dilation, dimension_numbers=layout)

    p = {"conv": jnp.asarray(kernel)}
    state = observed(fn, p, jnp.asarray(image), {"conv": Tap(statistics=(SecondMoment(),))})["conv"]
    # the moment of the patches gives the norm of every output channel
    y = np.asarray(fn(p, image))
    y = y.reshape(-1, 6) if layout[0] == "NHWC" else np.moveaxis(y, 1, -1).reshape(-1, 6)
    rows = kernel.reshape(-1, 6) if layout[1] == "HWIO" else kernel.transpose(2, 3, 1, 0).reshape(-1, 6)
    norms = np.einsum("kn,kl,ln->n", rows, np.asarray(state["second_moment"]), rows)
    np.testing.assert_allclose(norms, (y**2).sum(0), rtol=1e-3)
    model = qjax.quantize(
        fn,
        p,
        recipe=qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4), rounding=qjax.GPTQ())]),
        batches=[jnp.asarray(image)],
    )
    nearest = qjax.quantize(fn, p, image, recipe=qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4))]))
    error = lambda m: float(jnp.linalg.norm(m(m.params, image) - fn(p, image)))  # noqa: E731
    assert error(model) < error(nearest)


def test_grouped_convolutions_are_refused():
    p = {"conv": jnp.ones((3, 3, 1, 4))}
    fn = lambda p, x: lax.conv_general_dilated(  # noqa: E731
        x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
    )
    with pytest.raises(RecipeError, match="a convolution with groups"):
        observed(fn, p, jnp.ones((1, 4, 4, 4)), {"conv": Tap(statistics=(SecondMoment(),))})


@pytest.mark.slow
def test_devices_are_merged():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    name = mesh.axis_names[0]
    spec = jax.sharding.PartitionSpec(name)
    for part in ALL:
        found = jax.shard_map(
            lambda x, part=part: part.over_devices(part.see(x), mesh.axis_names),
            mesh=mesh,
            in_specs=spec,
            out_specs=jax.sharding.PartitionSpec(),
        )(x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), part.see(x), found)
