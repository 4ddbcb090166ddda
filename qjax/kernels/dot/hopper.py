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
    interpret: Any = None,
) -> Callable[..., Array]:
    """Return the kernel of a product.

    Args:
        work: called with a `Place` and the operands in global memory.
        out: [splits E, M, N] and its dtype.
        rows: N, padded to whole tiles.
        steps: of 128 columns in a part of K.
        sums: dtype of the sum over steps.
        schedule: how the work is cut.
        interpret: settings of the interpreter, for tests.
    """
    pl, plgpu = pallas()
    layouts, tile = plgpu.Layout, schedule.tokens
    count, tokens = out.shape[0] // schedule.splits, out.shape[1]
    bits = out.dtype.itemsize * 8

    def body(*refs: Any) -> None:
        *operands, y, y_tile = refs
        axes = ("warpgroup", "matrix", "rows", "tokens", "part")
        place = Place(*(lax.axis_index(name) for name in axes))
        step, finish, ring = work(place, *operands)

        def around(pipeline: Any) -> None:
            total = finish(pipeline(plgpu.layout_cast(jnp.zeros((ROWS, tile), sums), layouts.WGMMA))).astype(out.dtype)
            if bits == 32 or JAX_VERSION < (0, 11):  # others are turned as they are stored
                total = plgpu.layout_cast(total, layouts.WGMMA_TRANSPOSED)
            turned(y_tile.at[place.group])[...] = total
            plgpu.commit_smem()
            there = y.at[place.part * count + place.matrix, pl.ds(place.tokens * tile, tile), own_rows(place)]
            plgpu.copy_smem_to_gmem(y_tile.at[place.group], there)
            plgpu.wait_smem_to_gmem(0)

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

    return plgpu.kernel(
        body,
        out_type=out,
        grid=(rows // WIDE, -(-tokens // tile), schedule.splits, count),
        grid_names=("rows", "tokens", "part", "matrix"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((WARPGROUPS, tile, ROWS), out.dtype, transforms=tiling(1024 // bits, bits))],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )
