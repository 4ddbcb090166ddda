"""Attention whose probabilities are logarithmic codes: softmax, codes and the product with the values in one op."""

from qjax.kernels.log_attention import lookup, mosaic, reference

__all__ = ["lookup", "mosaic", "reference"]
