"""How the products on Hopper are cut: rules of thumb, and what was measured best where there is such a figure.

With few tokens a product takes as long as its weights take to arrive. What counts is how many bytes are under way on
each processor, and how few steps of the ring they come in; so blocks of threads are tall and steps are deep where there
are enough rows to go round. With many tokens tensor cores are the limit, if activations arrive in time: a tall block
reads each of them for twice as many rows. Experiments on an H200 led to these rules. What they give is not measured
yet, and where a device was tuned (`qjax.kernels.tuned`) its figures go before them.
"""

from __future__ import annotations

import dataclasses

from qjax.formats.tiles import rounded_up
from qjax.kernels.dot.hopper import CELL, STEP, TOKENS, WIDE, Schedule
from qjax.kernels.registry import Problem
from qjax.kernels.tuned import Key, bucket, schedule_of

PROCESSORS = 132
"""Streaming multiprocessors of an H100 SXM or H200: one block of threads each."""

FEWEST_STEPS = 4
"""Steps that a part of a cut K has at least, so that its ring fills."""

SHARED = 220 * 1024
"""Bytes of shared memory that ring and results may take; the rest of 227 KiB is for barriers."""

MOST_STAGES = 10
"""Steps under way at most. A guess."""

FEW = 64
"""Tokens up to which registers hold, for twice as many rows, sums of blocks besides totals."""

DEEP = 16
"""Tokens up to which a step is twice as deep."""

REVISIONS = {"codes8": 1, "codes4x8": 2, "words16": 2, "mixed16": 1}
"""Of each kernel; raised where a schedule means another program, so that what was measured before is not taken."""


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a kernel holds of a step in shared memory, and how it may be cut.

    Attributes:
        weight: bytes of `WIDE` rows and `STEP` columns, with scales and zero points.
        act: bytes of one activation.
        tall: whether warpgroups may multiply several tiles, of rows and of columns.
        one_sum: whether one sum for each row and token is enough, so that there may be several tiles with any number of
            tokens: sums of integers, scales per row, or scales that roll.
        rolling: whether it is enough only if scales roll.
        deep: times `STEP` columns that the tiles of the weight have, and a step at least.
    """

    weight: int
    act: int = 2
    tall: bool = False
    one_sum: bool = False
    rolling: bool = False
    deep: int = 1

    def padded(self, k: int) -> int:
        """Return the columns of a weight with ``k`` of them, in whole tiles."""
        return -(-k // (self.deep * STEP)) * self.deep * STEP

    def shared(self, schedule: Schedule, out_bytes: int) -> int:
        """Return the bytes of shared memory that a schedule takes, for results of so many bytes each."""
        return schedule.stages * self.stage(schedule) + schedule.tall * WIDE * schedule.tokens * _stored(
            schedule, out_bytes
        )

    def stage(self, schedule: Schedule) -> int:
        """Return the bytes of a step of the ring."""
        return schedule.deep * (schedule.tall * self.weight + schedule.tokens * STEP * self.act)

    def filled(self, schedule: Schedule, steps: int, out_bytes: int) -> Schedule:
        """Return a schedule with as many stages as there is room for, of ``steps`` that a part of K has."""
        room = SHARED - self.shared(dataclasses.replace(schedule, stages=0), out_bytes)
        stages = max(1, min(MOST_STAGES, room // self.stage(schedule), max(steps, 1)))
        return dataclasses.replace(schedule, stages=stages)

    def refuses(self, schedule: Schedule, out_bytes: int) -> str | None:
        """Return why a kernel cannot be cut so, or None."""
        several = schedule.tall > 1 or schedule.deep > self.deep
        if several and not self.tall or schedule.rolling and not self.rolling or schedule.deep % self.deep:
            return "the kernel has no such steps"
        if schedule.tall > 1 and schedule.tokens > FEW and not (self.one_sum and schedule.rolling == self.rolling):
            return f"registers hold no sums of so many rows and {schedule.tokens} tokens"
        taken = self.shared(schedule, out_bytes)
        return f"{taken} bytes of shared memory, of {SHARED}" if taken > SHARED else None


def _stored(schedule: Schedule, out_bytes: int) -> int:
    """Bytes of a result as a block of threads writes it: sums of parts of K are wide."""
    return 4 if schedule.splits > 1 or out_bytes != 2 else 2


def schedule_for(
    n: int, k: int, rows: int, matrices: int = 1, *, footprint: Footprint, out_bytes: int = 2, tokens: int = 0
) -> Schedule:
    """Return how a product is cut by the rule of thumb.

    The smallest tile that holds all tokens, or 128 tokens; K is cut where the tiles leave processors without work;
    twice as tall and deep where that leaves enough blocks of threads, and as many stages as fit.

    Args:
        n: rows of the weight.
        k: its columns.
        rows: tokens of one matrix.
        matrices: products of that size.
        footprint: of the kernel.
        out_bytes: of a result.
        tokens: of a tile, in place of the smallest that holds all.
    """
    tokens = tokens or next((t for t in TOKENS if t >= rows), TOKENS[-1])
    blocks = rounded_up(n) // WIDE * -(-rows // tokens) * matrices
    steps = footprint.padded(k) // (footprint.deep * STEP)
    fits = [s for s in range(1, steps + 1) if steps % s == 0 and steps // s * footprint.deep >= FEWEST_STEPS]
    splits = max([s for s in fits if s * blocks <= PROCESSORS], default=1)
    schedule = Schedule(tokens, 1, splits, deep=footprint.deep)
    # One block on each of six of seven processors is as good as two on each of most of them.
    enough = blocks // 2 >= PROCESSORS * 5 // 6
    if footprint.tall and enough and rounded_up(n) % (2 * WIDE) == 0:
        tall = dataclasses.replace(schedule, tall=2, rolling=footprint.rolling and tokens > FEW)
        if footprint.refuses(dataclasses.replace(tall, stages=3), out_bytes) is None:
            schedule = tall
    part = steps // splits
    if footprint.tall and footprint.deep == 1 and tokens <= DEEP and part % 2 == 0 and part // 2 >= FEWEST_STEPS:
        deep = footprint.filled(dataclasses.replace(schedule, deep=2), part // 2, out_bytes)
        if deep.stages >= FEWEST_STEPS:  # fewer large steps than that leave gaps between them
            return deep
    return footprint.filled(schedule, part, out_bytes)


def chosen(kernel: str, problem: Problem, tokens: int, footprint: Footprint) -> Schedule:
    """Return how a product is cut: as was measured best on this device, else by `schedule_for`.

    Args:
        kernel: one of `REVISIONS`.
        problem: what is to be computed.
        tokens: rows of one matrix product.
        footprint: of the kernel.
    """
    formats = problem.weight.name + (f" x {problem.act.name}" if problem.act else "")
    n, k = rounded_up(problem.n), footprint.padded(problem.k)
    key = Key(kernel, REVISIONS[kernel], formats, problem.x_dtype.name, n, k, bucket(tokens), problem.matrices)
    out_bytes = problem.out_dtype.itemsize
    rule = schedule_for(n, k, tokens, problem.matrices, footprint=footprint, out_bytes=out_bytes)
    return schedule_of(key, rule, lambda s: s.fits(n, k) and footprint.refuses(s, out_bytes) is None)


def ragged_schedule_for(
    n: int, k: int, rows: int, groups: int, *, footprint: Footprint, out_bytes: int = 2
) -> Schedule:
    """Return how a ragged product is cut; a rule of thumb.

    How rows spread over groups is not known when compiling. A tile holds half as many more rows as a group has where
    all have as many, and what lies between the multiple of 8 and its first row, so that most groups are one tile and
    their weights are read once. K is cut where as many groups as there may be leave processors without work.

    Args:
        n: rows of a matrix.
        k: its columns.
        rows: tokens of all groups.
        groups: matrices.
        footprint: of the kernel.
        out_bytes: of a result.
    """
    filled = max(1, min(groups, rows))
    wanted = rows if rows <= CELL else 1.5 * rows / filled + CELL - 1
    tokens = next((t for t in TOKENS if t >= wanted), TOKENS[-1])
    tiles = max(filled, rows // tokens)
    return schedule_for(n, k, tokens, tiles, footprint=footprint, out_bytes=out_bytes, tokens=tokens)


def chosen_ragged(kernel: str, problem: Problem, rows: int, footprint: Footprint) -> Schedule:
    """Return how a ragged product is cut: as was measured best on this device, else by `ragged_schedule_for`.

    Its program is that of the plain product but for the table, so both have one revision.

    Args:
        kernel: one of `REVISIONS`.
        problem: what is to be computed, its stack the groups.
        rows: tokens of all groups.
        footprint: of the kernel.
    """
    n, k = rounded_up(problem.n), footprint.padded(problem.k)
    formats, dtype = problem.weight.name, problem.x_dtype.name
    key = Key(f"ragged_{kernel}", REVISIONS[kernel], formats, dtype, n, k, bucket(rows), problem.matrices)
    out_bytes = problem.out_dtype.itemsize
    rule = ragged_schedule_for(n, k, rows, problem.matrices, footprint=footprint, out_bytes=out_bytes)
    return schedule_of(key, rule, lambda s: s.fits(n, k) and footprint.refuses(s, out_bytes) is None)
