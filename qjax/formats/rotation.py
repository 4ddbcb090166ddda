"""Rotating rows: x R, with R = diag(signs) · H / √n, along the last axis.

R is orthogonal, so (x R)(w R)ᵀ = x wᵀ: a product may be formed of rotated activations and a rotated weight. A channel
with outliers is spread over all, and a row of numbers that were unlike looks like a sample of a normal distribution,
which few codes hold well (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456; QuIP#, Tseng et al. 2024, arXiv:2402.04396).

A rotated weight keeps its signs as the array ``input.signs``, int8 [*stack, 1.., width] (`SIGNS`). The matrix follows
from their number: a row is rotated in blocks of ``width``, each by the matrix of `qjax.formats.hadamard` of that order.
So what is stored says what was done, slices and stacks of it are right without anything static, and an array that was
cut into pieces no longer fits and is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.errors import LayoutError
from qjax.formats import hadamard
from qjax.formats.numerics import AnyArray

SIGNS = "input.signs"
"""Name in aux of the signs of a rotation of each row, int8 [*stack, 1.., width]: a product rotates its activations
alike, anything else rotates the numbers that the codes stand for back."""

SMOOTH = "input.smooth"
"""Name in aux of constants per element of a row, [*stack, 1.., K], with which the weight was multiplied before it was
quantized: a product divides its activations by them, anything else the numbers that the codes stand for. A weight that
is rotated too was first multiplied and then rotated."""


def random_signs(width: int, seed: int | None = 0) -> np.ndarray:
    """Signs of a rotation: int8 [width] of ±1, half of them each on average; the same for the same width and seed.

    Args:
        width: how many.
        seed: another seed gives other signs; None gives +1 everywhere, the plain Hadamard matrix.
    """
    if seed is None:
        return np.ones(width, np.int8)
    # splitmix64 of the place: the same on every platform and version
    with np.errstate(over="ignore"):
        z = (np.arange(1, width + 1, dtype=np.uint64) + np.uint64((seed * 0xD1342543DE82EF95 + width) % 2**64)) * (
            np.uint64(0x9E3779B97F4A7C15)
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (1 - 2 * (z >> np.uint64(63)).astype(np.int8)).astype(np.int8)


def matrix(signs: AnyArray) -> np.ndarray:
    """R as a dense matrix, float64 [width, width]; for tests and for folding into weights on the host."""
    signs = np.asarray(signs, np.float64).reshape(-1)
    width = hadamard.blocked(len(signs))
    h = np.eye(1)
    for n in hadamard.factors(width):
        h = np.kron(h, hadamard.exact(n))
    return signs[:, None] * np.kron(np.eye(len(signs) // width), h)


def rotate(x: AnyArray, signs: AnyArray) -> Array:
    """Return x R, in blocks of ``width`` along the last axis.

    Args:
        x: float [*stack, rows, K]; computed in float32 (float64 if x is), returned in its own dtype.
        signs: ±1, [*stack, 1, width] or [width]; width divides K.

    Raises:
        LayoutError: the width does not divide K, as where a mesh has cut K.
    """
    return _turned(x, signs, back=False)


def unrotate(y: AnyArray, signs: AnyArray) -> Array:
    """Return y Rᵀ: what `rotate` made y of."""
    return _turned(y, signs, back=True)


def _turned(x: AnyArray, signs: AnyArray, back: bool) -> Array:
    width, k = signs.shape[-1], x.shape[-1]
    if not width or k % width:
        raise LayoutError(
            f"rows of {k} numbers that were rotated in blocks of {width}: a rotation mixes all of a block, so it "
            "cannot be cut; split another axis, or quantize with Rotated(block=...) of a length that divides each part"
        )
    return _rotated(jnp.asarray(x), jnp.asarray(signs), back)


@functools.partial(jax.jit, static_argnums=2)
def _rotated(x: Array, signs: Array, back: bool) -> Array:
    width = signs.shape[-1]
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    signs = jnp.expand_dims(signs, -2).astype(dtype)
    y = x.astype(dtype).reshape(*x.shape[:-1], x.shape[-1] // width, width)
    y = y if back else y * signs
    part = hadamard.blocked(width)
    orders = hadamard.factors(part)
    y = y.reshape(*x.shape[:-1], x.shape[-1] // part, *orders)
    lead = x.ndim
    for n, order in enumerate(orders):  # Kronecker product: each factor along an axis of its own
        h = hadamard.orthonormal(order) if dtype == jnp.float32 else hadamard.exact(order)
        axis = lead + n
        contract = (((axis,), (1 if back else 0,)), ((), ()))
        y = lax.dot_general(y, jnp.asarray(h, dtype), contract, precision=lax.Precision.HIGHEST)
        y = jnp.moveaxis(y, -1, axis)
    y = y.reshape(*x.shape[:-1], x.shape[-1] // width, width)
    y = y * signs if back else y
    return y.reshape(x.shape).astype(x.dtype)


def rotate_on_host(x: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """`rotate` of NumPy arrays by the same signs [width] for all, in their own dtype, float32 or float64."""
    width = len(signs)
    part = hadamard.blocked(width)
    y = x.reshape(-1, width) * signs.astype(x.dtype)
    orders = hadamard.factors(part)
    y = y.reshape(-1, *orders)
    for axis, order in enumerate(orders, 1):
        y = np.moveaxis(np.tensordot(y, hadamard.exact(order).astype(x.dtype), axes=(axis, 0)), -1, axis)
    return y.reshape(x.shape)


def prepared(x: AnyArray, aux: Mapping[str, Any]) -> Array:
    """Activations [*stack, rows, K] as a weight with these arrays wants them: smoothed, then rotated; float32."""
    y = jnp.asarray(x).astype(jnp.float32)
    if SMOOTH in aux:
        y = y * (1.0 / aux[SMOOTH])
    return rotate(y, aux[SIGNS]) if SIGNS in aux else y


def check_prepared(w: Any, where: str) -> None:
    """Refuse a weight whose activations have to be prepared before a product with its codes.

    Raises:
        LayoutError: it is kept smoothed or rotated.
    """
    for name, how in ((SMOOTH, "smoothed"), (SIGNS, "rotated")):
        if name in w.aux:
            raise LayoutError(
                f"{where}this weight is kept {how} ({name}): multiply it as a function that qjax has rewritten, or "
                "give qjax.formats.rotation.prepared(x, w.canonical().aux) and the weight without that array"
            )


def kept_as(w: AnyArray, aux: Mapping[str, Any]) -> Array:
    """A weight [*stack, N, K] as what its codes are taken of: the opposite of `restored`; float32."""
    y = jnp.asarray(w).astype(jnp.float32)
    y = y * aux[SMOOTH] if SMOOTH in aux else y
    return rotate(y, aux[SIGNS]) if SIGNS in aux else y


def restored(w: AnyArray, aux: Mapping[str, Any]) -> Array:
    """What numbers [*stack, N, K] stand for, that codes of a weight with these arrays gave: float32."""
    y = unrotate(w, aux[SIGNS]) if SIGNS in aux else jnp.asarray(w)
    return y / aux[SMOOTH] if SMOOTH in aux else y
