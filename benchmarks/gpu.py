"""The GPU kernels on the GPU at hand: first whether they are right, then how fast they are.

    PYTHONPATH=. python -m benchmarks.gpu [--seconds 540] [--quick] [--skip-times]

For one session with an H100 or H200. Every kind of weight, scale, dtype and schedule is compared with float64 NumPy,
three times over; a kernel that is wrong is named. Then layers of Llama-3-8B and 70B and a shape of Marlin's, 1 to 4096
tokens, beside the bfloat16 `jnp.dot` and the bandwidth of a copy, which are measured in the same run: weights rotate
through more memory than the L2 cache, and the calls of one round are one compiled program, so what is timed is the
device. What does not fit into the seconds is left out and said. Results: `benchmarks/results/<device>-<date>.json` and
`.md`, written after each layer; then `python -m benchmarks.kernel_states` renews docs/kernels.md.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.kernel_cases import G128
from qjax import ops
from qjax.formats import Int, IntTiles, QArray, assemble
from qjax.formats.tiles import rounded_up
from qjax.kernels.devices import cuda_capability
from qjax.kernels.dot.mosaic import schedule_for

SHAPES = {
    "Llama-3-70B gate and up": (57344, 8192),
    "Llama-3-8B q, o": (4096, 4096),
    "Llama-3-8B gate and up": (28672, 4096),
    "Llama-3-8B down": (4096, 14336),
    "Llama-3-70B q, o": (8192, 8192),
    "Llama-7B q, k and v": (12288, 4096),
}
"""(N, K) by layer; the last one is of Marlin's own benchmark."""

TOKENS = (1, 16, 4, 64, 256, 1024, 4096, 2, 8, 32, 128)
"""In the order in which they are measured, should time run out."""

ROTATE = 256 << 20
"""Bytes of weights of one kind that a round reads: several times the L2 cache."""

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

CLOSE = 1e-5
"""Largest difference from NumPy, relative to the sum of magnitudes of the terms: tensor cores truncate as they add."""


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


def product(x: Any, w: QArray, out_dtype: Any = None) -> Any:
    """By the kernel, or an error that says why not."""
    return ops.q_dot(x, w, implementation="mosaic", out_dtype=out_dtype)


def error(fmt: Int, n: int, k: int, tokens: int, dtype: str) -> tuple[float, bool]:
    """Largest error relative to the sum of magnitudes of the terms, and whether three runs gave the same."""
    w, numbers = weight(fmt, n, k, seed=n + k)
    x = jnp.asarray(np.random.default_rng(tokens).normal(size=(tokens, k)), dtype)
    run = jax.jit(product, static_argnums=2)
    results = [np.asarray(run(x, w, jnp.float32)) for _ in range(3)]
    exact = np.asarray(x, np.float64)
    terms = np.abs(exact) @ np.abs(numbers).T
    wrong = np.abs(results[0] - exact @ numbers.T) / np.maximum(terms, 1e-30)
    return float(np.max(wrong)), all(np.array_equal(results[0], r) for r in results)


def checks(quick: bool) -> list[dict[str, Any]]:
    """Every format and dtype at odd and even sizes; tokens over all tiles."""
    out = []
    for fmt in FORMATS:
        for dtype in ("bfloat16", "float16")[: 2 if fmt in FORMATS[:5:2] else 1]:
            for i, (n, k) in enumerate(SMALL):
                every = (1, 2, 3, 5, 7, 8, 13, 16, 31, 64, 100, 128, 257) if fmt is G128 and i == 1 else (7, 17)
                for tokens in every[:: 2 if quick else 1]:
                    row = {"weights": fmt.name, "dtype": dtype, "n": n, "k": k, "tokens": tokens}
                    try:
                        worst, steady = error(fmt, n, k, tokens, dtype)
                        row |= {"error": worst, "steady": steady, "right": bool(worst < CLOSE and steady)}
                    except Exception as failure:  # one kernel that fails must not hide the others
                        row |= {"right": False, "failure": f"{type(failure).__name__}: {failure}"[:300]}
                    out.append(row)
                    if not row["right"]:
                        print(f"WRONG: {row}", flush=True)
    return out


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
    return [{"check": name, "right": bool(right)} for name, right in rows.items()]


# Times.


def seconds(function: Callable[..., Any], *arguments: Any, trials: int = 7) -> float:
    """The fastest of some runs of a compiled function, in seconds."""
    jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(trials):
        begun = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        best = min(best, time.perf_counter() - begun)
    return best


def each(one: Callable[[Any, Any], Any], x: Any, weights: list[Any]) -> float:
    """Seconds of one product, from a program of one for each weight less a program of one for every second of them."""
    once = jax.jit(one)  # lowered once for all weights

    @jax.jit
    def program(x: Any, weights: list[Any]) -> Any:
        return [once(x, w) for w in weights]

    half = weights[: len(weights) // 2]
    # The difference leaves out what a launch of a program costs, which is not the kernel's.
    return (seconds(program, x, weights) - seconds(program, x, half)) / (len(weights) - len(half))


def copy_bandwidth() -> float:
    """Bytes a second of reading and writing 1 GiB."""
    a = jnp.zeros(1 << 29, jnp.bfloat16)
    once = seconds(jax.jit(lambda a: a + 1), a, trials=20)
    return 2 * a.nbytes / once


def peak() -> float:
    """Operations a second of a large bfloat16 product."""
    a = jnp.ones((8192, 8192), jnp.bfloat16)
    return 2 * 8192**3 / each(jnp.dot, a, [a + i for i in range(4)])


@functools.partial(jax.jit, static_argnums=1)
def _random_tiles(key: Any, like: Any) -> Any:
    return jax.random.bits(key, like.shape, jnp.uint8)


def packed(n: int, k: int, seed: int) -> QArray:
    """A weight of random codes in tiles, drawn on the device."""
    fmt = IntTiles(G128, k)
    like = jax.ShapeDtypeStruct((1, rounded_up(n) * fmt.padded_length // 2), jnp.uint8)
    aux = {
        "tiles": _random_tiles(jax.random.key(seed), like),
        "scale": jnp.full((1, fmt.blocks * rounded_up(n)), 0.01, jnp.float32),
    }
    whole = assemble(jnp.zeros((1, 1), jnp.int8), {"scale": jnp.ones((1, 1))}, Int(4), shape=(1, 1), in_axes=1)
    layout = dataclasses.replace(whole.layout, pad=0)
    return QArray(jnp.zeros((n, 0), jnp.int8), aux, fmt, layout, jnp.dtype(jnp.bfloat16))


def timed(name: str, n: int, k: int, deadline: float, rates: dict[str, float]) -> list[dict[str, Any]]:
    """One layer at all numbers of tokens, beside bfloat16."""
    ours = [packed(n, k, s) for s in range(max(4, -(-ROTATE // (n * k // 2))))]
    floats = [
        jax.random.normal(jax.random.key(s), (k, n), jnp.bfloat16) for s in range(max(4, -(-ROTATE // (n * k * 2))))
    ]
    out = []
    for tokens in TOKENS:
        if time.perf_counter() > deadline:
            break
        x = jax.random.normal(jax.random.key(0), (tokens, k), jnp.bfloat16)
        count = max(4, min(len(ours), (2 << 30) // (tokens * n * 2)))
        try:
            mine = each(product, x, ours[:count])
        except Exception as failure:  # the other sizes are worth having
            print(f"{name}, {tokens} tokens: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
            continue
        plain = each(jnp.dot, x, floats[: max(4, min(len(floats), count))])
        read = ours[0].nbytes + x.nbytes + tokens * n * 2
        ceiling = max(n * k * 4.125 / 8 / rates["copy"], 2 * tokens * n * k / rates["peak"])
        schedule = schedule_for(n, k, tokens)
        row = {
            "layer": name,
            "n": n,
            "k": k,
            "tokens": tokens,
            "schedule": dataclasses.asdict(schedule),
            "us": mine * 1e6,
            "bfloat16_us": plain * 1e6,
            "speedup": plain / mine,
            "gb_s": read / mine / 1e9,
            "tflop_s": 2 * tokens * n * k / mine / 1e12,
            "of_ceiling": ceiling / mine,
        }
        out.append(row)
        print(f"{name:24} {tokens:5} tokens {row['us']:9.1f} us, bfloat16 {row['bfloat16_us']:9.1f}", flush=True)
    return sorted(out, key=lambda r: r["tokens"])


def text(record: dict[str, Any]) -> str:
    """The Markdown page."""
    checked = record["checks"] + record["special"]
    wrong = [row for row in checked if not row["right"]]
    lines = [f"{len(checked) - len(wrong)} of {len(checked)} comparisons right."]
    lines += [f"- WRONG: {row}" for row in wrong]
    if rates := record.get("rates"):
        lines.append(f"\nCopy {rates['copy'] / 1e12:.2f} TB/s, bfloat16 product {rates['peak'] / 1e12:.0f} TFLOP/s.\n")
    head = ["layer", "N", "K", "tokens", "us", "bfloat16, us", "speed-up", "GB/s", "TFLOP/s", "of the ceiling"]
    rows = [
        [
            r["layer"],
            r["n"],
            r["k"],
            r["tokens"],
            f"{r['us']:.1f}",
            f"{r['bfloat16_us']:.1f}",
            f"{r['speedup']:.2f}",
            f"{r['gb_s']:.0f}",
            f"{r['tflop_s']:.0f}",
            f"{r['of_ceiling']:.0%}",
        ]
        for r in record["times"]
    ]
    if rows:
        lines.append(measure.table(head, rows))
        lines.append(
            "\nThe ceiling is the larger of 4.125 bits a weight at the bandwidth of the copy and the arithmetic at the "
            "rate of the bfloat16 product."
        )
    return "\n".join([*lines, *record["left_out"]])


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--seconds", type=float, default=540, help="after which nothing further is begun")
    parser.add_argument("--quick", action="store_true", help="half of the comparisons, two layers")
    parser.add_argument("--skip-times", action="store_true", help="only whether results are right")
    given = parser.parse_args()
    capability = cuda_capability()
    if capability is None or capability[0] != 9:
        print(f"the default device is {jax.devices()[0].device_kind}, no Hopper GPU: nothing was run")
        return
    deadline = time.perf_counter() + given.seconds
    environment = measure.environment()
    name = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    stem = f"{name}-{datetime.date.today().isoformat()}"
    record: dict[str, Any] = {"environment": environment, "times": [], "left_out": []}

    def save() -> None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
        (given.out / f"{stem}.md").write_text(f"{text(record)}\n\n{measure.described(environment)}.\n")

    record["checks"], record["special"] = checks(given.quick), special()
    save()
    if not given.skip_times:
        record["rates"] = {"copy": copy_bandwidth(), "peak": peak()}
        print(f"copy {record['rates']['copy']:.3g} B/s, product {record['rates']['peak']:.3g} FLOP/s", flush=True)
        for layer, (n, k) in list(SHAPES.items())[: 2 if given.quick else None]:
            if time.perf_counter() > deadline:
                record["left_out"].append(f"\n{layer}: left out, the time was up.")
                continue
            record["times"] += timed(layer, n, k, deadline, record["rates"])
            save()
    save()
    print(f"\n{text(record)}\n\nwritten to {given.out / stem}.md and .json")


if __name__ == "__main__":
    main()
