"""Rotary position embedding (RoPE) and the ways in which checkpoints stretch it to longer contexts.

A head of size D is D/2 planes; plane i is turned by the angle ``position * f_i`` with ``f_i = theta ** (-2 i / D)``.
The halves of a head are the two coordinates (element i is paired with element i + D/2), as in Hugging Face files.

The scalings change f only:

- ``linear``  f / factor: positions are interpolated.
- ``dynamic`` theta grows with the sequence once it is longer than the trained context ("NTK-aware").
- ``llama3``  long wavelengths are interpolated, short ones kept, with a linear blend between (Llama 3.1).
- ``yarn``    the same idea with the blend over the plane's index, cos and sin are warmed (arXiv:2309.00071).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import ModelError, near

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched; the fields carry the names of Hugging Face's ``rope_scaling``.

    Attributes:
        kind: one of ``default, linear, dynamic, llama3, yarn``.
        factor: how many times longer the context is made.
        original_max_position_embeddings: the context the model was first trained on (llama3, yarn); for ``dynamic``
            the context up to which nothing changes.
        low_freq_factor, high_freq_factor: ends of the blend of llama3, in turns per original context.
        beta_fast, beta_slow: ends of the blend of yarn, in turns per original context.
        attention_factor: yarn's factor on cos and sin; None computes it from the factor and the two mscales.
        truncate: yarn rounds the ends of its blend to whole planes.
    """

    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ModelError(
                f"rope_scaling type {self.kind!r} is not supported, only {', '.join(KINDS)}{near(self.kind, KINDS)}; "
                "use a checkpoint with one of these."
            )
        if self.kind != "default" and not self.factor > 0:
            raise ModelError(f"rope_scaling factor is {self.factor}, but must be positive; mend config.json.")
        if self.kind in ("dynamic", "llama3", "yarn") and self.original_max_position_embeddings <= 0:
            raise ModelError(
                f"rope_scaling of type {self.kind!r} needs original_max_position_embeddings > 0; add it to config.json."
            )

    @classmethod
    def from_hf(cls, spec: dict[str, Any] | None, max_positions: int) -> RopeScaling:
        """Read ``rope_scaling`` (transformers 4) or ``rope_parameters`` (transformers 5).

        Args:
            spec: the dictionary of config.json, or None.
            max_positions: ``max_position_embeddings``, the default of the original context.

        Raises:
            ModelError: an unknown type, or a key that the type needs is missing.
        """
        if not spec:
            return cls()
        kind = spec.get("rope_type", spec.get("type", "default"))
        if kind == "default":
            return cls()
        needed = {"llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}
        missing = [k for k in needed.get(kind, ("factor",)) if spec.get(k) is None] if kind in KINDS else []
        if missing:
            raise ModelError(f"rope_scaling of type {kind!r} lacks {', '.join(missing)}; add it to config.json.")
        known = {f.name for f in dataclasses.fields(cls)} - {"kind"}
        given = {k: v for k, v in spec.items() if k in known and v is not None}
        given.setdefault("original_max_position_embeddings", max_positions)
        if kind == "dynamic":  # transformers measures growth against max_position_embeddings
            given["original_max_position_embeddings"] = max_positions
        return cls(kind=kind, **given)

    def to_hf(self) -> dict[str, Any] | None:
        """The ``rope_scaling`` of a config.json: what differs from the defaults, or None where nothing is scaled."""
        if self.kind == "default":
            return None
        fields = [f for f in dataclasses.fields(self) if f.name != "kind" and getattr(self, f.name) is not None]
        always = ("factor", "low_freq_factor", "high_freq_factor") if self.kind == "llama3" else ("factor",)
        changed = {
            f.name: getattr(self, f.name) for f in fields if f.name in always or getattr(self, f.name) != f.default
        }
        return {"rope_type": self.kind, **changed}


def _yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(head_dim: int, theta: float, scaling: RopeScaling, length: int | jax.Array) -> tuple[Any, float]:
    """Angular frequencies of the planes of a head.

    Args:
        head_dim: D, even.
        theta: base of the geometric series.
        scaling: how it is stretched.
        length: number of positions in use, a Python int or a traced int32 scalar; read by ``dynamic`` only.

    Returns:
        float32 [D/2] frequencies, and the factor to multiply cos and sin by.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    if scaling.kind == "dynamic":
        trained = scaling.original_max_position_embeddings
        ratio = jnp.maximum(length, trained) / np.float32(trained)
        stretched = theta * (scaling.factor * ratio - (scaling.factor - 1)) ** (head_dim / (head_dim - 2))
        return stretched ** -jnp.asarray(exponents), 1.0
    plain = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    if scaling.kind == "default":
        return plain, 1.0
    slow = plain / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slow, 1.0
    context = scaling.original_max_position_embeddings
    if scaling.kind == "llama3":
        turns = context * plain / (2 * np.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return (keep * plain + (1 - keep) * slow).astype(np.float32), 1.0

    def plane(turns: float) -> float:  # the plane that makes so many turns over the original context
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = plane(scaling.beta_fast), plane(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    keep = 1 - np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    warmth = scaling.attention_factor
    if warmth is None and scaling.mscale and scaling.mscale_all_dim:
        warmth = _yarn_temperature(scaling.factor, scaling.mscale) / _yarn_temperature(
            scaling.factor, scaling.mscale_all_dim
        )
    elif warmth is None:
        warmth = _yarn_temperature(scaling.factor)
    return (keep * plain + (1 - keep) * slow).astype(np.float32), float(warmth)


def cos_sin(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling, length: int | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position and plane: float32 [*positions.shape, 1, D/2] (the 1 broadcasts over heads)."""
    freqs, warmth = frequencies(head_dim, theta, scaling, length)
    angles = positions[..., None, None].astype(jnp.float32) * freqs
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if warmth == 1.0 else (cos * warmth, sin * warmth)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn heads ``x [..., T, heads, D]`` by the angles of ``cos, sin [..., T, 1, D/2]``; dtype of x is kept."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
