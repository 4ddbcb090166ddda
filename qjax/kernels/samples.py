"""Products of random numbers, for whoever times kernels: arguments, and the function of a lowering on them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.errors import LoweringError
from qjax.formats import Format, Int, QArray, quantize_array
from qjax.kernels.devices import cuda_capability, platform_here
from qjax.kernels.pack import pack, tiled_format
from qjax.kernels.registry import Lowering, Problem

ROTATE = {"cuda": 256 << 20, "cpu": 64 << 20}
"""Bytes of weights that are read before the first is read again: several times the last cache."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of tokens and one weight.

    Attributes:
        weight: format of the weight.
        n: its rows, the outputs.
        k: its columns.
        tokens: rows of the activations.
        act: format of the activations, or None.
        dtype: of activations and result.
        experts: None; or how many weights there are, of which each token meets one (`jax.lax.ragged_dot`).
    """

    weight: Format
    n: int
    k: int
    tokens: int
    act: Format | None = None
    dtype: str = "bfloat16"
    experts: int | None = None

    @property
    def flops(self) -> int:
        """Operations, a multiply-add counted as two."""
        return 2 * self.n * self.k * self.tokens

    def __str__(self) -> str:
        """Say it in words."""
        act = f" x {self.act.name}" if self.act else ""
        several = f" x {self.experts} experts" if self.experts else ""
        return f"{self.weight.name}{act} {self.dtype} [{self.n}, {self.k}]{several}, {self.tokens} tokens"


@functools.lru_cache(maxsize=1)
def weights(
    fmt: Format,
    n: int,
    k: int,
    packed: bool,
    count: int | None = None,
    act: Format | None = None,
    experts: int | None = None,
) -> list[QArray]:
    """Return equal weights that lie apart in memory: as many as are larger than the cache, or ``count``.

    The last ones that were asked for are kept, so ask for all of one before those of another.

    Args:
        fmt: their format.
        n: rows.
        k: columns.
        packed: whether in the order of this platform's kernels (`pack`), if the format has one.
        count: how many; None: at least 2, and `ROTATE` bytes.
        act: format of the activations, for which the order is.
        experts: matrices of one weight, or None.
    """
    w = _quantized(fmt, n, k, experts)
    target = "mosaic" if act is None else "mosaic_int8"
    if packed and not isinstance(tiled_format(fmt, k, target), str):
        w = pack(w, target)
    most = ROTATE.get(platform_here(), ROTATE["cpu"])
    count = max(2, -(-most // max(w.nbytes, 1))) if count is None else count
    return [w, *(jax.tree.map(jnp.copy, w) for _ in range(count - 1))]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _quantized(fmt: Format, n: int, k: int, experts: int | None = None) -> QArray:
    if experts is None:
        return quantize_array(jax.random.normal(jax.random.key(0), (n, k), jnp.bfloat16), fmt, in_axes=1)
    made = jax.random.normal(jax.random.key(0), (experts, n, k), jnp.bfloat16)
    return quantize_array(made, fmt, in_axes=2, stack_axes=(0,))


def arguments(product: Product, many: list[QArray]) -> list[tuple[Any, ...]]:
    """Return ``[(x, w, aux of x)]`` for weights of `weights`; x is the same for all.

    With experts, the numbers of tokens that each of them has stand behind: every token chose one at random, for each
    weight anew.
    """
    x = jax.random.normal(jax.random.key(1), (product.tokens, product.k), product.dtype)
    aux = {} if product.act is None else product.act.fit(x.astype(jnp.float32))
    if product.experts is None:
        return [(x, w, aux) for w in many]
    rng = np.random.default_rng(0)
    chosen = [rng.integers(0, product.experts, product.tokens) for _ in many]
    sizes = [jnp.asarray(np.bincount(c, minlength=product.experts), jnp.int32) for c in chosen]
    return [(x, w, aux, s) for w, s in zip(many, sizes, strict=True)]


def problem_of(product: Product, w: QArray) -> Problem:
    """Return what lowerings are asked on this device."""
    platform, dtype = platform_here(), np.dtype(jnp.dtype(product.dtype))
    return Problem(
        op="dot" if product.experts is None else "ragged_dot",
        platform=platform,
        weight=w.fmt,
        act=product.act,
        rows=product.tokens,
        n=product.n,
        k=product.k,
        stack=() if product.experts is None else (product.experts,),
        x_dtype=dtype,
        out_dtype=dtype,
        capability=cuda_capability() if platform == "cuda" else None,
    )


def function_of(lowering: Lowering, problem: Problem) -> Callable[..., Array]:
    """Return the product by a lowering, as a new function of the arguments."""

    def product(x: Array, w: QArray, aux: Any, *sizes: Array) -> Array:
        act = None if problem.act is None else (problem.act, aux)
        return lowering.function(problem, x, w.canonical(), act, *sizes)

    return product


def format_named(name: str) -> Format:
    """Return a format from a short name: int4 g128, uint4 g64, int8, fp8, nf4, mxfp4, mixed, ...

    Raises:
        LoweringError: an unknown name; the message says what is known.
    """
    from qjax.formats import MXFP4, NF4, Float8, MixedBits

    text = name.lower().replace("_", " ").split()
    known: dict[str, Callable[..., Format]] = {"nf4": NF4, "mxfp4": MXFP4, "fp8": Float8, "mixed": MixedBits}
    for bits in (2, 3, 4, 8):
        known[f"int{bits}"] = functools.partial(Int, bits)
        known[f"uint{bits}"] = functools.partial(Int, bits, symmetric=False)
    try:
        made = known[text[0]]
        options: dict[str, Any] = {}
        for word in text[1:]:
            options |= {"group": int(word[1:])} if word[:1] == "g" and word[1:].isdigit() else {"per": word}
        return made(**options)
    except (KeyError, IndexError, TypeError, ValueError) as e:
        raise LoweringError(
            f"unknown format {name!r}; give one of {', '.join(known)}, with a group as in 'int4 g128' or with 'token', "
            f"'channel' or 'tensor' ({type(e).__name__}: {e})"
        ) from e
