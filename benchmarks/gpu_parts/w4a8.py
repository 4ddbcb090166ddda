"""W4A8 on the GPU at hand: against float64 NumPy, then beside W8A8, W4A16 and bfloat16."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_parts import endings
from benchmarks.gpu_parts.clock import BY_KERNEL, SHAPES, Clock, checked, copies
from benchmarks.kernel_cases.weights16 import described
from qjax import ops
from qjax.formats import DualGrained, Format, Int, Progressive, QArray, quantize_array
from qjax.kernels import tuned
from qjax.kernels.dot.codes4x8 import codes4x8
from qjax.kernels.dot.hopper import Schedule
from qjax.kernels.dot.schedules import schedule_for
from qjax.kernels.dot.w4a8 import footprint

TOKEN = Int(8, per="token")

FORMATS = (
    DualGrained(group=128),
    Int(4, group=128),
    Progressive(group=32, zeros="post"),
    Int(4),
    Progressive(group=128),
    Int(4, group=64, symmetric=False),
    Int(4, symmetric=False),
    DualGrained(group=64),
)

SMALL = ((200, 200), (512, 1024), (264, 72))
"""(N, K); with few tiles K is cut in parts."""

CLOSE = 1e-6
"""Largest difference from NumPy, relative to the sum of magnitudes of the terms: integers are exact, scales float32."""


def numbers(w: QArray) -> np.ndarray:
    """The numbers of a weight [N, K], by the equations of its format in float64."""
    fmt, codes = w.fmt, np.asarray(w.unpacked(), np.float64)
    aux = {name: np.asarray(a, np.float64) for name, a in w.aux.items()}
    spread = lambda a: np.repeat(a, fmt.group or w.length, axis=1)[:, : w.length]  # noqa: E731
    if fmt.int8_rows:
        step, zero = spread(aux["step"]), spread(aux["zero"])
        post = isinstance(fmt, Progressive) and fmt.zeros == "post"
        return (codes * step - zero if post else (codes - zero) * step) * aux["scale"]
    return (codes - (spread(aux["zero"]) if "zero" in aux else 0)) * spread(aux["scale"])


def product(x: Any, w: QArray, act: Int = TOKEN, out_dtype: Any = None, how: str = "mosaic", **terms: Any) -> Any:
    """By the kernel, or an error that says why not."""
    given = (act, ops.activation_aux(x, act))
    return ops.q_dot(x, w, act=given, out_dtype=out_dtype, implementation=how, **terms)


def error(fmt: Format, n: int, k: int, x: Any, act: Int = TOKEN) -> tuple[float, bool]:
    """Largest error relative to the sum of magnitudes of the terms, and whether three runs gave the same."""
    made = jax.random.normal(jax.random.key(n + k), (n, k))
    w = quantize_array(made, fmt.clamped(k), in_axes=1)
    run = jax.jit(functools.partial(product, act=act, out_dtype=jnp.float32))
    results = [np.asarray(run(x, ops.pack(w, "mosaic_int8"))) for _ in range(3)]
    aux = ops.activation_aux(x, act)
    codes = np.asarray(act.encode(x, aux), np.float64) * np.asarray(aux["scale"], np.float64)
    exact = numbers(w)
    wrong = np.abs(results[0] - codes @ exact.T) / np.maximum(np.abs(codes) @ np.abs(exact).T, 1e-30)
    return float(np.max(wrong)), all(np.array_equal(results[0], r) for r in results)


def checks(quick: bool) -> list[dict[str, Any]]:
    """Every format at odd and even sizes; tokens over all tiles; scales of tensors; NaN; no rows."""
    out = []
    for fmt in FORMATS:
        for i, (n, k) in enumerate(SMALL[: 1 if quick and fmt not in FORMATS[:2] else None]):
            many = fmt in FORMATS[:2] and i == 1
            every = (1, 17, 130, 257, 3, 64, 2, 5, 7, 8, 13, 16, 31, 100, 128) if many else (7, 33)
            for tokens in every[: (4 if many else 1) if quick else None]:
                x = jax.random.normal(jax.random.key(tokens), (tokens, k), jnp.bfloat16)
                row = {"kernel": f"W4A8 {fmt.name}, bfloat16", "case": f"[{n}, {k}], {tokens} tokens"}
                with checked(row, out):
                    worst, steady = error(fmt, n, k, x)
                    row |= {"error": worst, "steady": steady, "right": bool(worst < CLOSE and steady)}
    for fmt, tile in ((FORMATS[0], 8), (FORMATS[0], 64), (FORMATS[1], 16), (FORMATS[6], 32)):
        schedule = Schedule(tile, 3, tall=2, deep=2)
        row = {"kernel": f"W4A8 {fmt.name}, bfloat16", "case": f"[512, 4096], {described(schedule)}"}
        with checked(row, out), tuned.forced(schedule, "codes4x8"):
            jax.clear_caches()  # what is compiled does not say by which schedule
            x = jax.random.normal(jax.random.key(tile), (2 * tile - 3, 4096), jnp.bfloat16)
            worst, steady = error(fmt, 512, 4096, x)
            row |= {"error": worst, "steady": steady, "right": bool(worst < CLOSE and steady)}
    for n, k, tokens in endings.SIZES[:: 2 if quick else 1]:
        w = quantize_array(jax.random.normal(jax.random.key(n + k), (n, k)), FORMATS[0], in_axes=1)
        x = jax.random.normal(jax.random.key(tokens), (tokens, k), jnp.bfloat16)
        aux = ops.activation_aux(x, TOKEN)

        def ended(bias: Any, residual: Any, out: Any, x: Any = x, w: Any = w) -> Any:
            return product(x, ops.pack(w, "mosaic_int8"), out_dtype=out, bias=bias, residual=residual)

        inputs = np.asarray(TOKEN.encode(x, aux), np.float64) * np.asarray(aux["scale"], np.float64)
        name, size = f"W4A8 {FORMATS[0].name}", f"[{n}, {k}], {tokens} tokens"
        out += endings.rows(name, "bfloat16", size, ended, inputs, numbers(w), CLOSE)
    row = {"kernel": f"W4A8 {FORMATS[0].name}, bfloat16", "case": "a scale per tensor, transposed activations"}
    with checked(row, out):
        x = jax.random.normal(jax.random.key(1), (1024, 24), jnp.bfloat16).T
        worst, steady = error(FORMATS[0], 512, 1024, x, Int(8, per="tensor"))
        row |= {"error": worst, "steady": steady, "right": bool(worst < CLOSE and steady)}
    row = {"kernel": f"W4A8 {FORMATS[0].name}, bfloat16", "case": "NaN in its row alone, and no rows"}
    with checked(row, out):
        w = ops.pack(quantize_array(jnp.ones((256, 256)), FORMATS[0], in_axes=1))
        y = np.asarray(product(jnp.ones((3, 256), jnp.bfloat16).at[1, 5].set(jnp.nan), w), np.float32)
        alone = np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()
        row["right"] = bool(alone and product(jnp.ones((0, 256), jnp.bfloat16), w).shape == (0, 256))
    return out


def times(clock: Clock) -> list[dict[str, Any]]:
    """Three layers, by both schedules; quantizing the activations is included, but for "without quantizing"."""
    out = []
    for layer, (n, k) in list(SHAPES.items())[:3]:

        def weights(fmt: Format, target: str | None, n: int = n, k: int = k) -> list[QArray]:
            made = jax.jit(lambda key: quantize_array(jax.random.normal(key, (n, k), jnp.bfloat16), fmt, in_axes=1))
            ws = [made(jax.random.key(s)) for s in range(copies(n * k * fmt.code_bits // 8))]
            return [ops.pack(w, target) for w in ws] if target else ws

        w8a8, w4a16 = weights(Int(8), None), weights(Int(4, group=128), "mosaic")
        for fmt in FORMATS[:2]:
            ours = weights(fmt, "mosaic_int8")

            def alone(x: Any, scale: Any, w: QArray, n: int = n, k: int = k) -> Any:
                rule = schedule_for(n, k, x.shape[1], footprint=footprint(w.fmt))
                how = {"fmt": w.fmt, "n": n, "out_dtype": jnp.bfloat16, "schedule": rule}
                levels = w.aux.get("levels")
                flat = (w.aux["tiles"], levels, w.aux["scale"])
                return codes4x8(*(a if a is None else a.reshape(1, -1) for a in flat), x, scale, **how)[0]

            for tokens in (4096, 16, 256):
                if clock.left() <= 0:
                    return out
                x = jax.random.normal(jax.random.key(1), (tokens, k), jnp.bfloat16)
                codes = jax.random.randint(jax.random.key(2), (1, tokens, k), -127, 128, jnp.int8)
                row = {"kernel": f"W4A8 {fmt.name}, bfloat16", "layer": layer, "n": n, "k": k, "tokens": tokens}
                with checked(row, out, "us"):
                    row["us"] = clock.us(product, *[(x, w) for w in ours])
                    row |= {"bytes": ours[0].nbytes + tokens * (k + n) * 2, "flops": 2 * tokens * n * k}
                    peers = row["peers"] = {"bfloat16": clock.bfloat16_us(n, k, tokens)}
                    scale = jnp.ones((1, tokens), jnp.float32)
                    peers["without quantizing"] = clock.us(alone, *[(codes, scale, w) for w in ours])
                    peers["W8A8"] = clock.us(product, *[(x, w) for w in w8a8])
                    by_kernel = functools.partial(ops.q_dot, **BY_KERNEL)
                    peers["W4A16"] = clock.us(by_kernel, *[(x, w) for w in w4a16])
    return out
