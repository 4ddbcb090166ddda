"""Ternary weights for qjax, in a package of their own: a format, and an implementation of the product for it.

    pip install ./examples/plugin
    qjax quantize DIR --recipe examples/plugin/recipe.toml --out OUT

Ternary weight networks (Li and Liu 2016, arXiv:1605.04711, section 2): codes -1, 0, 1; numbers beyond 0.7 times the
mean magnitude of their block decide the scale, which is their mean magnitude. Here they are then rounded to the nearest
of the three values, which is at least as close as the paper's threshold.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.formats import Format, QArray

THRESHOLD = 0.7


@qjax.register_format("ternary")
@dataclasses.dataclass(frozen=True)
class Ternary(Format):
    """-1, 0 or 1 times a scale.

    Args:
        group: length of a group along the contracted axis; None is a scale per output channel.
    """

    group: int | None = None

    code_bits = 2  # packed four to a byte; the code -2 is not used
    code_dtype = np.dtype(np.int8)
    affine = True  # value = code * scale, so codes may be multiplied as integers
    elementwise = True

    @property
    def per(self) -> str:
        """What shares a scale."""
        return "group" if self.group else "channel"

    def fit(self, x: jax.Array, weight: jax.Array | None = None) -> dict[str, jax.Array]:
        """Return {"scale": float32}, blocked; 1 where a block is zero."""
        size = jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0)
        count = self.reduce(jnp.ones_like(size), jnp.sum)
        limit = self.spread(THRESHOLD * self.reduce(size, jnp.sum) / count, x.shape[-1])
        large = (size > limit).astype(size.dtype)
        total, members = self.reduce(size * large, jnp.sum), self.reduce(large, jnp.sum)
        scale = total / jnp.maximum(members, 1)
        return {"scale": jnp.where(scale >= 2.0**-100, scale, 1.0)}

    def encode(self, x: jax.Array, aux: dict[str, jax.Array]) -> jax.Array:
        """Return int8 codes."""
        steps = jnp.round(x * self.spread(1.0 / aux["scale"], x.shape[-1]))
        return jnp.clip(jnp.nan_to_num(steps), -1, 1).astype(jnp.int8)

    def decode(self, codes: jax.Array, aux: dict[str, jax.Array]) -> jax.Array:
        """Return float32."""
        return jnp.asarray(codes, jnp.float32) * self.spread(aux["scale"], codes.shape[-1])


def _a_scale_per_row(problem: qjax.ops.Problem) -> bool | str:
    if problem.act is not None:
        return "it takes float activations"
    return problem.weight.group is None or "it scales each output once, and this weight has a scale per group"


@qjax.register_lowering(
    "dot", "ternary", "cpu", when=_a_scale_per_row, about="multiply by the codes, scale each output"
)
def scale_after(problem: qjax.ops.Problem, x: jax.Array, w: QArray, act: None) -> jax.Array:
    """Return x [*stack, *rows, K] times w [*stack, N, K], each output scaled once, where others scale each weight."""
    codes = w.unpacked().astype(jnp.float32)
    rows = x.astype(jnp.float32).reshape(*problem.stack, -1, problem.k)
    y = (rows @ jnp.swapaxes(codes, -1, -2)) * jnp.swapaxes(w.aux["scale"], -1, -2)
    return y.reshape(*x.shape[:-1], problem.n).astype(problem.out_dtype)
