"""The kernels that are compiled ahead of time and measured on a device, each with the schedules it is run with."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import ops
from qjax.formats import Float8, Int, IntTiles, Layout, QArray
from qjax.formats.tiles import rounded_up
from qjax.kernels.dot.codes8 import codes8
from qjax.kernels.dot.hopper import TOKENS, Schedule
from qjax.kernels.dot.mosaic import STAGES
from qjax.kernels.dot.tiles16 import tiles16

G128 = Int(4, group=128)


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled kernel: what is fixed when it is compiled, on a matrix large enough to fill its ring."""

    fmt: Int | Float8
    dtype: str
    schedule: Schedule
    n: int = 1024
    k: int = 4096
    codes: bool = False

    @property
    def name(self) -> str:
        """As the table calls it; of W8A8 the activations are quantized and the result has the dtype."""
        kind = "W8A8" if self.codes else f"W{self.fmt.code_bits}A16"
        parts = f" in {self.schedule.splits} parts" if self.schedule.splits > 1 else ""
        return f"{kind} {self.fmt.name}, {self.dtype}, {self.schedule.tokens} tokens{parts}"

    @property
    def multiplies(self) -> str:
        """The instruction that it has to use."""
        return "HGMMA" if not self.codes else "IGMMA" if isinstance(self.fmt, Int) else "QGMMA"

    def function(self) -> Any:
        """The kernel, and the shapes of its arguments."""
        if self.codes:
            tokens, dtype = self.schedule.tokens, self.fmt.code_dtype
            one = lambda dtype, *shape: jax.ShapeDtypeStruct((1, *shape), dtype)  # noqa: E731
            ours, theirs = (one(dtype, rows, self.k) for rows in (self.n, tokens))
            arguments = (ours, one(np.float32, self.n), theirs, one(np.float32, tokens))
            return functools.partial(codes8, out_dtype=jnp.dtype(self.dtype), schedule=self.schedule), arguments
        assert isinstance(self.fmt, Int)
        fmt = IntTiles(self.fmt, self.k)
        codes = jnp.uint8 if self.fmt.bits == 4 else jnp.int8
        numbers = fmt.blocks * rounded_up(self.n)
        shape = jax.ShapeDtypeStruct
        zero = None if self.fmt.symmetric else shape((1, numbers), jnp.bfloat16)
        arguments = (
            shape((1, rounded_up(self.n) * fmt.padded_length * self.fmt.bits // 8), codes),
            shape((1, numbers), jnp.float32),
            zero,
            shape((1, self.schedule.tokens, self.k), self.dtype),
        )
        how = {"fmt": fmt, "n": self.n, "out_dtype": jnp.dtype(self.dtype), "schedule": self.schedule}
        return functools.partial(tiles16, **how), arguments


def programs() -> dict[str, tuple[Any, Any, int]]:
    """Whole programs around the kernel: function, shapes of its arguments, bytes of one layer's codes."""
    n = k = 1024
    fmt = IntTiles(G128, k)

    def stack(layers: int) -> QArray:
        shape = jax.ShapeDtypeStruct
        aux = {
            "tiles": shape((layers, 1, n * k // 2), jnp.uint8),
            "scale": shape((layers, 1, fmt.blocks * n), jnp.float32),
        }
        order = (("s", 0), ("o", 0), ("i", 0))
        return QArray(shape((layers, n, 0), jnp.int8), aux, fmt, Layout(order), jnp.dtype(jnp.bfloat16))

    def scanned(x: Any, w: QArray) -> Any:
        return jax.lax.scan(lambda x, w: (ops.q_dot(x, w, streamed=True), None), x, w)[0]

    def sliced(x: Any, w: QArray) -> Any:
        return functools.reduce(lambda x, i: ops.q_dot(x, w.index_stack(0, i)), range(4), x)

    x = jax.ShapeDtypeStruct((4, k), jnp.bfloat16)
    return {
        "a scan over layers": (scanned, (x, stack(4)), n * k // 2),
        "layers of one stack, unrolled": (sliced, (x, stack(4)), n * k // 2),
    }


def cases() -> list[Case]:
    """Every tile of tokens, every kind of scale and zero point, both dtypes, whole and cut."""
    out = [Case(G128, "bfloat16", Schedule(t, STAGES[t])) for t in TOKENS]
    out += [Case(G128, "bfloat16", Schedule(t, STAGES[t], 4)) for t in (8, 128)]
    out += [
        Case(fmt, dtype, Schedule(t, STAGES[t]))
        for t in (16, 128)
        for fmt, dtype in (
            (G128, "float16"),
            (Int(4, group=32), "bfloat16"),
            (Int(4, group=64), "bfloat16"),
            (Int(4), "bfloat16"),
            (Int(4, group=128, symmetric=False), "bfloat16"),
            (Int(4, group=32, symmetric=False), "float16"),
            (Int(4, symmetric=False), "float16"),
            (Int(8), "bfloat16"),
            (Int(8), "float16"),
            (Int(8, group=128), "bfloat16"),
            (Int(8, group=64, symmetric=False), "float16"),
        )
    ]
    out += [
        Case(fmt, "bfloat16", Schedule(t, STAGES[t], splits), codes=True)
        for fmt in (Int(8), Float8())
        for t, splits in ((8, 1), (16, 4), (64, 1), (128, 1))
    ]
    return out
