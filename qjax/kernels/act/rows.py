"""Rows of activations quantized by NVIDIA GPUs in one pass: a warpgroup a row, which it keeps in registers.

A row is read once, 16 bytes at a time where its length allows, and stays in the registers of the 128 threads as it
came; norms and gates are computed from there in float32. Statistics are sums and maxima over threads and then over the
four warps. What is written are codes and one scale: no value in between reaches memory. Rows that would take too many
registers (`HELD`) are read again for each step instead, from the cache.

A row that is no whole number of strides of the warpgroup ends in a stride that reaches back over the one before it.
What is read twice counts once in sums, changes no maximum, and is written twice alike.

Written for one source on jax 0.10 and newer; the equations are those of `qjax.kernels.act.reference`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats import Float8, Int
from qjax.formats.numerics import SMALLEST_SCALE
from qjax.kernels.act.reference import Before, unit_scale
from qjax.kernels.dot.hopper import load, pallas

THREADS = 128
"""Of a warpgroup."""

HELD = {"nothing": 112, "gate": 112, "rms_norm": 64, "layer_norm": 64}
"""Registers of a thread that a row may stay in; the rest of 255 computes, and holds weights that are under way."""

AGAIN = 4
"""Strides that are read at a time where a row does not stay: 32 elements of 16 bits a thread."""

MAGIC = 1.5 * 2**23
"""A float32 to which an integer of a few bits is added into the last bits, rounded to nearest even."""


class Piece(NamedTuple):
    """A part of a row, in strides of the warpgroup."""

    start: Any
    """Its first element; traced in a loop."""
    length: int
    vector: int
    """Neighbouring elements of one thread."""
    known: int = 0
    """Elements in front that belong to the piece before."""


def pieces(length: int, bits: int) -> tuple[Piece, ...]:
    """Cut a row of at least 128 elements of so many bits in strides of the warpgroup, up to 16 bytes a thread."""
    vector = 128 // bits
    while length % vector or THREADS * vector > length:
        vector //= 2
    stride = THREADS * vector
    whole = length // stride * stride
    out = [Piece(0, whole, vector)]
    if whole < length:
        out.append(Piece(length - stride, stride, vector, whole - (length - stride)))
    return tuple(out)


def is_held(length: int, bits: int, before: Before) -> bool:
    """Whether a row stays in registers: as it came, two to a register, or, behind a gate, in float32."""
    parts = pieces(length, bits)
    packed = bits == 16 and parts[0].vector > 1 and before.kind != "gate"
    return sum(p.length for p in parts) // THREADS // (2 if packed else 1) <= HELD[before.kind]


def quantize(
    x: Array,
    extra: Sequence[Array],
    *,
    fmt: Int | Float8,
    before: Before,
    held: bool | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """Quantize rows.

    Args:
        x: bfloat16, float16 or float32 [R, K], R at least 1 and K at least 128.
        extra: as `qjax.kernels.act.reference.transformed` takes them; a gate has the dtype of x.
        fmt: symmetric integers or float8_e4m3fn, one scale a row.
        before: what is done to a row before.
        held: whether rows stay in registers, or None for what `is_held` says.
        interpret: settings of the interpreter, for tests.

    Returns:
        codes [R, K] of the format, scales float32 [R].
    """
    pl, plgpu = pallas()
    rows, length = x.shape
    bits = x.dtype.itemsize * 8
    parts = pieces(length, bits)
    held = is_held(length, bits, before) if held is None else held
    unit = np.float32(unit_scale(fmt))

    def body(*refs: Any) -> None:
        *operands, y_ref, scale_ref = refs
        row = lax.axis_index("row")

        def read(ref: Any, part: Piece) -> Array:
            at = (pl.ds(part.start, part.length),)
            at = at if len(ref.shape) == 1 else (row, *at)
            return load(ref.at[at], plgpu.Layout.WG_STRIDED((part.length,), vec_size=part.vector))

        walk = _Walk(parts, held, read)
        y = walk.values(operands, before, length)
        top = walk.reduced(lambda part: jnp.abs(y(part)), jnp.max, jnp.maximum)
        scale = jnp.maximum(top * unit, np.float32(SMALLEST_SCALE))  # NaN stays NaN
        scale_ref[row] = scale
        inverse = 1.0 / scale
        # In a row with NaN or infinity all codes are 0: one mask for the bits of all of them.
        kept = jnp.where(scale < np.float32(np.inf), jnp.int32(-1), jnp.int32(0))

        def write(part: Piece) -> None:
            y_ref[row, pl.ds(part.start, part.length)] = _codes(y(part) * inverse, kept, fmt)

        walk.each(write)

    out = (jax.ShapeDtypeStruct((rows, length), fmt.code_dtype), jax.ShapeDtypeStruct((rows,), jnp.float32))
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )(x, *extra)


class _Walk:
    """The steps over a row: over pieces in registers, or in a loop that reads them again."""

    def __init__(self, parts: tuple[Piece, ...], held: bool, read: Callable[[Any, Piece], Array]):
        self.parts, self.held, self.read = parts, held, read
        first, *self.tail = parts
        strides = first.length // (THREADS * first.vector)
        self.turns = strides // next(n for n in range(AGAIN, 0, -1) if strides % n == 0)

    def turn(self, i: Any) -> Piece:
        """The piece of a turn of the loop."""
        length = self.parts[0].length // self.turns
        return Piece(i * length, length, self.parts[0].vector)

    def each(self, visit: Callable[[Piece], None]) -> None:
        """Call a function for all pieces."""
        if not self.held:
            lax.fori_loop(0, self.turns, lambda i, _: visit(self.turn(i)), None)
        for part in self.tail if not self.held else self.parts:
            visit(part)

    def reduced(self, values: Callable[[Piece], Array], reduce: Any, combine: Any, counted: bool = False) -> Array:
        """Reduce the row to one number, from 0 on.

        Args:
            values: float32 of a piece.
            reduce: of an array, as `jnp.sum`.
            combine: of two numbers, as `jnp.add`.
            counted: whether it matters that an element is met twice.
        """

        def of(part: Piece) -> Array:
            numbers = values(part)
            if counted and part.known:
                plgpu = pallas()[1]
                at = lax.broadcasted_iota(jnp.int32, (part.length,), 0)
                at = plgpu.layout_cast(at, plgpu.Layout.WG_STRIDED((part.length,), vec_size=part.vector))
                numbers = jnp.where(at >= part.known, numbers, 0.0)
            return reduce(numbers)

        if self.held:
            return functools.reduce(combine, map(of, self.parts))
        whole = lax.fori_loop(0, self.turns, lambda i, so_far: combine(so_far, of(self.turn(i))), jnp.float32(0))
        return functools.reduce(combine, map(of, self.tail), whole)

    def values(self, operands: Sequence[Any], before: Before, length: int) -> Callable[[Piece], Array]:
        """Return a function from a piece to its y of the equations, in float32."""
        x_ref, *extra = operands

        def wide(ref: Any, part: Piece) -> Array:
            return self.read(ref, part).astype(jnp.float32)

        if before.kind == "gate":

            def gated(part: Piece) -> Array:
                gate = wide(extra[0], part)
                return gate / (1.0 + jnp.exp(-gate)) * wide(x_ref, part)

            return self.kept(gated)

        stored = self.kept(lambda part: self.read(x_ref, part))

        def numbers(part: Piece) -> Array:
            return stored(part).astype(jnp.float32)

        if before.kind == "nothing":
            return numbers

        def mean(values: Callable[[Piece], Array]) -> Array:
            return self.reduced(values, jnp.sum, jnp.add, counted=True) * np.float32(1 / length)

        centre = mean(numbers) if before.kind == "layer_norm" else None

        def centred(part: Piece) -> Array:
            return numbers(part) if centre is None else numbers(part) - centre

        factor = lax.rsqrt(mean(lambda part: centred(part) * centred(part)) + np.float32(before.eps))

        def normed(part: Piece) -> Array:
            y = centred(part) * factor
            y = y * wide(extra[0], part) if before.weight else y
            return y + wide(extra[-1], part) if before.bias else y

        return normed

    def kept(self, function: Callable[[Piece], Array]) -> Callable[[Piece], Array]:
        """Return a function whose results for the pieces stay in registers, where the row does."""
        if not self.held:
            return function
        return {part: function(part) for part in self.parts}.__getitem__


def _codes(steps: Array, kept: Array, fmt: Int | Float8) -> Array:
    """Round numbers in units of the scale, which none exceeds by more than a last bit."""
    if isinstance(fmt, Float8):  # the conversion rounds to nearest even and saturates
        bits = lax.bitcast_convert_type(steps, jnp.int32) & kept
        return lax.bitcast_convert_type(bits, jnp.float32).astype(fmt.code_dtype)
    # 127.5 rounds to an even 128, which is no code, and -127.5 to -128, which is one.
    steps = jnp.minimum(steps, np.float32(fmt.code_range[1]))
    return (lax.bitcast_convert_type(steps + np.float32(MAGIC), jnp.int32) & kept).astype(jnp.int8)
