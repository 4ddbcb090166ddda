"""Passes: roundings, and edits of a program before rounding."""

from qjax._guard import only_inside_qjax

only_inside_qjax(__name__)

from qjax.passes.adalog import AdaLog
from qjax.passes.autoround import AutoRound
from qjax.passes.awq import AWQ, awq_clip, awq_scales
from qjax.passes.bias import BiasCorrection
from qjax.passes.dgq import DGQ
from qjax.passes.finish import FinishPass
from qjax.passes.gptq import GPTQ
from qjax.passes.hqq import HQQ
from qjax.passes.leaves import Leaves
from qjax.passes.prepare import Edits, PreparePass, run_passes, split_passes
from qjax.passes.ptqtp import PTQTP
from qjax.passes.qoq import QoQ
from qjax.passes.qoq_channels import DGQSmooth, Reorder, SmoothAttention, SmoothOutputs
from qjax.passes.rotate import Rotate
from qjax.passes.rotated import Rotated
from qjax.passes.rounding import RTN, Rounding, rounding_flops, rounding_statistics
from qjax.passes.smoothquant import SmoothQuant
from qjax.passes.sparsegpt import SparseGPT
from qjax.passes.two_bit import TwoBit

__all__ = [
    "DGQ",
    "GPTQ",
    "PTQTP",
    "HQQ",
    "RTN",
    "AWQ",
    "AdaLog",
    "AutoRound",
    "BiasCorrection",
    "DGQSmooth",
    "Edits",
    "FinishPass",
    "Leaves",
    "PreparePass",
    "QoQ",
    "Reorder",
    "Rotate",
    "Rotated",
    "Rounding",
    "SmoothAttention",
    "SmoothOutputs",
    "SparseGPT",
    "SmoothQuant",
    "TwoBit",
    "awq_clip",
    "awq_scales",
    "rounding_flops",
    "rounding_statistics",
    "run_passes",
    "split_passes",
]
