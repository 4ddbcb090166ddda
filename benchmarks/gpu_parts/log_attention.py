"""Attention with log-coded probabilities on the GPU at hand: against NumPy, then beside XLA and float attention."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_parts.clock import BY_KERNEL, Clock, checked
from qjax import ops
from qjax.formats import Int, Log


def name(fmt: Log, dtype: str) -> str:
    """As the cases for the compiler are called, without the sizes."""
    return f"log attention {fmt.bits} bits {fmt.zero}, {dtype}"


def exact(scores: np.ndarray, v: np.ndarray, fmt: Log, values: Any) -> tuple[np.ndarray, np.ndarray]:
    """The product [*batch, M, D] in float64, and how far float32 may be off: codes on the edge may fall either way."""
    s = scores.astype(np.float64)
    e = np.exp(s - s.max(-1, keepdims=True))
    u = np.maximum(e / e.sum(-1, keepdims=True), 1e-15 if fmt.zero != "reserve" else 1e-300)
    logs = -np.log2(u) * fmt.r / fmt.q
    n, below = 2**fmt.bits, 2 ** (fmt.bits + 1) - 2

    def level(code: np.ndarray) -> np.ndarray:
        at = np.clip(code, 0, n - 1) * fmt.q
        value = np.rint(2.0 ** (-(at % fmt.r) / fmt.r) * below) / below * 2.0 ** -(at // fmt.r)
        last = {"mask": n, "reserve": n - 1, "clamp": np.inf}[fmt.zero]
        return np.where(code < last, value, 0)

    edge = np.abs(logs - np.floor(logs) - 0.5) < 1e-4
    jump = np.where(edge, level(np.floor(logs)) - level(np.ceil(logs)), 0)
    near = v.astype(np.float64)
    if values is not None:
        scale, zero = (np.asarray(values[1][k], np.float64) for k in ("scale", "zero"))
        near = (np.clip(np.rint(near / scale) + zero, 0, 2 ** values[0].bits - 1) - zero) * scale
    p = level(np.rint(logs))
    return p @ near, jump @ np.abs(near) + 2e-6 * (p @ np.abs(near)) + 1e-7


def operands(seed: int, shape: tuple[int, ...], bits: int = 4, spread: float = 3.0) -> tuple[Any, Any, Any]:
    """Random scores, values without ties, and format, scale and zero point of the values for each matrix."""
    rng = np.random.default_rng(seed)
    *batch, m, n, d = shape
    scores = (spread * rng.standard_normal((*batch, m, n))).astype(np.float32)
    scale = rng.uniform(0.1, 1, (*batch, 1, 1)).astype(np.float32)
    zero = rng.integers(0, 2**bits, scale.shape).astype(np.uint8)
    v = (rng.integers(-20, 20, (*batch, n, d)) + rng.uniform(-0.4, 0.4, (*batch, n, d))) * scale
    return scores, v.astype(np.float32), (Int(bits, per="tensor", symmetric=False), {"scale": scale, "zero": zero})


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def ours(scores: Any, v: Any, aux: Any, values: Int, fmt: Log, how: str | None) -> Any:
    """Through the op."""
    return ops.log_attention(scores, v, fmt, values=(values, aux), implementation=how)


def checks(quick: bool) -> list[dict[str, Any]]:
    """Formats, odd and even sizes, each kind of scores; a row that is wholly hidden."""
    out: list[dict[str, Any]] = []
    sizes = ((2, 3, 197, 197, 64), (4, 49, 49, 32), (1, 70, 130, 40), (1, 1, 1, 8), (2, 512, 512, 64))
    formats = (Log(4, 25, zero="mask"), Log(3, 37), Log(5, 12, zero="clamp"), Log(4, 10))
    for i, fmt in enumerate(formats):
        for j, shape in enumerate(sizes):
            for dtype in ("float32", "bfloat16", "float16")[(i + j) % 3 :: 3 if quick else 1]:
                row: dict[str, Any] = {"kernel": name(fmt, dtype), "case": str(shape)}
                with checked(row, out):
                    scores, v, (values, aux) = operands(i + j, shape)
                    scores = jnp.asarray(scores, dtype)
                    got = np.asarray(ours(scores, jnp.asarray(v), aux, values, fmt, BY_KERNEL["implementation"]))
                    want, off = exact(np.asarray(scores, np.float32), v, fmt, (values, aux))
                    row["error"] = float(np.max(np.abs(got - want) / off))
                    row["right"] = bool((np.abs(got - want) <= off + 1e-5 * np.abs(want)).all())
        row = {"kernel": name(fmt, "float32"), "case": "a row of -inf"}
        with checked(row, out):
            scores, v, (values, aux) = operands(i, (2, 9, 70, 64))
            scores[0, 3] = -np.inf
            got, want = (np.asarray(ours(scores, v, aux, values, fmt, how)) for how in ("mosaic", "xla"))
            row["right"] = bool(np.allclose(got[0, 3], want[0, 3], atol=1e-6) and np.isfinite(got).all())
    return out


def times(clock: Clock) -> list[dict[str, Any]]:
    """ViT-Ti, -S and -B with 32 images and Swin's windows, beside XLA's two lowerings and float attention."""
    out: list[dict[str, Any]] = []
    fmt = Log(4, 25)
    for layer, shape in (("ViT-B", (32, 12, 197, 197, 64)), ("ViT-Ti", (32, 3, 197, 197, 64)),
                         ("Swin-T windows", (2048, 3, 49, 49, 32))):  # fmt: skip
        for dtype in ("bfloat16", "float32"):
            if clock.left() <= 0:
                return out
            row = {"kernel": name(fmt, dtype), "layer": layer, "n": shape[-1], "k": shape[-2], "tokens": shape[-3]}
            with checked(row, out, "us"):
                scores, v, (values, aux) = operands(0, (1, *shape[1:]))
                lead = shape[0]
                scores, v = (jnp.asarray(np.broadcast_to(a, (lead, *a.shape[1:])), dtype) for a in (scores, v))
                sets = [(scores * (1 + i / 64), v) for i in range(4)]
                one = lambda s, x, how, a=aux, f=values: ours(s, x, a, f, fmt, how)  # noqa: E731
                row["us"] = clock.us(functools.partial(one, how=BY_KERNEL["implementation"]), *sets)
                row["bytes"] = scores.nbytes + 2 * v.nbytes
                row["flops"] = 2 * scores.size * shape[-1]
                row["ceiling_us"] = clock.ceiling_us(row["bytes"], row["flops"])
                row["peers"] = {how: clock.us(functools.partial(one, how=how), *sets) for how in ("lookup", "xla")}
                plain = jax.jit(lambda s, x: jax.nn.softmax(s, axis=-1) @ x)
                row["peers"]["float"] = clock.us(plain, *sets)
    return out
