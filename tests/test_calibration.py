"""Observers: monoids whose states merge, and ranges that are right."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from qjax import calibration
from qjax.calibration import MSE, AbsMax, MinMax, Observer, Percentile
from qjax.errors import FormatError
from qjax.formats import NVFP4, Float8, Int

RNG = np.random.default_rng(0)
SYMMETRIC, ASYMMETRIC = Int(4, per="tensor"), Int(4, per="tensor", symmetric=False)
OBSERVERS = [AbsMax(), MinMax(), Percentile(99), MSE()]


@functools.partial(jax.jit, static_argnums=(0, 1))
def observed(observer, fmt, x):
    return observer.update(observer.init(fmt, x.shape), x, fmt)


@functools.partial(jax.jit, static_argnums=(0, 1))
def ranged(observer, fmt, state):
    return observer.range(state, fmt)


@functools.partial(jax.jit, static_argnums=(0, 1))
def fitted(observer, fmt, x):
    aux = observer.fit(x, fmt)
    return aux, fmt.decode(fmt.encode(x, aux), aux)


@pytest.mark.every(4)
@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("fmt", [SYMMETRIC, ASYMMETRIC], ids=lambda f: f.name)
def test_states_form_a_monoid(observer, fmt):
    a, b, c = (observed(observer, fmt, x) for x in RNG.standard_t(3, (3, 24, 20)).astype(np.float32))
    empty = observer.init(fmt, (24, 20))
    for left, right in (
        (observer.merge(a, b), observer.merge(b, a)),
        (observer.merge(a, observer.merge(b, c)), observer.merge(observer.merge(a, b), c)),
        (observer.merge(empty, a), a),
    ):
        for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_array_equal(x, y)
    low, high = ranged(observer, fmt, empty)
    assert low == 0 and high == 0
    assert (fmt.from_range(low, high)["scale"] == 1).all()


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: type(o).__name__)
def test_batches_add_up_to_the_whole(observer):
    x = RNG.standard_t(3, (4, 24, 20)).astype(np.float32)
    state = functools.reduce(
        lambda s, batch: observer.merge(s, observed(observer, ASYMMETRIC, batch)),
        x[1:],
        observed(observer, ASYMMETRIC, x[0]),
    )
    whole = observed(observer, ASYMMETRIC, x.reshape(96, 20))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("observer", [MinMax(), Percentile(99)], ids=lambda o: type(o).__name__)
def test_devices_merge_by_their_collective(observer):
    x = RNG.standard_t(3, (8 * 6, 20)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    collective = {"max": jax.lax.pmax, "sum": jax.lax.psum}[observer.collective]

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec())
    def shards(x):
        return jax.tree.map(
            lambda a: collective(a, "d"), observer.update(observer.init(ASYMMETRIC, x.shape), x, ASYMMETRIC)
        )

    for a, b in zip(
        jax.tree.leaves(jax.jit(shards)(x)), jax.tree.leaves(observed(observer, ASYMMETRIC, x)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_ranges_of_absmax_and_minmax():
    x = np.array([[-1.0, 2.0, 0.5], [np.nan, -7.0, np.inf]], np.float32)
    assert [v.item() for v in ranged(AbsMax(), ASYMMETRIC, observed(AbsMax(), ASYMMETRIC, x))] == [-7, 7]
    assert [v.item() for v in ranged(MinMax(), ASYMMETRIC, observed(MinMax(), ASYMMETRIC, x))] == [-7, 2]
    for fmt in (Int(4), Int(4, group=2), NVFP4()):
        plain, watched = fmt.fit(x), MinMax().fit(x, fmt)
        for name in plain:
            np.testing.assert_array_equal(plain[name], watched[name])


@pytest.mark.parametrize("percentile", [90, 99.9, 100])
def test_percentiles_equal_numpy_at_once_and_nearly_in_a_stream(percentile):
    x = RNG.standard_t(3, (50, 40)).astype(np.float32)
    x[0, :3] = np.nan, np.inf, 0
    real = x[np.isfinite(x)]
    size = np.percentile(np.abs(real), percentile)
    aux, _ = fitted(Percentile(percentile), SYMMETRIC, x)
    np.testing.assert_allclose(aux["scale"][0, 0], size / 7.5, rtol=1e-5)
    low, high = ranged(Percentile(percentile), SYMMETRIC, observed(Percentile(percentile), SYMMETRIC, x))
    np.testing.assert_allclose([-low[0, 0], high[0, 0]], size, rtol=1 / 16)
    both = np.percentile(real, [100 - percentile, percentile])
    aux, _ = fitted(Percentile(percentile), ASYMMETRIC, x)
    np.testing.assert_allclose(aux["scale"][0, 0], (both[1] - both[0]) / 15, rtol=1e-5)
    low, high = ranged(Percentile(percentile), ASYMMETRIC, observed(Percentile(percentile), ASYMMETRIC, x))
    np.testing.assert_allclose([low[0, 0], high[0, 0]], both, rtol=1 / 16)


def test_percentiles_of_uneven_groups_leave_the_padding_out():
    x = np.abs(RNG.standard_normal((3, 20))).astype(np.float32) + 1
    aux, _ = fitted(Percentile(60), Int(4, group=16), x)
    np.testing.assert_allclose(aux["scale"][:, 1] * 7.5, np.percentile(x[:, 16:], 60, axis=1), rtol=1e-5)


def mse_oracle(x, group, norm):
    """Best of the shrink factors 1, .99, .. .81 per group, symmetric 4 bits, in NumPy."""
    out = np.zeros(x.shape, np.float32)
    for k in range(0, x.shape[1], group):
        part = x[:, k : k + group].astype(np.float64)
        best = np.full((len(x), 1), np.inf)
        for i in range(20):
            scale = np.abs(part).max(1, keepdims=True) * (1 - i / 100) / 7.5
            decoded = np.clip(np.round(part / scale), -8, 7) * scale
            error = (np.abs(part - decoded) ** norm).sum(1, keepdims=True)
            out[:, k : k + group] = np.where(error < best, decoded, out[:, k : k + group])
            best = np.minimum(best, error)
    return out


@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_mse_finds_the_best_factor_of_each_group(norm):
    x = RNG.standard_t(3, (8, 80)).astype(np.float32)
    _, decoded = fitted(MSE(norm=norm), Int(4, group=32), x)
    error = (np.abs(decoded - x) ** norm).sum()
    oracle = (np.abs(mse_oracle(x, 32, norm) - x) ** norm).sum()
    np.testing.assert_allclose(error, oracle, rtol=1e-4)


@pytest.mark.every(3)
@pytest.mark.parametrize("fmt", [Int(4, group=16, symmetric=False), Int(3), Float8()], ids=lambda f: f.name)
def test_mse_in_pieces_is_mse_of_the_whole(fmt, monkeypatch):
    """Formats study, MSE clipping: the factor lies within the grid, and the error is never that of a worse one."""
    x = RNG.standard_t(3, (13, 48)).astype(np.float32)
    blocks = fmt.ungrouped()
    rows = x.reshape(-1, fmt.group or 48)
    low, high = blocks.range_of(rows)
    weight = np.abs(RNG.standard_normal(rows.shape)).astype(np.float32)
    for importance in (None, weight):
        whole = np.asarray(MSE()._of_rows((rows, importance, low, high), blocks))
        with monkeypatch.context() as one_device:
            one_device.setattr(jax, "device_count", lambda: 1)
            one_device.setattr(calibration, "_CHUNK", 5 * 48)
            parts = np.asarray(MSE()._of_rows((rows, importance, low, high), blocks))
        np.testing.assert_array_equal(whole, parts)
        assert whole.min() >= 0.8 and whole.max() == 1 and whole.min() < 1

    def error(factor):
        aux = blocks.from_range(low * factor, high * factor)
        return (np.abs(blocks.decode(blocks.encode(rows, aux), aux) - rows) ** 2.4 * weight).sum(1)

    assert (error(whole) <= error(1.0) * (1 + 1e-5)).all()
    best = MSE()._of_rows((rows, None, low, high), blocks)
    want = blocks.from_range(low * best, high * best)["scale"]
    np.testing.assert_allclose(MSE().fit(x, fmt)["scale"].reshape(-1, 1), want)


def test_patience_keeps_what_a_block_had():
    x = RNG.standard_t(3, (40, 32)).astype(np.float32)
    error = lambda o: (np.abs(np.asarray(fitted(o, Int(4), x)[1]) - x) ** 2.4).sum(1)  # noqa: E731
    whole, some, none = error(MSE()), error(MSE(patience=3)), error(MSE(maxshrink=1e-3))
    assert (whole <= some * (1 + 1e-6)).all() and (some <= none * (1 + 1e-6)).all() and (some < none).any()
    np.testing.assert_allclose(error(MSE(patience=20)), whole)
    with pytest.raises(FormatError, match="patience"):
        MSE(patience=0)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "fmt", [Int(2), Int(4, group=16, symmetric=False), Float8(per="tensor"), NVFP4()], ids=lambda f: f.name
)
def test_mse_is_never_worse_than_the_full_range(fmt):
    x = (RNG.standard_t(2, (2, 6, 48)) * 10.0 ** RNG.integers(-20, 20, (2, 6, 1))).astype(np.float32)
    plain = fmt.decode(fmt.encode(x, fmt.fit(x)), fmt.fit(x))
    _, shrunk = fitted(MSE(norm=2.0), fmt, x)

    def errors(decoded):
        # In float64, relative to the range of the block, as they are judged.
        off = ((np.asarray(decoded, np.float64) - x) / np.abs(x).max((-2, -1), keepdims=True)) ** 2
        return off.sum((-2, -1) if fmt.per == "tensor" else -1)

    assert (errors(shrunk) <= errors(plain) * (1 + 1e-4) + 1e-300).all()


def test_mse_listens_to_importance():
    x = np.array([[8.0] + [0.53] * 400], np.float32)
    fmt = Int(4)
    plain = MSE(maxshrink=0.6).fit(x, fmt)
    heavy = MSE(maxshrink=0.6).fit(x, fmt, weight=np.array([1e4] + [1.0] * 400, np.float32))
    assert plain["scale"] < heavy["scale"]


def test_a_stream_gives_mse_nearly_the_same_range():
    x = RNG.standard_t(3, (64, 64)).astype(np.float32)
    state = observed(MSE(norm=2.0), SYMMETRIC, x)
    streamed = SYMMETRIC.from_range(*ranged(MSE(norm=2.0), SYMMETRIC, state))
    aux, decoded = fitted(MSE(norm=2.0), SYMMETRIC, x)
    again = SYMMETRIC.decode(SYMMETRIC.encode(x, streamed), streamed)
    assert np.square(again - x).sum() <= 1.1 * np.square(decoded - x).sum()


def test_histograms_are_not_kept_for_groups():
    with pytest.raises(FormatError, match="AbsMax or MinMax"):
        Percentile().init(Int(4, group=8), (4, 16))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Percentile(50),
        lambda: Percentile(101),
        lambda: MSE(maxshrink=0),
        lambda: MSE(maxshrink=1),
        lambda: MSE(grid=0),
        lambda: MSE(norm=0),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(FormatError):
        make()


def test_observers_are_values():
    assert MSE() == MSE() and hash(Percentile(99)) == hash(Percentile(99)) and isinstance(AbsMax(), Observer)
    assert Percentile(99) != Percentile(99.9) and len(MSE().shrinks) == 20 and MSE().shrinks[0] == 1
    assert jnp.asarray(MSE(maxshrink=0.5, grid=10).shrinks).min() > 0.5
