"""Ragged products of 16-bit activations with experts in tiles, and whole programs around that kernel."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernel_cases.weights16 import G128, described, filled, shapes
from qjax import ops
from qjax.formats import MXFP4, Format, Int, Layout, QArray, TritPlanes
from qjax.kernels.dot.hopper import Schedule
from qjax.kernels.ragged_dot.experts import experts16


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled kernel: what is fixed when it is compiled, on experts large enough to fill its ring."""

    fmt: Format
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
        w, shape = shapes(self.fmt, self.n, self.k, (self.groups,)), jax.ShapeDtypeStruct
        rows = self.schedule.tokens * (2 * self.groups if self.schedule.tokens > 8 else 1)
        aux = {name: shape((self.groups, a.size // self.groups), a.dtype) for name, a in w.aux.items()}
        schedule = filled(w.fmt, self.schedule, self.k)
        how = {"fmt": w.fmt, "n": self.n, "out_dtype": jnp.dtype(self.dtype), "schedule": schedule}
        return functools.partial(experts16, **how), (
            aux,
            shape((rows, self.k), self.dtype),
            shape((self.groups,), jnp.int32),
        )


def experts(n: int, k: int, stack: tuple[int, ...]) -> QArray:
    """The shapes of packed experts, [*stack, N, K]."""
    order = (*(("s", i) for i in range(len(stack))), ("o", 0), ("i", 0))
    return dataclasses.replace(shapes(G128, n, k, stack), layout=Layout(order))


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
    few, many = Schedule(16, 0, tall=2, deep=2), Schedule(128, 0, tall=2, rolling=True)
    out = [Case(G128, "bfloat16", Schedule(t, 0)) for t in (8, 16, 32, 64, 128)]
    out += [Case(G128, "bfloat16", Schedule(t, 0, 4)) for t in (8, 16)]
    kinds = (
        (G128, "bfloat16"),
        (Int(4, group=64, symmetric=False), "float16"),
        (Int(4, group=32), "bfloat16"),
        (Int(4), "bfloat16"),
        (MXFP4(), "bfloat16"),
        (TritPlanes(), "bfloat16"),
    )
    out += [Case(fmt, dtype, few) for fmt, dtype in kinds] + [Case(fmt, dtype, many) for fmt, dtype in kinds[:-1]]
    return out + [Case(Int(8), "bfloat16", schedule) for schedule in (few, many)]
