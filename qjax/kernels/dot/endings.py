"""A bias and a residual in the kernels of `hopper`: added to float32 sums in registers, which are rounded afterwards.

A bias is a number for each row of the weight, and is read as a scale per row is. A residual has the shape of the
result: TMA brings its tile, while the ring runs, to where the result is put together in shared memory, and each thread
replaces the numbers that it adds by their sums. So it takes no memory of its own, but has to have the dtype of the
result. Where K is cut, parts are written as they are, and both are added where XLA sums them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qjax.kernels.dot.hopper import Schedule, in_cells
from qjax.kernels.dot.terms import TERMS, with_terms


@dataclasses.dataclass(frozen=True)
class Ending:
    """What becomes of the sums of a product.

    Attributes:
        terms: "bias" [E, N] and "residual" [E, M, N] of the dtype of the result; one of them, or none.
        dtype: of the result.
        schedule: how the work is cut.
    """

    terms: Mapping[str, Array]
    dtype: Any
    schedule: Schedule

    @property
    def inside(self) -> tuple[str, ...]:
        """What the kernel itself adds."""
        return tuple(name for name in TERMS if name in self.terms) if self.schedule.splits == 1 else ()

    def operands(self, out: jax.ShapeDtypeStruct, rows: int) -> list[Array]:
        """Return what stands behind the operands of a kernel that writes ``out``, of so many padded rows."""
        given = []
        for name in self.inside:
            a = self.terms[name]
            if name == "residual":
                given.append(in_cells(a, out.shape[2]))
            else:
                a = a if a.dtype.itemsize in (2, 4) else a.astype(jnp.float32)
                given.append(jnp.pad(a, ((0, 0), (0, rows - a.shape[1]))) if a.shape[1] < rows else a)
        return given

    def finished(self, y: Array) -> Array:
        """Return the result from what kernels wrote, parts of K summed: [E, M, N]."""
        return with_terms(y, {} if self.inside else self.terms, self.dtype)
