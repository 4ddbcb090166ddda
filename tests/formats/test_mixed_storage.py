"""The bytes of strips of 2 and 4 bits: words of rows, words of scales, sums of bits, and what views may do."""

from __future__ import annotations

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import qjax
from qjax import ops
from qjax.errors import LayoutError
from qjax.formats import MixedBits, concatenate, quantize_array, stack
from qjax.formats.mixed_layout import MixedPacking, StripRule, order_of, places_of
from qjax.formats.mixed_outliers import largest, ranked
from qjax.rewriting.sharding import quantized_specs

RULES = [StripRule(16, 0.25, True), StripRule(8, 0.25, True), StripRule(16, 0.3, False), StripRule(16, 1.0, False)]


def bits(codes: np.ndarray, width: int) -> str:
    """Codes side by side, the lowest bit of the first code first."""
    return "".join(f"{int(c):0{width}b}"[::-1] for c in codes)


def words_of_row(codes: np.ndarray, rule: StripRule) -> bytes:
    """A row's bytes, written out word by word as strings of bits."""
    strips, g = rule.of(len(codes)), rule.strip
    two, four = codes[: strips.narrow_columns], codes[strips.narrow_columns :]
    two = np.pad(two, (0, strips.narrow * g - len(two))).reshape(-1, g)
    four = np.pad(four, (0, strips.wide * g - len(four))).reshape(-1, g)
    main, tail = [], []
    if rule.aligned:
        for q in range(strips.wide):
            main += [bits(two[3 * q + j], 2) for j in range(3)] + [bits(four[q, : g // 2], 4)]
    else:
        main += [bits(s, 2) for s in two] + [bits(s[: g // 2], 4) for s in four]
    tail += [bits(s[g // 2 :], 4) for s in four]
    return bytes(int(b[::-1], 2) for word in main + tail for b in [word[i : i + 8] for i in range(0, len(word), 8)])


@pytest.mark.parametrize(("rule", "k"), [*zip(RULES, (130, 40, 200, 15), strict=True), (RULES[0], 0), (RULES[2], 128)])
def test_rows_are_main_words_then_tails(rule, k):
    """The split into main words and tails gives back the codes, and the bytes are those of the layout."""
    packing, strips = MixedPacking(rule), rule.of(k)
    codes = np.random.default_rng(k).integers(0, 16, (4, k)).astype(np.uint8)
    codes[:, : strips.narrow_columns] %= 4
    packed, back = jax.jit(lambda c: (packing.pack(c), packing.unpack(packing.pack(c), k)))(codes)
    packed = np.asarray(packed)
    assert packed.shape == (4, packing.row_bytes(k))
    for row, stored in zip(codes, packed, strict=True):
        assert words_of_row(row, rule) == stored.tobytes()
    np.testing.assert_array_equal(back, codes)


@given(rule=st.sampled_from(RULES), k=st.integers(0, 3000))
def test_lengths_follow_from_bytes(rule, k):
    packing = MixedPacking(rule)
    width = packing.row_bytes(k)
    full = packing.capacity(width)
    assert full >= k and packing.row_bytes(full) == width
    assert packing.capacity(packing.row_bytes(full + 1)) > full


def test_strips_sorted_by_width_and_back():
    is_wide = jnp.asarray([False, True, False, False, True, True])
    np.testing.assert_array_equal(order_of(is_wide), [0, 2, 3, 1, 4, 5])
    np.testing.assert_array_equal(places_of(is_wide), [0, 3, 1, 2, 4, 5])


def test_an_aligned_row_is_128_bit_loads_and_a_fifth_behind_them():
    fmt = MixedBits()
    assert fmt.packing.row_bytes(4096) == 4096 // 64 * 16 + 4096 // 64 * 4
    assert fmt.packing.row_bytes(4096) * 8 / 4096 == 2.5


def test_a_row_word_uses_all_sixteen_bits():
    n = 4096
    w = np.random.default_rng(0).standard_normal((n, 48)).astype(np.float32)
    w *= np.exp(np.random.default_rng(1).standard_normal((n, 3)).repeat(16, axis=1))
    fmt = MixedBits(0, select="global")
    q = quantize_array(w, fmt, in_axes=1)
    words, tiles = np.asarray(q.aux["words"]), np.asarray(q.aux["tile_zero"])
    assert np.bitwise_or.reduce(words.ravel()) == 0xFFFF and np.bitwise_and.reduce(words.ravel()) == 0
    assert not (tiles & 0xF088).any()  # the padding of the tile's word
    # Read back field by field: z (2, 2, 2 bits), then the scale codes (3, 3, 4 bits).
    steps = np.asarray(q.aux["tile_scale"], np.float32).reshape(256, 3).repeat(16, axis=0)
    zeros = [words[:, 0] >> at & 3 for at in (0, 2, 4)]
    codes = [words[:, 0] >> 6 & 7, words[:, 0] >> 9 & 7, words[:, 0] >> 12 & 15]
    offsets = [tiles.reshape(256) >> at & 15 for at in (0, 4, 8)]
    scale, zero, _ = (np.asarray(a) for a in jax.jit(lambda aux: fmt.grid(aux, n, 48))(q.aux))
    unit = 2.0 ** int(np.asarray(q.aux["exponent"])[0, 0])
    for j in range(3):
        np.testing.assert_array_equal(zero[:, 16 * j], zeros[j])
        want = (codes[j] + offsets[j].repeat(16)) * steps[:, j] * unit
        np.testing.assert_array_equal(scale[:, 16 * j], want.astype(np.float32))


TABLE = [  # p, g4, rho, bits of an outlier, average
    (0, 128, 0, 0, "2.417"),
    (0.25, 128, 0, 0, "2.852"),
    (0.25, 128, 0.005, 16, "2.912"),
    (0.25, 128, 0.005, 32, "2.972"),
    (0.25, 16, 0, 0, "3.125"),
    (0.125, 16, 0, 0, "2.771"),
    (0.125, 16, 0.005, 32, "2.911"),
    (0.1, 16, 0.005, 32, "2.844"),
]


@pytest.mark.parametrize(("p", "g4", "rho", "v", "average"), TABLE)
def test_the_published_averages(p, g4, rho, v, average):
    select = "aligned" if (p, g4) == (0.25, 128) else "global"
    fmt = MixedBits(p, select=select, wide_group=g4, outliers=rho)
    assert f"{fmt.average_bits(v):.3f}" == average
    # Exactly, in fractions, and from what is stored for a matrix in which nothing is left over.
    share, sparse = Fraction(p).limit_denominator(100), Fraction(rho).limit_denominator(1000)
    two = 2 + Fraction(16, 3) / 16 + (16 + Fraction(16, 3)) / 256
    exact = (1 - share) * two + share * (4 + Fraction(20, g4)) + (1 - share) * sparse * v
    assert float(exact) == pytest.approx(fmt.average_bits(v), abs=1e-12)
    n, k = 1600, 15360  # 960 strips: quads, threes and tenths of them are whole
    stored = fmt.storage_bits((n, k))
    counted = sum(b for name, b in stored.items() if name not in ("strips", "exponent", "outlier_row"))
    if v == 16:
        counted -= stored["outlier_column"]
    assert Fraction(counted, n * k) == exact
    assert stored["outlier_row"] == (32 * (n + 1) if rho else 0)
    assert stored["strips"] == (0 if p == 0 else 960 // 4 * 2 if select == "aligned" else 960)


@pytest.mark.parametrize("fmt", [MixedBits(), MixedBits(outliers=0.005), MixedBits(0.125, select="global")])
@pytest.mark.parametrize("shape", [(64, 512), (2, 20, 200), (1, 7)])
def test_bits_are_those_of_the_array(fmt, shape):
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    stacks = tuple(range(len(shape) - 2))
    q = jax.eval_shape(functools.partial(quantize_array, fmt=fmt, in_axes=len(shape) - 1, stack_axes=stacks), w)
    parts = fmt.storage_bits(shape)
    assert sum(parts.values()) == 8 * q.nbytes
    for name, a in q.aux.items():
        assert parts[name] == 8 * a.size * a.dtype.itemsize, name
    assert all(name in q.aux or not b for name, b in parts.items() if name not in ("main", "tail"))


_largest = jax.jit(lambda score, first, allowed, count: largest(ranked(score, first, allowed), count))


@given(count=st.integers(0, 12), seed=st.integers(0, 5))
def test_the_largest_are_found_without_sorting(count, seed):
    rng = np.random.default_rng(seed)
    score = rng.choice([0.0, 0.5, 1.0, 3.0], 24).astype(np.float32)
    first, allowed = rng.random(24) < 0.3, np.arange(24) % 2 == 0  # 12 are allowed
    where = np.asarray(_largest(score, first, allowed, count))
    order = sorted(range(24), key=lambda i: (not allowed[i], not first[i], -score[i], i))
    assert sorted(order[:count]) == np.flatnonzero(where).tolist()


W = np.random.default_rng(0).standard_normal((3, 80, 4, 6)).astype(np.float32)  # [stack, K, out, out]
Q = quantize_array(W, MixedBits(outliers=0.01), in_axes=1, stack_axes=0)
FLOATS = np.asarray(Q.dequantize())


def test_views_that_keep_matrices_whole():
    views = {
        "index": (lambda q: q[1], FLOATS[1]),
        "slice": (lambda q: q[1:], FLOATS[1:]),
        "take": (lambda q: q.take(0, jnp.asarray([2, 0])), FLOATS[[2, 0]]),
        "transpose": (lambda q: q.transpose(0, 3, 1, 2), FLOATS.transpose(0, 3, 1, 2)),
        "merge": (lambda q: q.reshape(3, 80, 24), FLOATS.reshape(3, 80, 24)),
        "split": (lambda q: q.reshape(3, 80, 2, 2, 6), FLOATS.reshape(3, 80, 2, 2, 6)),
        "stack": (lambda q: stack([q[2], q[0]]), FLOATS[[2, 0]]),
        "concatenate": (lambda q: concatenate([q, q], 0), np.concatenate([FLOATS, FLOATS])),
        "expand": (lambda q: q[0].expand_dims(0), FLOATS[:1]),
    }
    same = jax.jit(lambda q: {name: jnp.all(f(q).dequantize() == want) for name, (f, want) in views.items()})(Q)
    assert all(same.values()), same


@pytest.mark.parametrize(
    "view",
    [
        lambda q: q.slice_axis(2, 0, 2),
        lambda q: q.slice_axis(1, 0, 64),
        lambda q: q.take(3, jnp.asarray([1])),
        lambda q: q[0].transpose(1, 0, 2)[1],
        lambda q: q.transpose(0, 1, 3, 2).reshape(3, 80, 24),
        lambda q: concatenate([q, q], 2),
    ],
    ids=["out slice", "in slice", "take", "index", "merge in another order", "concatenate"],
)
def test_views_that_would_cut_a_matrix_are_refused(view):
    with pytest.raises(LayoutError, match="whole matrices.*dequantize first"):
        view(Q)


def test_shards_of_a_matrix_are_refused():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    for spec in (P(None, None, "x"), P(None, "x")):
        with pytest.raises(LayoutError, match="stack axes only"):
            quantized_specs(Q, spec, mesh)
    assert quantized_specs(Q, P("x"), mesh).codes == P("x", None, None, None)


@pytest.mark.slow
def test_products_scan_grad_and_vmap():
    w = np.random.default_rng(1).standard_normal((3, 20, 100)).astype(np.float32)  # [stack, N, K]
    q = quantize_array(w, MixedBits(outliers=0.01), in_axes=2, stack_axes=0)
    near, x = (
        np.asarray(q.dequantize()),
        jnp.asarray(np.random.default_rng(2).standard_normal((3, 5, 100)), jnp.float32),
    )
    want = np.einsum("src,snc->srn", x, near)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
    close(jax.jit(ops.q_dot)(x, q), want)
    close(jax.jit(jax.vmap(ops.q_dot))(x, q), want)
    close(jax.jit(jax.vmap(ops.q_dot, in_axes=(0, None)))(x, q[1]), np.einsum("src,nc->srn", x, near[1]))
    close(jax.jit(lambda x, q: jax.lax.scan(lambda c, part: (c, ops.q_dot(*part)), 0, (x, q))[1])(x, q), want)
    pulled = jax.jit(jax.grad(lambda x: jnp.sum(ops.q_dot(x, q) ** 2)))(x)
    np.testing.assert_allclose(pulled, np.einsum("srn,snc->src", 2 * want, near), rtol=1e-4, atol=1e-2)


@pytest.mark.slow
def test_convolutions_experts_tables_and_loops_over_rows():
    """Through the program: what cannot follow the codes is dequantized, and the numbers are those of the weight."""
    rng = np.random.default_rng(0)
    params = {
        "conv": rng.standard_normal((3, 3, 8, 20)).astype(np.float32),
        "experts": rng.standard_normal((3, 20, 24)).astype(np.float32),
        "heads": rng.standard_normal((24, 4, 10)).astype(np.float32),
        "table": rng.standard_normal((12, 40)).astype(np.float32),
    }

    def fn(p, x, ids):
        y = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = jax.nn.relu(y.reshape(-1, 20))
        y = jax.lax.ragged_dot(y, p["experts"], jnp.asarray([10, 0, 22], jnp.int32))
        halves = jnp.einsum("rk,khd->rhd", y, p["heads"][:, 2:])  # rows of a matrix, cut
        return halves.sum(0), p["table"][ids]

    x = jnp.asarray(rng.standard_normal((2, 4, 4, 8)), jnp.float32)
    fmt = MixedBits()
    recipe = qjax.Recipe([qjax.Rule("**", weights=fmt), qjax.Rule("**", op="embedding", weights=fmt)])
    model = qjax.quantize(fn, params, x, jnp.arange(3), recipe=recipe)
    assert all(isinstance(q, qjax.QArray) for q in model.params.values())
    near = {name: jnp.asarray(q.dequantize()) for name, q in model.params.items()}
    for got, want in zip(jax.jit(model)(model.params, x, jnp.arange(3)), fn(near, x, jnp.arange(3)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_saved_loaded_and_exported(tmp_path):
    w = {"w": np.random.default_rng(0).standard_normal((100, 20)).astype(np.float32)}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    x = jnp.ones((2, 100))
    model = qjax.quantize(fn, w, x, recipe=qjax.Recipe([qjax.Rule("**", weights=MixedBits(outliers=0.01))]))
    qjax.save(tmp_path / "model", model)
    again = qjax.load(tmp_path / "model", fn)
    np.testing.assert_array_equal(again(again.params, x), model(model.params, x))
    exported = jax.export.export(jax.jit(model))(model.params, x)
    back = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(back.call(model.params, x), model(model.params, x))
