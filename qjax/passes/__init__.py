"""Passes: roundings, and edits of a program before rounding."""

from qjax._guard import only_inside_qjax

only_inside_qjax(__name__)

from qjax.passes.prepare import Edits, PreparePass, run_passes
from qjax.passes.rounding import RTN, Rounding

__all__ = ["RTN", "Edits", "PreparePass", "Rounding", "run_passes"]
