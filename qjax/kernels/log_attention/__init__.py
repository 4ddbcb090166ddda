"""Attention whose probabilities are logarithmic codes: softmax, codes and the product with the values in one op.

A lowering is called as ``function(problem, scores, v, act)``, with scores float [*batch, M, N], values float
[*batch, N, D], and ``act`` the format and aux of the values, [*batch or 1, 1, 1] each, or None; it returns
[*batch, M, D]. In its `Problem` ``weight`` is the format of the probabilities, ``act`` that of the values, ``rows`` M,
``n`` D, ``k`` N, ``stack`` the batch, and ``settings`` the precision of float products.
"""

from qjax.kernels.log_attention import lookup, mosaic, reference

__all__ = ["lookup", "mosaic", "reference"]
