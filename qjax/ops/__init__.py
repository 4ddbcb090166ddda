"""Quantized operations: products, convolutions and gathers on packed weights, as primitives that JAX can transform."""

from qjax.kernels import (
    Choice,
    LoweringTable,
    Problem,
    choose,
    lowering_table,
    register_lowering,
)
from qjax.ops.base import LinearOp, Operands, QuantizedOp, Spec, quantized_linear
from qjax.ops.dot import activation_aux, q_dot

__all__ = [
    "Choice",
    "LinearOp",
    "LoweringTable",
    "Operands",
    "Problem",
    "QuantizedOp",
    "Spec",
    "activation_aux",
    "choose",
    "lowering_table",
    "q_dot",
    "quantized_linear",
    "register_lowering",
]
