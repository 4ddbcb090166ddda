"""The compiled CPU kernels of formats other than `Int` against arithmetic in NumPy, by every instruction set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from qjax import ops
from qjax.errors import LayoutError, LoweringError
from qjax.formats import DualGrained, Int, MixedBits, Progressive, TritPlanes, quantize_array
from qjax.kernels.cpu import library, mixed, operands, trits, two_level
from qjax.testing import check_lowering

TOKEN = Int(8, per="token")
TWO_LEVELS = [DualGrained(32), Progressive(64), Progressive(32, zeros="post"), DualGrained(16), Progressive(64, bits=2)]


def packed(codes, bits):
    """[n, k] codes as rows of a little-endian bit stream."""
    stream = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def steps_of(x, sx):
    """int8 codes of activations, NaN 0."""
    with np.errstate(all="ignore"):
        steps = x * (np.float32(1) / sx)
        return np.where(np.isnan(steps), 0, np.clip(np.round(steps), -128, 127)).astype(np.int64)


def drawn_rows(rng, m, k, values):
    """Activations and their scales."""
    x = rng.standard_normal((m, k)).astype(np.float32)
    if values == "nan":
        x[-1, 0] = np.nan
    return x, np.full((m, 1), 3 / 127.5, np.float32)


@given(
    bits=st.sampled_from([2, 4, 4, 4]),
    after=st.booleans(),
    group=st.sampled_from([32, 64, 128, 128, 40, 256, 1000]),
    m=st.sampled_from([1, 2, 11, 37]),
    n=st.sampled_from([1, 33, 70]),
    k=st.sampled_from([1, 63, 256, 500]),
    values=st.sampled_from(["normal", "nan", "largest numbers"]),
    seed=st.integers(0, 1000),
)
def test_two_levels_equal_integer_arithmetic_to_the_bit(native, bits, after, group, m, n, k, values, seed):
    rng = np.random.default_rng(seed)
    groups = -(-k // min(group, k))
    x, sx = drawn_rows(rng, m, k, values)
    step = rng.integers(1, 128 if not after else 9, (n, groups))
    zero = rng.integers(0, 2**bits if not after else 120, (n, groups))
    if values == "largest numbers":
        x[:], step[:], zero[:] = -100, 8, 0
    wide = lambda a: np.repeat(a, min(group, k), axis=1)[:, :k]  # noqa: E731
    codes = rng.integers(0, 2**bits, (n, k)) if values != "largest numbers" else np.full((n, k), 2**bits - 1)
    if not after:  # codes that stay within int8, as fitted weights have
        codes = np.clip(
            codes, wide(np.maximum(zero - 127 // step, 0)), wide(np.minimum(zero + 127 // step, 2**bits - 1))
        )
    numbers = codes * wide(step) - wide(zero) if after else (codes - wide(zero)) * wide(step)
    scale = rng.uniform(0.01, 1, (n, 1)).astype(np.float32)
    expected = (steps_of(x, sx) @ numbers.T).astype(np.float32) * sx * scale[:, 0]
    fmt = Progressive(group, bits=bits, zeros="post" if after else "pre")
    operands = (scale, step.astype(np.int8), zero.astype(np.uint8))
    for name in native.instruction_sets():
        args = (x[None], sx[None], packed(codes, bits)[None], *(a[None] for a in operands))
        y = two_level.product(*map(jnp.asarray, args), weight=fmt, act=TOKEN, instructions=name)
        np.testing.assert_array_equal(np.asarray(y)[0], expected, err_msg=f"{name} {fmt.name}")


def test_two_levels_give_what_xla_gives(native):
    """The same bits as int_dot, under jit, vmap and scan, for weights as their formats fit them."""
    rng = np.random.default_rng(0)
    for fmt in TWO_LEVELS[2:3]:
        w = quantize_array(jnp.asarray(rng.standard_normal((3, 40, 96)), jnp.float32), fmt, in_axes=2, stack_axes=0)
        x = jnp.asarray(rng.standard_normal((3, 5, 96)), jnp.float32)

        def run(x, w, name):
            return ops.q_dot(x, w, act=(TOKEN, ops.activation_aux(x, TOKEN)), implementation=name)

        def every(x, w, run=run):
            one = run(x[0], w[0], "native")
            _, scanned = jax.lax.scan(lambda c, xw: (c, run(*xw, "native")), 0, (x, w))
            mapped = jax.vmap(lambda x, w: run(x, w, "native"))(x, w)
            stacked = ops.q_dot(x, w, act=TOKEN, implementation="native")  # scales are fitted by the kernel
            other = jnp.stack([run(x[i], w[i], "int_dot") for i in range(3)])
            return one, scanned, mapped, stacked, other

        one, scanned, mapped, stacked, other = jax.jit(every)(x, w)
        np.testing.assert_array_equal(one, other[0])
        for y in (scanned, mapped, stacked):
            np.testing.assert_array_equal(y, other)


def by_hand_mixed(w, x):
    """The product in float64 and the sum of magnitudes of its terms, rows by outputs."""
    real = np.asarray(w.decode_canonical(), np.float64)
    return x @ real.T, np.abs(x) @ np.abs(real).T


STRIPS = [
    MixedBits(outliers=0.01),
    MixedBits(0.3, select="global", strip=32, wide_group=64, tile=24),
    MixedBits(0, select="global", strip=8, tile=5),
    MixedBits(1, select="global", strip=64, wide_group=64),
]


@pytest.mark.parametrize("fmt", [STRIPS[0], *(pytest.param(f, marks=pytest.mark.slow) for f in STRIPS[1:])])
def test_strips_of_two_widths_are_multiplied_as_they_decode(native, fmt):
    """Sparse numbers among them; a row has the same bits with others and alone."""
    rng = np.random.default_rng(0)
    w = quantize_array(jnp.asarray(rng.standard_normal((90, 300)), jnp.float32), fmt, in_axes=1).canonical()
    x = rng.standard_normal((7, 300)).astype(np.float32)
    expected, terms = by_hand_mixed(w, x)
    problem = type("Matrix", (), {"stack": (), "matrices": 1})  # what operands look at
    empty = {name: jnp.zeros((1, 0), dtype) for name, dtype in mixed.ARRAYS.items()}
    arrays = empty | w.aux
    own = [operands.merged(problem, a, *a.shape) for a in (w.codes, *(arrays[name] for name in mixed.ARRAYS))]
    for name in set(native.instruction_sets()) & {"portable", "avx512_vnni"}:
        run = lambda x, name=name: np.asarray(mixed.product(x[None], *own, weight=fmt, instructions=name))[0]  # noqa: E731
        y = run(x)
        assert np.max(np.abs(y - expected) / terms) < 1e-6, name
        np.testing.assert_array_equal(run(x[6:]), y[6:], err_msg=name)


PLANES = [
    TritPlanes(group=32),
    TritPlanes(group=64, store="two_bit"),
    TritPlanes(group=100, store="nibble", tied=True),
    TritPlanes(planes=1, group=48),
    TritPlanes(planes=1, store="two_bit"),
    TritPlanes(planes=3, group=32),
]


@given(
    m=st.sampled_from([1, 3, 7]),
    n=st.sampled_from([1, 33]),
    k=st.sampled_from([63, 130, 384]),
    values=st.sampled_from(["normal", "nan"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=3)
def test_trits_equal_integer_arithmetic_to_the_bit(native, m, n, k, values, seed):
    rng = np.random.default_rng(seed)
    x, sx = drawn_rows(rng, m, k, values)
    q = steps_of(x, sx)
    for fmt in PLANES:
        planes, groups = fmt.planes, -(-k // min(fmt.group, k))
        t = rng.integers(-1, 2, (planes, n, k))
        codes = np.tensordot(3 ** np.arange(planes)[::-1], t + 1, axes=1)
        scale = rng.uniform(0.01, 1, (planes, n, groups)).astype(np.float32)
        expected = np.zeros((m, n), np.float32)
        for g in range(groups):
            part = slice(g * fmt.group, (g + 1) * fmt.group)
            for p in range(planes):
                expected += (q[:, part] @ t[p][:, part].T).astype(np.float32) * scale[p, :, g]
        stored = fmt.packing.pack(codes.astype(np.uint8))
        for name in set(native.instruction_sets()) & {"portable", "avx512_vnni"}:
            own = (stored[None], jnp.asarray(scale.reshape(1, planes * n, groups)))
            y = trits.product(x[None], sx[None], *own, weight=fmt, act=TOKEN, instructions=name)
            np.testing.assert_array_equal(np.asarray(y)[0], expected * sx, err_msg=f"{name} {fmt.name}")


def test_experts_give_what_their_matrices_give(native):
    """Bit for bit; groups without rows among them, sizes cut off, rows behind the last group 0."""
    rng = np.random.default_rng(0)
    w = quantize_array(
        jnp.asarray(rng.standard_normal((4, 40, 96)), jnp.float32), Int(4, group=32), in_axes=2, stack_axes=0
    )
    x = jnp.asarray(rng.standard_normal((13, 96)), jnp.float32)
    aux = ops.activation_aux(x, TOKEN)

    def run(x, w, sizes):
        return ops.q_ragged_dot(x, w, sizes, act=(TOKEN, ops.activation_aux(x, TOKEN)), implementation="native")

    alone = jax.jit(
        lambda x, w: jnp.stack([ops.q_dot(x, w[g], act=(TOKEN, aux), implementation="native") for g in range(4)])
    )
    each = np.asarray(alone(x, w))
    compiled = jax.jit(run)
    for sizes in ([3, 0, 8, 1], [0, 0, 0, 0], [1, 1, 20, 5], [-2, 4, 1, 2]):
        y = np.asarray(compiled(x, w, jnp.asarray(sizes)))
        group = np.repeat(np.arange(4), np.maximum(sizes, 0))[:13]
        np.testing.assert_array_equal(y[: len(group)], each[group, np.arange(len(group))])
        assert not np.any(y[len(group) :])


def test_experts_are_a_lowering(native):
    check_lowering("ragged_dot", "native", weights=[Int(4, symmetric=False)], acts=[TOKEN], examples=1)


@pytest.mark.parametrize(
    "fmt", [TWO_LEVELS[0], pytest.param(STRIPS[0], marks=pytest.mark.slow), PLANES[0], Int(4, group=32)]
)
def test_one_layer_of_a_stack_of_stacks(native, fmt):
    """By a number, clamped, as the layer alone gives; so do experts, whose stack is that of groups."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((3, 2, 40, 96)), jnp.float32)
    w = quantize_array(w, fmt, in_axes=3, stack_axes=(0, 1)).canonical()
    x = jnp.asarray(rng.standard_normal((2, 5, 96)), jnp.float32)
    dot = jax.jit(lambda x, w, i=None: ops.q_dot(x, w, act=TOKEN, implementation="native", layer=i))
    act, sizes = (TOKEN, ops.activation_aux(x[0], TOKEN)), jnp.asarray([3, 2])
    ragged = jax.jit(lambda x, w, i=None: ops.q_ragged_dot(x, w, sizes, act=act, implementation="native", layer=i))
    for number, taken in ((-1, 0), (1, 1), (3, 2)):
        np.testing.assert_array_equal(dot(x, w, jnp.asarray(number)), dot(x, w[taken]))
        if isinstance(fmt, Int):
            y = ragged(x[0], w, jnp.asarray(number))
            np.testing.assert_array_equal(y, ragged(x[0], w[taken]))
            other = ops.q_ragged_dot(x[0], w, sizes, act=act, implementation="experts", layer=number)
            np.testing.assert_allclose(y, other, rtol=1e-4, atol=1e-3)
    if isinstance(fmt, Int):
        with pytest.raises(LayoutError, match="layer has to be a scalar"):
            ops.q_ragged_dot(x[0], w[0], sizes, layer=1)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [TWO_LEVELS[0], STRIPS[0], PLANES[0]])
def test_inside_shard_map_each_device_runs_it_on_what_it_holds(native, fmt):
    rng = np.random.default_rng(0)
    w = quantize_array(jnp.asarray(rng.standard_normal((48, 256)), jnp.float32), fmt, in_axes=1).canonical()
    x = jnp.asarray(rng.standard_normal((8, 256)), jnp.float32)
    run = lambda x, w: ops.q_dot(x, w, act=TOKEN, implementation="native")  # noqa: E731
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    inside = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")))
    np.testing.assert_array_equal(np.asarray(inside(x, w)), np.asarray(jax.jit(run)(x, w)))


@pytest.mark.slow
def test_experts_are_a_lowering_at_length(native):
    weights = [Int(8), Int(4, group=32), Int(2, per="tensor", symmetric=False)]
    acts = [TOKEN, Int(8, per="tensor"), Int(6, per="token", scale="qmax")]
    check_lowering("ragged_dot", "native", weights=weights, acts=acts, examples=40)


def test_they_are_lowerings(native):
    check_lowering("dot", "native", weights=[TWO_LEVELS[0], STRIPS[0]], acts=[TOKEN, None], examples=1)


@pytest.mark.slow
def test_they_are_lowerings_at_length(native):
    acts = [TOKEN, Int(8, per="tensor"), Int(6, per="token", scale="qmax"), None]
    check_lowering("dot", "native", weights=[*TWO_LEVELS, *STRIPS, *PLANES], acts=acts, examples=60)


def test_when_formats_have_a_kernel(native, monkeypatch):
    """The default for large weights, and reasons where there is none."""
    if operands.FAST not in native.instruction_sets():
        pytest.skip(f"this processor has no {operands.FAST}")
    choose = lambda fmt, act, **how: ops.choose("dot", fmt, act, (4, 1024, 1024), "cpu", **how).name  # noqa: E731
    assert choose(DualGrained(), TOKEN) == "native"
    assert ops.choose("dot", DualGrained(), TOKEN, (4, 8, 1024), "cpu").name == "int_dot"
    strips = lambda *shape: ops.choose("dot", MixedBits(), None, shape, "cpu").name  # noqa: E731
    assert [strips(rows, 64, 64) for rows in (1, 64, 65)] == ["native", "native", "dequantize"]
    assert strips(1, 63, 64) == "dequantize"
    experts = lambda n: ops.choose("ragged_dot", Int(4), TOKEN, (3, 500, n, 64), "cpu").name  # noqa: E731
    assert [experts(n) for n in (63, 64)] == ["experts", "native"]
    refused = [
        (DualGrained(), None, "the activations are not quantized"),
        (DualGrained(), Int(8, per="token", symmetric=False), "uint8 per token activations have no kernel"),
        (Progressive(bits=5), TOKEN, "those of 2 and 4 bits have"),
        (DualGrained(33), TOKEN, "groups of 33 codes of 4 bits do not end with a byte"),
    ]
    for fmt, act, says in refused:
        with pytest.raises(LoweringError, match=says):
            choose(fmt, act, implementation="native")
    with pytest.raises(LoweringError, match="may overflow int32"):
        ops.choose("dot", DualGrained(), TOKEN, (4, 8, 2**18), "cpu", implementation="native")


def test_wrong_operands_of_formats_are_errors(native):
    x, sx = jnp.zeros((1, 3, 64)), jnp.ones((1, 3, 1))
    w, s = jnp.zeros((1, 8, 32), jnp.uint8), jnp.ones((1, 8, 1))
    step, zero = jnp.ones((1, 8, 2), jnp.int8), jnp.zeros((1, 8, 2), jnp.uint8)
    settings = {"bits": 4, "group": 32, "after": 0, "low": -128, "high": 127, "isa": -1}

    no = jnp.zeros((0,), jnp.int32)

    def call(*own, out=((1, 3, 8), jnp.float32), at=no, **changed):
        attributes = {k: np.int64(v) for k, v in {**settings, **changed}.items()} | {"unit": np.float32(0)}
        return jax.ffi.ffi_call(library.TWO_LEVEL, jax.ShapeDtypeStruct(*out))(*own, at, **attributes)

    assert call(x, sx, w, s, step, zero).shape == (1, 3, 8)
    wrong = [
        (lambda: call(x.astype(jnp.float16), sx, w, s, step, zero), "float32 or int8"),
        (lambda: call(x, sx[:, :2], w, s, step, zero), "scales of activations"),
        (lambda: call(x, sx, w[:, :, :31], s, step, zero), "rows of 31 bytes"),
        (lambda: call(x, sx, w, jnp.ones((1, 8, 2)), step, zero), "scales have to be"),
        (lambda: call(x, sx, w, s, zero, zero), "steps have to be"),
        (lambda: call(x, sx, w, s, step, zero[:, :, :0]), "zero points have to be"),
        (lambda: call(x, sx, w, s, step, zero, bits=8), "of 8 bits"),
        (lambda: call(x, sx, w, s, step, zero, group=31), "begin with a byte"),
        (lambda: call(x, sx, w, s, step, zero, isa=17), "no unknown"),
        (lambda: call(x, sx, w, s, step, zero, at=jnp.zeros((2,), jnp.int32)), "layer has to be int32"),
        (lambda: call(x, sx, w[:0], s, step, zero, at=jnp.zeros((1,), jnp.int32)), "weight has to be bytes"),
        (lambda: call(x, sx, jnp.concatenate([w, w]), s, step, zero, at=jnp.ones((1,), jnp.int32)), "steps have to"),
        (lambda: call(x, sx, w, s, step, zero, out=((1, 3, 9), jnp.float32)), "result"),
    ]
    for run, says in wrong:
        with pytest.raises(Exception, match=says):
            run().block_until_ready()
