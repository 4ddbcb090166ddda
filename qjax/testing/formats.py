"""`check_format`: the properties that make a number format one.

    def test_ternary():
        check_format(Ternary(group=64))

The suite draws matrices and weights of a few shapes and axes (even and uneven groups, stacks, convolutions) and many
kinds (normal, heavy-tailed, constant, zero, single spikes, huge, tiny, subnormal, with NaN and infinity) and holds the
format to its word.
"""

from __future__ import annotations

import functools
import json
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.errors import QjaxError
from qjax.formats import Format, format_from_dict, quantize_array

KINDS = ("normal", "heavy", "constant", "zero", "spike", "huge", "tiny", "subnormal", "rows", "positive", "bad")
"""The kinds of matrix that `matrix` makes."""

_LEAST = 2.0**-126  # below it, numbers count as zero


def matrix(kind: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """Return a float32 array of one of `KINDS`; "bad" holds NaN and infinity."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    match kind:
        case "heavy":
            x = rng.standard_t(2, shape)
        case "constant":
            x = np.full(shape, rng.choice([1.0, -0.3, 7.5]))
        case "zero":
            x = np.zeros(shape)
        case "spike":
            x = np.zeros(shape)
            if x.size:
                x.flat[rng.integers(x.size)] = rng.choice([-3.0, 5.0])
        case "huge":
            x = x * 1e30
        case "tiny":
            x = x * 1e-30
        case "subnormal":
            x = x * 1e-39
        case "rows":
            x = x * 10.0 ** rng.integers(-6, 6, (*shape[:-1], 1))
        case "positive":
            x = np.abs(x) + 0.5
        case "bad":
            x = np.where(rng.random(shape) < 0.1, rng.choice([np.nan, np.inf, -np.inf], shape), x)
    return x.astype(np.float32)


def check_format(
    fmt: Format, *, examples: int = 25, nearest: bool = True, exact_zero: bool = True, homogeneous: bool = True
) -> None:
    """Check a format, raising AssertionError with the property that fails.

    Args:
        fmt: the format.
        examples: how many matrices to draw.
        nearest: whether `encode` picks the representable number nearest to each element.
        exact_zero: whether 0 (and NaN) decodes to 0.
        homogeneous: whether scaling a matrix by a power of two scales what it decodes to by the same.
    """
    try:
        import hypothesis
        from hypothesis import strategies
    except ImportError as error:
        raise QjaxError('qjax.testing draws its examples with hypothesis; pip install "qjax[test]"') from error

    _check_description(fmt)
    shapes = _shapes(fmt)
    for shape in (*shapes, (0, fmt.group or 8), (3, 0), (2, 0, fmt.group or 8)):
        _check_shapes(fmt, shape)
    run = functools.partial(_check_matrix, nearest=nearest, exact_zero=exact_zero, homogeneous=homogeneous)
    for kind in ("normal", "zero", "bad"):  # whatever the draw
        run(fmt, kind, shapes[0], 0)
    for weight in _weights(fmt):
        _check_storage(fmt, weight, "normal", 0)

    @hypothesis.settings(deadline=None, max_examples=examples, database=None)
    @hypothesis.given(
        kind=strategies.sampled_from(KINDS),
        shape=strategies.sampled_from(shapes),
        weight=strategies.sampled_from(_weights(fmt)),
        seed=strategies.integers(0, 2**32 - 1),
    )
    def drawn(kind: str, shape: tuple[int, ...], weight: _Weight, seed: int) -> None:
        run(fmt, kind, shape, seed)
        _check_storage(fmt, weight, kind, seed)

    drawn()


def _say(fmt: Format, what: str) -> str:
    return f"{fmt.name}: {what}"


def _shapes(fmt: Format) -> list[tuple[int, ...]]:
    """A plain matrix with an uneven last group, and a stack with whole ones."""
    group = fmt.group or 8
    return [(3, 2 * group + max(1, group // 3)), (2, 3, group)]


def _check_description(fmt: Format) -> None:
    assert hash(fmt) == hash(pickle.loads(pickle.dumps(fmt))), _say(fmt, "an equal format has another hash")
    assert pickle.loads(pickle.dumps(fmt)) == fmt, _say(fmt, "pickling changes it")
    again = format_from_dict(json.loads(json.dumps(fmt.to_dict())))
    assert again == fmt, _say(fmt, f"to_dict and back gives {again!r}")
    assert isinstance(fmt.name, str) and fmt.name, _say(fmt, "has no name")
    assert 1 <= fmt.code_bits <= 8, _say(fmt, f"code_bits is {fmt.code_bits}; 1 to 8 are possible")
    assert np.dtype(fmt.code_dtype).itemsize == 1, _say(fmt, f"codes of {fmt.code_dtype} do not fit in a byte")
    packed = fmt.code_bits < 8
    assert not packed or np.issubdtype(fmt.code_dtype, np.integer), _say(fmt, "packed codes have to be integers")


@functools.cache
def _compiled(fmt: Format) -> Callable[..., dict[str, Any]]:
    """Everything about one matrix in one compiled function, as many shapes as are asked for."""

    def everything(x: Array) -> dict[str, Any]:
        aux = fmt.fit(x)
        codes = fmt.encode(x, aux)
        decoded = fmt.decode(codes, aux)
        again = fmt.decode(fmt.encode(decoded, aux), aux)
        out = {"aux": aux, "codes": codes, "decoded": decoded, "again": again}
        if fmt.code_bits < 8:
            out["unpacked"] = fmt.packing.unpack(fmt.packing.pack(codes), x.shape[-1])
        each = jnp.asarray(_all_codes(fmt))
        # The nearest number that any code stands for, element by element.
        distances = jax.vmap(lambda code: jnp.abs(fmt.decode(jnp.full(x.shape, code), aux) - x))(each)
        out["least"] = jnp.min(jnp.where(jnp.isnan(distances), jnp.inf, distances), axis=0)
        return out

    return jax.jit(everything)


def _all_codes(fmt: Format) -> np.ndarray:
    """Return every code that stands for a finite number."""
    dtype, count = np.dtype(fmt.code_dtype), 2**fmt.code_bits
    if not np.issubdtype(dtype, np.integer):
        codes = np.arange(256, dtype=np.uint8).view(dtype)
        return codes[np.isfinite(codes.astype(np.float32))]
    return (np.arange(count) - (count // 2 if fmt.signed else 0)).astype(dtype)


def _check_matrix(
    fmt: Format, kind: str, shape: tuple[int, ...], seed: int, *, nearest: bool, exact_zero: bool, homogeneous: bool
) -> None:
    x = matrix(kind, shape, seed)
    here = f" (kind {kind!r}, shape {shape}, seed {seed})"
    out = jax.tree.map(np.asarray, _compiled(fmt)(x))
    codes, decoded = out["codes"], out["decoded"]
    assert np.isfinite(decoded).all(), _say(fmt, f"decodes to NaN or infinity{here}")
    finite = np.isfinite(x)
    if exact_zero:
        assert not decoded[(x == 0) | np.isnan(x)].any(), _say(fmt, f"0 or NaN decodes to something else{here}")
    if nearest:
        least, off = out["least"][finite], np.abs(decoded - x)[finite]
        slack = 1e-5 * np.abs(x[finite]) + _LEAST
        assert (off <= least + slack).all(), _say(
            fmt, f"encode misses the nearest number by {(off - least).max()}{here}"
        )
    np.testing.assert_array_equal(
        out["again"], decoded, _say(fmt, f"decoded numbers do not encode to themselves{here}")
    )
    if "unpacked" in out:
        np.testing.assert_array_equal(out["unpacked"], codes, _say(fmt, f"packing loses bits of a code{here}"))
    if kind == "bad":
        _check_bad(fmt, x, out, here)
    if homogeneous and kind in ("normal", "heavy", "constant", "positive"):
        scaled = np.asarray(_compiled(fmt)(x * np.float32(0.25))["decoded"])
        np.testing.assert_array_equal(scaled * 4, decoded, _say(fmt, f"a quarter of x decodes to something else{here}"))
    if len(shape) > 2:
        parts = np.asarray(jax.vmap(_compiled(fmt))(x)["decoded"])
        np.testing.assert_array_equal(parts, decoded, _say(fmt, f"slices of a stack are not independent{here}"))


def _check_bad(fmt: Format, x: np.ndarray, out: dict[str, Any], here: str) -> None:
    """NaN and infinity leave the range, and with it every other element, alone; infinity saturates."""
    clean = jax.tree.map(np.asarray, _compiled(fmt)(np.where(np.isfinite(x), x, 0).astype(np.float32)))
    for name, a in clean["aux"].items():
        np.testing.assert_array_equal(out["aux"][name], a, _say(fmt, f"NaN or infinity changes aux {name!r}{here}"))
    finite = np.isfinite(x)
    np.testing.assert_array_equal(
        out["decoded"][finite], clean["decoded"][finite], _say(fmt, f"NaN or infinity changes its neighbours{here}")
    )
    for sign in (1, -1):
        hits = x == sign * np.inf
        assert (sign * out["decoded"][hits] >= 0).all(), _say(fmt, f"infinity decodes to the other sign{here}")


def _check_shapes(fmt: Format, shape: tuple[int, ...]) -> None:
    """Shapes and dtypes are as promised, for empty matrices too, without running anything."""
    here = f" (shape {shape})"
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    aux = jax.eval_shape(fmt.fit, x)
    blocks = fmt.groups(shape[-1])
    for name, a in aux.items():
        rows = a.ndim == len(shape) and a.shape[:-2] == shape[:-2] and a.shape[-2] in (1, shape[-2])
        assert rows and (a.shape[-1] in (1, blocks) or name in fmt.row_aux), _say(
            fmt,
            f"aux {name!r} has shape {a.shape}; [*stack, 1 or N, 1 or {blocks}] is needed, or name it in row_aux{here}",
        )
    codes = jax.eval_shape(fmt.encode, x, aux)
    assert codes.shape == shape and codes.dtype == fmt.code_dtype, _say(
        fmt, f"encode gives {codes.dtype} {codes.shape}, not {fmt.code_dtype} {shape}{here}"
    )
    decoded = jax.eval_shape(fmt.decode, codes, aux)
    assert decoded.shape == shape and decoded.dtype == np.float32, _say(
        fmt, f"decode gives {decoded.dtype} {decoded.shape}, not float32 {shape}{here}"
    )


_Weight = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # shape, in axes, stack axes


def _weights(fmt: Format) -> list[_Weight]:
    """Shapes, in axes and stack axes of a convolution's weight and of one whose stack axis is in the middle."""
    group = fmt.group or 8
    return [((2, 1, group, 3), (0, 1, 2), ()), ((group + 3, 2, 3), (0,), (1,))]


def _check_storage(fmt: Format, weight: _Weight, kind: str, seed: int) -> None:
    """A weight is stored as promised, with any axes, and decodes to what the format says."""
    shape, in_axes, stack_axes = weight
    here = f" (kind {kind!r}, weight {shape}, in axes {in_axes}, stack axes {stack_axes}, seed {seed})"
    w = matrix(kind, shape, seed)
    q = quantize_array(w, fmt, in_axes=in_axes, stack_axes=stack_axes)
    assert q.shape == shape and q.dtype == np.float32, _say(fmt, f"it is stored as {q!r}{here}")
    rest = [a for a in range(len(shape)) if a not in in_axes + stack_axes]
    length = math.prod(shape[a] for a in in_axes)
    order = [*stack_axes, *rest, *in_axes]
    x = w.transpose(order).reshape(*(shape[a] for a in stack_axes), -1, length)
    out = _compiled(fmt)(x)
    back = np.asarray(q.dequantize()).transpose(order).reshape(x.shape)
    np.testing.assert_array_equal(back, out["decoded"], _say(fmt, f"storage changes the numbers{here}"))
    aux = sum(a.size * a.dtype.itemsize for a in out["aux"].values())
    stored = math.prod(x.shape[:-1]) * fmt.packing.row_bytes(length)
    assert q.nbytes == stored + aux, _say(fmt, f"{q.nbytes} bytes are stored, not {stored} and {aux} of aux{here}")
    leaves, tree = jax.tree.flatten(q)
    assert jax.tree.unflatten(tree, leaves).shape == shape, _say(fmt, f"flattening loses the shape{here}")
