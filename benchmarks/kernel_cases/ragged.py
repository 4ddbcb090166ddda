"""Ragged products of 16-bit activations with experts in tiles, and whole programs around that kernel."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernel_cases.weights16 import G128, described
from qjax import ops
from qjax.formats import Int, IntTiles, Layout, QArray
from qjax.formats.tiles import rounded_up
from qjax.kernels.dot.hopper import Schedule
from qjax.kernels.dot.mosaic import STAGES
from qjax.kernels.ragged_dot.tiles16 import ragged_tiles16


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled kernel: what is fixed when it is compiled, on experts large enough to fill its ring."""

    fmt: Int
    dtype: str
    schedule: Schedule
    groups: int = 8
    n: int = 1024
    k: int = 4096
    multiplies = "HGMMA"

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"ragged W{self.fmt.code_bits}A16 {self.fmt.name}, {self.dtype}, {described(self.schedule)}"

    def function(self) -> Any:
        """The kernel, and the shapes of its arguments: twice as many tokens as the groups' tiles hold."""
        fmt, shape = IntTiles(self.fmt, self.k), jax.ShapeDtypeStruct
        codes = jnp.uint8 if self.fmt.bits == 4 else jnp.int8
        numbers = (self.groups, fmt.blocks * rounded_up(self.n))
        arguments = (
            shape((self.groups, rounded_up(self.n) * fmt.padded_length * self.fmt.bits // 8), codes),
            shape(numbers, jnp.float32),
            None if self.fmt.symmetric else shape(numbers, jnp.bfloat16),
            shape((self.schedule.tokens * (2 * self.groups if self.schedule.tokens > 8 else 1), self.k), self.dtype),
            shape((self.groups,), jnp.int32),
        )
        how = {"fmt": fmt, "n": self.n, "out_dtype": jnp.dtype(self.dtype), "schedule": self.schedule}
        return functools.partial(ragged_tiles16, **how), arguments


def experts(n: int, k: int, stack: tuple[int, ...]) -> QArray:
    """The shapes of packed experts, [*stack, N, K]."""
    fmt, shape = IntTiles(G128, k), jax.ShapeDtypeStruct
    aux = {
        "tiles": shape((*stack, 1, n * k // 2), jnp.uint8),
        "scale": shape((*stack, 1, fmt.blocks * n), jnp.float32),
    }
    order = (*(("s", i) for i in range(len(stack))), ("o", 0), ("i", 0))
    return QArray(shape((*stack, n, 0), jnp.int8), aux, fmt, Layout(order), jnp.dtype(jnp.bfloat16))


def programs() -> dict[str, tuple[Any, Any, int]]:
    """Whole programs around the kernel: function, shapes of its arguments, bytes of one expert's codes."""
    n = k = 1024
    x, sizes = jax.ShapeDtypeStruct((16, k), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.int32)

    def scanned(x: Any, sizes: Any, w: QArray) -> Any:
        return jax.lax.scan(lambda x, w: (ops.q_ragged_dot(x, w, sizes), None), x, w)[0]

    def sliced(x: Any, sizes: Any, w: QArray) -> Any:
        return functools.reduce(lambda x, i: ops.q_ragged_dot(x, w.index_stack(0, i), sizes), range(3), x)

    return {
        "a scan over layers of experts": (scanned, (x, sizes, experts(n, k, (3, 4))), n * k // 2),
        "layers of experts of one stack, unrolled": (sliced, (x, sizes, experts(n, k, (3, 4))), n * k // 2),
    }


def cases() -> list[Case]:
    """Tiles for few and for many tokens of a group, whole and cut; kinds of scale and zero point, both dtypes."""
    out = [Case(G128, "bfloat16", Schedule(t, STAGES[t])) for t in (8, 16, 32, 64, 128)]
    out += [Case(G128, "bfloat16", Schedule(t, STAGES[t], 4)) for t in (8, 16)]
    return out + [
        Case(fmt, dtype, Schedule(t, STAGES[t]))
        for t in (16, 128)
        for fmt, dtype in (
            (Int(4, group=64, symmetric=False), "float16"),
            (Int(4, group=32), "bfloat16"),
            (Int(4), "bfloat16"),
            (Int(8), "bfloat16"),
        )
    ]
