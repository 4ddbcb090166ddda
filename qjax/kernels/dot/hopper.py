"""What the products on Hopper's tensor cores share: blocks of threads, ring, cut of K, and how sums are stored.

A product is formed transposed, y[m, n] from total[n, m], because the left operand of `wgmma` may come from registers:
tokens are the narrow side (8 to 128 a tile), rows of the weight the side of 64 that a warpgroup multiplies at once.

A block of threads is two warpgroups that multiply, 64 rows each or ``tall`` times as many, and one that fetches:
operands of the next steps of 128 columns, or ``deep`` times as many, come through TMA in a ring of ``stages``. Where
there are few tiles, K is cut in ``splits`` and their sums are added afterwards. TMA moves activations in cells of 8
tokens, so more than 8 tokens are padded to a multiple of 8; up to 8 need no padding, because TMA reads zeros behind the
last token and writes none there.

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
"""Rows of the weight that a block of threads multiplies, or ``tall`` times as many."""

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
        tall: times `ROWS` rows that a warpgroup multiplies with the same activations; it divides N' / `WIDE`.
        deep: times `STEP` columns in a step of the ring; it divides the number of steps of a part.
        rolling: whether tensor cores add to one sum, which is kept in units of the scale at hand, so that registers
            have room for more of them; of kernels that say so.
    """

    tokens: int
    stages: int
    splits: int = 1
    tall: int = 1
    deep: int = 1
    rolling: bool = False

    def fits(self, n: int, k: int) -> bool:
        """Whether the padded rows and columns of a weight are cut into whole parts."""
        return not n % (self.tall * WIDE) and not k % (self.splits * self.deep * STEP)


class Place(NamedTuple):
    """Where a warpgroup works, as traced indices."""

    group: Any
    """Of the warpgroup in its block."""
    matrix: Any
    rows: Any
    """Tile of `WIDE` rows, or tall times as many."""
    tokens: Any
    """Tile of tokens."""
    part: Any
    """Of K."""
    first: Any = None
    """First token of a tile that a table places (`hopper_kernel`); a multiple of `CELL`."""
    tall: int = 1
    """As in `Schedule`."""

    def own(self, t: int = 0) -> Any:
        """The rows of a tile of `WIDE` times tall that a warpgroup multiplies: the t-th `ROWS` of them."""
        return pallas()[0].ds((self.group * self.tall + t) * ROWS, ROWS)

    def own_of_matrix(self, t: int = 0) -> Any:
        """Likewise, the rows of a matrix."""
        return pallas()[0].ds(((self.rows * WARPGROUPS + self.group) * self.tall + t) * ROWS, ROWS)


class Work(NamedTuple):
    """What one kernel does at a place."""

    step: Callable[..., tuple[Array, ...]]
    """``step(indices, *operands in shared memory, totals) -> totals``, for one step; ``tall`` times [64, tokens]."""
    finish: Callable[[tuple[Array, ...], int], Array]
    """From the totals over all steps to float32 [64, tokens], of the t-th `ROWS` rows."""
    ring: Sequence[tuple[Any, Any]]
    """Operands in global memory with the `BlockSpec` of a step."""
    kept: int = 0
    """Numbers of rows, float32 [64], that a step hands on behind the totals; zeros at first."""


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


def accumulated(add: Callable[[Sequence[Any]], None], starts: Sequence[Array], interpret: bool) -> list[Array]:
    """Return what tensor cores make of accumulators that hold ``starts``.

    Args:
        add: called with the accumulators; what it adds has to be there when it returns.
        starts: [64, tokens] each.
        interpret: whether jax's interpreter runs it, which knows accumulators of zeros alone.
    """
    pl, plgpu = pallas()
    if not interpret:
        return list(pl.run_state(add)(tuple(plgpu.ACC.init(start) for start in starts)))

    def products(*accs: Any) -> list[Array]:
        add(accs)
        return [acc[...] for acc in accs]

    found = pl.run_scoped(products, *(plgpu.ACC(start.shape, start.dtype) for start in starts))
    return [start + one for start, one in zip(starts, found, strict=True)]


def hopper_kernel(
    work: Callable[..., Work],
    out: jax.ShapeDtypeStruct,
    *,
    rows: int,
    steps: int,
    sums: Any,
    schedule: Schedule,
    tiles: int = 0,
    terms: Sequence[str] = (),
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
        steps: of the ring in a part of K.
        sums: dtype of the sum over steps.
        schedule: how the work is cut.
        tiles: rows of the table, or 0 where tile follows tile in every matrix.
        terms: what is added to the sums (`qjax.kernels.dot.endings`), the last operands: "bias" [E, N'], "residual" of
            the shape and dtype of ``out``; of a kernel without tables and parts.
        interpret: settings of the interpreter, for tests.
    """
    assert not terms or not tiles and schedule.splits == 1
    pl, plgpu = pallas()
    layouts, tile, tall = plgpu.Layout, schedule.tokens, schedule.tall
    count, tokens = out.shape[0] // schedule.splits, out.shape[1]
    bits = out.dtype.itemsize * 8

    def fetch(place: Place, added: dict[str, Any], y_tile: Any, arrived: Sequence[Any]) -> None:
        """Ask for the residual of a warpgroup's tiles, where their results will be."""
        if "residual" in added:
            residual = added["residual"].at[place.matrix, pl.ds(place.tokens * tile, tile)]
            for t in range(tall):
                at = place.group * tall + t
                plgpu.copy_gmem_to_smem(residual.at[:, place.own_of_matrix(t)], y_tile.at[at], arrived[0].at[at])

    def with_terms(
        total: Array, t: int, place: Place, added: dict[str, Any], y_tile: Any, arrived: Sequence[Any]
    ) -> Array:
        if "bias" in added:
            bias = load(added["bias"].at[place.matrix, place.own_of_matrix(t)], layouts.WGMMA.reduce(1))
            total = total + lax.broadcast_in_dim(bias.astype(jnp.float32), total.shape, (0,))
        if "residual" in added:  # a thread reads what it will write
            at = place.group * tall + t
            plgpu.barrier_wait(arrived[0].at[at])
            residual = load(turned(y_tile.at[at]), layouts.WGMMA_TRANSPOSED).astype(jnp.float32)
            total = plgpu.layout_cast(total, layouts.WGMMA_TRANSPOSED) + residual
        return total

    def store(totals: Sequence[Array], place: Place, y: Any, y_tile: Any, begin: Any = None, end: Any = None) -> None:
        for t, total in enumerate(totals):
            total = total.astype(out.dtype)
            if bits == 32 or JAX_VERSION < (0, 11):  # others are turned as they are stored
                total = plgpu.layout_cast(total, layouts.WGMMA_TRANSPOSED)
            here = turned(y_tile.at[place.group * tall + t])
            if tiles and JAX_VERSION >= (0, 12):  # which wants to be told that rows without a swizzle may take longer
                plgpu.store(here, total, optimized=False)
            else:
                here[...] = total
        plgpu.commit_smem()
        for t in range(tall):
            here = y_tile.at[place.group * tall + t]
            if not tiles:
                there = y.at[place.part * count + place.matrix, pl.ds(place.tokens * tile, tile)]
                plgpu.copy_smem_to_gmem(here, there.at[:, place.own_of_matrix(t)])
                continue
            # A copy has a fixed size, and the number of tokens is known when the kernel runs.
            cells = (end - begin) // CELL

            def copy(size: int, start: Any, here: Any = here, t: int = t) -> None:
                there = y.at[place.part, pl.ds(start, size), place.own_of_matrix(t)]
                plgpu.copy_smem_to_gmem(here.at[pl.ds(start - place.first, size)], there)

            lax.fori_loop(0, cells, lambda i, _: copy(CELL, begin + i * CELL), None)
            lax.fori_loop(begin + cells * CELL, end, lambda i, _: copy(1, i), None)
        plgpu.wait_smem_to_gmem(0)

    def zeros(kept: int = 0) -> tuple[Array, ...]:
        totals = tuple(plgpu.layout_cast(jnp.zeros((ROWS, tile), sums), layouts.WGMMA) for _ in range(tall))
        of_rows = layouts.WGMMA.reduce(1)
        return totals + tuple(plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), of_rows) for _ in range(kept))

    def body(*refs: Any) -> None:
        operands, (y, y_tile, *arrived) = list(refs[: -2 - len(barriers)]), refs[-2 - len(barriers) :]
        place = Place(*(lax.axis_index(name) for name in ("warpgroup", "matrix", "rows", "tokens", "part")), tall=tall)
        if not tiles:
            added = dict(zip(terms, operands[len(operands) - len(terms) :], strict=True))
            operands = operands[: len(operands) - len(terms)]
            return product(place, operands, y, y_tile, added=added, arrived=arrived)
        table, *operands = operands
        matrix, cell, begin, end = (table[place.tokens, column] for column in range(4))
        place = place._replace(matrix=matrix, first=cell * CELL)  # the compiler wants to see the multiple
        pl.when((begin < end) & (matrix >= 0))(lambda: product(place, operands, y, y_tile, begin, end))

        @pl.when((begin < end) & (matrix < 0) & (place.group < WARPGROUPS))
        def _() -> None:
            store(zeros(), place, y, y_tile, begin, end)

    def product(
        place: Place, operands: Sequence[Any], *there: Any, added: Any = None, arrived: Sequence[Any] = ()
    ) -> None:
        step, finish, ring, kept = work(place, *operands)

        def around(pipeline: Any) -> None:
            if terms:
                fetch(place, added, there[1], arrived)
            totals = pipeline(zeros(kept))
            sums = [finish(totals, t) for t in range(tall)]
            if terms:
                sums = [with_terms(total, t, place, added, there[1], arrived) for t, total in enumerate(sums)]
            store(sums, place, *there)

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
    grid = {
        "rows": rows // (tall * WIDE),
        "tokens": tiles or -(-tokens // tile),
        "part": schedule.splits,
        "matrix": count,
    }
    names = ("matrix", "tokens", "rows", "part") if tiles else tuple(grid)
    # Tokens are copied one by one where a tile may end anywhere: they lie in rows, not in swizzled cells. jax 0.10
    # wants that said as tiles of one row, and newer ones take no such tiles.
    in_rows = () if JAX_VERSION >= (0, 11) else (plgpu.TilingTransform((1, ROWS)),)
    transforms = in_rows if tiles else tiling(1024 // bits, bits)
    barriers = [plgpu.Barrier(num_barriers=WARPGROUPS * tall)] if "residual" in terms else []
    return plgpu.kernel(
        body,
        out_type=out,
        grid=tuple(grid[name] for name in names),
        grid_names=names,
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((WARPGROUPS * tall, tile, ROWS), out.dtype, transforms=transforms), *barriers],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )
