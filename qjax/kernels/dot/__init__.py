"""The product of activations and a quantized weight: y[r, n] = sum over k of x[r, k] * W[n, k]."""

from qjax.kernels.dot import affine, integer, log_digits, mixed, mosaic, parts, reference, triton, w4a8, words, xla

__all__ = [
    "affine",
    "integer",
    "log_digits",
    "mixed",
    "mosaic",
    "parts",
    "reference",
    "triton",
    "w4a8",
    "words",
    "xla",
]
