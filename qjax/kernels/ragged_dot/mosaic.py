"""The lowering of ragged products on NVIDIA's Hopper, by the kernel of `tiles16`."""

from __future__ import annotations

from jax import Array

from qjax.formats import QArray
from qjax.formats.tiles import IntTiles, rounded_up
from qjax.kernels.dot.hopper import CELL, STEP, TOKENS, WIDE, Schedule
from qjax.kernels.dot.mosaic import FEWEST_STEPS, PROCESSORS, REVISIONS, STAGES, on_hopper, refuses_tiles
from qjax.kernels.ragged_dot.reference import ragged_dot_reference
from qjax.kernels.ragged_dot.tiles16 import ragged_tiles16
from qjax.kernels.registry import Act, Problem, register_lowering
from qjax.kernels.tuned import Key, bucket, schedule_of


def ragged_schedule_for(n: int, k: int, rows: int, groups: int) -> Schedule:
    """Return how a ragged product is cut; a rule of thumb until configurations are tuned on a device.

    How rows spread over groups is not known when compiling. A tile holds half as many more rows as a group has where
    all have as many, and what lies between the multiple of 8 and its first row, so that most groups are one tile and
    their weights are read once. K is cut where as many groups as there may be leave processors without work.

    Args:
        n: rows of a matrix.
        k: its columns.
        rows: tokens of all groups.
        groups: matrices.
    """
    filled = max(1, min(groups, rows))
    wanted = rows if rows <= CELL else 1.5 * rows / filled + CELL - 1
    tokens = next((t for t in TOKENS if t >= wanted), TOKENS[-1])
    blocks = rounded_up(n) // WIDE * max(filled, rows // tokens)
    steps = rounded_up(k) // STEP
    fits = [s for s in range(1, steps + 1) if steps % s == 0 and steps // s >= FEWEST_STEPS]
    splits = max([s for s in fits if s * blocks <= PROCESSORS], default=1)
    return Schedule(tokens, STAGES[tokens], splits)


def ragged_schedule(problem: Problem, rows: int) -> Schedule:
    """Return how a ragged product is cut: as was measured best on this device, else by `ragged_schedule_for`.

    Its program is that of `tiles16` but for the table, so both have one revision.

    Args:
        problem: what is to be computed, its stack the groups.
        rows: tokens of all groups.
    """
    n, k = rounded_up(problem.n), rounded_up(problem.k)
    formats, dtype = problem.weight.name, problem.x_dtype.name
    key = Key("ragged_tiles16", REVISIONS["tiles16"], formats, dtype, n, k, bucket(rows), problem.matrices)
    rule = ragged_schedule_for(problem.n, problem.k, rows, problem.matrices)
    return schedule_of(key, rule, lambda s: k // STEP % s.splits == 0)


def _refuses(problem: Problem) -> str | None:
    if problem.act is not None:
        act = f"activations are quantized ({problem.act.name})"
        return f"{act}, and a weight in tiles takes 16-bit floats; qjax.ops.neutral(w)"
    return refuses_tiles(problem)


@register_lowering(
    "ragged_dot",
    IntTiles,
    "cuda",
    when=on_hopper(_refuses),
    name="mosaic",
    priority=5,
    about="wgmma on Hopper: codes of 4 or 8 bits, packed for it, with 16-bit activations",
)
def mosaic(problem: Problem, x: Array, w: QArray, act: Act | None, group_sizes: Array) -> Array:
    """Return the ragged product by the kernel."""
    (groups,) = problem.stack
    if x.size == 0 or not problem.n or not groups:
        return ragged_dot_reference(problem, x, w, act, group_sizes)
    assert isinstance(problem.weight, IntTiles)
    zero = w.aux.get("zero")
    return ragged_tiles16(
        w.aux["tiles"].reshape(groups, -1),
        w.aux["scale"].reshape(groups, -1),
        None if zero is None else zero.reshape(groups, -1),
        x,
        group_sizes,
        fmt=problem.weight,
        n=problem.n,
        out_dtype=problem.out_dtype,
        schedule=ragged_schedule(problem, x.shape[0]),
    )
