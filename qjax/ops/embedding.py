"""q_take: rows of a packed table."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from qjax.formats import QArray


def q_take(
    w: QArray, axis: int, indices: ArrayLike, *, mode: str = "clip", out_dtype: DTypeLike | None = None
) -> Array:
    """Look up rows of a quantized table: `jnp.take` that reads codes and decodes the rows it has read.

    Written in jnp and not as a primitive of its own: gathering codes is exact, decoding a few rows costs nothing
    beside it, and so derivatives of scales, `vmap`, sharding and export are those of jnp.

    Args:
        w: the table; ``axis`` one of its stack or out axes.
        axis: the axis that is indexed.
        indices: integers of any shape.
        mode: "clip", "wrap", or "fill" (NaN outside, as `jnp.take` does by default; negative indices count from the
            end).
        out_dtype: dtype of the result, by default that which w stands for.

    Returns:
        float, the shape of w with ``axis`` replaced by the shape of ``indices``.
    """
    indices = jnp.asarray(indices)
    axis %= w.ndim
    if mode != "fill":
        return w.take(axis, indices, mode).dequantize(out_dtype)
    size = w.shape[axis]
    indices = jnp.where(indices < 0, indices + size, indices)
    rows = w.take(axis, indices, "clip").dequantize(out_dtype)
    inside = ((indices >= 0) & (indices < size)).reshape(
        *(1,) * axis, *indices.shape, *(1,) * (rows.ndim - axis - indices.ndim)
    )
    return jnp.where(inside, rows, jnp.array(jnp.nan, rows.dtype))
