"""W4A16 and W8A16 on the GPU at hand: every kind of weight, scale and dtype against float64 NumPy; then times."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_parts import endings
from benchmarks.gpu_parts.clock import BY_KERNEL, CLOSE, SHAPES, TOKENS, Clock, checked, copies
from benchmarks.kernel_cases.weights16 import G128, described, shapes
from qjax import ops
from qjax.formats import Format, Int, QArray, assemble
from qjax.kernels import tuned
from qjax.kernels.dot.hopper import Schedule
from qjax.kernels.dot.schedules import schedule_for
from qjax.kernels.dot.words import footprint

FORMATS = (
    G128,
    Int(4, group=32),
    Int(4, group=64),
    Int(4),
    Int(4, group=128, symmetric=False),
    Int(4, group=32, symmetric=False),
    Int(4, symmetric=False),
    Int(4, group=256),
    Int(8),
    Int(8, group=128, symmetric=False),
)

SMALL = ((200, 200), (512, 1024), (264, 72))
"""(N, K) of what is compared with NumPy; with few tiles K is cut in parts."""


CUT = (
    Schedule(8, 4, tall=2, deep=2),
    Schedule(16, 3, 2, tall=2, deep=2),
    Schedule(32, 3, tall=2),
    Schedule(64, 3, tall=2),
    Schedule(64, 3, tall=2, rolling=True),
    Schedule(128, 2, tall=2, rolling=True),
)
"""Schedules of large layers, on small ones."""


def weight(fmt: Int, n: int, k: int, seed: int) -> tuple[QArray, np.ndarray]:
    """Random codes as a packed weight, and the numbers they stand for in float64."""
    fmt = fmt.clamped(k)
    rng = np.random.default_rng(seed)
    low, high = fmt.code_range
    codes = rng.integers(low, high + 1, (n, k))
    scale = rng.uniform(0.5, 1.5, (n, fmt.groups(k))).astype(np.float32)
    aux = {"scale": jnp.asarray(scale)}
    spread = lambda a: np.repeat(a.astype(np.float64), fmt.group or k, axis=-1)[:, :k]  # noqa: E731
    numbers = codes.astype(np.float64)
    if not fmt.symmetric:
        zero = rng.integers(low, high + 1, scale.shape)
        aux["zero"] = jnp.asarray(zero, jnp.uint8)
        numbers = numbers - spread(zero)
    w = assemble(jnp.asarray(codes, fmt.code_dtype), aux, fmt, shape=(n, k), in_axes=1)
    return ops.pack(w), numbers * spread(scale)


def product(x: Any, w: QArray, out_dtype: Any = None, **terms: Any) -> Any:
    """By the kernel, or an error that says why not."""
    return ops.q_dot(x, w, out_dtype=out_dtype, **BY_KERNEL, **terms)


def error(fmt: Int, n: int, k: int, tokens: int, dtype: str, out_dtype: Any = jnp.float32) -> tuple[float, bool]:
    """Largest error relative to the sum of magnitudes of the terms, and whether three runs gave the same.

    Of bfloat16 results, what is beyond their rounding.
    """
    w, numbers = weight(fmt, n, k, seed=n + k)
    x = jnp.asarray(np.random.default_rng(tokens).normal(size=(tokens, k)), dtype)
    run = jax.jit(product, static_argnums=2)
    results = [np.asarray(run(x, w, out_dtype)).astype(np.float64) for _ in range(3)]
    exact = np.asarray(x, np.float64)
    terms, want = np.abs(exact) @ np.abs(numbers).T, exact @ numbers.T
    rounding = 2.0**-8 * np.abs(want) if out_dtype == jnp.bfloat16 else 0
    wrong = (np.abs(results[0] - want) - rounding) / np.maximum(terms, 1e-30)
    return float(np.max(wrong)), all(np.array_equal(results[0], r) for r in results)


def checks(quick: bool) -> list[dict[str, Any]]:
    """Every format and dtype at odd and even sizes; tokens over all tiles."""
    out = []
    for fmt in FORMATS:
        for dtype in ("bfloat16", "float16")[: 2 if fmt in FORMATS[:5:2] else 1]:
            for i, (n, k) in enumerate(SMALL):
                every = (1, 2, 3, 5, 7, 8, 13, 16, 31, 64, 100, 128, 257) if fmt is G128 and i == 1 else (7, 17)
                for tokens in every[:: 2 if quick else 1]:
                    kernel = f"W{fmt.code_bits}A16 {fmt.name}, {dtype}"
                    row = {"kernel": kernel, "case": f"[{n}, {k}], {tokens} tokens"}
                    with checked(row, out):
                        worst, steady = error(fmt, n, k, tokens, dtype)
                        row |= {"error": worst, "steady": steady, "right": bool(worst < CLOSE and steady)}
    for fmt in (G128, FORMATS[5], FORMATS[3]):
        for schedule in CUT:
            row = {"kernel": f"W4A16 {fmt.name}, bfloat16", "case": f"[512, 4096], {described(schedule)}"}
            with checked(row, out), tuned.forced(schedule, "words16"):
                jax.clear_caches()  # what is compiled does not say by which schedule
                worst, steady = error(fmt, 512, 4096, schedule.tokens * 2 - 3, "bfloat16", jnp.bfloat16)
                row |= {"error": worst, "steady": steady, "right": bool(worst < CLOSE and steady)}
    for fmt, dtype in ((G128, "bfloat16"), (G128, "float16"), (Int(8), "bfloat16")):
        made = functools.partial(weight, fmt, seed=0)
        out += endings.weight_only(f"W{fmt.code_bits}A16 {fmt.name}", dtype, made, product, quick)
    return out + special()


def special() -> list[dict[str, Any]]:
    """NaN and infinity stay in their rows, an empty batch, a transposed operand, a stack."""
    w, numbers = weight(G128, 256, 256, 0)
    x = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    x[1, 5], x[2] = np.nan, 60000.0
    y = np.asarray(product(jnp.asarray(x, jnp.float16), w))
    rows = {
        "NaN in its row alone": np.isnan(y[1]).all() and np.isfinite(y[0]).all() and not np.isnan(y[2]).any(),
        "float16 overflows to infinity": bool(np.isinf(y[2]).any()),
        "no rows": product(jnp.ones((0, 256), jnp.bfloat16), w).shape == (0, 256),
    }
    turned = jnp.asarray(np.random.default_rng(1).normal(size=(256, 4)), jnp.bfloat16)
    got = np.asarray(jax.jit(lambda t, w: product(t.T, w, jnp.float32))(turned, w))
    want = np.asarray(turned, np.float64).T @ numbers.T
    rows["transposed activations"] = bool(np.max(np.abs(got - want)) < 1e-4 * np.max(np.abs(want)))
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *[weight(G128, 256, 256, s)[0] for s in (1, 2)])
    both = jax.jit(jax.vmap(lambda w: product(turned.T, w, jnp.float32)))(stacked)
    each = [np.asarray(product(turned.T, weight(G128, 256, 256, s)[0], jnp.float32)) for s in (1, 2)]
    rows["a stack of weights"] = bool(np.array_equal(np.asarray(both), np.stack(each)))
    kernel = f"W4A16 {G128.name}, bfloat16"
    return [{"kernel": kernel, "case": name, "right": bool(right)} for name, right in rows.items()]


def packed(n: int, k: int, seed: int, fmt: Format = G128, stack: tuple[int, ...] = ()) -> QArray:
    """A packed weight of random codes, drawn on the device."""

    def leaf(a: Any) -> Any:
        if a.dtype == jnp.int32:
            return jax.lax.bitcast_convert_type(jax.random.bits(jax.random.key(seed), a.shape, jnp.uint32), jnp.int32)
        return jnp.full(a.shape, 0.01, a.dtype)

    return jax.jit(lambda: jax.tree.map(leaf, shapes(fmt, n, k, stack)))()


def times(clock: Clock) -> list[dict[str, Any]]:
    """Every layer at all numbers of tokens beside bfloat16; other schedules of one layer; a residual."""
    out = endings.times(clock, f"W4A16 {G128.name}", packed, product)
    for layer, (n, k) in SHAPES.items():
        ours = [packed(n, k, s) for s in range(copies(n * k // 2))]
        for tokens in TOKENS:
            if clock.left() <= 0:
                return out
            x = jax.random.normal(jax.random.key(0), (tokens, k), jnp.bfloat16)
            row = {"kernel": f"W4A16 {G128.name}, bfloat16", "layer": layer, "n": n, "k": k, "tokens": tokens}
            with checked(row, out, "us"):
                row["us"] = clock.us(product, *[(x, w) for w in ours])
                row |= {"bytes": ours[0].nbytes + x.nbytes + tokens * n * 2, "flops": 2 * tokens * n * k}
                row["ceiling_us"] = clock.ceiling_us(n * k * 4.125 / 8, 2 * tokens * n * k)
                row["schedule"] = str(schedule_for(n, k, tokens, footprint=footprint(ours[0].fmt)))
                row["peers"] = {"bfloat16": clock.bfloat16_us(n, k, tokens)}
    return out
