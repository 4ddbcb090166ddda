"""Activations quantized row by row as they pass: alone, and with the norm or the gate in front of them."""

from qjax.kernels.act import mosaic, reference

__all__ = ["mosaic", "reference"]
