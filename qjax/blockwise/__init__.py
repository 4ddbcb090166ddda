"""Quantizing block by block: a model whose statistics, or whose weights, do not fit in memory at once."""

from qjax.blockwise.run import BlockQuantizer
from qjax.blockwise.schedule import blocks_of

__all__ = ["BlockQuantizer", "blocks_of"]
