"""Products of rows with the matrix of their group: a mixture of experts with quantized experts."""

from qjax.kernels.ragged_dot import mosaic, reference, xla

__all__ = ["mosaic", "reference", "xla"]
