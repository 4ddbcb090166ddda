"""Strips of 2 and 4 bits times 16-bit activations."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernel_cases.weights16 import described, shapes
from qjax import ops
from qjax.formats import Layout, MixedBits, MixedTiles, QArray
from qjax.kernels.dot.hopper import STEP, TOKENS, Schedule
from qjax.kernels.dot.mixed16 import FOOTPRINT, mixed16

FORMATS = (
    MixedBits(),
    MixedBits(outliers=0.005),
    MixedBits(1 / 8, select="global"),
    MixedBits(0, select="global"),
)
ALONE = (MixedBits(0, select="global"), MixedBits(1, select="global"))
"""Strips of one width: a kernel each, which are two of one product where strips are chosen over the whole matrix."""


def kernel(fmt: MixedBits) -> str:
    """A weight and its activations, as the table calls them."""
    return f"W{4 if fmt.share == 1 else 2}A16 {fmt.name}"


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled kernel; corrections are not in it, nor what puts activations in order."""

    fmt: MixedBits
    dtype: str
    schedule: Schedule
    n: int = 1024
    k: int = 4096
    multiplies = "HGMMA"

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"{kernel(self.fmt)}, {self.dtype}, {described(self.schedule)}"

    def function(self) -> Any:
        """The kernel, and the shapes of its arguments."""
        w = shapes(self.fmt, self.n, self.k)
        aux = {name: jax.ShapeDtypeStruct((1, a.size), a.dtype) for name, a in w.aux.items()}
        x = jax.ShapeDtypeStruct((1, self.schedule.tokens, self.k), self.dtype)
        schedule = FOOTPRINT.filled(self.schedule, self.k // (STEP * self.schedule.splits * self.schedule.deep), 2)
        how = {"n": self.n, "out_dtype": jnp.dtype(self.dtype), "schedule": schedule}
        return functools.partial(mixed16, fmt=MixedTiles(self.fmt, self.k), **how), (aux, x)


def programs() -> dict[str, tuple[Any, Any, int]]:
    """Layers of one stack: function, shapes of its arguments, bytes of one layer's tiles."""
    n = k = 1024
    layers = 4
    one = shapes(FORMATS[0], n, k)
    aux = {name: jax.ShapeDtypeStruct((layers, *a.shape), a.dtype) for name, a in one.aux.items()}
    order = (("s", 0), ("o", 0), ("i", 0))
    codes = jax.ShapeDtypeStruct((layers, n, 0), jnp.int8)
    w = QArray(codes, aux, MixedTiles(FORMATS[0], k), Layout(order), jnp.dtype(jnp.bfloat16))

    def scanned(x: Any, w: QArray) -> Any:
        return jax.lax.scan(lambda x, w: (ops.q_dot(x, w, streamed=True), None), x, w)[0]

    return {"a scan over layers": (scanned, (jax.ShapeDtypeStruct((4, k), jnp.bfloat16), w), n * k * 3 // 8)}


def cases() -> list[Case]:
    """Every tile of tokens, both dtypes, whole and cut, tall."""
    one = FORMATS[0]
    out = [Case(one, "bfloat16", Schedule(t, 0, deep=2)) for t in TOKENS]
    out += [Case(one, "bfloat16", Schedule(t, 0, tall=2, deep=2)) for t in (16, 64)]
    out += [Case(one, "float16", Schedule(t, 0, deep=2)) for t in (16, 128)]
    out += [Case(fmt, "bfloat16", Schedule(t, 0, deep=2)) for t in (16, 128) for fmt in ALONE]
    out += [Case(fmt, "bfloat16", Schedule(16, 0, tall=2, deep=2)) for fmt in ALONE]
    return [*out, Case(one, "bfloat16", Schedule(8, 0, 4, deep=2))]
