"""What computes a quantized op, a folder an op: `reference` is the oracle, the other files are lowerings.

Every lowering, ours or a stranger's, stands in one table (`qjax.kernels.registry`), from which a quantized op picks
the first that can run on the platform, the formats and the shapes at hand.
"""

from qjax._guard import only_inside_qjax

only_inside_qjax(__name__)

from qjax.kernels import act, attention, conv, cpu, dot, log_attention, ragged_dot  # noqa: F401 (they fill the table)
from qjax.kernels.figures import kind_of
from qjax.kernels.pack import neutral, pack, pack_tree
from qjax.kernels.registry import (
    Act,
    Choice,
    Lowering,
    LoweringTable,
    Problem,
    choice_for,
    choose,
    lowering_table,
    register_lowering,
    select,
)

__all__ = [
    "Act",
    "Choice",
    "Lowering",
    "LoweringTable",
    "Problem",
    "choice_for",
    "choose",
    "kind_of",
    "lowering_table",
    "neutral",
    "pack",
    "pack_tree",
    "register_lowering",
    "select",
]
