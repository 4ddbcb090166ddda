"""Remat policies that see quantized products as the products that they replace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax.core import ShapedArray
from jax.extend.core.primitives import conv_general_dilated_p, dot_general_p

from qjax.ops.base import Call
from qjax.ops.conv import ConvSpec
from qjax.ops.dot import q_dot_op, q_dot_transposed_op

Policy = Callable[..., Any]


@functools.lru_cache(maxsize=256)
def remat_policy(policy: Policy) -> Policy:
    """Return a policy for `jax.checkpoint` that decides on quantized products as on float ones.

    `jax.checkpoint_policies.dots_saveable` and its kin compare primitives by identity, so that they would recompute a
    quantized product. The policy returned here asks the given one about the ``dot_general`` or
    ``conv_general_dilated`` that the quantized op stands for, with its dimension numbers, and passes everything else
    through.

    Args:
        policy: any policy of `jax.checkpoint`.
    """

    def decide(primitive: Any, *avals: Any, **params: Any) -> Any:
        call = params.get("call")
        if not isinstance(call, Call):
            return policy(primitive, *avals, **params)
        operands = call.operands(avals).shapes()
        x, w, spec = operands.x, operands.w, call.spec
        if primitive in (q_dot_op.primitive, q_dot_transposed_op.primitive):
            stacks = w.codes.ndim - 2
            stack = tuple(w.codes.shape[:stacks])
            batch = tuple(range(stacks))
            kept = stacks if primitive is q_dot_transposed_op.primitive else stacks + 1
            numbers = (((x.ndim - 1,), (kept,)), (batch, batch))
            weight = ShapedArray((*stack, w.codes.shape[stacks], w.length), x.dtype)
            return policy(
                dot_general_p,
                x,
                weight,
                dimension_numbers=numbers,
                precision=spec.precision,
                preferred_element_type=spec.out_dtype,
                out_sharding=spec.out_sharding,
            )
        if isinstance(spec, ConvSpec):
            return policy(
                conv_general_dilated_p,
                x,
                ShapedArray(w.shape, x.dtype),
                window_strides=spec.window_strides,
                padding=spec.padding,
                lhs_dilation=spec.lhs_dilation,
                rhs_dilation=spec.rhs_dilation,
                dimension_numbers=spec.dimension_numbers,
                feature_group_count=spec.feature_group_count,
                batch_group_count=spec.batch_group_count,
                precision=spec.precision,
                preferred_element_type=spec.out_dtype,
            )
        return policy(primitive, *avals, **params)

    return decide
