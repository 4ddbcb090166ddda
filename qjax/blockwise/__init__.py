"""Quantizing block by block: a model whose statistics, or whose weights, do not fit in memory at once."""

from qjax.blockwise.cost import Cost, job_cost
from qjax.blockwise.run import BlockQuantizer
from qjax.blockwise.schedule import blocks_of

__all__ = ["BlockQuantizer", "Cost", "blocks_of", "job_cost"]
