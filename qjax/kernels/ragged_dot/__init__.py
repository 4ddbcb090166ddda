"""Products of rows with the matrix of their group: a mixture of experts with quantized experts."""

from qjax.kernels.ragged_dot import reference, xla

__all__ = ["reference", "xla"]
