"""A bias and a residual in the kernels on the GPU at hand: against float64 NumPy, for the parts of their families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_parts.clock import CLOSE, SHAPES, Clock, checked, copies
from benchmarks.kernel_cases.weights16 import BOTH, plus

SIZES = ((200, 512, 7), (512, 2048, 17), (512, 512, 130), (32768, 512, 16))
"""(N, K, tokens); K of the second is cut in parts, and the last is tall where the kernel can be."""

Run = Callable[..., Any]


def rows(name: str, dtype: str, size: str, run: Run, inputs: np.ndarray, numbers: np.ndarray, close: float) -> list:
    """Compare ``run(bias, residual, out_dtype)``, a product with either None, with what it has to be.

    Results in float32, and rounded once to 16 bits; a bias of either dtype, and alone.

    Args:
        name: of the kernel, up to its format.
        dtype: of the activations.
        size: in words.
        run: to be jitted.
        inputs: float64 [M, K], what the activations stand for.
        numbers: float64 [N, K], likewise of the weight.
        close: largest difference allowed, relative to the sum of magnitudes of the terms.
    """
    out: list[dict[str, Any]] = []
    rng = np.random.default_rng(len(inputs))
    exact, terms = inputs @ numbers.T, np.abs(inputs) @ np.abs(numbers).T
    typical = float(np.sqrt(np.mean(exact**2)))
    for result, of_bias, names in ((dtype, dtype, BOTH), ("float32", "float32", BOTH), (dtype, "float32", ("bias",))):
        bias = jnp.asarray(rng.normal(size=len(numbers)) * typical, of_bias)
        residual = jnp.asarray(rng.normal(size=exact.shape) * typical, result) if "residual" in names else None
        row = {"kernel": f"{name}{plus(names)}, {dtype}", "case": f"{size}, bias {of_bias}, result {result}"}
        with checked(row, out):
            y = jax.jit(run, static_argnums=2)(bias, residual, jnp.dtype(result))
            added = [np.asarray(a.astype(jnp.float32), np.float64) for a in (bias, residual) if a is not None]
            want, whole = exact + sum(added), terms + sum(map(np.abs, added))
            once = 0 if result == "float32" else float(jnp.finfo(result).eps) / 2 * np.abs(want)
            wrong = np.maximum(np.abs(np.asarray(y.astype(jnp.float32), np.float64) - want) - once, 0)
            worst = float(np.max(wrong / whole))
            row |= {"error": worst, "right": bool(y.dtype == result and worst < close)}
    return out


def weight_only(kernel: str, dtype: str, made: Run, product: Run, quick: bool, close: float = CLOSE) -> list:
    """Checks of a kernel with float activations.

    Args:
        kernel: its name, up to the format.
        dtype: of the activations.
        made: ``(n, k) -> (weight, its numbers)``.
        product: ``(x, weight, **terms and out_dtype) -> result``.
        quick: whether one of two sizes is enough.
        close: as in `rows`.
    """
    out = []
    for n, k, tokens in SIZES[:: 2 if quick else 1]:
        w, numbers = made(n, k)
        x = jnp.asarray(np.random.default_rng(tokens).normal(size=(tokens, k)), dtype)
        run = lambda bias, residual, out, x=x, w=w: product(x, w, bias=bias, residual=residual, out_dtype=out)  # noqa: E731
        inputs = np.asarray(x.astype(jnp.float32), np.float64)
        out += rows(kernel, dtype, f"[{n}, {k}], {tokens} tokens", run, inputs, numbers, close)
    return out


def times(clock: Clock, kernel: str, packed: Run, product: Run) -> list[dict[str, Any]]:
    """A layer that is followed by a residual, beside the same product with the residual added to its 16-bit result."""
    out: list[dict[str, Any]] = []
    layer = "Llama-3-8B q, o"
    n, k = SHAPES[layer]
    ours = [packed(n, k, s) for s in range(copies(n * k // 2))]
    for tokens in (16, 1024, 1):
        if clock.left() <= 0:
            return out
        x, residual = (jax.random.normal(jax.random.key(i), (tokens, m), jnp.bfloat16) for i, m in enumerate((k, n)))
        row = {"kernel": f"{kernel} + residual, bfloat16", "layer": layer, "n": n, "k": k, "tokens": tokens}
        with checked(row, out, "us"):
            sets = [(x, w, residual) for w in ours]
            row["us"] = clock.us(lambda x, w, r: product(x, w, residual=r), *sets)
            row |= {"bytes": ours[0].nbytes + x.nbytes + tokens * n * 4, "flops": 2 * tokens * n * k}
            row["peers"] = {"added after it": clock.us(lambda x, w, r: product(x, w) + r, *sets)}
    return out
