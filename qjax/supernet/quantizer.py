"""LSQ+ with a column of steps for each bit width: the quantizer of EQ-Net, and where its steps start.

Values are ``code * s + beta`` with the real offset added back after scaling (LSQ+, Bhalgat et al. 2020,
arXiv:2004.09576, equations 1 to 5, as EQ-Net's code has it; the integer zero point of the paper's equation 1 is
another quantizer). Bits, symmetry and signedness may be traced, so one program serves every form.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from qjax.supernet.space import BITS

SMALLEST_STEP = 1e-6
"""Added to the magnitude of every step, as in EQ-Net's code: a step never reaches 0."""

POWER = 2.4
"""Exponent of the error that initial steps minimize."""


def code_range(bits: Any, signed: Any = True) -> tuple[Any, Any]:
    """Smallest and largest code of a bit width, float32; both arguments may be traced."""
    levels = jnp.exp2(jnp.asarray(bits, jnp.float32))
    low = jnp.where(signed, -levels / 2, 0.0)
    return low, low + levels - 1


def steps_of(scale: Any, offset: Any, abs_offset: bool = False) -> tuple[Any, Any]:
    """The step and the offset that parameters stand for: |scale| + 1e-6, and the offset or its magnitude."""
    return jnp.abs(scale) + jnp.asarray(SMALLEST_STEP, scale.dtype), jnp.abs(offset) if abs_offset else offset


def codes_of(x: Any, step: Any, offset: Any, low: Any, high: Any) -> Array:
    """Codes as floats, ties to even, NaN stays NaN; by the float32 reciprocal (`qjax.formats.numerics` says why)."""
    return jnp.round(jnp.clip((x - offset) * (1.0 / step), low, high))


def lsq_plus(
    x: Any,
    scale: Any,
    offset: Any,
    bits: Any,
    *,
    signed: Any = True,
    grad_scale: Any = 1.0,
    abs_offset: bool = False,
) -> Array:
    """Round to a uniform grid with a learned step and offset.

    With ``s = |scale| + 1e-6``, ``v = (x - offset) / s``, codes ``lo .. hi`` and ``inside = lo <= v <= hi``:
    ``out = rint(clip(v, lo, hi)) * s + offset``, and derivatives as in EQ-Net's code: in x ``inside``; in scale
    ``rint(v) - v`` inside and ``lo`` or ``hi`` outside, times ``sign(scale) * grad_scale``; in offset 0 inside and 1
    outside, times ``grad_scale`` (and the sign of the offset with ``abs_offset``). Both bounds are inside.

    Args:
        x: float, any shape.
        scale: float, broadcasts against x: the column of the chosen bit width.
        offset: as scale; None is symmetric, that is 0.
        bits: 2 to 8, an integer or a traced one.
        signed: codes -2^(b-1) .. 2^(b-1)-1, else 0 .. 2^b-1; may be traced.
        grad_scale: factor of the derivatives in scale and offset; see `step_grad_scale`.
        abs_offset: use the offset's magnitude, as EQ-Net's code does; negative offsets are lost.

    Returns:
        Of the shape and dtype of x; computed in float32, or float64 where x is.
    """
    x = jnp.asarray(x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scale = jnp.asarray(scale, wide)
    beta = jnp.zeros_like(scale) if offset is None else jnp.asarray(offset, wide)
    low, high = (a.astype(wide) for a in code_range(bits, signed))
    out: Any = _lsq_plus(x.astype(wide), scale, beta, low, high, jnp.asarray(grad_scale, wide), abs_offset)
    return out.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _lsq_plus(x: Any, scale: Any, offset: Any, low: Any, high: Any, gain: Any, abs_offset: bool) -> Array:
    step, beta = steps_of(scale, offset, abs_offset)
    return codes_of(x, step, beta, low, high) * step + beta


def _forward(x: Any, scale: Any, offset: Any, low: Any, high: Any, gain: Any, abs_offset: bool) -> Any:
    return _lsq_plus(x, scale, offset, low, high, gain, abs_offset), (x, scale, offset, low, high, gain)


def _backward(abs_offset: bool, kept: Any, g: Any) -> Any:
    x, scale, offset, low, high, gain = kept
    step, beta = steps_of(scale, offset, abs_offset)
    v = (x - beta) * (1.0 / step)
    inside = (v >= low) & (v <= high)
    by_step = jnp.where(inside, jnp.round(v) - v, jnp.clip(v, low, high))
    ds = _reduced(g * by_step, scale.shape) * jnp.sign(scale) * gain
    db = _reduced(jnp.where(inside, 0, g), offset.shape) * gain
    db = db * jnp.sign(offset) if abs_offset else db
    return jnp.where(inside, g, 0), _to(ds, scale), _to(db, offset), *(jnp.zeros_like(a) for a in (low, high, gain))


_lsq_plus.defvjp(_forward, _backward)


def _reduced(g: Any, shape: tuple[int, ...]) -> Any:
    """A cotangent summed over the axes that broadcasting added."""
    lead = g.ndim - len(shape)
    axes = (*range(lead), *(lead + d for d, n in enumerate(shape) if n == 1 and g.shape[lead + d] != 1))
    return jnp.sum(g, axis=axes).reshape(shape)


def _to(g: Any, like: Any) -> Any:
    return jnp.broadcast_to(g, like.shape).astype(like.dtype)


def step_grad_scale(bits: Any, count: Any, signed: Any = True, factor: float = 1.0) -> Array:
    """The gain of derivatives in steps: ``factor / sqrt(largest code * count)``.

    EQ-Net's code: factor 1 and all elements per tensor, of the batch at hand for activations; factor 2 and the elements
    over the number of input channels for scales per channel of weights (LSQ would take those of an output channel).
    Groups, which EQ-Net has not, take factor 1 and the numbers of a group. All but the factor may be traced.
    """
    return factor / jnp.sqrt(code_range(bits, signed)[1] * jnp.maximum(count, 1.0))


def init_steps(x: Any, *, symmetric: bool, channel_axis: int | None = None, signed: bool = True) -> tuple[Array, Array]:
    """Initial steps for 2 to 8 bits: the range is shrunk by 1 % at a time, and the least error wins.

    The error is mean |x - Q(x)|^2.4, of equal ones the widest range. Symmetric: ranges +-(1 - i/100) max|x|, or from 0
    where unsigned; 80 of them per tensor and, as in EQ-Net's code, 5 per channel. Asymmetric: both ends shrink, 80
    ranges. Unsigned and asymmetric, the range begins at 0 and the offset is -1e-9. In the authors' code a channel whose
    error exceeds 100 keeps the step 1; here it takes its best range. An all-zero one has 0, which stands on the floor
    of 1e-6 in `lsq_plus`.

    Args:
        x: float, any shape.
        symmetric: no offset.
        channel_axis: axis with a step for each index; None for one step.
        signed: whether codes are signed; not so for activations that are never negative.

    Returns:
        (scale, offset), float32 (float64 where x is) [C or 1, 7], a column for each of 2 to 8 bits.
    """
    x = jnp.asarray(x)
    rows = jnp.moveaxis(x, channel_axis, 0) if channel_axis is not None else x[None]
    rows = rows.reshape(rows.shape[0], -1)
    return init_rows(rows, symmetric=symmetric, per_channel=channel_axis is not None, signed=signed)


def init_rows(
    rows: Any, *, symmetric: bool, per_channel: bool, signed: Any = True, ends: tuple[Any, Any] | None = None
) -> tuple[Array, Array]:
    """`init_steps` of a matrix [C, n], with a step a row; ``signed`` may be traced, ``ends`` are the rows' ranges."""
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    bottom, top = (f(rows, axis=1, keepdims=True) for f in (jnp.min, jnp.max)) if ends is None else ends
    largest = jnp.maximum(jnp.abs(bottom), jnp.abs(top))
    if symmetric:
        bottom, top = jnp.where(signed, -largest, 0), largest
    else:
        bottom = jnp.where(signed, bottom, 0)
    tries = 5 if per_channel and symmetric else 80

    def parameters(bits: Any, i: Any) -> tuple[Any, Any]:
        low, high = (a.astype(rows.dtype) for a in code_range(bits, signed))
        shrunk = (1 - i / 100).astype(rows.dtype)
        step = (top - bottom) * shrunk / (high - low)
        offset = jnp.zeros_like(step) if symmetric else jnp.where(signed, bottom * shrunk - step * low, -1e-9)
        return step, offset

    def one(bits: Any) -> tuple[Any, Any]:
        low, high = (a.astype(rows.dtype) for a in code_range(bits, signed))

        def attempt(i: Any, best: tuple[Any, Any]) -> tuple[Any, Any]:
            scale, offset = parameters(bits, i)
            step, beta = steps_of(scale, offset)
            near = codes_of(rows, step, beta, low, high) * step + beta
            error = jnp.mean(jnp.abs(rows - near) ** POWER, axis=1, keepdims=True)
            better = error < best[0]
            return jnp.where(better, error, best[0]), jnp.where(better, i, best[1])

        first = (jnp.full_like(largest, jnp.inf), jnp.zeros_like(largest))
        _, at = lax.fori_loop(0, tries, lambda i, best: attempt(jnp.asarray(i, rows.dtype), best), first)
        scale, offset = parameters(bits, at)
        return scale[:, 0], offset[:, 0]

    scale, offset = lax.map(one, jnp.asarray(BITS, jnp.int32))
    return scale.T, offset.T
