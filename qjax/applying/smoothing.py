"""Smoothing: a constant for each input channel, divided out of the activations and multiplied into the weight.

A few input channels that are far larger than the rest take the range of a scale that serves the whole tensor. Dividing
channel k by s_k and multiplying column k of the weight by it leaves the product as it was and moves part of the range
into the weight, which has a scale per output channel to take it. SmoothQuant (Xiao et al. 2023, arXiv:2211.10438,
section 4.2, equation 4):

    s_k = max|x_k|^a / max|W_k|^(1 - a)

The constants are kept with the weight, as its array ``input.smooth``, and applied to the activations just before they
are rounded; so smoothing needs no operation in front into which it could be folded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from qjax.calibration import State
from qjax.sources import Static


def smoothing(
    matrix: Any, sources: Sequence[tuple[str, Static]], seen: Sequence[Mapping[str, State]], lead: tuple[int, ...]
) -> tuple[Any, dict[str, Any]]:
    """Smoothing constants of weights, and the scales of their smoothed activations.

    Args:
        matrix: the weights [*stack, N, K].
        sources: prefix and source of each reader of the weights that is smoothed.
        seen: for each slice, prefix of the reader -> its state, with the fields of `qjax.statistics.ChannelRange`.
        lead: the stack axes of the slices, and ones for those along which one constant serves all.

    Returns:
        s [*lead, 1, K], float32, and ``{prefix.field: array [*stack, 1, 1]}``.
    """
    strength = max(source.smooth for _, source in sources if source.smooth is not None)
    length, stack = matrix.shape[-1], matrix.shape[:-2]

    def channels(prefix: str, field: str) -> Any:
        return jnp.stack([jnp.asarray(s[prefix][f"channel_{field}"]) for s in seen]).reshape(*lead, 1, length)

    reach = {p: (channels(p, "below"), channels(p, "above")) for p, _ in sources}
    top = jnp.stack([jnp.maximum(*pair) for pair in reach.values()]).max(axis=0)
    rows = tuple(n for n, size in enumerate(lead) if size == 1 and stack[n] != 1) + (matrix.ndim - 2,)
    weight = jnp.max(jnp.abs(matrix.astype(jnp.float32)), axis=rows, keepdims=True)
    s = top**strength / jnp.maximum(weight, 1e-30) ** (1 - strength)
    # A channel that was never seen, or that meets zeros only, is left as it is. No constant is more than a factor of
    # 2**20 from the middle one: beyond it float32 would not bring it back.
    good = (top > 0) & (weight > 0)
    middle = jnp.exp2(
        jnp.sum(jnp.where(good, jnp.log2(s), 0), -1, keepdims=True) / jnp.maximum(good.sum(-1), 1)[..., None]
    )
    s = jnp.where(good, jnp.clip(s / middle, 2.0**-20, 2.0**20), 1.0)
    constants = {}
    for prefix, source in sources:
        below, above = (jnp.max(a / s, axis=-1, keepdims=True) for a in reach[prefix])
        aux = source.fmt.constant_aux(-below, above)
        for field, a in aux.items():
            constants[f"{prefix}.{field}"] = jnp.broadcast_to(a, (*stack, 1, 1))
    assert math.prod(s.shape[:-1]) == math.prod(lead)
    return jnp.broadcast_to(s, (*stack, 1, length)), constants
