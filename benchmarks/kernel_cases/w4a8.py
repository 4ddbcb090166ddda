"""W4A8: codes of activations times 4-bit weights in tiles, by both schedules."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_cases.weights16 import BOTH, described, given_terms, plus
from qjax.formats import CodeTiles, DualGrained, Format, Int, Progressive
from qjax.formats.tiles import rounded_up
from qjax.kernels.dot.codes4x8 import codes4x8
from qjax.kernels.dot.hopper import STEP, TOKENS, Schedule
from qjax.kernels.dot.w4a8 import footprint


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled kernel."""

    fmt: Format
    schedule: Schedule
    n: int = 1024
    k: int = 4096
    terms: tuple[str, ...] = ()
    multiplies = "IGMMA"

    @property
    def name(self) -> str:
        """As the table calls it; the dtype is the result's."""
        return f"W4A8 {self.fmt.name}{plus(self.terms)}, bfloat16, {described(self.schedule)}"

    def function(self) -> Any:
        """The kernel, and the shapes of its arguments."""
        fmt, rows, tokens = CodeTiles(self.fmt, self.k), rounded_up(self.n), self.schedule.tokens
        one = lambda dtype, *shape: jax.ShapeDtypeStruct((1, *shape), dtype)  # noqa: E731
        arguments = (
            one(np.int32, rows * fmt.padded_length // 8),
            one(np.int16, fmt.blocks * rows) if fmt.leveled else None,
            one(np.float32, (1 if fmt.whole_rows else fmt.blocks) * rows),
            one(np.int8, tokens, self.k),
            one(np.float32, tokens),
        )
        steps = self.k // (STEP * self.schedule.splits * self.schedule.deep)
        schedule = footprint(fmt).filled(self.schedule, steps, 2)
        how = {"fmt": fmt, "n": self.n, "out_dtype": jnp.dtype(jnp.bfloat16), "schedule": schedule}
        run = functools.partial(codes4x8, **how)
        return given_terms(run, arguments, self.terms, self.n, tokens, "bfloat16")


def cases() -> list[Case]:
    """Every tile of tokens, every kind of number, whole and cut."""
    g128 = DualGrained(group=128)
    few = Schedule(16, 0, tall=2, deep=2)
    out = [Case(g128, Schedule(t, 0)) for t in TOKENS]
    out += [Case(g128, Schedule(t, 0, 4)) for t in (16, 128)]
    out += [Case(g128, few), Case(g128, Schedule(64, 0, tall=2)), Case(g128, Schedule(128, 0, tall=2))]
    one_sum = (Progressive(group=128), Progressive(group=32, zeros="post"), Int(4), Int(4, symmetric=False))
    out += [Case(fmt, schedule) for fmt in one_sum for schedule in (few, Schedule(128, 0, tall=2))]
    in_blocks = (Int(4, group=128), Int(4, group=64), Int(4, group=128, symmetric=False))
    out += [Case(fmt, schedule) for fmt in in_blocks for schedule in (few, Schedule(128, 0))]
    return out + [Case(g128, schedule, terms=BOTH) for schedule in (few, Schedule(128, 0, tall=2))]
