"""Convolutions with a quantized kernel."""

from qjax.kernels.conv import reference, xla

__all__ = ["reference", "xla"]
