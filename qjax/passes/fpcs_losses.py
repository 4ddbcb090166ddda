"""What a candidate quantizer costs: squared errors of values, and of the products that they enter.

Every function takes candidates [S, C] and returns a loss for each, the sum of squared errors. Candidates are gone
through one by one inside one compiled loop, so that memory is that of one quantized copy and not of 128.

A product with a rounded operand is wrong by what the rounding of *both* operands does. With X' = X + E and W' = W + D

    X' W'^T  -  X W^T  =  E W'^T + X D^T.

Summed over squares this is a quadratic form in E, whose coefficients do not depend on the candidate:

    |E W'^T + X D^T|^2  =  sum E (W'^T W') E  +  2 sum E (X D^T W')  +  |X D^T|^2,

and likewise in D, where the tokens disappear: with G = X'^T X', A = X'^T E and C = E^T E, a row d of D costs

    d G d  +  2 d (A w)  +  w C w.

The form in E is cheaper than the product where the layer has more outputs than inputs (`form_of`); the one in D always
is. Errors are small beside the values, so nothing large cancels in these sums, as it would in |X'W'^T|^2 - 2 .. +
|XW^T|^2. The moments G, A and C are accumulated in float64 all the same.

Nearly all of the time goes into the product of E by W' or G, for which there are two precisions. In float32 all is
exact to rounding. In bfloat16 E and the matrix are rounded to 8 significant bits first, and products are added in
float32: what rounding E does to the loss of a candidate differs from element to element and averages out, and a rounded
matrix changes the losses of all candidates alike, so that their order stays. What the pairs found in either precision
cost is compared in docs/methods/adalog.md. On CPUs with tiles of bfloat16 a compiled kernel does all of it without
writing E or the product (`qjax.kernels.cpu.candidates`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats.log import FLOOR, R, denominator, fractions
from qjax.formats.numerics import power_of_two
from qjax.kernels.cpu import candidates

EXACT = lax.Precision.HIGHEST

Products = Literal["float32", "bfloat16", "kernel"]
"""How errors are multiplied: by XLA in float32 or bfloat16, or in bfloat16 by the compiled kernel."""

_OWN_COLUMNS = 4096


def chosen_products(asked: str | None) -> Products:
    """Return how errors are multiplied here.

    Args:
        asked: "float32", "bfloat16", or None: bfloat16 on GPU and TPU, and on CPU where there is the compiled kernel.
            On a CPU without instructions for it XLA's product of bfloat16 is the slower one.
    """
    on_cpu = jax.default_backend() == "cpu"
    there = on_cpu and not candidates.available()
    if asked is None:
        asked = "bfloat16" if there or not on_cpu else "float32"
    return "kernel" if there and asked == "bfloat16" else asked  # type: ignore[return-value]


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
    u = jnp.clip(log2x - jnp.log2(scale), _LEAST_LOG, 0)
    code = jnp.round(-u * (R / q))
    last = _last(bits, zero)
    value = _log_value(jnp.minimum(code, last), scale, q, bits)
    return value if zero == "clamp" else jnp.where(code > last, 0, value)


_LEAST_LOG = np.float32(np.log2(FLOOR))


def _last(bits: int, zero: str) -> int:
    """The last code that is not 0."""
    return 2**bits - 1 - (zero == "reserve")


def _log_value(code: Array, scale: Array, q: Array, bits: int) -> Array:
    """What codes stand for, scale * 2**-E * M / D; codes are whole numbers as float32."""
    product = code * q
    shift = jnp.floor((product + 0.5) * np.float32(1 / R))
    part = product - shift * R
    below = denominator(bits)
    numerator = jnp.round(jnp.exp2(-part * np.float32(1 / R)) * below)  # no fraction is near a half: see the tests
    return numerator * power_of_two(-jnp.minimum(shift, 126.0).astype(jnp.int32)) * (scale / below)


def _log_tables(scales: Array, qs: Array, bits: int, zero: str) -> Array:
    """What each code becomes, [C, entries]; beyond the last entry codes are the last one."""
    last = _last(bits, zero)
    codes = jnp.arange(last + 1, dtype=jnp.float32)
    values = _log_value(codes, scales[:, None], qs[:, None], bits)
    return values if zero == "clamp" else jnp.pad(values, ((0, 0), (0, 1)))


def nearest_half(bits: int) -> float:
    """How near a fraction times D comes to where its rounding turns; `logarithmic` relies on its being far."""
    exact = 2.0 ** (-np.arange(R) / R) * denominator(bits)
    return float(np.abs(np.abs(exact - fractions(bits)) - 0.5).min())


def _each(candidates: tuple[Array, ...], loss: Callable[..., Array]) -> Array:
    """Losses [S, C] of candidates [S, C], one after the other."""
    return jnp.moveaxis(lax.map(lambda pair: loss(*pair), tuple(c.T for c in candidates)), 0, -1)


@functools.partial(jax.jit, static_argnames=("bits", "products"))
def own_uniform(x: Array, scales: Array, zeros: Array, *, bits: int, products: Products = "float32") -> Array:
    """Squared error of each slice x [S, M] itself, float32 [S, C]; nothing is multiplied, and all is in float32."""
    if products == "kernel":
        parts = -(-x.shape[1] // _OWN_COLUMNS)  # tasks of bounded length; zeros have no error
        padded = jnp.pad(x, ((0, 0), (0, parts * -(-x.shape[1] // parts) - x.shape[1]))).reshape(len(x), parts, -1)
        return candidates.losses(padded, scales, zeros, form="own", top=2**bits - 1)

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


@functools.partial(jax.jit, static_argnames=("bits", "products"))
def weight_uniform(
    w: Array, known: Moments, scales: Array, zeros: Array, *, bits: int, products: Products = "float32"
) -> Array:
    """Squared error of the layer's outputs for candidates of its weight w [N, K]: float32 [N, C], a row an output."""
    linear = 2 * jnp.dot(w, known.cross.T, precision=EXACT)
    constant = jnp.sum(jnp.dot(w, known.error, precision=EXACT) * w, axis=1)
    if products == "kernel":
        found = candidates.losses(
            w[None], scales, zeros, form="quadratic", matrix=known.gram[None], rest=linear[None],
            top=2**bits - 1, by_row=True,
        )  # fmt: skip
        return found + constant[:, None]
    form = Quadratic(known.gram, linear, constant)

    def loss(scale: Array, zero: Array) -> Array:
        return _by_row(form, uniform(w, scale[:, None], zero[:, None], bits) - w, products) + constant

    return _each((scales, zeros), loss)


class Product(NamedTuple):
    """The squared error of products as |E matrix^T + rest|^2."""

    matrix: Array  # [.., N, K], the other operand, rounded
    rest: Array  # [.., M, N], what is wrong of the product without E
    constant: Array  # [..], 0


class Quadratic(NamedTuple):
    """The squared error of products as sum (E matrix + rest) E + constant."""

    matrix: Array  # [.., K, K], symmetric
    rest: Array  # [.., M, K]
    constant: Array  # [..], or a number for each row


Form = Product | Quadratic


@jax.jit
def form_of(x: Array, w: Array, rounded: Array) -> Form:
    """Return what the products of x [.., M, K] by w [.., N, K] cost as a function of an error of x, by the cheaper way.

    Args:
        x: what gets an error.
        w: the other operand.
        rounded: what it is rounded to.
    """
    off = rounded - w
    if rounded.shape[-2] <= rounded.shape[-1]:
        rest = jnp.einsum("...mk,...nk->...mn", x, off, precision=EXACT)
        return Product(rounded, rest, jnp.zeros(x.shape[:-2], jnp.float32))
    gram = jnp.einsum("...nk,...nl->...kl", rounded, rounded, precision=EXACT)
    cross = jnp.einsum("...nk,...nl->...kl", off, rounded, precision=EXACT)
    linear = 2 * jnp.einsum("...mk,...kl->...ml", x, cross, precision=EXACT)
    square = jnp.einsum("...nk,...nl->...kl", off, off, precision=EXACT)
    constant = jnp.sum(jnp.einsum("...mk,...kl->...ml", x, square, precision=EXACT) * x, axis=(-2, -1))
    return Quadratic(gram, linear, constant)


def _by_row(form: Form, e: Array, products: Products) -> Array:
    """Losses of an error e [.., M, K], row by row, without the constant: [.., M]."""
    if products == "float32":
        moved = jnp.einsum("...mk,...pk->...mp", e, form.matrix, precision=EXACT)
    else:
        # The barrier: XLA would make the errors again where they are multiplied with.
        e = lax.optimization_barrier(e.astype(jnp.bfloat16))
        matrix = form.matrix.astype(jnp.bfloat16)
        moved = jnp.einsum("...mk,...pk->...mp", e, matrix, preferred_element_type=jnp.float32)
        e = e.astype(jnp.float32)
    moved = moved + form.rest
    return jnp.sum(moved**2 if isinstance(form, Product) else moved * e, axis=-1)


def _loss(form: Form, e: Array, products: Products) -> Array:
    """Losses of an error e [.., M, K]: [..]."""
    return jnp.sum(_by_row(form, e, products), axis=-1) + form.constant


def _kernel(x: Array, form: Form, scales: Array, others: Array, **how: Any) -> Array:
    """`candidates.losses` of x [S, M, K] with the constant: [S, C]."""
    kind = "product" if isinstance(form, Product) else "quadratic"
    found = candidates.losses(x, scales, others, form=kind, matrix=form.matrix, rest=form.rest, **how)
    return found + form.constant[:, None]


class Logs(NamedTuple):
    """An operand of logarithmic candidates: numbers that are positive, and their logarithms to base 2."""

    log2: Array
    number: Array


@jax.jit
def logs_of(x: Array, shift: Array) -> Logs:
    """Return x + shift, of which no more than rounding is negative, with its logarithms."""
    return Logs(jnp.log2(jnp.maximum(x + shift, 0)), x + shift)


@functools.partial(jax.jit, static_argnames=("bits", "products"))
def input_uniform(
    x: Array, form: Form, scales: Array, zeros: Array, *, bits: int, products: Products = "float32"
) -> Array:
    """Squared error of outputs for candidates of inputs x [M, K]: float32 [1, C]; ``form`` from `form_of`."""
    if products == "kernel":
        return _kernel(x[None], _stacked(form), scales, zeros, top=2**bits - 1)
    return _each((scales, zeros), lambda s, z: _loss(form, uniform(x, s, z, bits) - x, products)[None])


@functools.partial(jax.jit, static_argnames=("bits", "zero", "products"))
def input_log(
    x: Logs, form: Form, scales: Array, qs: Array, *, bits: int, zero: str, products: Products = "float32"
) -> Array:
    """`input_uniform` for logarithmic candidates; what was added to x [M, K], the product takes off again: [1, C]."""
    if products == "kernel":
        return _log_kernel(Logs(x.log2[None], x.number[None]), _stacked(form), scales, qs, bits, zero)
    return _each(
        (scales, qs),
        lambda s, q: _loss(form, logarithmic(x.log2, s[0], q[0], bits, zero) - x.number, products)[None],
    )


def _stacked(form: Form) -> Form:
    return type(form)(*(a[None] for a in form))


def _log_kernel(x: Logs, form: Form, scales: Array, qs: Array, bits: int, zero: str) -> Array:
    """Losses [S, C] of logarithmic candidates [1, C] of x [S, M, K]."""
    tables = _log_tables(scales[0], qs[0], bits, zero)
    return _kernel(x.log2, form, jnp.log2(scales), R / qs, number=x.number, table=tables, least=float(_LEAST_LOG))


@jax.jit
def product_error(error: Array, x: Array, w: Array, rounded: Array) -> Array:
    """Squared error of the product of x [.., M, K] by w [.., N, K] once x has an error and w is ``rounded``."""
    return jnp.sum(_loss(form_of(x, w, rounded), error, "float32"))


@functools.partial(jax.jit, static_argnames=("bits", "products"))
def heads_uniform(
    x: Array, form: Form, scales: Array, zeros: Array, *, bits: int, products: Products = "float32"
) -> Array:
    """Squared error of products of x [B, H, M, K] for candidates of x, head by head: [H, C]."""
    if products == "kernel":
        found = _kernel(_merged(x), _heads_merged(form), scales, zeros, top=2**bits - 1)
        return jnp.sum(found.reshape(*x.shape[:2], -1), axis=0)

    def loss(scale: Array, zero: Array) -> Array:
        error = uniform(x, scale[:, None, None], zero[:, None, None], bits) - x
        return jnp.sum(_loss(form, error, products), axis=0)

    return _each((scales, zeros), loss)


@functools.partial(jax.jit, static_argnames=("bits", "zero", "products"))
def heads_log(
    p: Logs, form: Form, scales: Array, qs: Array, *, bits: int, zero: str, products: Products = "float32"
) -> Array:
    """Squared error of products of p [B, H, M, K] for logarithmic candidates of p: [1, C]."""
    if products == "kernel":
        merged = Logs(_merged(p.log2), _merged(p.number))
        return jnp.sum(_log_kernel(merged, _heads_merged(form), scales, qs, bits, zero), axis=0)[None]
    return _each(
        (scales, qs),
        lambda s, q: jnp.sum(_loss(form, logarithmic(p.log2, s[0], q[0], bits, zero) - p.number, products))[None],
    )


def _merged(x: Array) -> Array:
    """[B, H, ..] -> [B H, ..]."""
    return x.reshape(-1, *x.shape[2:])


def _heads_merged(form: Form) -> Form:
    return type(form)(*(_merged(a) for a in form))
