"""Many recipes on one model: what each keeps of the scores, what it stores, and which differences are real."""

from qjax.studies.result import Comparison, Outcome, Study
from qjax.studies.run import study

__all__ = ["Comparison", "Outcome", "Study", "study"]
