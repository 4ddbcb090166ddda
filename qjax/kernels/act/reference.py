"""The oracle of quantizing activations row by row, in plain jnp, which is also what XLA compiles.

With x [*rows, K], and all of it in float32:

    y = x                                                                     alone
    y = x * rsqrt(mean(x**2) + eps) * weight                                  after an RMS norm
    y = (x - mean(x)) * rsqrt(mean((x - mean(x))**2) + eps) * weight + bias   after a layer norm
    y = gate / (1 + exp(-gate)) * x                                           after a gate, SiLU(gate) * x
    scale = max(max |y| * unit, 2**-126)              unit = 1 / 127.5, 1 / 127 ("qmax") or 1 / 448 (float8_e4m3fn)
    codes = round(y / scale)                          to nearest even, as the format encodes

NaN or infinity in a row makes the scale of that row infinite or NaN and its codes 0, so that a product with it is NaN
in that row alone; a row of zeros has the smallest scale and codes 0. What a norm or a gate returns is not rounded to
the dtype of x in between, as it would be if it were an operation of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from qjax.formats import Float8, Format, Int
from qjax.formats.numerics import SMALLEST_SCALE
from qjax.kernels.registry import Problem, register_lowering


@dataclasses.dataclass(frozen=True)
class Before:
    """What is done to a row before it is quantized; the static part.

    Attributes:
        kind: "nothing", "rms_norm", "layer_norm" or "gate".
        eps: of a norm.
        weight: whether a norm has a weight, the first of the further operands.
        bias: whether a layer norm has a bias, which stands behind it.
    """

    kind: str = "nothing"
    eps: float = 0.0
    weight: bool = False
    bias: bool = False

    def __str__(self) -> str:
        """In words: "after an RMS norm"."""
        words = {"rms_norm": " after an RMS norm", "layer_norm": " after a layer norm", "gate": " after a SiLU gate"}
        return words.get(self.kind, "")


def by_magnitude(fmt: Format) -> bool:
    """Whether a scale is fitted to the largest magnitude alone."""
    return isinstance(fmt, Float8) or (isinstance(fmt, Int) and fmt.symmetric)


def unit_scale(fmt: Format) -> Array:
    """Return the scale of [-1, 1], float32: a multiple of it is to the bit the scale of [-top, top]."""
    with jax.ensure_compile_time_eval():
        return jnp.asarray(fmt.from_range(jnp.float32(-1), jnp.float32(1))["scale"])


def largest_magnitudes(x: Array, fmt: Format, largest: Callable[..., Array] = jnp.max) -> Array:
    """Return max |x| of each block, infinity where there is NaN.

    A maximum that meets NaN cannot be relied on: XLA on CPU forgets it in rows of some hundred elements or more, or
    returns minus infinity (jaxlib 0.10 and 0.12).

    Args:
        x: float32 [*rows, K].
        fmt: says what a block is.
        largest: how the maximum over a block is taken, called as `Format.reduce` does.
    """
    size = jnp.abs(x)
    return fmt.reduce(lax.select(lax.eq(x, x), size, lax.full_like(size, jnp.inf)), largest)


def row_scales(x: Array, fmt: Format, largest: Callable[..., Array] = jnp.max) -> Array:
    """Return the scale of each row, for formats that are fitted `by_magnitude` with one scale a row.

    Short, because it is compiled into everything that reads the scale: no scale of 1 where a row is zero.

    Args:
        x: float32 [*rows, K].
        fmt: the format.
        largest: how the maximum over a block is taken, called as `Format.reduce` does.

    Returns:
        float32 [*rows, 1].
    """
    top = largest_magnitudes(x, fmt, largest)
    return lax.max(top * unit_scale(fmt), lax.full_like(top, SMALLEST_SCALE))


def transformed(x: Array, extra: Sequence[Array], before: Before) -> Array:
    """Return y of the module's equations, in float32.

    Args:
        x: float [*rows, K].
        extra: weight [K] and bias [K] of a norm as far as it has them; the gate [*rows, K].
        before: which equation.
    """
    x = x.astype(jnp.float32)
    operands = [a.astype(jnp.float32) for a in extra]
    if before.kind == "nothing":
        return x
    if before.kind == "gate":
        (gate,) = operands
        return gate / (1.0 + jnp.exp(-gate)) * x
    if before.kind == "layer_norm":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    y = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + before.eps)
    y = y * operands[0] if before.weight else y
    return y + operands[-1] if before.bias else y


@register_lowering("quantize_rows", name="xla", priority=0, about="plain jnp, which XLA fuses; the oracle")
def quantize_rows_reference(problem: Problem, x: Array, extra: Sequence[Array]) -> tuple[Array, Array]:
    """Return codes [*rows, K] and scales [*rows, 1] as the module's equations say them."""
    y = transformed(x, extra, problem.settings)
    fmt: Any = problem.weight
    scale = row_scales(y, fmt) if x.size else fmt.fit(y)["scale"]
    return fmt.encode(y, {"scale": scale}), scale
