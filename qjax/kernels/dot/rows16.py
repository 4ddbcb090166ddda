"""W4A16 and W8A16 as a Triton kernel: weights in neutral order, rows of bytes, and 16-bit activations.

    part[n, m]  = sum over k in block of (code[n, k] - zero[n, block]) * x[m, k]      on the tensor cores, in float32
    total[n, m] = sum over blocks of scale[n, block] * part[n, m]
    y[m, n]     = total[n, m]

As in `words16`, a code less its zero point is exact in bfloat16 and float16 and scales stay in float32, so the weight
is never rounded, and rows of the weight are the wide side of a tile. A byte is two neighbouring codes of a row: both
are widened by writing them into the last bits of 128 (bfloat16) or 1024 (float16), and laid side by side, which moves
nothing between threads. So the order on disk is read as it lies. Nothing is padded: reads behind the last row, token
or column are masked.

For NVIDIA's Ampere and Ada, where wgmma does not exist; it runs on newer ones too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from qjax.formats import Int
from qjax.kernels.dot.terms import TERMS, with_terms
from qjax.kernels.dot.triton_call import TritonKernel, pallas_triton

AHEAD = 8
"""Tiles of tokens whose programs stand side by side, so that they find each other's operands in the L2 cache."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the work is cut.

    Attributes:
        rows: rows of the weight in a tile.
        tokens: tokens in a tile, at least 16.
        columns: columns in a step; of a weight with groups it divides the group.
        splits: parts of K that are summed apart; it divides the number of steps.
        warps: threads of a program, in units of 32.
        stages: steps whose loads are under way at once.
    """

    rows: int
    tokens: int
    columns: int
    splits: int = 1
    warps: int = 4
    stages: int = 4


def rows16(
    codes: Array,
    scale: Array,
    zero: Array | None,
    x: Array,
    *,
    fmt: Int,
    out_dtype: Any,
    cut: Cut,
    terms: Mapping[str, Array] = {},
    interpret: bool = False,
) -> Array:
    """Multiply a stack of activations by a stack of weights in neutral order.

    Args:
        codes: uint8 [E, N, ceil(K/2)], int8 or uint8 [E, N, K]; E matrices.
        scale: float32 [E, N or 1, G].
        zero: uint8 [E, N or 1, G], or None.
        x: bfloat16 or float16 [E, M, K], M at least 1.
        fmt: the format of the weight.
        out_dtype: dtype of the result.
        cut: how the work is cut.
        terms: what is added before the result is rounded: "bias" [E, N], "residual" [E, M, N].
        interpret: whether Pallas' interpreter runs it, for tests.

    Returns:
        [E, M, N].
    """
    count, tokens, length = x.shape
    n = codes.shape[1]
    steps = -(-length // cut.columns)
    assert steps % cut.splits == 0
    partial = jnp.dtype(jnp.float32 if cut.splits > 1 else out_dtype)
    names, late = inside_and_after(terms, cut)
    body = _body(fmt, cut, count, n, tokens, length, x.dtype, steps // cut.splits, names)
    kernel = TritonKernel(
        body,
        f"w{fmt.bits}a16",
        jax.ShapeDtypeStruct((cut.splits * count, tokens, n), partial),
        (-(-tokens // cut.tokens) * -(-n // cut.rows), cut.splits, count),
        cut.warps,
        cut.stages,
        interpret,
    )
    y = kernel(codes, scale, *(() if zero is None else (zero,)), x, *(terms[name] for name in names))
    y = y if cut.splits == 1 else jnp.sum(y.reshape(cut.splits, count, tokens, n), axis=0)
    return with_terms(y, late, out_dtype)


def inside_and_after(terms: Mapping[str, Array], cut: Cut) -> tuple[tuple[str, ...], Mapping[str, Array]]:
    """Names of the terms that a kernel adds, and the terms that are added to the sum over parts of K."""
    return (tuple(name for name in TERMS if name in terms), {}) if cut.splits == 1 else ((), terms)


def plus(
    total: Array, names: Sequence[str], refs: Sequence[Any], e: Any, rows: Array, places: Array, *there: Any
) -> Any:
    """Sums [rows, tokens] of matrix e in float32 with their terms; ``there`` masks rows and tokens."""
    for name, ref in zip(names, refs, strict=True):
        if name == "bias":
            total = total + read(ref.at[e, rows], there[0]).astype(jnp.float32)[:, None]
        else:
            total = total + read(ref.at[e, places[None, :], rows[:, None]], both(*there)).astype(jnp.float32)
    return total


def place(cut: Cut, n: int, tokens: int) -> tuple[Array, Array]:
    """Rows and tokens of this program, by its place in the first axis of the grid: [rows], [tokens]."""
    pl = pallas_triton()[0]
    at, across, down = pl.program_id(0), -(-tokens // cut.tokens), -(-n // cut.rows)
    if across <= AHEAD:
        i, j = at // across, at % across
    else:
        first = at // (AHEAD * down) * AHEAD
        ahead = jnp.minimum(across - first, AHEAD)
        i, j = at % (AHEAD * down) // ahead, first + at % (AHEAD * down) % ahead
    return i * cut.rows + jnp.arange(cut.rows), j * cut.tokens + jnp.arange(cut.tokens)


def inside(places: Array, size: int, step: int) -> Array | None:
    """Which places lie in an axis, or None where all of them do."""
    return None if size % step == 0 else places < size


def both(a: Array | None, b: Array | None) -> Array | None:
    """Where both masks, of rows and of columns of a tile, hold."""
    if a is None or b is None:
        return a[:, None] if a is not None else b[None, :] if b is not None else None
    return a[:, None] & b[None, :]


def read(ref: Any, mask: Array | None) -> Array:
    """Read a tile, with zeros where the mask does not hold."""
    plt = pallas_triton()[1]
    return plt.load(ref) if mask is None else plt.load(ref, mask=mask, other=0)


def write(ref: Any, numbers: Array, mask: Array | None) -> None:
    """Write a tile where the mask holds."""
    pallas_triton()[1].store(ref, numbers, mask=mask)


def _body(
    fmt: Int, cut: Cut, count: int, n: int, tokens: int, length: int, dtype: Any, steps: int, names: Sequence[str]
) -> Any:
    pl = pallas_triton()[0]
    per_row = fmt.groups(length) == 1
    width = cut.columns * fmt.bits // 8  # bytes
    held = -(-length * fmt.bits // 8)

    def body(codes: Any, scale: Any, *rest: Any) -> None:
        *zero, x = rest[: len(rest) - 1 - len(names)]
        *terms, y = rest[len(zero) + 1 :]
        rows, places = place(cut, n, tokens)
        part, e = pl.program_id(1), pl.program_id(2)
        in_rows, in_tokens = inside(rows, n, cut.rows), inside(places, tokens, cut.tokens)

        def of_rows(ref: Any, group: Any) -> Array:
            one = ref.shape[1] == 1
            return read(ref.at[e, rows * 0 if one else rows, group], None if one else in_rows)

        def step(s: Any, total: Array) -> Array:
            s = part * steps + s
            columns = s * cut.columns + jnp.arange(cut.columns)
            cells = s * width + jnp.arange(width)
            w = read(codes.at[e, rows[:, None], cells[None, :]], both(in_rows, inside(cells, held, width)))
            of_x = both(in_tokens, inside(columns, length, cut.columns))
            x_tile = read(x.at[e, places[:, None], columns[None, :]], of_x)
            group = 0 if per_row else s * cut.columns // fmt.group  # type: ignore[operator]
            numbers = widened(w, of_rows(zero[0], group) if zero else None, fmt, dtype)
            product = lax.dot_general(numbers, x_tile, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            return total + (product if per_row else product * of_rows(scale, group)[:, None])

        total = lax.fori_loop(0, steps, step, jnp.zeros((cut.rows, cut.tokens), jnp.float32))
        if per_row:
            total = total * of_rows(scale, 0)[:, None]
        total = plus(total, names, terms, e, rows, places, in_rows, in_tokens)
        there = y.at[part * count + e, places[None, :], rows[:, None]]
        write(there, total.astype(y.dtype), both(in_rows, in_tokens))

    return body


def widened(cells: Array, zero: Array | None, fmt: Int, dtype: Any) -> Array:
    """Codes less their zero points in a 16-bit float, exactly.

    Args:
        cells: bytes of a tile, [rows, columns * bits / 8].
        zero: uint8 [rows], or None.
        fmt: the format of the weight.
        dtype: bfloat16 or float16.

    Returns:
        [rows, columns].
    """
    low, magic = (128, 0x4300) if dtype == jnp.bfloat16 else (1024, 0x6400)

    def written(numbers: Array) -> Array:
        return lax.bitcast_convert_type(numbers.astype(jnp.uint16) | jnp.uint16(magic), dtype)

    def signed(bits: Array) -> Array:
        """Two's complement: the lower seven bits as 128 and on, less 128 or, where the eighth is set, 256."""
        return written(bits & jnp.uint8(0x7F)) - written(bits & jnp.uint8(0x80))

    if fmt.bits == 8 and dtype == jnp.bfloat16:  # 128 has no room for eight bits
        if zero is None:
            return signed(lax.bitcast_convert_type(cells, jnp.uint8))
        return signed(cells ^ jnp.uint8(128)) - signed(zero ^ jnp.uint8(128))[:, None]
    if fmt.bits == 8:
        bits = cells if zero is not None else lax.bitcast_convert_type(cells, jnp.uint8) ^ jnp.uint8(128)
        numbers, base = written(bits), low + 128
    else:
        bits = cells if zero is not None else cells ^ jnp.uint8(0x88)  # signed codes plus 8
        pair = [written(bits & jnp.uint8(15)), written(bits >> jnp.uint8(4))]
        numbers, base = jnp.stack(pair, axis=-1).reshape(cells.shape[0], 2 * cells.shape[1]), low + 8
    return numbers - (jnp.asarray(base, dtype) if zero is None else written(zero)[:, None])
