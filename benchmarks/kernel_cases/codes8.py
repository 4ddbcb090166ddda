"""W8A8: codes of activations times codes of weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_cases.weights16 import BOTH, described, given_terms, plus
from qjax.formats import Float8, Int
from qjax.kernels.dot.codes8 import codes8
from qjax.kernels.dot.hopper import STEP, Schedule
from qjax.kernels.dot.mosaic import CODES8


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled kernel."""

    fmt: Int | Float8
    schedule: Schedule
    n: int = 1024
    k: int = 4096
    terms: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As the table calls it; the dtype is the result's."""
        return f"W8A8 {self.fmt.name}{plus(self.terms)}, bfloat16, {described(self.schedule)}"

    @property
    def multiplies(self) -> str:
        """The instruction that it has to use."""
        return "IGMMA" if isinstance(self.fmt, Int) else "QGMMA"

    def function(self) -> Any:
        """The kernel, and the shapes of its arguments."""
        tokens, dtype = self.schedule.tokens, self.fmt.code_dtype
        one = lambda dtype, *shape: jax.ShapeDtypeStruct((1, *shape), dtype)  # noqa: E731
        ours, theirs = (one(dtype, rows, self.k) for rows in (self.n, tokens))
        arguments = (ours, one(np.float32, self.n), theirs, one(np.float32, tokens))
        schedule = CODES8.filled(self.schedule, self.k // STEP // self.schedule.splits, 2)
        run = functools.partial(codes8, out_dtype=jnp.dtype(jnp.bfloat16), schedule=schedule)
        return given_terms(run, arguments, self.terms, self.n, tokens, "bfloat16")


def cases() -> list[Case]:
    """Both dtypes of codes, every width of tile, whole and cut."""
    out = [
        Case(fmt, Schedule(t, 0, splits))
        for fmt in (Int(8), Float8())
        for t, splits in ((8, 1), (16, 4), (64, 1), (128, 1))
    ]
    return [*out, Case(Int(8), Schedule(64, 0), terms=BOTH)]
