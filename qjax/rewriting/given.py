"""Giving numbers to sites: arrays that enter a program beside its operands and reach each site inside control flow.

Learned scales and low-rank factors belong to sites, and a training step differentiates in them, so they have to be
operands of the bodies of scans and of shared calls and not constants of theirs:

    jit            further operands, those of the call
    scan           stacked, as further xs beside the weights, so that a step's derivative is that step's row
    remat, cond, while, shard_map    closed over
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.rewriting.steps import Context

Step = tuple[int, ...]
Fields = Mapping[str, Any]
"""Name -> array of one site."""


class Giver:
    """What a `qjax.rewrite.Rewriter` adds that gives arrays to sites; it comes before the rewriter among the bases."""

    program: Any
    brings_scores = False
    held: dict[int, dict[Step, Fields]]
    """Number of a read -> the steps of the loops that choose its slice and that are still open -> arrays."""

    def hold(self, fields: Mapping[str, Fields]) -> None:
        """Give these arrays to sites, by name."""
        self.held = {}
        for number, table in enumerate(self.program.slices):
            found = {s: fields[table.name_of[k]] for s, k in table.by_step.items() if table.name_of[k] in fields}
            if found:
                self.held[number] = found

    def given(self, number: int) -> Fields | None:
        """What the running step of a read is given; None where the step is known only when the program runs."""
        return self.held.get(number, {}).get(())

    def brought(self, numbers: Sequence[int]) -> list[Any]:
        """The arrays of each read at the steps that are still open, as a tree."""
        return [self.held.get(n, {}) for n in numbers]

    def brought_rows(self, numbers: Sequence[int], loop: int, order: Sequence[int], context: Context) -> dict[int, Any]:
        """The arrays of reads whose slices a loop takes, with a leading axis that runs over the steps ``order``."""
        out = {}
        for n in numbers:
            open_loops = [i for i in self.program.slices[n].loops if i not in context]
            if n not in self.held or loop not in open_loops:
                continue
            at = open_loops.index(loop)
            rows: dict[Step, list[Fields]] = {}
            for t in order:
                for step, fields in self.held[n].items():
                    if step[at] == t:
                        rows.setdefault((*step[:at], *step[at + 1 :]), []).append(fields)
            out[n] = {rest: jax.tree.map(lambda *a: jnp.stack(a), *parts) for rest, parts in rows.items()}
        return out

    @contextlib.contextmanager
    def bringing(self, held: Mapping[int, Any]) -> Iterator[None]:
        """Let these arrays be the ones of their reads inside."""
        before, self.held = self.held, {**self.held, **held}
        try:
            yield
        finally:
            self.held = before
