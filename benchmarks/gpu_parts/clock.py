"""What the parts of the GPU benchmark share: layers, the clock, rates of the device, rows that survive a failure."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from qjax.kernels.timing import device_seconds

SHAPES = {
    "Llama-3-70B gate and up": (57344, 8192),
    "Llama-3-8B gate and up": (28672, 4096),
    "Llama-3-8B q, o": (4096, 4096),
    "Llama-3-8B down": (4096, 14336),
    "Llama-3-70B q, o": (8192, 8192),
    "Llama-2-7B q, k and v": (12288, 4096),
    "Mixtral expert, gate and up": (28672, 4096),
}
"""(N, K) by layer, in the order in which they are measured; Llama-2-7B's is of Marlin's own benchmark."""

TOKENS = (1, 16, 4096, 64, 256, 1024, 4, 8, 32, 128, 2)
"""In the order in which they are measured, should time run out."""

ROTATE = 256 << 20
"""Bytes of weights of one kind that a round reads: several times the L2 cache."""

CLOSE = 1e-5
"""Largest difference from NumPy, relative to the sum of magnitudes of the terms: tensor cores truncate as they add."""

BY_KERNEL: dict[str, Any] = {"implementation": "mosaic"}


def copies(nbytes: int) -> int:
    """How many weights of so many bytes a round reads."""
    return max(2, -(-ROTATE // nbytes))


class Clock:
    """Times on the device, until a deadline.

    Attributes:
        copy: bytes a second of reading and writing 1 GiB, counting both.
        peak: operations a second of a large bfloat16 product of random numbers.
    """

    def __init__(self) -> None:
        a = jnp.ones(1 << 28, jnp.float32)  # of bfloat16 XLA copies a fifth slower
        self.copy = 2 * a.nbytes / device_seconds(lambda a: a + 1, [(a,)])
        self.peak = 2 * 8192**3 / (self.bfloat16_us(8192, 8192, 8192) * 1e-6)

    def share(self, seconds: float) -> None:
        """Set the deadline so many seconds from now."""
        self._deadline = time.perf_counter() + seconds

    def left(self) -> float:
        """Seconds until nothing further should be begun."""
        return self._deadline - time.perf_counter()

    def us(self, function: Callable[..., Any], *sets: tuple[Any, ...]) -> float:
        """Microseconds of one call on the device, over sets of arguments that are rotated through."""
        return device_seconds(function, list(sets)) * 1e6

    @functools.cache  # noqa: B019 (one clock a process)
    def bfloat16_us(self, n: int, k: int, tokens: int) -> float:
        """Microseconds of the product in bfloat16, weights [K, N]."""
        draw = jax.jit(lambda key: jax.random.normal(key, (k, n), jnp.bfloat16))
        weights = [draw(jax.random.key(s)) for s in range(copies(n * k * 2))]
        x = jax.random.normal(jax.random.key(0), (tokens, k), jnp.bfloat16)
        return self.us(jnp.dot, *[(x, w) for w in weights])

    def ceiling_us(self, nbytes: float, operations: float) -> float:
        """Microseconds that memory or arithmetic allow, at the rates of the copy and of the bfloat16 product."""
        return max(nbytes / self.copy, operations / self.peak) * 1e6


@contextlib.contextmanager
def checked(row: dict[str, Any], out: list[dict[str, Any]], needed: str = "right") -> Iterator[None]:
    """Keep a row whatever happens: one kernel that fails must not hide the others.

    A row without what is ``needed`` is printed, and has the reason under "failure".
    """
    try:
        yield
    except Exception as failure:
        row["failure"] = f"{type(failure).__name__}: {failure}"[:300]
        if needed == "right":
            row["right"] = False
    out.append(row)
    if not row.get(needed):
        print(f"WRONG: {row}", flush=True)
