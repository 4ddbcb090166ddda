"""Quantized operations as primitives that JAX can transform: products, convolutions, gathers, attention over caches."""

from qjax.kernels import (
    Choice,
    LoweringTable,
    Problem,
    choice_for,
    choose,
    kind_of,
    lowering_table,
    neutral,
    pack,
    pack_tree,
    register_lowering,
)
from qjax.ops.attention import q_attention
from qjax.ops.base import LinearOp, Operands, QuantizedOp, Spec, quantized_linear
from qjax.ops.cache import KVCache, quantize_cache
from qjax.ops.conv import ConvSpec, conv_activation_aux, conv_problem, q_conv
from qjax.ops.dot import activation_aux, q_dot
from qjax.ops.embedding import q_take
from qjax.ops.log_attention import log_attention
from qjax.ops.ragged import q_ragged_dot
from qjax.ops.remat import remat_policy
from qjax.ops.rows import LayerNorm, RMSNorm, quantize_rows
from qjax.ops.taken import Taken, lowerings

__all__ = [
    "Choice",
    "ConvSpec",
    "KVCache",
    "LayerNorm",
    "LinearOp",
    "LoweringTable",
    "Operands",
    "Problem",
    "QuantizedOp",
    "RMSNorm",
    "Spec",
    "Taken",
    "activation_aux",
    "choice_for",
    "choose",
    "conv_activation_aux",
    "conv_problem",
    "kind_of",
    "log_attention",
    "lowering_table",
    "lowerings",
    "neutral",
    "pack",
    "pack_tree",
    "q_attention",
    "q_conv",
    "q_dot",
    "q_ragged_dot",
    "q_take",
    "quantize_cache",
    "quantize_rows",
    "quantized_linear",
    "register_lowering",
    "remat_policy",
]
