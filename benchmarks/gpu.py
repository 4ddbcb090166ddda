"""The GPU kernels on the GPU at hand: first whether they are right, then how fast they are.

    PYTHONPATH=. python -m benchmarks.gpu [--seconds 540] [--quick] [--skip-times]

For one session with an H100 or H200. Every kind of weight, scale and dtype is compared with float64 NumPy, three times
over; what is wrong is named. Then layers of Llama-3-8B and 70B and a shape of Marlin's, 1 to 4096 tokens, beside the
bfloat16 `jnp.dot` and the bandwidth of a copy, which are measured in the same run: weights rotate through more memory
than the L2 cache, and the calls of a round are one compiled program, so what is timed is the device. W8A8 of one layer
is timed beside XLA's, and other schedules are tried. What does not fit into the seconds is left out. Results:
`benchmarks/results/<device>-<date>.json` and `.md`, written after each layer; then `python -m benchmarks.kernel_states`
renews docs/kernels.md.
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

from benchmarks import measure
from benchmarks.gpu_checks import BY_KERNEL, checks, codes, product, special
from benchmarks.kernel_cases import G128
from qjax import ops
from qjax.formats import Float8, Int, IntTiles, QArray, assemble, quantize_array
from qjax.formats.tiles import rounded_up
from qjax.kernels.devices import cuda_capability
from qjax.kernels.dot.hopper import STEP, Schedule
from qjax.kernels.dot.hopper import TOKENS as TILES
from qjax.kernels.dot.mosaic import schedule_for
from qjax.kernels.dot.tiles16 import tiles16

SHAPES = {
    "Llama-3-70B gate and up": (57344, 8192),
    "Llama-3-8B q, o": (4096, 4096),
    "Llama-3-8B gate and up": (28672, 4096),
    "Llama-3-8B down": (4096, 14336),
    "Llama-3-70B q, o": (8192, 8192),
    "Llama-7B q, k and v": (12288, 4096),
}
"""(N, K) by layer; the last one is of Marlin's own benchmark."""

WITH_MORE = ("Llama-3-8B gate and up",)
"""Layers of which W8A8 is measured too, and schedules are tried."""

TOKENS = (1, 16, 4, 64, 256, 1024, 4096, 2, 8, 32, 128)
"""In the order in which they are measured, should time run out."""

ROTATE = 256 << 20
"""Bytes of weights of one kind that a round reads: several times the L2 cache."""

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


def of_codes(name: str, n: int, k: int, deadline: float) -> list[dict[str, Any]]:
    """W8A8 of one layer: by our kernel, by XLA, and in bfloat16; quantizing the activations included."""
    out = []
    keys = jax.random.split(jax.random.key(0), max(4, -(-ROTATE // (n * k * 2))))
    floats = [jax.random.normal(key, (n, k), jnp.bfloat16) for key in keys]
    for weights, act, xla in (
        (Int(8), Int(8, per="token"), "int_dot"),
        (Float8(), Float8(per="token"), "float8_dot"),
    ):
        packed = [quantize_array(w, weights, in_axes=1) for w in floats]

        def one(x: Any, w: QArray, how: str, act: Any = act) -> Any:
            return ops.q_dot(x, w, act=(act, ops.activation_aux(x, act)), implementation=how)

        for tokens in (16, 256, 4096):
            if time.perf_counter() > deadline:
                return out
            x = jax.random.normal(jax.random.key(1), (tokens, k), jnp.bfloat16)
            row = {"layer": name, "n": n, "k": k, "tokens": tokens, "weights": weights.name}
            for how, function, many in (
                ("mosaic_us", functools.partial(one, how=BY_KERNEL["implementation"]), packed),
                ("xla_us", functools.partial(one, how=xla), packed),
                ("bfloat16_us", lambda x, w: jnp.dot(x, w.T), floats),
            ):
                try:
                    row[how] = each(function, x, many) * 1e6
                except Exception as failure:
                    print(f"{row}, {how}: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
            out.append(row)
            print(row, flush=True)
    return out


def sweep(n: int, k: int, tokens: int, deadline: float) -> list[dict[str, Any]]:
    """One product by every schedule that might be good, fastest first."""
    ours = [packed(n, k, s) for s in range(max(4, -(-ROTATE // (n * k // 2))))]
    x = jax.random.normal(jax.random.key(0), (tokens, k), jnp.bfloat16)
    chosen = schedule_for(n, k, tokens)
    steps = rounded_up(k) // STEP
    tiles = sorted({chosen.tokens, *(t for t in TILES if t > chosen.tokens)})[:2] if tokens > 8 else [chosen.tokens]
    splits = sorted({1, chosen.splits, *(s for s in (2, 4, 8, 16) if steps % s == 0)})
    splits = splits if tokens <= 64 else [1]
    out = []
    for tile in tiles:
        for stages in (3, 4, 6, 8):
            for parts in splits:
                if time.perf_counter() > deadline:
                    return sorted(out, key=lambda r: r["us"])
                schedule = Schedule(tile, stages, parts)

                def one(x: Any, w: QArray, schedule: Schedule = schedule) -> Any:
                    how = {"fmt": w.fmt, "n": n, "out_dtype": x.dtype, "schedule": schedule}
                    return tiles16(w.aux["tiles"], w.aux["scale"], None, x[None], **how)[0]

                try:
                    us = each(one, x, ours) * 1e6
                except Exception as failure:  # more shared memory than there is, say
                    print(f"{schedule}: {type(failure).__name__}: {str(failure)[:100]}", flush=True)
                    continue
                row = {"n": n, "k": k, "tokens": tokens, "tile": tile, "stages": stages, "splits": parts}
                out.append({**row, "us": us, "chosen": schedule == chosen})
    return sorted(out, key=lambda r: r["us"])


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
    if rows := record.get("codes"):
        names = ("layer", "weights", "tokens", "mosaic_us", "xla_us", "bfloat16_us")
        body = [[r.get(k, "") if not isinstance(r.get(k), float) else f"{r[k]:.1f}" for k in names] for r in rows]
        lines += ["\nW8A8, quantizing the activations included:\n", measure.table(names, body)]
    if rows := record.get("sweep"):
        names = ("n", "k", "tokens", "tile", "stages", "splits", "us", "chosen")
        body = [[f"{r[k]:.1f}" if k == "us" else r.get(k, r.get("tokens")) for k in names] for r in rows]
        lines += ["\nSchedules, the three fastest and the one that is chosen:\n", measure.table(names, body)]
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

    record["checks"] = checks(given.quick) + codes(given.quick)
    record["special"] = special()
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
            if layer in WITH_MORE:
                record.setdefault("codes", []).extend(of_codes(layer, n, k, deadline))
                for tokens in (1, 16, 64, 1024):
                    found = sweep(n, k, tokens, min(deadline, time.perf_counter() + 40))
                    record.setdefault("sweep", []).extend(r for i, r in enumerate(found) if i < 3 or r["chosen"])
                save()
    save()
    print(f"\n{text(record)}\n\nwritten to {given.out / stem}.md and .json")


if __name__ == "__main__":
    main()
