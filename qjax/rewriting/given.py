"""Giving numbers to sites: arrays that enter a program beside its operands and reach each site inside control flow.

Learned scales belong to sites, and a training step differentiates in them, so they have to be operands of the bodies
of scans and of shared calls and not constants of theirs:

    jit            further operands, by the address of the read below the call
    scan           further xs, where the loop slices the parameter: each step gets its own
    remat, cond, while, shard_map    closed over
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.errors import RecipeError
from qjax.rewriting.taps import Collector

Fields = dict[str, Any]
"""Name -> array of one site."""


class Giver(Collector):
    """Replays a program whose sites are given arrays, and may contribute some.

    Args:
        program: the trace.
        decisions: site name -> what its product is told.
        taps: site name -> tap, for those that contribute; see `qjax.rewriting.taps`.
        fields: site name -> arrays; sites of one read have fields of the same names and shapes.
    """

    def __init__(
        self, program: Any, decisions: Mapping[str, Any], taps: Mapping[str, Any], fields: Mapping[str, Fields]
    ):
        super().__init__(program, decisions)
        self.taps = dict(taps)
        self.given: dict[int, Fields] = {}
        self.loops_left: dict[int, tuple[int, ...]] = {}
        for number, table in enumerate(program.slices):
            names = [n for n in table.name_of.values() if n in fields]
            if names:
                self.given[number] = self._stacked_fields(table, fields, names)
                self.loops_left[number] = table.loops

    def _stacked_fields(self, table: Any, fields: Mapping[str, Fields], names: Sequence[str]) -> Fields:
        """Fields with a leading axis for each loop that chooses the slice."""
        lengths = [self.program.analysis.loops[loop].length if loop >= 0 else None for loop in table.loops]
        if any(n is None for n in lengths):
            raise RecipeError(
                f"{names[0]}: which slice of its weight is read is only known when the program runs, so it cannot be "
                "given a scale of its own; leave out learned, averaged and static scales here"
            )
        if set(names) != set(table.name_of.values()):
            missing = next(n for n in table.name_of.values() if n not in fields)
            raise RecipeError(
                f"{missing} is quantized in another way than {names[0]}, which the same loop runs; give both one rule"
            )
        steps = itertools.product(*(range(n) for n in lengths if n is not None))
        found = [fields[table.name_of[table.by_step[step]]] for step in steps]
        size = [n for n in lengths if n is not None]
        return {k: jnp.stack([f[k] for f in found]).reshape(*size, *found[0][k].shape) for k in found[0]}

    @property
    def observing(self) -> bool:
        """Whether some site contributes."""
        return bool(self.taps)

    def given_to_call(self, below: Sequence[tuple[Any, int]]) -> list[Any]:
        """Fields of the reads below a call, None for those that have none."""
        return [self.given.get(number) for _, number in below]

    def given_to_scan(self, path: Any, loop: int, steps: Sequence[int]) -> dict[int, Fields]:
        """Fields of the reads below a scan that it slices, a row a step."""
        rows = np.asarray(steps, np.int32)
        out = {}
        for _, number in self.active.get(path, ()):
            left = self.loops_left.get(number, ())
            if loop in left:
                at = left.index(loop)
                out[number] = {k: jnp.moveaxis(a, at, 0)[rows] for k, a in self.given[number].items()}
        return out

    @contextlib.contextmanager
    def giving(self, given: Mapping[int, Any], loop: int | None = None) -> Iterator[None]:
        """Inside a body."""
        before = self.given, self.loops_left
        self.given = {**self.given, **{n: fields for n, fields in given.items() if fields is not None}}
        if loop is not None:
            self.loops_left = {n: tuple(k for k in left if k != loop) for n, left in self.loops_left.items()}
        try:
            yield
        finally:
            self.given, self.loops_left = before

    def fields_of(self, number: int, where: str) -> Fields:
        """What the running step of a read is given."""
        if self.loops_left.get(number):
            raise RecipeError(
                f"{where}: it runs in a while loop that slices its weight, so the running step is not known and it "
                "cannot be given a scale of its own; use scan, or leave out learned, averaged and static scales here"
            )
        return self.given.get(number, {})
