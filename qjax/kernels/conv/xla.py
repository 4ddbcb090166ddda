"""Lowerings of quantized convolutions that XLA compiles.

- "dequantize": unpack the kernel, then a float convolution. On one CPU device the kernel is unpacked once x is known.
- "int_conv": int8 x int8 -> int32 on codes, scaled afterwards. XLA on CPU has a fast int8 convolution for channels
  last, one feature group and enough channels (measured 1.4 to 3 times the speed of float from 64 channels on, 0.3
  to 0.7 times with 3 channels or many feature groups, and a hundred times slower with channels first), so codes
  are moved to that order and other shapes are left to "dequantize".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats import Aux, Format, QArray
from qjax.kernels.conv.reference import conv_reference, convolve
from qjax.kernels.dot.integer import LARGEST_SUM
from qjax.kernels.dot.xla import both_quantized, on_one_cpu, once_there
from qjax.kernels.order import runtime_zero
from qjax.kernels.registry import Act, Problem, register_lowering

ENOUGH_CHANNELS = 16


@register_lowering("conv", name="dequantize", priority=0, about="unpack the kernel, then a float convolution")
def dequantize(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the float convolution with the dequantized kernel."""
    if not on_one_cpu(problem):
        return conv_reference(problem, x, w, act)
    fmt, aux = act or (None, {})
    return once_there(problem, _of_format)((problem, fmt), x, w, aux)


def _of_format(what: tuple[Problem, Format | None], x: Array, w: QArray, aux: Aux) -> Array:
    problem, fmt = what
    return conv_reference(problem, x, w, (fmt, aux) if fmt else None)


def _symmetric_integers(problem: Problem) -> bool | str:
    if problem.act is None:
        return "the activations are not quantized"
    for fmt in (problem.act, problem.weight):
        if not (fmt.is_integer and fmt.signed and getattr(fmt, "symmetric", False)):
            return f"{fmt.name} codes are no symmetric integers (a zero point would have to be padded with)"
        if fmt.per == "group":
            return f"{fmt.name} has a scale per group, which cuts across the window"
    if problem.settings.batch_group_count != 1:
        return "a batch group count mixes examples"
    if not problem.settings.one_scale:
        return "the activations have a scale per position, and a window covers several"
    return problem.k <= LARGEST_SUM or f"a sum of {problem.k} products may overflow int32"


def _fast_on_cpu(problem: Problem) -> bool | str:
    s = problem.settings
    if problem.platform != "cpu":
        return "it was measured on CPU only"
    if len(s.window_strides) != 2 or s.feature_group_count != 1 or s.batch_group_count != 1:
        return "XLA on CPU is fast on int8 for two spatial dimensions and one feature group"
    if s.channels < ENOUGH_CHANNELS:
        return f"int8 convolutions of fewer than {ENOUGH_CHANNELS} channels are slower than float ones on CPU"
    return all(d == 1 for d in s.lhs_dilation) or "dilated inputs are slow in int8"


@register_lowering(
    "conv",
    when=_symmetric_integers,
    worth=_fast_on_cpu,
    name="int_conv",
    priority=2,
    about="int8 x int8 -> int32 on codes, then scaled",
)
def int_conv(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the convolution of integer codes times both scales."""
    fmt, aux = both_quantized(act)
    settings = problem.settings
    lhs, rhs, out = settings.dimension_numbers
    codes = fmt.encode(x, aux)
    # Channels last: x [N, *spatial, C], kernel [*spatial, I, O], result [N, *spatial, O].
    codes = codes.transpose(lhs[0], *lhs[2:], lhs[1])
    kernel = _in_order(w, (*rhs[2:], rhs[1]), runtime_zero(codes) if codes.size else None)
    last = len(lhs) - 1
    spatial = tuple(range(1, last))
    numbers = lax.ConvDimensionNumbers(
        (0, last, *spatial), (last, last - 1, *(s - 1 for s in spatial)), (0, last, *spatial)
    )
    moved: Any = dataclasses.replace(settings, dimension_numbers=numbers)
    acc = convolve(codes, kernel, moved, jnp.int32).astype(jnp.float32)
    scale_x = fmt.scale_of(aux).transpose(lhs[0], *lhs[2:], lhs[1])
    scale_w = w.fmt.scale_of(w.canonical().aux)[:, 0]
    y = acc * scale_x * scale_w
    place = {axis: i for i, axis in enumerate((out[0], *out[2:], out[1]))}
    return y.transpose([place[a] for a in range(len(out))]).astype(problem.out_dtype)


def _in_order(w: QArray, axes: tuple[int, ...], zero: Array | None) -> Array:
    """Return a kernel's codes as [*in axes in the order given, O].

    Written as a gather of columns: behind a transpose XLA on CPU does not recognise its fast int8 convolution (and
    takes a hundred times longer). ``zero`` is a 0 of which the compiler does not know it.
    """
    codes = w.unpacked()  # [O, K]
    sizes = [w.shape[a] for a in w.in_axes]
    columns = np.arange(codes.shape[1], dtype=np.int32).reshape(sizes)
    columns = columns.transpose([w.in_axes.index(a) for a in axes]).reshape(-1, 1)
    numbers = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(1,), start_index_map=(1,))
    picked = lax.gather(
        codes,
        columns if zero is None else columns + zero.astype(jnp.int32),
        numbers,
        slice_sizes=(codes.shape[0], 1),
        indices_are_sorted=False,
        unique_indices=True,
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    return picked.reshape(*(w.shape[a] for a in axes), codes.shape[0])
