"""Weights in words times 16-bit activations: float8, NF4, 4-bit floats, 2 bits, trit-planes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernel_cases.weights16 import described
from qjax import ops
from qjax.formats import MXFP4, NF4, NVFP4, Float8, Format, Int, QArray, TritPlanes, quantize_array
from qjax.kernels.dot.hopper import Schedule
from qjax.kernels.dot.mosaic import STAGES
from qjax.kernels.dot.words16 import words16

FORMATS = (
    Float8(),
    Float8(group=128),
    NF4(),
    MXFP4(),
    NVFP4(),
    Int(2, group=128),
    Int(2, group=64, symmetric=False),
    TritPlanes(),
    TritPlanes(tied=True),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled kernel."""

    fmt: Format
    dtype: str
    schedule: Schedule
    n: int = 1024
    k: int = 4096
    multiplies = "HGMMA"

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"W{self.fmt.code_bits}A16 {self.fmt.name}, {self.dtype}, {described(self.schedule)}"

    def function(self) -> Any:
        """The kernel, and the shapes of its arguments."""
        w = shapes(self.fmt, self.n, self.k)
        aux = {name: jax.ShapeDtypeStruct((1, a.size), a.dtype) for name, a in w.aux.items()}
        x = jax.ShapeDtypeStruct((1, self.schedule.tokens, self.k), self.dtype)
        how = {"n": self.n, "out_dtype": jnp.dtype(self.dtype), "schedule": self.schedule}
        return functools.partial(words16, planes=w.fmt.planes, **how), (aux, x)  # pyright: ignore[reportAttributeAccessIssue]


def shapes(fmt: Format, n: int, k: int) -> QArray:
    """A packed weight, abstractly."""
    return jax.eval_shape(lambda: ops.pack(quantize_array(jnp.zeros((n, k)), fmt, in_axes=1)))


def cases() -> list[Case]:
    """Every format in bfloat16 for few tokens and many; some in float16, some cut."""
    out = [Case(fmt, "bfloat16", Schedule(t, STAGES[t])) for t in (16, 128) for fmt in FORMATS]
    some = (Float8(), NF4(), MXFP4(), NVFP4(), Int(2, group=128))
    out += [Case(fmt, "float16", Schedule(16, STAGES[16])) for fmt in some]
    return out + [Case(fmt, "bfloat16", Schedule(8, STAGES[8], 4)) for fmt in (Float8(), NF4(), TritPlanes())]
