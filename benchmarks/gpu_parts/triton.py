"""The Triton kernels on the GPU at hand, on Hopper by their name: against float64 NumPy, then a few times.

They are for Ampere and Ada. On Hopper their times say what a weight costs that is not packed for Mosaic's kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_parts import endings
from benchmarks.gpu_parts.clock import CLOSE, SHAPES, Clock, checked, copies
from benchmarks.gpu_parts.codes8 import CLOSE_FLOAT8
from benchmarks.gpu_parts.weights16 import weight
from benchmarks.kernel_cases.triton import G128, kind
from qjax import ops
from qjax.formats import Float8, Int, QArray, assemble, quantize_array
from qjax.kernels.devices import cuda_capability

FORMATS = (
    G128,
    Int(4, group=32),
    Int(4, group=64, symmetric=False),
    Int(4),
    Int(4, symmetric=False),
    Int(8),
    Int(8, group=128, symmetric=False),
)

SIZES = ((512, 1024), (200, 201))
"""(N, K) of what is compared; K of the first is cut in parts."""

PEERS = {"XLA, dequantized": "dequantize"}


def product(x: Any, w: QArray, how: str = "triton", out_dtype: Any = None, **terms: Any) -> Any:
    """By the kernel, or an error that says why not."""
    return ops.q_dot(x, w, out_dtype=out_dtype, implementation=how, **terms)


def target() -> str:
    """As the compiled cases call the device at hand."""
    major, minor = cuda_capability() or (0, 0)
    return "sm_90a" if major == 9 else f"sm_{major}{minor}"


def checks(quick: bool) -> list[dict[str, Any]]:
    """Every format at odd and even sizes, over the tiles of tokens; both kinds of W8A8."""
    out = []
    run = jax.jit(functools.partial(product, out_dtype=jnp.float32))
    for fmt in FORMATS:
        for i, (n, k) in enumerate(SIZES):
            every = (1, 7, 17, 64, 257) if fmt is G128 and i == 0 else (3, 130) if i == 0 else (5, 67)
            dtype = "float16" if i else "bfloat16"
            w, numbers = weight(fmt, n, k, seed=n + k)
            w = ops.neutral(w)
            for tokens in every[:: 2 if quick else 1]:
                row = {"kernel": kind(fmt, dtype, target()), "case": f"[{n}, {k}], {tokens} tokens"}
                with checked(row, out):
                    x = jnp.asarray(np.random.default_rng(tokens).normal(size=(tokens, k)), dtype)
                    first, again = (np.asarray(run(x, w), np.float64) for _ in range(2))
                    exact = np.asarray(x, np.float64)
                    worst = np.max(np.abs(first - exact @ numbers.T) / (np.abs(exact) @ np.abs(numbers).T))
                    steady = np.array_equal(first, again)
                    row |= {"error": float(worst), "steady": steady, "right": bool(worst < CLOSE and steady)}
    return out + special() + codes(quick) + ended(quick)


def ended(quick: bool) -> list[dict[str, Any]]:
    """With a bias and a residual."""

    def made(n: int, k: int) -> tuple[QArray, np.ndarray]:
        w, numbers = weight(G128, n, k, seed=0)
        return ops.neutral(w), numbers

    out = endings.weight_only(f"Triton W4A16 {G128.name}", "bfloat16", made, product, quick)
    for row in out:  # the target stands behind the dtype
        row["kernel"] += f", {target()}"
    return out


def special() -> list[dict[str, Any]]:
    """NaN and infinity stay in their rows, an empty batch, a stack of weights."""
    out: list[dict[str, Any]] = []
    w, numbers = weight(G128, 200, 256, 0)
    w = ops.neutral(w)
    x = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    x[1, 5], x[2] = np.nan, 60000.0

    def rows() -> bool:
        y = np.asarray(product(jnp.asarray(x, jnp.float16), w))
        alone = np.isnan(y[1]).all() and np.isfinite(y[0]).all() and not np.isnan(y[2]).any()
        return bool(alone and np.isinf(y[2]).any())

    def stack() -> bool:
        both = jax.tree.map(lambda a: jnp.stack([a, a]), w)
        ones = jnp.ones((3, 256), jnp.bfloat16)
        y = jax.jit(jax.vmap(functools.partial(product, ones, out_dtype=jnp.float32)))(both)
        return bool(np.allclose(y, numbers.sum(-1), rtol=1e-4, atol=1e-2))

    empty = lambda: product(jnp.ones((0, 256), jnp.bfloat16), w).shape == (0, 200)  # noqa: E731
    for case, right in (("NaN in its row alone", rows), ("no rows", empty), ("a stack of weights", stack)):
        row = {"kernel": kind(G128, "bfloat16", target()), "case": case}
        with checked(row, out):
            row["right"] = right()
    return out


def codes(quick: bool) -> list[dict[str, Any]]:
    """W8A8, of sizes that no tile divides."""
    out: list[dict[str, Any]] = []
    rng = np.random.default_rng(0)
    for fmt, close in ((Int(8), CLOSE), (Float8(), CLOSE_FLOAT8)):
        act = type(fmt)(8, per="token") if isinstance(fmt, Int) else Float8(per="token")
        for n, k in SIZES:
            w = quantize_array(jnp.asarray(rng.normal(size=(n, k)), jnp.float32), fmt, in_axes=1)
            numbers = np.asarray(w.dequantize(), np.float64)
            for tokens in (1, 17, 130)[:: 2 if quick else 1]:
                row = {"kernel": kind(fmt, "bfloat16", target(), codes=True), "case": f"[{n}, {k}], {tokens} tokens"}
                with checked(row, out):
                    x = jnp.asarray(rng.normal(size=(tokens, k)), jnp.bfloat16)
                    aux = ops.activation_aux(x, act)
                    run = jax.jit(lambda x, w, aux, act=act: _codes(x, w, (act, aux), "triton", jnp.float32))
                    y = np.asarray(run(x, w, aux), np.float64)
                    inputs = np.asarray(act.decode(act.encode(x, aux), aux), np.float64)
                    worst = np.max(np.abs(y - inputs @ numbers.T) / (np.abs(inputs) @ np.abs(numbers).T))
                    row |= {"error": float(worst), "right": bool(worst < close)}
    return out


def _codes(x: Any, w: QArray, act: Any, how: str, out_dtype: Any = None) -> Any:
    return ops.q_dot(x, w, act=act, implementation=how, out_dtype=out_dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _bits(key: Any, n: int, k: int) -> Any:
    return jax.random.bits(key, (n, k), jnp.uint8)


def neutral(n: int, k: int, seed: int) -> QArray:
    """A weight of random codes in neutral order, drawn on the device."""
    small = jnp.zeros((n, k // G128.group), jnp.float32) + 0.01  # type: ignore[operator]
    w = assemble(jnp.zeros((n, 2), jnp.int8), {"scale": small[:, :1]}, Int(4), shape=(n, 2), in_axes=1)
    return QArray(_bits(jax.random.key(seed), n, k // 2), {"scale": small}, G128, w.layout, jnp.dtype(jnp.bfloat16))


def times(clock: Clock) -> list[dict[str, Any]]:
    """Two layers beside XLA's dequantized product and bfloat16; int8 of one."""
    out: list[dict[str, Any]] = []
    for layer in ("Llama-3-8B gate and up", "Llama-3-70B gate and up", "Llama-3-8B q, o"):
        n, k = SHAPES[layer]
        ours = [neutral(n, k, s) for s in range(copies(n * k // 2))]
        for tokens in (1, 16, 64, 256, 4096, 4, 1024):
            if clock.left() <= 0:
                return out
            x = jax.random.normal(jax.random.key(0), (tokens, k), jnp.bfloat16)
            row = {"kernel": kind(G128, "bfloat16", target()), "layer": layer, "n": n, "k": k, "tokens": tokens}
            with checked(row, out, "us"):
                sets = [(x, w) for w in ours]
                row["us"] = clock.us(product, *sets)
                row |= {"bytes": ours[0].nbytes + x.nbytes + tokens * n * 2, "flops": 2 * tokens * n * k}
                row["ceiling_us"] = clock.ceiling_us(n * k * 4.125 / 8, 2 * tokens * n * k)
                row["peers"] = {"bfloat16": clock.bfloat16_us(n, k, tokens)}
                for peer, how in PEERS.items():
                    row["peers"][peer] = clock.us(functools.partial(product, how=how), *sets)
    n, k = SHAPES["Llama-3-8B gate and up"]
    act = Int(8, per="token")
    draw = jax.jit(lambda key: quantize_array(jax.random.normal(key, (n, k), jnp.bfloat16), Int(8), in_axes=1))
    ours = [draw(jax.random.key(s)) for s in range(copies(n * k))]
    for tokens in (16, 256, 4096):
        if clock.left() <= 0:
            return out
        x = jax.random.normal(jax.random.key(0), (tokens, k), jnp.bfloat16)
        name = kind(Int(8), "bfloat16", target(), codes=True)
        row = {"kernel": name, "layer": "Llama-3-8B gate and up", "n": n, "k": k, "tokens": tokens}

        def one(x: Any, w: QArray, how: str) -> Any:
            return _codes(x, w, (act, ops.activation_aux(x, act)), how)

        with checked(row, out, "us"):
            sets = [(x, w) for w in ours]
            row["us"] = clock.us(functools.partial(one, how="triton"), *sets)
            row |= {"bytes": n * k + tokens * (k + n) * 2, "flops": 2 * tokens * n * k}
            row["ceiling_us"] = clock.ceiling_us(n * k, tokens * n * k)
            row["peers"] = {"bfloat16": clock.bfloat16_us(n, k, tokens)}
            row["peers"]["XLA int8"] = clock.us(functools.partial(one, how="int_dot"), *sets)
    return out
