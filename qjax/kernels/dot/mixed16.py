"""Strips of 2 and 4 bits times 16-bit activations, on the tensor cores of NVIDIA's Hopper.

    y[m, n] = unit * (sum over k of number[n, k] * x[m, k])     in float32

Numbers hold their scales (`qjax.formats.mixed_words`): strips of 16 columns are too short for sums of their own. Blocks
of threads, ring and cut of K are those of `hopper`; a step of the ring is a tile of 256 columns, one block of memory in
which a thread finds its codes and all that its scales are made of (`qjax.formats.mixed_tiles`). Second scales become
first ones in registers, for two rows at once and while the next tiles are on their way.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats.mixed_tiles import COLUMNS, QUAD, TILE, in_order
from qjax.formats.mixed_words import GROUPS, Emulated, of_bits, operand
from qjax.formats.tiles import ROWS, rounded_up
from qjax.formats.words import BFLOAT16
from qjax.kernels.dot.hopper import (
    WARPGROUPS,
    WIDE,
    Place,
    Schedule,
    Work,
    added,
    hopper_kernel,
    in_cells,
    load,
    own_rows,
    pallas,
    tiling,
    turned,
    written,
)
from qjax.kernels.dot.widen import Register

STAGES = {8: 6, 16: 6, 32: 6, 64: 4, 128: 2}
"""Steps of 256 columns under way by tokens of a tile. Untuned."""


def mixed16(
    tiles: Array,
    unit: Array,
    which: Array,
    x: Array,
    *,
    bits: tuple[int, int, int],
    n: int,
    out_dtype: Any,
    schedule: Schedule,
    interpret: Any = None,
) -> Array:
    """Multiply a stack of activations by a stack of weights in mixed tiles.

    Args:
        tiles: int32 [E, words], E matrices.
        unit: float32 [E, N'].
        which: which strip of each quad is 4-bit, int [E, K'/64].
        x: bfloat16 or float16 [E, M, K], M at least 1.
        bits: of the scale codes of three 2-bit strips.
        n: N, rows of a matrix.
        out_dtype: dtype of the result.
        schedule: how the work is cut; its splits divide K'/256.
        interpret: settings of the interpreter, for tests.

    Returns:
        [E, M, N].
    """
    count, tokens, length = x.shape
    rows, steps = rounded_up(n), -(-length // COLUMNS)
    x = in_order(in_cells(x, steps * COLUMNS), which)
    out = written(x, count, n, rows, out_dtype, schedule)
    call = _kernel(out, x.dtype, bits, rows, steps // schedule.splits, schedule, interpret)
    y = call(tiles.reshape(count * rows // ROWS, steps, *TILE), unit.reshape(count, 1, rows), x)
    return added(y, schedule)[:, :tokens, :n].astype(out_dtype)


def _kernel(
    out: jax.ShapeDtypeStruct,
    dtype: Any,
    bits: tuple[int, int, int],
    rows: int,
    steps: int,
    schedule: Schedule,
    interpret: Any,
) -> Any:
    pl, plgpu = pallas()
    of_rows, tile = plgpu.Layout.WGMMA.reduce(1), schedule.tokens

    def work(place: Place, tiles: Any, unit: Any, x: Any) -> Work:
        group, e, i, j, part, *_ = place
        above = e * (rows // WIDE)
        w_spec = plgpu.BlockSpec((WARPGROUPS, 1, *TILE), lambda k: (above + i, part * steps + k, 0, 0))
        x_spec = plgpu.BlockSpec((tile, COLUMNS), lambda k: (j, part * steps + k), transforms=tiling(QUAD, 16))

        def step(_: Any, w_s: Any, x_s: Any, total: Array) -> Array:
            parts = _numbers(plgpu, w_s.at[group, 0], bits, dtype, bool(interpret))

            def sums(acc: Any) -> Array:
                for g in range(GROUPS):
                    plgpu.wgmma(acc, parts[g], turned(x_s.at[:, pl.ds(g * QUAD, QUAD)]))
                plgpu.wgmma_wait(0)
                return acc[...]

            total = total + pl.run_scoped(sums, plgpu.ACC((ROWS, tile), jnp.float32))
            # The slot was read by ordinary loads and is refilled by TMA: two proxies, which a fence orders.
            plgpu.commit_smem()
            return total

        def finish(total: Array) -> Array:
            factor = load(unit.at[e, 0, own_rows(place)], of_rows)
            return total * lax.broadcast_in_dim(factor, total.shape, (0,))

        return Work(step, finish, [(tiles, w_spec), (x.at[e], x_spec)])

    return hopper_kernel(work, out, rows=rows, steps=steps, sums=jnp.float32, schedule=schedule, interpret=interpret)


def _numbers(plgpu: Any, w_s: Any, bits: tuple[int, int, int], dtype: Any, interpret: bool) -> tuple[Array, ...]:
    """The numbers of a tile [24, 64] in shared memory: of each part of 64 columns [64, 64], as ``WGMMA``."""
    pl, _ = pallas()
    layouts = plgpu.Layout
    eight, three = layouts.WG_STRIDED((16, 64), vec_size=4), layouts.WG_STRIDED((6, 64), vec_size=1)
    kinds = (eight, three, layouts.WGMMA.reduce(1), layouts.TILED(**by_warp()))
    loaded = [load(ref, kind) for ref, kind in zip(pieces(w_s.at, pl.ds), kinds, strict=True)]
    if interpret:
        return emulated([lax.bitcast_convert_type(a, jnp.uint32) for a in loaded], bits, dtype)
    part = plgpu.ShapeDtypeStruct((ROWS, QUAD), dtype, layout=layouts.WGMMA)

    @plgpu.inline_mgpu(arg_types=kinds, return_type=(part,) * GROUPS)
    def inline(_: Any, *registers: Any) -> Any:
        return _operands(registers, bits, dtype)

    return inline(*loaded)


def pieces(tile: Any, span: Any = lambda first, size: slice(first, first + size)) -> list[Any]:
    """What is loaded of a tile [24, 64]: codes by fours, three words a thread, words of rows and of second scales."""
    return [tile[span(0, 16)], tile[span(16, 6)], tile[22], tile[23]]


def by_warp() -> dict[str, Any]:
    """The layout of second scales: of 64 words four for each warp and each of its four threads of a row, which the
    eight rows of threads have in common.
    """
    mgpu: Any = importlib.import_module("jax.experimental.mosaic.gpu.fragmented_array")
    tiling = mgpu.Tiling(((64,), (16,), (4,)))
    return {"tiling": tiling, "warp_dims": (-3,), "lane_dims": (mgpu.Replicated(8), -2), "vector_dim": -1}


def emulated(loaded: Any, bits: tuple[int, ...], dtype: Any) -> tuple[Any, ...]:
    """Return the numbers of a tile, of each part of 64 columns [64, 64], from its `pieces`, NumPy's or jax's uint32.

    What `_numbers` does on registers, with threads as [4, 8, 4].
    """
    eight, three, rows, steps = loaded
    eight = eight.reshape(2, 4, 8, 4, 4)
    three = three.reshape(3, 4, 8, 4)
    codes = [eight[i // 4, ..., i % 4] for i in range(8)] + [three[0], three[1]]
    of_rows = [rows.reshape(4, 2, 8, 1)[:, h] for h in range(2)]
    of_steps = [steps.reshape(4, 1, 4, 4)[..., g] for g in range(3)]
    parts = operand(codes, three[2], of_rows, of_steps, bits, dtype, Emulated())
    of, out = (jnp if isinstance(eight, jax.Array) else np), []
    for part in parts:
        pairs = of.stack([of.stack(row, axis=-1) for row in part])  # [h, w, r, c, t]
        numbers = of_bits(of.stack([pairs, pairs >> np.uint32(16)], axis=-1), dtype)
        out.append(numbers.transpose(1, 0, 2, 4, 3, 5).reshape(ROWS, QUAD))
    return tuple(out)


def _operands(registers: Any, bits: Any, dtype: Any) -> tuple[Any, ...]:
    """The registers of `_numbers`."""
    ir: Any = importlib.import_module("jaxlib.mlir.ir")
    vector: Any = importlib.import_module("jaxlib.mlir.dialects.vector")
    mgpu: Any = importlib.import_module("jax.experimental.mosaic.gpu")
    utils: Any = importlib.import_module("jax.experimental.mosaic.gpu.utils")

    def words(array: Any, size: int) -> list[Register]:
        flat = array.registers.reshape(-1)
        at = lambda a, i: Register(vector.extract(a, dynamic_position=[], static_position=[i]))  # noqa: E731
        return [at(a, i) for a in flat for i in range(size)]

    eight, three, rows, steps = (words(a, size) for a, size in zip(registers, (4, 1, 1, 4), strict=True))
    parts = operand(eight + three[:2], three[2], rows, steps[:3], bits, dtype, Assembled())
    kind = ir.BF16Type if np.dtype(dtype) == BFLOAT16 else ir.F16Type
    pair = ir.VectorType.get((2,), kind.get())
    out = []
    for part in parts:
        # [tile of rows, tile of columns, warp, 1, half of 16 rows, 1, lanes, vector]: what threads share counts 1.
        made = np.empty((1, QUAD // 8, 1, 1, 2, 1, 1, 1, 1), dtype=object)
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
