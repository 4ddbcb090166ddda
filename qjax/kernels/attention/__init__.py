"""Attention of queries over quantized keys and values: `reference` is the oracle.

A lowering is called as ``function(problem, q, k, v, lengths, windows, layer)``, with

    q          float [B, H, T, G, D]: sequences, heads of keys, tokens, query heads that share one of keys, channels
    k, v       QArray [*layers, B, H, S, D] in its canonical view: room for S positions; layers is one axis or none
    lengths    int32 [B]: positions that are filled, those of the T tokens among them, which are the last
    windows    int32 [B]: of the positions up to its own, how many a token sees
    layer      int32 []: which of the layers

and returns [B, H, T, G, D of values]. In its `Problem` ``weight`` is the format of the keys, ``rows`` T * G, ``n`` the
channels of values, ``k`` the room S, ``stack`` (B, H), and ``settings`` an `AttentionSpec`.
"""

from qjax.kernels.attention.reference import AttentionSpec, attention_reference

__all__ = ["AttentionSpec", "attention_reference"]
