"""W8A8 on the GPU at hand, per token and per tensor: against float64 NumPy, then beside XLA and bfloat16."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_parts import endings
from benchmarks.gpu_parts.clock import BY_KERNEL, CLOSE, SHAPES, Clock, checked, copies
from qjax import ops
from qjax.formats import Float8, Int, QArray, quantize_array

CLOSE_FLOAT8 = 1e-3
"""As `CLOSE`, where float8 codes are multiplied, whose sums tensor cores keep to about 14 bits."""


def checks(quick: bool) -> list[dict[str, Any]]:
    """Scales per token and channel, and per tensor."""
    out = []
    rng = np.random.default_rng(0)
    for weights, act, close in (
        (Int(8), Int(8, per="token"), CLOSE),
        (Int(8, per="tensor"), Int(8, per="tensor"), CLOSE),
        (Float8(), Float8(per="token"), CLOSE_FLOAT8),
    ):
        w = quantize_array(jnp.asarray(rng.normal(size=(512, 1024)), jnp.float32), weights, in_axes=1)
        numbers = np.asarray(w.dequantize(), np.float64)
        for tokens in (1, 7, 16, 64, 130)[:: 2 if quick else 1]:
            x = jnp.asarray(rng.normal(size=(tokens, 1024)), jnp.bfloat16)
            aux = ops.activation_aux(x, act)
            run = jax.jit(lambda x, w, aux, a=act: ops.q_dot(x, w, act=(a, aux), out_dtype=jnp.float32, **BY_KERNEL))
            row = {"kernel": f"W8A8 {Float8().name if close > CLOSE else Int(8).name}, bfloat16"}
            row["case"] = f"{weights.name} x {act.name}, {tokens} tokens"
            with checked(row, out):
                y = np.asarray(run(x, w, aux), np.float64)
                inputs = np.asarray(act.decode(act.encode(x, aux), aux), np.float64)
                worst = np.max(np.abs(y - inputs @ numbers.T) / (np.abs(inputs) @ np.abs(numbers).T))
                row |= {"error": float(worst), "right": bool(worst < close)}
            if act == Int(8, per="token") and tokens in (1, 16, 130):

                def ended(bias: Any, residual: Any, out: Any, x: Any = x, w: Any = w, aux: Any = aux) -> Any:
                    how = {"bias": bias, "residual": residual, "out_dtype": out}
                    return ops.q_dot(x, w, act=(Int(8, per="token"), aux), **how, **BY_KERNEL)

                inputs = np.asarray(act.decode(act.encode(x, aux), aux), np.float64)
                name, size = f"W8A8 {weights.name}", f"[512, 1024], {tokens} tokens"
                out += endings.rows(name, "bfloat16", size, ended, inputs, numbers, close)
    return out


def times(clock: Clock) -> list[dict[str, Any]]:
    """The largest layers; quantizing the activations is included, in ours and in XLA's."""
    out = []
    for layer, (n, k) in list(SHAPES.items())[:3]:
        for weights, act, xla in (
            (Float8(), Float8(per="token"), "float8_dot"),
            (Int(8), Int(8, per="token"), "int_dot"),
        ):
            made = jax.jit(
                lambda key, fmt=weights, n=n, k=k: quantize_array(
                    jax.random.normal(key, (n, k), jnp.bfloat16), fmt, in_axes=1
                )
            )
            packed = [made(jax.random.key(s)) for s in range(copies(n * k))]

            def one(x: Any, w: QArray, how: str, act: Any = act) -> Any:
                return ops.q_dot(x, w, act=(act, ops.activation_aux(x, act)), implementation=how)

            for tokens in (4096, 16, 256):
                if clock.left() <= 0:
                    return out
                x = jax.random.normal(jax.random.key(1), (tokens, k), jnp.bfloat16)
                row = {"kernel": f"W8A8 {weights.name}, bfloat16", "layer": layer, "n": n, "k": k, "tokens": tokens}
                with checked(row, out, "us"):
                    sets = [(x, w) for w in packed]
                    row["us"] = clock.us(functools.partial(one, how=BY_KERNEL["implementation"]), *sets)
                    row |= {"bytes": n * k + tokens * (k + n) * 2, "flops": 2 * tokens * n * k}
                    row["ceiling_us"] = clock.ceiling_us(n * k, tokens * n * k)  # twice the rate of bfloat16
                    row["peers"] = {"bfloat16": clock.bfloat16_us(n, k, tokens)}
                    row["peers"]["XLA W8A8"] = clock.us(functools.partial(one, how=xla), *sets)
    return out
