"""Ragged products with experts in tiles on the GPU at hand: against float64 NumPy for many kinds of groups; then times.

The times are of Mixtral-8x7B's experts with two experts a token, drawn at random: the table of tiles, the kernel and,
where K is cut, the sum of its parts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_parts import lookup
from benchmarks.gpu_parts.clock import BY_KERNEL, CLOSE, Clock, checked
from benchmarks.gpu_parts.weights16 import packed, weight
from benchmarks.kernel_cases.weights16 import G128
from benchmarks.peers import tokamax_ragged
from qjax import ops
from qjax.formats import MXFP4, Format, Int, Layout, QArray
from qjax.kernels.dot.hopper import Schedule
from qjax.kernels.dot.schedules import ragged_schedule_for
from qjax.kernels.dot.words import footprint
from qjax.kernels.ragged_dot.experts import experts16

SIZES: dict[str, tuple[int, list[int]]] = {
    "one token": (1, [0, 1, 0, 0]),
    "one token of no group": (1, [0, 0, 0, 0]),
    "two experts": (2, [1, 0, 0, 1]),
    "seven tokens": (7, [3, 0, 2, 2]),
    "nine, one left over": (9, [0, 5, 3, 0]),
    "few each": (32, [9, 7, 3, 13]),
    "all in one": (37, [0, 0, 37, 0]),
    "borders anywhere": (100, [17, 1, 63, 19]),
    "half of no group": (130, [5, 60, 0, 0]),
    "many": (257, [131, 0, 125, 1]),
    "more": (700, [233, 1, 300, 120]),
}
"""Tokens and group sizes of what is compared with NumPy."""

EXPERTS = {"Mixtral-8x7B experts, gate or up": (14336, 4096), "Mixtral-8x7B experts, down": (4096, 14336)}
"""(N, K) of one of the eight."""

GROUPS, CHOSEN = 8, 2
"""Experts, and those of a token."""


def product(x: Any, w: QArray, sizes: Any, out_dtype: Any = None) -> Any:
    """By the kernel, or an error that says why not."""
    return ops.q_ragged_dot(x, w, sizes, out_dtype=out_dtype, **BY_KERNEL)


def several(fmt: Format, n: int, k: int, groups: int) -> tuple[QArray, np.ndarray]:
    """Random experts, packed, canonical, and the numbers they stand for in float64 [groups, N, K]."""
    if isinstance(fmt, Int):
        each = [weight(fmt, n, k, seed) for seed in range(groups)]
    else:
        neutral = [lookup.weight(fmt, n, k, seed) for seed in range(groups)]
        each = [(ops.pack(w), lookup.numbers(w)) for w in neutral]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *[w for w, _ in each])
    order = (("s", 0), ("o", 0), ("i", 0))
    w = QArray(stacked.codes, stacked.aux, stacked.fmt, Layout(order), stacked.dtype)
    return w, np.stack([numbers for _, numbers in each])


def wanted(x: np.ndarray, numbers: np.ndarray, sizes: Any) -> np.ndarray:
    """Each row times the matrix of its group, row by row; 0 behind the last group."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    out = np.zeros((x.shape[0], numbers.shape[1]))
    for row, group in enumerate(groups):
        out[row] = numbers[group] @ x[row]
    return out


def checks(quick: bool) -> list[dict[str, Any]]:
    """All kinds of groups for one format, some for others; every tile of tokens; NaN stays in its row."""
    out: list[dict[str, Any]] = []
    run = jax.jit(product, static_argnums=3)
    kinds = ((G128, "bfloat16", 256, 512), (Int(4, group=64, symmetric=False), "float16", 200, 200))
    kinds = (*kinds, (Int(8), "bfloat16", 256, 256), (Int(4), "bfloat16", 128, 1024), (MXFP4(), "bfloat16", 256, 256))
    for fmt, dtype, n, k in kinds:
        w, numbers = several(fmt, n, k, 4)
        few = list(SIZES.items()) if fmt is G128 else list(SIZES.items())[4:8:3]
        for case, (tokens, sizes) in few[:: 2 if quick and fmt is G128 else 1]:
            row = {"kernel": f"ragged W{fmt.code_bits}A16 {fmt.name}, {dtype}", "case": f"[{n}, {k}], {case}"}
            with checked(row, out):
                x = jnp.asarray(np.random.default_rng(tokens).normal(size=(tokens, k)), dtype)
                results = [np.asarray(run(x, w, jnp.asarray(sizes, jnp.int32), jnp.float32)) for _ in range(3)]
                exact = np.asarray(x, np.float64)
                terms = np.maximum(wanted(np.abs(exact), np.abs(numbers), sizes), 1e-30)
                worst = float(np.max(np.abs(results[0] - wanted(exact, numbers, sizes)) / terms))
                steady = all(np.array_equal(results[0], r) for r in results)
                row |= {"error": worst, "steady": steady, "right": bool(worst < CLOSE and steady)}
    w, numbers = several(G128, 256, 512, 4)
    kernel = f"ragged W4A16 {G128.name}, bfloat16"
    for tile in (8, 16, 32, 64, 128):
        row = {"kernel": kernel, "case": f"tiles of {tile} tokens"}
        with checked(row, out):
            tokens, sizes = (8, [2, 0, 5, 1]) if tile == 8 else (300, [140, 1, 30, 128])
            x = jnp.asarray(np.random.default_rng(tile).normal(size=(tokens, 512)), jnp.bfloat16)
            how = {"fmt": w.fmt, "n": 256, "out_dtype": jnp.bfloat16, "schedule": Schedule(tile, 3)}
            how["schedule"] = dataclasses.replace(how["schedule"], tall=2, rolling=tile > 64)
            flat = {name: a.reshape(4, -1) for name, a in w.aux.items()}
            y = jax.jit(functools.partial(experts16, **how))(flat, x, jnp.asarray(sizes, jnp.int32))
            exact = np.asarray(x, np.float64)
            terms = np.maximum(wanted(np.abs(exact), np.abs(numbers), sizes), 1e-30)
            want = wanted(exact, numbers, sizes)
            worst = np.abs(np.asarray(y, np.float64) - want) - 2**-8 * np.abs(want)  # results are bfloat16
            worst = float(np.max(worst / terms))
            row |= {"error": worst, "right": bool(worst < CLOSE)}
    row = {"kernel": kernel, "case": "NaN in its row alone; bfloat16 results"}
    with checked(row, out):
        x = np.random.default_rng(0).normal(size=(20, 512)).astype(np.float32)
        x[7, 3] = np.nan
        y = np.asarray(run(jnp.asarray(x, jnp.bfloat16), w, jnp.asarray([6, 3, 0, 9], jnp.int32), None), np.float64)
        exact = np.nan_to_num(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64))
        clean, want = (np.delete(a, 7, axis=0) for a in (y, wanted(exact, numbers, [6, 3, 0, 9])))
        near = np.max(np.abs(clean - want)) < 2**-7 * np.max(np.abs(want))
        row["right"] = bool(np.isnan(y[7]).all() and np.isfinite(clean).all() and near and not y[18:].any())
    return out


def routed(tokens: int, seed: int) -> jax.Array:
    """Sizes of the experts' groups where each token chooses two at random."""
    rng = np.random.default_rng(seed)
    chosen = np.concatenate([rng.permutation(GROUPS)[:CHOSEN] for _ in range(tokens)])
    return jnp.asarray(np.bincount(chosen, minlength=GROUPS), jnp.int32)


PATIENCE = 20
"""Seconds that have to be left for tokamax's product to be begun: its forms are compiled and compared first."""


def tokamax_us(clock: Any, x: Any, sizes: list[Any], n: int, k: int) -> dict[str, Any]:
    """Microseconds of tokamax's product with int4 experts, the faster of two configurations; or why there is none.

    Returns:
        ``us`` and ``config``, its name, if its result is that of its own XLA form; else ``failure``.
    """
    found = tokamax_ragged.products(x.shape[0])
    if isinstance(found, str):
        return {"failure": found}
    weights = [tokamax_ragged.drawn(n, k, GROUPS, s) for s in range(len(sizes))]
    want = np.asarray(jax.jit(found.pop("xla"))(x, weights[0], sizes[0]), np.float32)
    own, out = int(np.sum(sizes[0])), {}  # rows of no group are left as they were
    for name, function in found.items():
        try:
            compiled = jax.jit(function).lower(x, weights[0], sizes[0]).compile()
            got = np.asarray(compiled(x, weights[0], sizes[0]), np.float32)
            if np.linalg.norm((got - want)[:own]) > 0.02 * np.linalg.norm(want[:own]):
                raise ValueError("its result is not that of its XLA form")
            out[name] = clock.us(compiled, *[(x, w, s) for w, s in zip(weights, sizes, strict=True)])
        except Exception as failure:  # such as a configuration that this device has no room for
            print(f"peer: {name}: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
    best = min(out, key=lambda name: out[name], default="")
    return {"us": out[best], "config": best} if out else {"failure": "no configuration of tokamax runs"}


def times(clock: Clock) -> list[dict[str, Any]]:
    """Experts of Mixtral-8x7B at 1 to 4096 tokens, beside XLA's bfloat16 product and tokamax's with int4."""
    out: list[dict[str, Any]] = []
    for layer, (n, k) in EXPERTS.items():
        order = Layout((("s", 0), ("o", 0), ("i", 0)))
        w = [dataclasses.replace(packed(n, k, s, stack=(GROUPS,)), layout=order) for s in range(2)]
        floats = jax.random.normal(jax.random.key(0), (GROUPS, k, n), jnp.bfloat16)
        for tokens in (1, 16, 256, 4096):
            if clock.left() <= 0:
                return out
            rows = tokens * CHOSEN
            x = jax.random.normal(jax.random.key(0), (rows, k), jnp.bfloat16)
            sizes = [routed(tokens, s) for s in range(2)]
            filled = float(np.mean([np.count_nonzero(s) for s in sizes]))
            row = {"kernel": f"ragged W4A16 {G128.name}, bfloat16", "layer": layer, "n": n, "k": k, "tokens": tokens}
            with checked(row, out, "us"):
                row["us"] = clock.us(product, *[(x, a, s) for a, s in zip(w, sizes, strict=True)])
                read = filled * n * k * 4.25 / 8
                row |= {"bytes": int(read + x.nbytes + rows * n * 2), "flops": 2 * rows * n * k}
                row["ceiling_us"] = clock.ceiling_us(read * 4.125 / 4.25, 2 * rows * n * k)
                row["schedule"] = str(ragged_schedule_for(n, k, rows, GROUPS, footprint=footprint(w[0].fmt)))
                row["peers"] = {"bfloat16": clock.us(jax.lax.ragged_dot, *[(x, floats, s) for s in sizes])}
                if layer == next(iter(EXPERTS)) and clock.left() > PATIENCE:
                    theirs = tokamax_us(clock, x, sizes, n, k)
                    row["tokamax"] = theirs.get("config", theirs.get("failure"))
                    row["peers"] |= {"tokamax int4": theirs["us"]} if "us" in theirs else {}
    return out
