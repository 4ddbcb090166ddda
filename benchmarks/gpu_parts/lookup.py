"""Weights in words on the GPU at hand: every format against float64 NumPy, then beside bfloat16 and W4A16."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks.gpu_parts.clock import BY_KERNEL, CLOSE, SHAPES, Clock, checked, copies
from benchmarks.gpu_parts.weights16 import packed
from benchmarks.kernel_cases.lookup import FORMATS
from qjax import ops
from qjax.formats import MXFP4, NF4, Float8, Format, Int, QArray, TritPlanes, quantize_array
from qjax.formats.nf4 import NF4_VALUES
from qjax.formats.words import NF4 as TABLE

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""Of the codes of E2M1 without sign."""


def numbers(w: QArray, dtype: Any = None) -> np.ndarray:
    """What a weight [N, K] stands for, float64, from the equations of its format.

    With a ``dtype``, NF4's table is rounded to it, as the kernel has it.
    """
    fmt: Format = w.fmt
    codes = np.asarray(w.unpacked())
    aux = {name: np.asarray(a).astype(np.float64) for name, a in w.aux.items()}
    k = codes.shape[-1]
    spread = lambda a: np.repeat(a, fmt.group if fmt.per == "group" else k, axis=-1)[..., :k]  # noqa: E731
    if isinstance(fmt, TritPlanes):
        digits = [codes // 3 ** (fmt.planes - 1 - p) % 3 - 1.0 for p in range(fmt.planes)]
        scales = [
            aux["scale"] * 3.0 ** (fmt.planes - 1 - p) if fmt.tied else aux[f"scale{p}"] for p in range(fmt.planes)
        ]
        return sum(d * spread(s) for d, s in zip(digits, scales, strict=True))
    if isinstance(fmt, Float8):
        values = codes.astype(np.float64)
    elif isinstance(fmt, Int):
        values = codes - (0.0 if fmt.symmetric else spread(aux["zero"]))
    elif isinstance(fmt, NF4):
        stretch = TABLE.stretch[np.dtype(dtype)] if dtype else 1.0
        table = NF4_VALUES.astype(np.float64) * stretch
        values = (table.astype(dtype).astype(np.float64) if dtype else table)[codes] / stretch
    else:
        values = MAGNITUDES[codes & 7] * np.where(codes & 8, -1.0, 1.0)
    if isinstance(fmt, MXFP4):
        return values * spread(2.0 ** (aux["scale"] - 127))
    return values * spread(aux["scale"]) * aux.get("global_scale", 1.0)


def weight(fmt: Format, n: int, k: int, seed: int = 0) -> QArray:
    """A weight [N, K] of random numbers of several magnitudes."""
    rng = np.random.default_rng(seed)
    floats = rng.normal(size=(n, k)) * np.exp(rng.normal(size=(n, k)))
    return quantize_array(jnp.asarray(floats, jnp.float32), fmt.clamped(k), in_axes=1)


def product(x: Any, w: QArray, out_dtype: Any = None) -> Any:
    """By the kernel, or an error that says why not."""
    return ops.q_dot(x, w, out_dtype=out_dtype, **BY_KERNEL)


def checks(quick: bool) -> list[dict[str, Any]]:
    """Every format and dtype at odd and even sizes."""
    out = []
    run = jax.jit(product, static_argnums=2)
    for fmt in FORMATS:
        for n, k in ((264, 200), (512, 1024)):
            w = weight(fmt, n, k)
            p = ops.pack(w)
            for dtype, every in (("bfloat16", (1, 7, 17, 130)), ("float16", (5, 64))):
                exact = numbers(w, ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
                for tokens in every[:: 2 if quick else 1]:
                    kernel = f"W{fmt.code_bits}A16 {fmt.name}, {dtype}"
                    row = {"kernel": kernel, "case": f"[{n}, {k}], {tokens} tokens"}
                    with checked(row, out):
                        x = jnp.asarray(np.random.default_rng(tokens).normal(size=(tokens, k)), dtype)
                        y = np.asarray(run(x, p, jnp.float32), np.float64)
                        inputs = np.asarray(x, np.float64)
                        worst = float(np.max(np.abs(y - inputs @ exact.T) / (np.abs(inputs) @ np.abs(exact).T)))
                        row |= {"error": worst, "right": worst < CLOSE}
    return out


def times(clock: Clock) -> list[dict[str, Any]]:
    """Two layers."""
    out = []
    for layer in ("Llama-3-8B gate and up", "Llama-3-70B q, o"):
        n, k = SHAPES[layer]
        int4 = [packed(n, k, s) for s in range(copies(n * k // 2))]
        theirs = {}
        for fmt in FORMATS:
            ours = [packed(n, k, s, fmt) for s in range(copies(n * k * fmt.code_bits // 8))]
            for tokens in (1, 16, 256):
                if clock.left() <= 0:
                    return out
                x = jax.random.normal(jax.random.key(0), (tokens, k), jnp.bfloat16)
                row = {"kernel": f"W{fmt.code_bits}A16 {fmt.name}, bfloat16", "layer": layer, "n": n, "k": k}
                row["tokens"] = tokens
                with checked(row, out, "us"):
                    row["us"] = clock.us(product, *[(x, w) for w in ours])
                    row |= {"bytes": ours[0].nbytes + tokens * (n + k) * 2, "flops": 2 * tokens * n * k}
                    row["ceiling_us"] = clock.ceiling_us(ours[0].nbytes, 2 * tokens * n * k)
                    if tokens not in theirs:
                        theirs[tokens] = clock.us(product, *[(x, w) for w in int4])
                    row["peers"] = {"bfloat16": clock.bfloat16_us(n, k, tokens), "W4A16": theirs[tokens]}
    return out
