"""What the products on Hopper's tensor cores share: blocks of threads, ring, cut of K, and how sums are stored.

A product is formed transposed, y[m, n] from total[n, m], because the left operand of `wgmma` may come from registers:
tokens are the narrow side (8 to 128 a tile), rows of the weight the side of 64 that a warpgroup multiplies at once.

A block of threads is two warpgroups that multiply, 64 rows each, and one that fetches: operands of the next steps of
128 columns come through TMA in a ring of ``stages``. Where there are few tiles, K is cut in ``splits`` and their sums
are added afterwards. TMA moves activations in cells of 8 tokens, so more than 8 tokens are padded to a multiple of 8;
up to 8 need no padding, because TMA reads zeros behind the last token and writes none there.

Written for one source on jax 0.10 and newer.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from qjax._compat import JAX_VERSION
from qjax.formats.tiles import ROWS

STEP = 128
"""Columns of the weight in one step of the ring."""

WARPGROUPS = 2
"""Warpgroups that multiply."""

WIDE = WARPGROUPS * ROWS
"""Rows of the weight that a block of threads multiplies."""

CELL = 8
"""Tokens that TMA moves at once where they are swizzled: a tile begins at a multiple of them."""

TOKENS = (8, 16, 32, 64, 128)
"""Tokens that a tile may have."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the work is cut.

    Attributes:
        tokens: tokens of a tile, one of `TOKENS`.
        stages: steps of the ring that are under way at once.
        splits: parts of K that are summed apart; it divides the number of steps.
    """

    tokens: int
    stages: int
    splits: int = 1


class Place(NamedTuple):
    """Where a warpgroup works, as traced indices."""

    group: Any
    """Of the warpgroup in its block."""
    matrix: Any
    rows: Any
    """Tile of `WIDE` rows."""
    tokens: Any
    """Tile of tokens."""
    part: Any
    """Of K."""
    first: Any = None
    """First token of a tile that a table places (`hopper_kernel`); a multiple of `CELL`."""


class Work(NamedTuple):
    """What one kernel does at a place."""

    step: Callable[..., Array]
    """``step(indices, *operands in shared memory, total) -> total``, for 128 columns; [64, tokens]."""
    finish: Callable[[Array], Array]
    """From the sum over all steps to float32 [64, tokens]."""
    ring: Sequence[tuple[Any, Any]]
    """Operands in global memory with the `BlockSpec` of a step."""


def pallas() -> tuple[Any, Any]:
    """The modules of Pallas: slow to import, needed on GPUs alone, and of other types in each version of jax."""
    return tuple(map(importlib.import_module, ("jax.experimental.pallas", "jax.experimental.pallas.mosaic_gpu")))  # type: ignore[return-value]


def load(ref: Any, layout: Any) -> Array:
    """Read a reference into registers of a layout."""
    where = (ref,) if JAX_VERSION >= (0, 11) else (ref, ())
    return pallas()[1].load(*where, layout=layout, optimized=False)


def turned(ref: Any) -> Any:
    """A matrix in shared memory, transposed."""
    return ref.T if JAX_VERSION >= (0, 11) else pallas()[1].transpose_ref(ref, (1, 0))


def tiling(columns: int, bits: int) -> tuple[Any, ...]:
    """Tiles of 8 rows and so many columns, swizzled over their width."""
    plgpu = pallas()[1]
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * bits // 8)


def in_cells(x: Array, length: int) -> Array:
    """Return activations [..., M, K] padded to columns of ``length``, and above `CELL` tokens to whole cells of TMA."""
    below = -x.shape[-2] % CELL if x.shape[-2] > CELL else 0
    if not below and x.shape[-1] == length:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, below), (0, length - x.shape[-1])])


def written(x: Array, count: int, n: int, rows: int, dtype: Any, schedule: Schedule, sums: Any = jnp.float32) -> Any:
    """Return shape and dtype of what a kernel writes, [splits E, M, N or N'].

    16-bit results as they are; others, and the parts of a cut K, in the dtype of sums.

    Args:
        x: activations as `in_cells` pads them.
        count: E.
        n: N.
        rows: N', where N is no whole number of cells of 128 bytes, in which results are written.
        dtype: of the result.
        schedule: how the work is cut.
        sums: of parts of K, and of results that have not 16 bits.
    """
    partial = jnp.dtype(sums if schedule.splits > 1 or jnp.dtype(dtype).itemsize != 2 else dtype)
    width = n if n * partial.itemsize % 128 == 0 else rows
    return jax.ShapeDtypeStruct((schedule.splits * count, x.shape[-2], width), partial)


def added(y: Array, schedule: Schedule) -> Array:
    """Return the sum over the parts of K of what a kernel wrote, [E, M, N]."""
    parts = schedule.splits
    return y if parts == 1 else jnp.sum(y.reshape(parts, y.shape[0] // parts, *y.shape[1:]), axis=0)


def own_rows(place: Place) -> Any:
    """The rows of a matrix that a warpgroup multiplies."""
    return pallas()[0].ds(place.rows * WIDE + place.group * ROWS, ROWS)


def hopper_kernel(
    work: Callable[..., Work],
    out: jax.ShapeDtypeStruct,
    *,
    rows: int,
    steps: int,
    sums: Any,
    schedule: Schedule,
    tiles: int = 0,
    interpret: Any = None,
) -> Callable[..., Array]:
    """Return the kernel of a product.

    With ``tiles``, a table says where each tile of tokens lies: the kernel then takes an int32 [tiles, 4] in front of
    its operands, of which a row is (matrix, first cell, begin, end). The tile reads tokens from `CELL` times the first
    cell on, and writes those from begin to end alone; the matrix -1 writes zeros there, and a row with begin = end
    writes nothing.

    Args:
        work: called with a `Place` and the operands in global memory.
        out: [splits E, M, N] and its dtype.
        rows: N, padded to whole tiles.
        steps: of 128 columns in a part of K.
        sums: dtype of the sum over steps.
        schedule: how the work is cut.
        tiles: rows of the table, or 0 where tile follows tile in every matrix.
        interpret: settings of the interpreter, for tests.
    """
    pl, plgpu = pallas()
    layouts, tile = plgpu.Layout, schedule.tokens
    count, tokens = out.shape[0] // schedule.splits, out.shape[1]
    bits = out.dtype.itemsize * 8

    def store(total: Array, place: Place, y: Any, y_tile: Any, begin: Any = None, end: Any = None) -> None:
        total = total.astype(out.dtype)
        if bits == 32 or JAX_VERSION < (0, 11):  # others are turned as they are stored
            total = plgpu.layout_cast(total, layouts.WGMMA_TRANSPOSED)
        if tiles and JAX_VERSION >= (0, 12):  # which wants to be told that rows without a swizzle may take longer
            plgpu.store(turned(y_tile.at[place.group]), total, optimized=False)
        else:
            turned(y_tile.at[place.group])[...] = total
        plgpu.commit_smem()
        if not tiles:
            there = y.at[place.part * count + place.matrix, pl.ds(place.tokens * tile, tile), own_rows(place)]
            plgpu.copy_smem_to_gmem(y_tile.at[place.group], there)
        else:  # a copy has a fixed size, and the number of tokens is known when the kernel runs
            cells = (end - begin) // CELL

            def copy(size: int, start: Any) -> None:
                here = y_tile.at[place.group, pl.ds(start - place.first, size)]
                plgpu.copy_smem_to_gmem(here, y.at[place.part, pl.ds(start, size), own_rows(place)])

            lax.fori_loop(0, cells, lambda i, _: copy(CELL, begin + i * CELL), None)
            lax.fori_loop(begin + cells * CELL, end, lambda i, _: copy(1, i), None)
        plgpu.wait_smem_to_gmem(0)

    def body(*refs: Any) -> None:
        *operands, y, y_tile = refs
        place = Place(*(lax.axis_index(name) for name in ("warpgroup", "matrix", "rows", "tokens", "part")))
        if not tiles:
            return product(place, operands, y, y_tile)
        table, *operands = operands
        matrix, cell, begin, end = (table[place.tokens, column] for column in range(4))
        place = place._replace(matrix=matrix, first=cell * CELL)  # the compiler wants to see the multiple
        pl.when((begin < end) & (matrix >= 0))(lambda: product(place, operands, y, y_tile, begin, end))

        @pl.when((begin < end) & (matrix < 0) & (place.group < WARPGROUPS))
        def _() -> None:
            store(plgpu.layout_cast(jnp.zeros((ROWS, tile), sums), layouts.WGMMA), place, y, y_tile, begin, end)

    def product(place: Place, operands: Sequence[Any], *there: Any) -> None:
        step, finish, ring = work(place, *operands)

        def around(pipeline: Any) -> None:
            total = pipeline(plgpu.layout_cast(jnp.zeros((ROWS, tile), sums), layouts.WGMMA))
            store(finish(total), place, *there)

        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(steps,),
            wg_axis="warpgroup",
            num_compute_wgs=WARPGROUPS,
            memory_registers=40,
            max_concurrent_steps=min(schedule.stages, steps),
            compute_context=around,
            in_specs=[spec for _, spec in ring],
        )(*(ref for ref, _ in ring))

    # The last axis of a grid runs fastest. Where a table places tiles, few tokens meet the whole of a large matrix.
    grid = {"rows": rows // WIDE, "tokens": tiles or -(-tokens // tile), "part": schedule.splits, "matrix": count}
    names = ("matrix", "tokens", "rows", "part") if tiles else tuple(grid)
    # Tokens are copied one by one where a tile may end anywhere: they lie in rows, not in swizzled cells. jax 0.10
    # wants that said as tiles of one row, and newer ones take no such tiles.
    in_rows = () if JAX_VERSION >= (0, 11) else (plgpu.TilingTransform((1, ROWS)),)
    transforms = in_rows if tiles else tiling(1024 // bits, bits)
    return plgpu.kernel(
        body,
        out_type=out,
        grid=tuple(grid[name] for name in names),
        grid_names=names,
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((WARPGROUPS, tile, ROWS), out.dtype, transforms=transforms)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )
