"""Read-only matchers on one level of a jaxpr: attention, softmax, activations, norms.

Precision goes before recall: what is returned *is* what it is called, shown by following dimensions (attention,
softmax, norms) or by evaluating the formula (activations); names of functions and scopes play no part.
"""

from qjax.composites.activation import Activation
from qjax.composites.attention import Attention, Factor, Mask, Operand
from qjax.composites.base import Composite
from qjax.composites.find import find_composites, find_nested, register_matcher
from qjax.composites.graph import Level, Node, Path, Value, inlined
from qjax.composites.masks import Causal
from qjax.composites.norm import Norm
from qjax.composites.softmax import Softmax

__all__ = [
    "Activation",
    "Attention",
    "Causal",
    "Composite",
    "Factor",
    "Level",
    "Mask",
    "Node",
    "Norm",
    "Operand",
    "Path",
    "Softmax",
    "Value",
    "find_composites",
    "find_nested",
    "inlined",
    "register_matcher",
]
