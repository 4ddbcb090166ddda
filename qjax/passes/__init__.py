"""Passes: roundings, and edits of a program before rounding."""

from qjax._guard import only_inside_qjax

only_inside_qjax(__name__)

from qjax.passes.gptq import GPTQ
from qjax.passes.prepare import Edits, PreparePass, run_passes
from qjax.passes.rounding import RTN, Rounding, rounding_statistics

__all__ = ["GPTQ", "RTN", "Edits", "PreparePass", "Rounding", "rounding_statistics", "run_passes"]
