"""W4A8 on the tensor cores of NVIDIA's Hopper: 4-bit weights, expanded to int8 in registers, and int8 activations.

The weight lies as `CodeTiles` orders it. A thread reads the codes of a row of 128 columns in 16 bytes and makes four
int8 numbers at once (why no byte disturbs its neighbour: `qjax.formats.code_tiles`), which are the left operand of
`wgmma` where they are; activations come from shared memory. Two schedules, by the scales of the weight:

One per row (DGQ, QoQ, per channel): integers all the way, scaled once,

    total[n, m] = sum over k of number[n, k] * x[m, k]                              exactly, in int32
    y[m, n]     = total[n, m] * w_scale[n] * x_scale[m]

One per group of columns (after MixPE, arXiv:2411.16158): sums of blocks are exact integers, scaled one by one,

    part[n, m]  = sum over k in block of number[n, k] * x[m, k]                     exactly, in int32
    total[n, m] = sum over blocks of part[n, m] * w_scale[n, block]                 in float32
    y[m, n]     = total[n, m] * x_scale[m]

Sums start at 0x4B400000, so that the bits of the sum of a block, below 2^22 in magnitude, are those of the float32
number 12582912 + part: a subtraction converts it, where the instruction for that takes four to eight times as long.
Symmetric codes are taken as 16 times themselves, the upper half of a byte, and scales as a sixteenth.

Blocks of threads, ring and cut of K are those of `hopper`. Parts of a cut K are added as integers where they are.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats.code_tiles import CodeTiles
from qjax.formats.tiles import ROWS, rounded_up
from qjax.kernels.dot.endings import Ending
from qjax.kernels.dot.hopper import (
    STEP,
    WARPGROUPS,
    WIDE,
    Place,
    Schedule,
    Work,
    accumulated,
    hopper_kernel,
    in_cells,
    load,
    pallas,
    tiling,
    turned,
)

MAGIC = 0x4B400000
"""The bits of 1.5 * 2^23, to which integers below 2^22 in magnitude are added bit by bit."""

SUMS = 128
"""Tokens of the sums of blocks that are under way at once: 64 registers of a thread, besides those of the totals."""

TURNED = 16
"""What symmetric codes are multiplied with."""


def codes4x8(
    tiles: Array,
    levels: Array | None,
    scale: Array,
    x: Array,
    x_scale: Array,
    *,
    fmt: CodeTiles,
    n: int,
    out_dtype: Any,
    schedule: Schedule,
    terms: Mapping[str, Array] = {},
    interpret: Any = None,
) -> Array:
    """Multiply a stack of codes of activations by a stack of weights in tiles, and scale.

    Args:
        tiles: int32 [E, N' K'/8], as `CodeTiles` orders them; E matrices.
        levels: int16 [E, G N'], or None for symmetric codes.
        scale: float32 [E, S N'].
        x: int8 [E, M, K], M at least 1.
        x_scale: float32 [E, M].
        fmt: the format of the weight.
        n: N, rows of a matrix.
        out_dtype: dtype of the result; int32 gives sums as they are, of whole rows.
        schedule: how the work is cut.
        terms: what is added (`Ending`).
        interpret: settings of the interpreter, for tests.

    Returns:
        [E, M, N].
    """
    count, tokens, length = x.shape
    rows, wide = rounded_up(n), fmt.padded_length
    x = in_cells(x, wide)  # the weight was padded when it was packed
    cells = tiles.reshape(count * rows // ROWS, wide // STEP, 8, 128)
    scale = scale.reshape(count, -1, rows)
    scale = scale * (1 / TURNED) if levels is None and out_dtype != jnp.int32 else scale
    numbers = () if levels is None else (levels.reshape(count, fmt.blocks, rows),)
    cut = schedule.splits > 1
    sums = jnp.dtype(jnp.int32 if fmt.whole_rows else jnp.float32)
    narrow = jnp.dtype(out_dtype).itemsize == 2
    partial = sums if cut or out_dtype == sums else jnp.dtype(out_dtype if narrow else jnp.float32)
    # What is written is cut in cells of 128 bytes.
    width = n if n * partial.itemsize % 128 == 0 else rows
    out = jax.ShapeDtypeStruct((schedule.splits * count, x.shape[1], width), partial)
    scaled = not cut and out_dtype != jnp.int32
    ending = Ending(terms, out_dtype, schedule)
    call = _kernel(out, fmt, rows, schedule, levels is not None, scaled, ending.inside, interpret)
    # Scales of whole tiles, so that none is read from behind the last token.
    of_tokens = (jnp.pad(x_scale, ((0, 0), (0, -tokens % schedule.tokens))),) if scaled else ()
    of_rows = () if fmt.whole_rows and not scaled else (scale,)
    y = call(cells, x, *numbers, *of_rows, *of_tokens, *ending.operands(out, rows))
    if scaled or out_dtype == jnp.int32 and not cut:
        return ending.finished(y[:, :tokens, :n])
    y = jnp.sum(y.reshape(schedule.splits, count, *y.shape[1:]), axis=0)[:, :tokens, :n]
    if out_dtype == jnp.int32:
        return y
    y = y * scale[:, :1, :n] if fmt.whole_rows else y
    return ending.finished(y * x_scale[:, :, None])


def _kernel(
    out: jax.ShapeDtypeStruct,
    fmt: CodeTiles,
    rows: int,
    schedule: Schedule,
    leveled: bool,
    scaled: bool,
    terms: Sequence[str],
    interpret: Any,
) -> Any:
    pl, plgpu = pallas()
    layouts, tile, tall = plgpu.Layout, schedule.tokens, schedule.tall
    wide, span = tall * WIDE, schedule.deep * STEP  # of a step
    steps = fmt.padded_length // span // schedule.splits
    in_blocks = not fmt.whole_rows
    columns = fmt.block or STEP if in_blocks else STEP  # of one product
    of_sum = columns if in_blocks else span  # columns of a sum
    words_of = columns // 32

    def over_rows(numbers: Array, shape: tuple[int, ...]) -> Array:
        return lax.broadcast_in_dim(numbers, shape, (0,))

    def work(place: Place, cells: Any, x: Any, *rest: Any) -> Work:
        levels, rest = (rest[:1], rest[1:]) if leveled else ((), rest)
        scale: Any = rest[0] if rest else None
        of_tokens: Any = rest[-1] if rest else None

        def step(_: Any, w_s: Any, x_s: Any, *rest: Any) -> tuple[Array, ...]:
            *ringed, totals = rest
            totals = list(totals)
            levels_s: Any = ringed[0] if leveled else None

            def loaded(t: int, tile_of_columns: int) -> Array:
                ref = w_s.at[place.group * tall + t, tile_of_columns]
                return load(ref, layouts.WG_STRIDED((8, 128), vec_size=4))

            def affine(t: int, b: int) -> tuple[Array, Array]:
                """What is multiplied with and added to the words of a block, int32 [64] each."""
                both = load(levels_s.at[b, place.own(t)], layouts.WGMMA.reduce(1)).astype(jnp.int32)
                by, zero = both & 0xFF, both >> 8 & 0xFF
                offset = zero if fmt.post else zero * by
                return by, jnp.int32(-0x7F7F7F80) - offset * jnp.int32(0x01010101)

            def products(which: Sequence[tuple[int, int]], accs: Sequence[Any]) -> None:
                """Of rows and blocks, each added to its own sum."""
                words, terms = functools.cache(loaded), functools.cache(affine)
                for (t, b), acc in zip(which, accs, strict=True):
                    for at in range(b * of_sum // columns, (b + 1) * of_sum // columns):
                        first = at * words_of
                        blocks = [(first + i) * 32 // fmt.block if fmt.block else 0 for i in range(words_of) if leveled]
                        per = [terms(t, block) for block in blocks]
                        a = expanded(plgpu, words(t, first // 4), per, first % 4, words_of, bool(interpret))
                        plgpu.wgmma(acc, a, turned(x_s.at[:, pl.ds(at * columns, columns)]))
                if which[-1] == every[-1]:  # The slot was read by ordinary loads and is refilled by TMA: two proxies,
                    plgpu.commit_smem()  # which a fence orders, while tensor cores are at work.
                plgpu.wgmma_wait(0)

            every = [(t, b) for b in range(span // of_sum) for t in range(tall)]
            if not in_blocks:
                return tuple(accumulated(functools.partial(products, every), totals, bool(interpret)))
            most = max(1, SUMS // tile)
            for which in (every[i : i + most] for i in range(0, len(every), most)):
                start = plgpu.layout_cast(jnp.full((ROWS, tile), MAGIC, jnp.int32), layouts.WGMMA)
                scales = [load(ringed[-1].at[b, place.own(t)], layouts.WGMMA.reduce(1)) for t, b in which]
                parts = accumulated(functools.partial(products, which), [start] * len(which), bool(interpret))
                for (t, _), by, part in zip(which, scales, parts, strict=True):
                    part = lax.bitcast_convert_type(part, jnp.float32) - jnp.float32(12582912)
                    totals[t] = totals[t] + part * over_rows(by, part.shape)
            return tuple(totals)

        def finish(totals: tuple[Array, ...], t: int) -> Array:
            if not scaled:
                return totals[t]
            total = totals[t].astype(jnp.float32)
            if not in_blocks:
                of_rows = load(scale.at[place.matrix, 0, place.own_of_matrix(t)], layouts.WGMMA.reduce(1))
                total = total * over_rows(of_rows, total.shape)
            mine = load(of_tokens.at[place.matrix, pl.ds(place.tokens * tile, tile)], layouts.WGMMA.reduce(0))
            return total * lax.broadcast_in_dim(mine, total.shape, (1,))

        e, first = place.matrix, place.part * steps
        above = e * (rows // wide)
        held = span // fmt.block if fmt.block else 1
        shape = (WARPGROUPS * tall, schedule.deep, 8, 128)
        of_w = plgpu.BlockSpec(shape, lambda k: (above + place.rows, first + k, 0, 0))
        of_x = plgpu.BlockSpec((tile, span), lambda k: (place.tokens, first + k), transforms=tiling(columns, 8))
        of_rows = plgpu.BlockSpec((held, wide), lambda k: ((first + k if fmt.block else 0 * k), place.rows))
        ring = [(cells, of_w), (x.at[e], of_x), *((a.at[e], of_rows) for a in levels)]
        return Work(step, finish, ring + ([(scale.at[e], of_rows)] if in_blocks else []))

    sums = jnp.float32 if in_blocks else jnp.int32
    how = {"schedule": schedule, "terms": terms, "interpret": interpret}
    return hopper_kernel(work, out, rows=rows, steps=steps, sums=sums, **how)


def expanded(
    plgpu: Any, words: Array, terms: list[tuple[Array, Array]], first: int, count: int, interpret: bool
) -> Array:
    """Make int8 numbers of the codes in words.

    Args:
        plgpu: the module.
        words: int32 [8, 128], four neighbouring ones of each half to a thread.
        terms: what the words are multiplied with and what is added, int32 [64] by rows, for each of ``count`` words;
            none for signed codes, of which 16 times each is made.
        first: of the four words of a thread, the one to begin with.
        count: how many words.
        interpret: whether the interpreter runs it, which knows no registers.

    Returns:
        int8 [64, 32 count] in the order of columns, as ``WGMMA_8BIT``.
    """
    flat = [a for pair in terms for a in pair]
    if interpret:
        return _expanded_numbers(words, flat, first, count)
    layouts = plgpu.Layout

    @plgpu.inline_mgpu(
        arg_types=(layouts.WG_STRIDED((8, 128), vec_size=4), *(layouts.WGMMA.reduce(1),) * len(flat)),
        return_type=plgpu.ShapeDtypeStruct((ROWS, 32 * count), jnp.int8, layout=layouts.WGMMA_8BIT),
    )
    def inline(_: Any, words: Any, *flat: Any) -> Any:
        return _expanded_registers(words, flat, first, count)

    return inline(words, *flat)


def _bytes(words: Array, upper: int, by: Array | None, more: Array | None) -> Array:
    """Four int8 numbers to a word, of its lower or its upper nibbles."""
    if by is None or more is None:
        return (words if upper else words << 4) & jnp.int32(-0x0F0F0F10)
    nibbles = (words >> 4 if upper else words) & jnp.int32(0x0F0F0F0F)
    return (nibbles * by + more) ^ jnp.int32(-0x7F7F7F80)


def _expanded_numbers(words: Array, flat: list[Array], first: int, count: int) -> Array:
    """The numbers of `expanded`, by arrays in place of registers."""
    by_row = words.reshape(2, 4, 8, 4, 4)  # h, w, r, c, b
    by_row = jnp.transpose(by_row, (1, 0, 2, 3, 4)).reshape(ROWS, 4, 4)
    out = []
    for i in range(count):
        mine = by_row[:, :, first + i]
        by, more = (a[:, None] for a in flat[2 * i : 2 * i + 2]) if flat else (None, None)
        for upper in range(2):
            out.append(lax.bitcast_convert_type(_bytes(mine, upper, by, more), jnp.int8).reshape(ROWS, 16))
    return jnp.concatenate(out, axis=1)


def _expanded_registers(words: Any, flat: Any, first: int, count: int) -> Any:
    """The registers of `expanded`: of a word, the lower nibbles are of the first 16 columns, the upper of 16 more."""
    ir: Any = importlib.import_module("jaxlib.mlir.ir")
    arith: Any = importlib.import_module("jaxlib.mlir.dialects.arith")
    vector: Any = importlib.import_module("jaxlib.mlir.dialects.vector")
    mgpu: Any = importlib.import_module("jax.experimental.mosaic.gpu")
    utils: Any = importlib.import_module("jax.experimental.mosaic.gpu.utils")
    word = ir.IntegerType.get_signless(32)
    four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
    constant = functools.cache(lambda value: utils.c(value - (1 << 32) if value >> 31 else value, word))
    # [tile of rows, tile of columns, warp, 1, half of 16 rows, 1, lanes, vector]: what is spread over threads counts 1.
    out = np.empty(mgpu.WGMMA_LAYOUT_8BIT.registers_shape((ROWS, 32 * count)), dtype=object)
    flats = out.reshape(2 * count, 2)
    for half in range(2):
        mine = words.registers.reshape(2)[half]
        for i in range(count):
            codes = vector.extract(mine, [], [first + i])
            by, more = (
                (utils.bitcast(a.registers.reshape(2)[half], word) for a in flat[2 * i : 2 * i + 2])
                if flat
                else (None, None)
            )
            for upper in range(2):
                if by is None:
                    moved = codes if upper else arith.shli(codes, constant(4))
                    numbers = arith.andi(moved, constant(0xF0F0F0F0))
                else:
                    moved = arith.shrui(codes, constant(4)) if upper else codes
                    nibbles = arith.andi(moved, constant(0x0F0F0F0F))
                    numbers = arith.addi(arith.muli(nibbles, by), more)
                    numbers = arith.xori(numbers, constant(0x80808080))
                flats[2 * i + upper, half] = utils.bitcast(numbers, four)
    return mgpu.FragmentedArray(_registers=out, _layout=mgpu.WGMMA_LAYOUT_8BIT, _is_signed=True)
