"""Activations quantized row by row on the GPU at hand: against float64 NumPy, then beside XLA's own fusion."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks.gpu_parts.clock import BY_KERNEL, Clock, checked
from benchmarks.kernel_cases.acts import ALONE, FLOAT8, GATE, INT8, LAYER_NORM, RMS_NORM, WORDS
from qjax import ops
from qjax.formats import Float8, Int, quantize_array
from qjax.kernels.act.reference import Before
from qjax.kernels.act.rows import is_held, quantize

LENGTHS = (4096, 14336, 8192, 28672)
TOKENS = (4096, 16, 256, 1)
EVERY = (ALONE, RMS_NORM, LAYER_NORM, GATE)


def name(fmt: Int | Float8, before: Before, dtype: str) -> str:
    """As the cases for the compiler are called, without the length."""
    return f"rows {WORDS[before.kind]} {fmt.name}, {dtype}"


def exact(x: np.ndarray, extra: Sequence[np.ndarray], before: Before) -> np.ndarray:
    """What is quantized, in float64, from the equations."""
    x, *extra = (np.asarray(a, np.float64) for a in (x, *extra))
    if before.kind == "gate":
        with np.errstate(over="ignore"):
            return extra[0] / (1 + np.exp(-extra[0])) * x
    if before.kind == "nothing":
        return x
    if before.kind == "layer_norm":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + before.eps)
    y = y * extra[0] if before.weight else y
    return y + extra[-1] if before.bias else y


def wrong(codes: np.ndarray, scale: np.ndarray, y: np.ndarray, fmt: Int | Float8) -> float:
    """How far results are from those of float64: of scales in shares, of codes in steps beyond the half that is due."""
    bound = 448.0 if isinstance(fmt, Float8) else fmt.code_range[1] + 0.5 * (fmt.scale == "half")
    tops = np.abs(y).max(-1, keepdims=True)
    worst = np.max(np.abs(scale - np.maximum(tops / bound, 2.0**-126)) / np.maximum(scale, 2.0**-126))
    steps = y / scale
    if isinstance(fmt, Float8):  # a step is that of three bits of mantissa
        near = np.maximum(np.abs(steps), 2.0**-6)
        steps, codes = (a / 2.0 ** (np.floor(np.log2(near)) - 3) for a in (steps, codes.astype(np.float64)))
    return float(max(worst, np.max(np.abs(codes.astype(np.float64) - steps)) - 0.5))


def operands(
    before: Before, rows: int, length: int, dtype: Any, seed: int = 0, weights: Any = None
) -> tuple[Any, list[Any]]:
    """Random rows of unlike sizes with a few large elements, and what a norm or gate takes; its dtype that of rows."""
    rng = np.random.default_rng(seed + rows + length)
    x = rng.normal(size=(rows, length)) * np.exp(rng.normal(size=(rows, 1)))
    x[:, :: max(length // 7, 1)] *= 20
    like = (rows, length) if before.kind == "gate" else (length,)
    count = 1 if before.kind == "gate" else before.weight + before.bias
    own = dtype if weights is None or before.kind == "gate" else weights
    return jnp.asarray(x, dtype), [jnp.asarray(rng.normal(size=like) + 1, own) for _ in range(count)]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def ours(x: Any, extra: Any, fmt: Any, before: Before, how: str | None) -> Any:
    """Through the op: codes and scales."""
    gate = extra[0] if before.kind == "gate" else None
    norm = None
    if before.kind == "rms_norm":
        norm = ops.RMSNorm(extra[0], before.eps)
    elif before.kind == "layer_norm":
        norm = ops.LayerNorm(extra[0], extra[1], before.eps)
    rows = ops.quantize_rows(x, fmt, norm=norm, gate=gate, implementation=how)
    return rows.codes, rows.aux["scale"]


def checks(quick: bool) -> list[dict[str, Any]]:
    """Every kind at odd and even sizes, and what must not leave its row."""
    out = []
    sizes = ((1, 4096), (7, 1001), (5, 28672), (257, 128), (3, 11008), (13, 1032))
    for i, before in enumerate(EVERY):
        for j, (rows, length) in enumerate(sizes):
            fmt = (INT8, FLOAT8)[(i + j) % 2]
            for dtype in ("bfloat16", "float16", "float32")[j % 3 :: 3 if quick else 1]:
                row = {"kernel": name(fmt, before, dtype), "case": f"[{rows}, {length}]"}
                with checked(row, out):
                    x, extra = operands(before, rows, length, dtype)
                    codes, scale = (np.asarray(a) for a in ours(x, extra, fmt, before, BY_KERNEL["implementation"]))
                    y = exact(np.asarray(x), [np.asarray(a) for a in extra], before)
                    row["error"] = wrong(codes, scale.astype(np.float64), y, fmt)
                    row["right"] = row["error"] < 2e-3
    return out + few_rows() + special() + in_its_own_row()


def few_rows() -> list[dict[str, Any]]:
    """One to seven rows of a prime number of elements, with weights of norms in float32, and no row at all."""
    out: list[dict[str, Any]] = []
    lengths = (131, 257, 1009, 4099, 509, 2053, 11003)
    for i, before in enumerate(EVERY):
        for rows, length in enumerate(lengths, 1):
            fmt = (FLOAT8, INT8)[(i + rows) % 2]
            row = {"kernel": name(fmt, before, "bfloat16"), "case": f"[{rows}, {length}], weights float32"}
            with checked(row, out):
                x, extra = operands(before, rows, length, "bfloat16", weights="float32")
                codes, scale = (np.asarray(a) for a in ours(x, extra, fmt, before, BY_KERNEL["implementation"]))
                y = exact(np.asarray(x), [np.asarray(a) for a in extra], before)
                row["error"] = wrong(codes, scale.astype(np.float64), y, fmt)
                row["right"] = row["error"] < 2e-3
        row = {"kernel": name(INT8, before, "bfloat16"), "case": "no rows"}
        with checked(row, out):
            x, extra = operands(before, 0, 1024, "bfloat16")
            codes, scale = ours(x, extra, INT8, before, BY_KERNEL["implementation"])
            row["right"] = codes.shape == (0, 1024) and scale.shape == (0, 1)
    return out


def in_its_own_row() -> list[dict[str, Any]]:
    """NaN and infinity behind norms and gates, held rows and rows read again: the rows beside are the same bits."""
    out: list[dict[str, Any]] = []
    for i, before in enumerate(EVERY):
        for length in (1009, 4096, 28672):
            fmt = (INT8, FLOAT8)[(i + length) % 2]
            row = {"kernel": name(fmt, before, "bfloat16"), "case": f"NaN and infinity in rows of {length}"}
            with checked(row, out):
                x, extra = operands(before, 5, length, "bfloat16")
                spoilt = x.at[1, 0].set(jnp.nan).at[3, length - 1].set(jnp.inf)
                clean, found = (
                    [np.asarray(a) for a in ours(rows, extra, fmt, before, BY_KERNEL["implementation"])]
                    for rows in (x, spoilt)
                )
                beside = [0, 2, 4]
                row["right"] = bool(
                    all(
                        (a[beside].view(np.uint8) == b[beside].view(np.uint8)).all()
                        for a, b in zip(clean, found, strict=True)
                    )
                    and not np.isfinite(found[1][[1, 3]]).any()
                    and not found[0][[1, 3]].astype(np.float32).any()
                )
    return out


def special() -> list[dict[str, Any]]:
    """NaN, infinity, zeros and negative zero; other codes; a product that takes the codes."""
    out: list[dict[str, Any]] = []
    for fmt in (INT8, FLOAT8):
        kernel = name(fmt, ALONE, "bfloat16")
        x = np.random.default_rng(0).normal(size=(5, 1001)).astype(ml_dtypes.bfloat16)
        x[1, 5], x[2, 1000], x[3], x[4, :500] = np.nan, -np.inf, 0, -0.0
        row = {"kernel": kernel, "case": "NaN, infinity, zeros"}
        with checked(row, out):
            found = ours(jnp.asarray(x), [], fmt, ALONE, BY_KERNEL["implementation"])
            codes, scale = (np.asarray(a).astype(np.float64) for a in found)
            row["right"] = bool(
                not np.isfinite(scale[1:3]).any()
                and not codes[1:4].any()
                and scale[3, 0] == 2.0**-126
                and not codes[4, :500].any()
                and wrong(codes[[0, 4]], scale[[0, 4]], np.asarray(x[[0, 4]], np.float64), fmt) < 2e-3
            )
        row = {"kernel": kernel, "case": "its codes in a product"}
        with checked(row, out):
            w = quantize_array(
                jax.random.normal(jax.random.key(0), (256, 512)), (Int(8), Float8())[fmt is FLOAT8], in_axes=1
            )
            x = jax.random.normal(jax.random.key(1), (7, 512), jnp.bfloat16)

            def both(x: Any, w: Any, fmt: Any = fmt) -> Any:
                rows = ops.quantize_rows(x, fmt, **BY_KERNEL)
                apart = ops.q_dot(x, w, act=(fmt, ops.activation_aux(x, fmt)), out_dtype=jnp.float32)
                return ops.q_dot(rows, w, out_dtype=jnp.float32), apart

            got, want = (np.asarray(a) for a in jax.jit(both)(x, w))
            row["error"] = float(np.max(np.abs(got - want)) / np.max(np.abs(want)))
            row["right"] = row["error"] < 1e-2  # ties may fall differently
    return out


def times(clock: Clock) -> list[dict[str, Any]]:
    """Beside XLA on the same expression, and rows in registers beside rows that are read again."""
    out = []
    for fmt, before in ((INT8, ALONE), (FLOAT8, RMS_NORM), (INT8, GATE), (FLOAT8, ALONE), (INT8, LAYER_NORM)):
        for length in LENGTHS:
            for tokens in TOKENS:
                if clock.left() <= 0:
                    return out
                many = [operands(before, tokens, length, "bfloat16", seed) for seed in range(1)]
                count = max(2, min(64, -(-(128 << 20) // (tokens * length * 3))))
                # New numbers by a product: drawing them anew on the host would take longer than what is measured.
                sets = [jax.tree.map(lambda a, i=i: a * (1 + i / 64), many[0]) for i in range(count)]
                kernel = name(fmt, before, "bfloat16")
                row = {"kernel": kernel, "layer": WORDS[before.kind], "n": length, "k": length, "tokens": tokens}
                with checked(row, out, "us"):
                    one = lambda x, extra, how, f=fmt, b=before: ours(x, extra, f, b, how)  # noqa: E731
                    row["us"] = clock.us(functools.partial(one, how=BY_KERNEL["implementation"]), *sets)
                    row["bytes"] = sum(a.nbytes for a in jax.tree.leaves(sets[0])) + tokens * (length + 4)
                    row["flops"] = 0
                    row["ceiling_us"] = clock.ceiling_us(row["bytes"], 0)
                    row["peers"] = {"XLA": clock.us(functools.partial(one, how="xla"), *sets)}
                    held = is_held(length, 16, before)
                    if tokens in (16, 4096):
                        other = functools.partial(quantize, fmt=fmt, before=before, held=False)
                        row["peers"] |= {"rows read again": clock.us(other, *sets)} if held else {}
    return out
