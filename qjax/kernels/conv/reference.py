"""The oracle of quantized convolutions, in plain jnp.

With x in the user's layout, codes of the kernel W and, where the activations are quantized, their aux:

    W~ = decode(codes, aux) in the user's layout
    x~ = x        or   decode_act(encode_act(x, act_aux), act_aux)
    y  = conv_general_dilated(x~, W~, ...)

A scale of activations covers the whole input or one example; groups would cut across the window. Dtypes and
accumulation as in `qjax.kernels.dot.reference`.
"""

from __future__ import annotations

from typing import Any

from jax import Array, lax

from qjax.formats import QArray
from qjax.kernels.dot.reference import round_trip, wide
from qjax.kernels.registry import Act, Problem, register_lowering


def convolve(x: Array, w: Array, settings: Any, accumulate: Any) -> Array:
    """Return the convolution with the settings of a `qjax.ops.conv.ConvSpec`, in the dtype of accumulation."""
    return lax.conv_general_dilated(
        x,
        w,
        window_strides=settings.window_strides,
        padding=settings.padding,
        lhs_dilation=settings.lhs_dilation,
        rhs_dilation=settings.rhs_dilation,
        dimension_numbers=settings.dimension_numbers,
        feature_group_count=settings.feature_group_count,
        batch_group_count=settings.batch_group_count,
        precision=settings.precision,
        preferred_element_type=accumulate,
    )


@register_lowering("conv", name="reference", priority=-1, about="the oracle: dequantize, then a float convolution")
def conv_reference(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the convolution as the module's equation says it."""
    if act is not None:
        x = round_trip(x, act)
    # 16-bit inputs: the transpose of a convolution with another result dtype is not defined in jax, and XLA
    # accumulates 16-bit convolutions in float32 anyway.
    y = convolve(x, w.dequantize(x.dtype), problem.settings, wide(x.dtype) if x.dtype.itemsize >= 4 else None)
    return y.astype(problem.out_dtype)
