"""Strips of 2 and 4 bits times 16-bit activations, on the tensor cores of NVIDIA's Hopper.

    y[m, n] = unit * (sum over k of number[n, k] * x[m, k])     in float32

Numbers hold their scales (`qjax.formats.mixed_words`): strips of 16 columns are too short for sums of their own. Blocks
of threads, ring and cut of K are those of `hopper`; a step of the ring is a tile of `qjax.formats.mixed_tiles`, one
block of memory in which a thread finds its codes and all that its scales are made of. Second scales become first ones
in registers, for two rows at once and while the next tiles are on their way.

Sums are in units of the matrix, in which its largest number is 2**12 to 2**13.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats.mixed_tiles import PART, MixedTiles, Stretch, in_order
from qjax.formats.mixed_words import Emulated, narrow, of_bits, wide
from qjax.formats.tiles import ROWS, rounded_up
from qjax.formats.words import BFLOAT16
from qjax.kernels.dot.hopper import (
    WARPGROUPS,
    WIDE,
    Place,
    Schedule,
    Work,
    accumulated,
    added,
    hopper_kernel,
    in_cells,
    load,
    pallas,
    tiling,
    turned,
    written,
)
from qjax.kernels.dot.schedules import Footprint
from qjax.kernels.dot.widen import Register

FOOTPRINT = Footprint(WIDE // ROWS * 24 * 64 * 4 // 2, tall=True, one_sum=True, deep=2)
"""What a step holds: tiles of up to 256 columns, 24 x 64 words each. No scales are applied to sums."""


def mixed16(
    aux: Mapping[str, Array],
    x: Array,
    *,
    fmt: MixedTiles,
    n: int,
    out_dtype: Any,
    schedule: Schedule,
    interpret: Any = None,
) -> Array:
    """Multiply a stack of activations by a stack of weights in mixed tiles, corrections left out.

    Where 2-bit and 4-bit strips stand apart, there is a kernel for each, and their sums are added.

    Args:
        aux: of the weights, each [E, anything]; E matrices.
        x: bfloat16 or float16 [E, M, K], M at least 1.
        fmt: of the weights.
        n: N, rows of a matrix.
        out_dtype: dtype of the result.
        schedule: how the work is cut; into fewer parts of K where these would not be whole tiles. A step is one tile.
        interpret: settings of the interpreter, for tests.

    Returns:
        [E, M, N].
    """
    count, tokens, _ = x.shape
    rows, several = rounded_up(n), len(fmt.stretches) > 1
    activations = in_order(in_cells(x, x.shape[-1]), aux["order"], fmt)
    total: Any = 0
    for kind, own in zip(fmt.stretches, activations, strict=True):
        cut = dataclasses.replace(schedule, splits=math.gcd(schedule.splits, kind.count))
        out = written(own, count, n, rows, jnp.float32 if several else out_dtype, cut)
        call = _kernel(out, x.dtype, kind, fmt.like.scale_bits, rows, kind.count // cut.splits, cut, interpret)
        tiles = aux[kind.tiles].reshape(count * rows // ROWS, kind.count, *kind.words)
        total = total + added(call(tiles, aux["unit"].reshape(count, 1, rows), own), cut)
    return total[:, :tokens, :n].astype(out_dtype)


def _kernel(
    out: jax.ShapeDtypeStruct,
    dtype: Any,
    kind: Stretch,
    bits: tuple[int, int, int],
    rows: int,
    steps: int,
    schedule: Schedule,
    interpret: Any,
) -> Any:
    pl, plgpu = pallas()
    of_rows, tile, tall = plgpu.Layout.WGMMA.reduce(1), schedule.tokens, schedule.tall

    def work(place: Place, tiles: Any, unit: Any, x: Any) -> Work:
        _, e, i, j, part, *_ = place
        above = e * (rows // (tall * WIDE))
        w_spec = plgpu.BlockSpec((WARPGROUPS * tall, 1, *kind.words), lambda k: (above + i, part * steps + k, 0, 0))
        x_spec = plgpu.BlockSpec((tile, kind.columns), lambda k: (j, part * steps + k), transforms=tiling(PART, 16))

        def step(_: Any, w_s: Any, x_s: Any, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            def products(accs: Sequence[Any]) -> None:
                for t, acc in enumerate(accs):
                    parts = _numbers(plgpu, w_s.at[place.group * tall + t, 0], kind, bits, dtype, bool(interpret))
                    for g, numbers in enumerate(parts):
                        plgpu.wgmma(acc, numbers, turned(x_s.at[:, pl.ds(g * PART, PART)]))
                plgpu.wgmma_wait(0)

            found = accumulated(products, totals, bool(interpret))
            # The slot was read by ordinary loads and is refilled by TMA: two proxies, which a fence orders.
            plgpu.commit_smem()
            return tuple(found)

        def finish(totals: tuple[Array, ...], t: int) -> Array:
            factor = load(unit.at[e, 0, place.own_of_matrix(t)], of_rows)
            return totals[t] * lax.broadcast_in_dim(factor, totals[t].shape, (0,))

        return Work(step, finish, [(tiles, w_spec), (x.at[e], x_spec)])

    return hopper_kernel(work, out, rows=rows, steps=steps, sums=jnp.float32, schedule=schedule, interpret=interpret)


def pieces(tile: Any, kind: Stretch, span: Any = lambda first, size: slice(first, first + size)) -> list[Any]:
    """What is loaded of a tile, by `layouts`."""
    narrow = [tile[span(0, 8)], tile[span(8, 4)], tile[span(12, 2)], tile[14]] if kind.narrow else []
    first = 15 * kind.narrow
    return narrow + ([tile[span(first, 8)], tile[first + 8]] if kind.wide else [])


def layouts(plgpu: Any, kind: Stretch) -> tuple[Any, ...]:
    """How `pieces` lie in registers: 4, 2 and 1 words a thread, second scales, 4 words a thread, words of rows."""
    of = plgpu.Layout
    narrow = [of.WG_STRIDED((2 * several, 64), vec_size=several) for several in (4, 2, 1)] + [of.TILED(**by_warp())]
    wide = [of.WG_STRIDED((8, 64), vec_size=4), of.WGMMA.reduce(1)]
    return (*narrow * kind.narrow, *wide * kind.wide)


def by_warp() -> dict[str, Any]:
    """The layout of second scales: of 64 words four for each warp and each of its four threads of a row, which the
    eight rows of threads have in common.
    """
    mgpu: Any = importlib.import_module("jax.experimental.mosaic.gpu.fragmented_array")
    tiling = mgpu.Tiling(((64,), (16,), (4,)))
    return {"tiling": tiling, "warp_dims": (-3,), "lane_dims": (mgpu.Replicated(8), -2), "vector_dim": -1}


def _numbers(plgpu: Any, w_s: Any, kind: Stretch, bits: Any, dtype: Any, interpret: bool) -> tuple[Array, ...]:
    """The numbers of a tile in shared memory: of each part of 64 columns [64, 64], as ``WGMMA``."""
    pl, _ = pallas()
    how = layouts(plgpu, kind)
    loaded = [load(ref, layout) for ref, layout in zip(pieces(w_s.at, kind, pl.ds), how, strict=True)]
    if interpret:
        return emulated([lax.bitcast_convert_type(a, jnp.uint32) for a in loaded], kind, bits, dtype)
    part = plgpu.ShapeDtypeStruct((ROWS, PART), dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=how, return_type=(part,) * kind.parts)
    def inline(_: Any, *registers: Any) -> Any:
        return _operands(registers, kind, bits, dtype)

    return inline(*loaded)


def of_thread(words: list[list[Any]], kind: Stretch, bits: Any, dtype: Any, machine: Any) -> list[list[list[Any]]]:
    """Return the numbers of one thread, by strip, row and pair, from the words that it has of each of `pieces`."""
    parts = []
    if kind.narrow:
        fours, twos, (both,), steps, *words = words
        parts = narrow([*fours, *twos], both, steps, bits, dtype, machine)
    return parts + (wide(words[0], words[1], dtype, machine) if kind.wide else [])


def emulated(loaded: list[Any], kind: Stretch, bits: Any, dtype: Any) -> tuple[Any, ...]:
    """Return the numbers of a tile, of each part of 64 columns [64, 64], from its `pieces`, NumPy's or jax's uint32.

    What `_numbers` does on registers, with threads as [4, 8, 4].
    """
    words = []
    for i, a in enumerate(loaded):
        if i == len(loaded) - 1 and kind.wide:
            words.append([a.reshape(4, 2, 8, 1)[:, h] for h in range(2)])
        elif i == 3:
            words.append([a.reshape(4, 1, 4, 4)[..., g] for g in range(4)])
        else:
            each = a.reshape(4, 8, 4, -1)
            words.append([each[..., k] for k in range(each.shape[-1])])
    of, out = (jnp if isinstance(loaded[0], jax.Array) else np), []
    for part in of_thread(words, kind, bits, dtype, Emulated()):
        pairs = of.stack([of.stack(row, axis=-1) for row in part])  # [h, w, r, c, t]
        numbers = of_bits(of.stack([pairs, pairs >> np.uint32(16)], axis=-1), dtype)
        out.append(numbers.transpose(1, 0, 2, 4, 3, 5).reshape(ROWS, PART))
    return tuple(out)


def _operands(registers: Any, kind: Stretch, bits: Any, dtype: Any) -> tuple[Any, ...]:
    """The registers of `_numbers`."""
    ir: Any = importlib.import_module("jaxlib.mlir.ir")
    vector: Any = importlib.import_module("jaxlib.mlir.dialects.vector")
    mgpu: Any = importlib.import_module("jax.experimental.mosaic.gpu")
    utils: Any = importlib.import_module("jax.experimental.mosaic.gpu.utils")

    def words(array: Any) -> list[Register]:
        at = lambda a, i: Register(vector.extract(a, dynamic_position=[], static_position=[i]))  # noqa: E731
        return [at(a, i) for a in array.registers.reshape(-1) for i in range(a.type.shape[0])]

    parts = of_thread([words(a) for a in registers], kind, bits, dtype, Assembled())
    number = ir.BF16Type if np.dtype(dtype) == BFLOAT16 else ir.F16Type
    pair = ir.VectorType.get((2,), number.get())
    out = []
    for part in parts:
        # [tile of rows, tile of columns, warp, 1, half of 16 rows, 1, lanes, vector]: what threads share counts 1.
        made = np.empty((1, PART // 8, 1, 1, 2, 1, 1, 1, 1), dtype=object)
        for h, pairs in enumerate(part):
            for t, word in enumerate(pairs):
                made[0, t, 0, 0, h, 0, 0, 0, 0] = utils.bitcast(word.value, pair)
        out.append(mgpu.FragmentedArray(_registers=made, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None))
    return tuple(out)


class Assembled:
    """The instructions of `qjax.formats.mixed_words.Machine` on registers."""

    def masked(self, word: Any, mask: int, rest: int) -> Register:
        return Register.assembled("lop3.b32 $0, $1, $2, $3, 0xea;", word, mask, rest)

    def fma(self, pair: Any, factor: Any, added: Any, dtype: Any) -> Register:
        kind = "bf16x2" if np.dtype(dtype) == BFLOAT16 else "f16x2"
        return Register.assembled(f"fma.rn.{kind} $0, $1, $2, $3;", pair, factor, added)

    def splat(self, word: Any, half: int) -> Register:
        return Register.assembled("prmt.b32 $0, $1, $1, $2;", word, 0x3232 if half else 0x1010)

    def narrowed(self, word: Any, half: int) -> Register:
        ir, arith, llvm, vector, utils = (
            importlib.import_module(name)
            for name in (
                "jaxlib.mlir.ir",
                "jaxlib.mlir.dialects.arith",
                "jaxlib.mlir.dialects.llvm",
                "jaxlib.mlir.dialects.vector",
                "jax.experimental.mosaic.gpu.utils",
            )
        )
        numbers = utils.bitcast(word.value, ir.VectorType.get((2,), ir.F16Type.get()))
        number = vector.extract(numbers, dynamic_position=[], static_position=[half])
        number = arith.extf(ir.F32Type.get(), number)
        word_type = ir.IntegerType.get_signless(32)
        return Register(llvm.inline_asm(word_type, [number], "cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,f"))
