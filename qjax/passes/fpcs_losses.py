"""What a candidate quantizer costs: squared errors of values, and of the products that they enter.

Every function takes candidates [S, C] (or [C]) and returns a loss for each, the sum of squared errors. Candidates are
gone through one by one inside one compiled loop, so that memory is that of one quantized copy and not of 128.

A product with a rounded operand is wrong by what the rounding of *both* operands does. With X' = X + E and W' = W + D

    X' W'^T - X W^T  =  E W'^T + X D^T.

Summed over squares this is a quadratic form in E, whose coefficients do not depend on the candidate:

    |E W'^T + X D^T|^2  =  sum E (W'^T W') E  +  2 sum E (X D^T W')  +  |X D^T|^2,

and likewise in D, where the tokens disappear: with G = X'^T X', A = X'^T E and C = E^T E, a row d of D costs

    d G d  +  2 d (A w)  +  w C w.

The form in E is cheaper than the product where the layer has more outputs than inputs; the one in D always is. Errors
are small beside the values, so nothing large cancels in these sums, as it would in |X'W'^T|^2 - 2 .. + |XW^T|^2. The
moments G, A and C are accumulated in float64 all the same; a loop over candidates is in float32, at full precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats.log import FLOOR, R, denominator, fractions
from qjax.formats.numerics import power_of_two

EXACT = lax.Precision.HIGHEST


@functools.partial(jax.jit, static_argnames="bits")
def uniform(x: Array, scale: Array, zero: Array, bits: int) -> Array:
    """Return x quantized and dequantized: ``(clip(rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale``.

    The reciprocal is multiplied with, as in `qjax.Int`.
    """
    codes = jnp.clip(jnp.round(x * (1.0 / scale)) + zero, 0, 2**bits - 1)
    return (codes - zero) * scale


@functools.partial(jax.jit, static_argnames=("bits", "zero"))
def logarithmic(log2x: Array, scale: Array, q: Array, bits: int, zero: str) -> Array:
    """Return scale * 2**-E * M / D of numbers whose logarithm is known: `qjax.formats.Log` with a traced q.

    Logarithms, where the format compares with bounds; the two differ in about one code of a million, by one step.

    Args:
        log2x: base-2 logarithms, -inf for what is not positive; any shape.
        scale, q: float32 scalars.
        bits: of the codes.
        zero: "mask", "reserve" or "clamp".
    """
    u = jnp.clip(log2x - jnp.log2(scale), np.float32(np.log2(FLOOR)), 0)
    code = jnp.round(-u * (R / q))
    last = 2**bits - 1 - (zero == "reserve")
    product = jnp.minimum(code, last) * q
    shift = jnp.floor((product + 0.5) * np.float32(1 / R))
    part = product - shift * R
    below = denominator(bits)
    numerator = jnp.round(jnp.exp2(-part * np.float32(1 / R)) * below)  # no fraction is near a half: see the tests
    value = numerator * power_of_two(-jnp.minimum(shift, 126.0).astype(jnp.int32)) * (scale / below)
    return value if zero == "clamp" else jnp.where(code > last, 0, value)


def nearest_half(bits: int) -> float:
    """How near a fraction times D comes to where its rounding turns; `logarithmic` relies on its being far."""
    exact = 2.0 ** (-np.arange(R) / R) * denominator(bits)
    return float(np.abs(np.abs(exact - fractions(bits)) - 0.5).min())


def _each(candidates: tuple[Array, ...], loss: Callable[..., Array]) -> Array:
    """Losses [S, C] of candidates [S, C], one after the other."""
    return jnp.moveaxis(lax.map(lambda pair: loss(*pair), tuple(c.T for c in candidates)), 0, -1)


@functools.partial(jax.jit, static_argnames="bits")
def own_uniform(x: Array, scales: Array, zeros: Array, *, bits: int) -> Array:
    """Squared error of each slice x [S, M] itself, float32 [S, C]."""

    def loss(scale: Array, zero: Array) -> Array:
        return jnp.sum((uniform(x, scale[:, None], zero[:, None], bits) - x) ** 2, axis=1)

    return _each((scales, zeros), loss)


class Moments(NamedTuple):
    """What the search for weights knows of the inputs: float32 [K, K] each, accumulated in float64."""

    gram: Array  # X'^T X'
    cross: Array  # X'^T (X' - X)
    error: Array  # (X' - X)^T (X' - X)


def moments(x: np.ndarray, rounded: np.ndarray) -> Moments:
    """Moments of inputs [M, K] and of what quantization makes of them, a few thousand rows at a time."""
    k = x.shape[1]
    sums = [np.zeros((k, k)) for _ in range(3)]
    for at in range(0, len(x), 4096):
        there = rounded[at : at + 4096].astype(np.float64)
        off = there - x[at : at + 4096]
        for total, left, right in zip(sums, (there, there, off), (there, off, off), strict=True):
            total += left.T @ right
    return Moments(*(jnp.asarray(s, jnp.float32) for s in sums))


@functools.partial(jax.jit, static_argnames="bits")
def weight_uniform(w: Array, known: Moments, scales: Array, zeros: Array, *, bits: int) -> Array:
    """Squared error of the layer's outputs for candidates of its weight w [N, K]: float32 [N, C], a row an output."""
    linear = 2 * jnp.dot(w, known.cross.T, precision=EXACT)
    constant = jnp.sum(jnp.dot(w, known.error, precision=EXACT) * w, axis=1)

    def loss(scale: Array, zero: Array) -> Array:
        d = uniform(w, scale[:, None], zero[:, None], bits) - w
        return jnp.sum((jnp.dot(d, known.gram, precision=EXACT) + linear) * d, axis=1) + constant

    return _each((scales, zeros), loss)


def _quadratic(x: Array, w: Array, rounded: Array) -> tuple[Array, Array, Array]:
    """Coefficients of the quadratic form in the error of x, for `_output_loss`; the last axes are [M, K] and [N, K]."""
    d = rounded - w
    gram = jnp.einsum("...nk,...nl->...kl", rounded, rounded, precision=EXACT)
    cross = jnp.einsum("...nk,...nl->...kl", d, rounded, precision=EXACT)
    linear = 2 * jnp.einsum("...mk,...kl->...ml", x, cross, precision=EXACT)
    square = jnp.einsum("...nk,...nl->...kl", d, d, precision=EXACT)
    constant = jnp.sum(jnp.einsum("...mk,...kl->...ml", x, square, precision=EXACT) * x, axis=(-2, -1))
    return gram, linear, constant


def _output_losses(x: Array, w: Array, rounded: Array) -> Callable[[Array], Array]:
    """A function of an error [.., M, K] of x: the squared error of the products with w [.., N, K], summed over M and N.

    The cheaper of the two ways: through the form in E, or through the product itself.
    """
    if rounded.shape[-2] > rounded.shape[-1]:
        gram, linear, constant = _quadratic(x, w, rounded)
        return lambda e: (
            jnp.sum((jnp.einsum("...mk,...kl->...ml", e, gram, precision=EXACT) + linear) * e, axis=(-2, -1)) + constant
        )
    rest = jnp.einsum("...mk,...nk->...mn", x, rounded - w, precision=EXACT)
    return lambda e: jnp.sum((jnp.einsum("...mk,...nk->...mn", e, rounded, precision=EXACT) + rest) ** 2, axis=(-2, -1))


@functools.partial(jax.jit, static_argnames="bits")
def input_uniform(x: Array, w: Array, rounded: Array, scales: Array, zeros: Array, *, bits: int) -> Array:
    """Squared error of outputs for candidates of inputs x [M, K] with quantized weights ``rounded`` [N, K]: [1, C]."""
    losses = _output_losses(x, w, rounded)
    return _each((scales, zeros), lambda s, z: losses(uniform(x, s, z, bits) - x)[None])


@functools.partial(jax.jit, static_argnames=("bits", "zero"))
def input_log(
    x: Array, shift: Array, w: Array, rounded: Array, scales: Array, qs: Array, *, bits: int, zero: str
) -> Array:
    """`input_uniform` for logarithmic candidates of x + shift, which the product takes off again: [1, C]."""
    losses = _output_losses(x, w, rounded)
    logs = jnp.log2(jnp.maximum(x + shift, 0))
    return _each(
        (scales, qs),
        lambda s, q: losses(logarithmic(logs, s[0], q[0], bits, zero) - shift - x)[None],
    )


@jax.jit
def product_error(error: Array, x: Array, w: Array, rounded: Array) -> Array:
    """Squared error of the product of x [.., M, K] by w [.., N, K] once x has an error and w is ``rounded``."""
    return jnp.sum(_output_losses(x, w, rounded)(error))


@functools.partial(jax.jit, static_argnames="bits")
def heads_uniform(x: Array, w: Array, rounded: Array, scales: Array, zeros: Array, *, bits: int) -> Array:
    """Squared error of products x [B, H, M, K] by w [B, H, N, K] for candidates of x, head by head: [H, C]."""
    losses = _output_losses(x, w, rounded)

    def loss(scale: Array, zero: Array) -> Array:
        error = uniform(x, scale[:, None, None], zero[:, None, None], bits) - x
        return jnp.sum(losses(error), axis=0)

    return _each((scales, zeros), loss)


@functools.partial(jax.jit, static_argnames=("bits", "zero"))
def heads_log(p: Array, v: Array, rounded: Array, scales: Array, qs: Array, *, bits: int, zero: str) -> Array:
    """Squared error of products p [B, H, M, K] by v [B, H, N, K] for logarithmic candidates of p: [1, C]."""
    losses = _output_losses(p, v, rounded)
    logs = jnp.log2(p)
    return _each(
        (scales, qs),
        lambda s, q: jnp.sum(losses(logarithmic(logs, s[0], q[0], bits, zero) - p))[None],
    )
