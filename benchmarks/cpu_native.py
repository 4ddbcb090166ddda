"""The compiled CPU kernels beside XLA: layers of Llama-3-8B, 1 to 512 tokens, cold weights where tokens are few.

    python -m benchmarks.cpu_native                       # on an idle machine; about five minutes on two cores
    python -m benchmarks.cpu_native --clock processor     # on a busy one: processor time of all threads, not wall time

Every call multiplies by the next of several copies of a weight. For up to 16 tokens they are together larger than the
last-level cache, so that each is read from memory, as in a model. "read" is NumPy's maximum over as many bytes as the
4-bit weight has, by as many threads: what share of the memory's speed is reached is the ratio of the two.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from qjax import ops
from qjax.formats import DualGrained, Format, Int, MixedBits, TritPlanes, quantize_array
from qjax.kernels import cpu

TOKEN = Int(8, per="token")
SHAPES = ((4096, 4096), (14336, 4096))
TOKENS = (1, 4, 16, 64, 512)
FORMATS: dict[str, Format] = {"W8A8": Int(8), "W4A8 g128": Int(4, group=128)}
OTHERS: dict[str, tuple[Format, bool, tuple[str, ...]]] = {
    "DualGrained g128": (DualGrained(), True, ("int_dot",)),
    "MixedBits": (MixedBits(outliers=0.005), False, ("dequantize",)),
    "TritPlanes g128": (TritPlanes(), True, ("dequantize_blocks",)),
}
"""Formats of other kinds: whether activations are int8, and the lowerings of XLA that are fastest."""

EXPERTS = (8, 2048, 2048)
"""Experts, and the outputs and inputs of each."""

COLD = 16
"""Up to so many tokens weights are cold."""

INTEGERS = [(name, lowering) for name in FORMATS for lowering in ("int_dot", "native")]
FLOATS = [(name, lowering) for name in FORMATS for lowering in ("dequantize_blocks", "native")]
KINDS = [(name, lowering) for name, (_, _, xla) in OTHERS.items() for lowering in (*xla, "native")]
""" "W8A8 native" with activations quantized as they come, "W8A16 native" with those that stay float32."""


def in_turn(function: Callable[..., Any], x: Any, weights: list[Any]) -> Callable[[], Any]:
    """Return a call of the compiled function with the next weight each time."""
    ready = jax.jit(function).lower(x, weights[0]).compile()
    following = itertools.cycle(weights)
    return lambda: ready(x, next(following))


def product(name: str, quantized: bool) -> Callable[..., Any]:
    """Return the product by a named lowering, activations quantized as they come, or floats."""
    aux = lambda x: (TOKEN, ops.activation_aux(x, TOKEN)) if quantized else None  # noqa: E731
    return lambda x, w: ops.q_dot(x, w, act=aux(x), implementation=name)


def label(name: str, lowering: str, quantized: bool) -> str:
    """How a case is called."""
    return f"{name if quantized else name.replace('A8', 'A16')} {lowering}"


def reading(nbytes: int, total: int) -> Callable[[], Any]:
    """Return a call that reads the next stretch of memory, by a thread for each core."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = np.ones(total // 8, np.int64)
    step = nbytes // 8 // threads
    starts = itertools.cycle(range(0, len(memory) - step * threads + 1, step * threads))
    pool = ThreadPoolExecutor(threads)

    def read() -> None:
        first = next(starts)
        list(pool.map(lambda i: memory[first + i * step : first + (i + 1) * step].max(), range(threads)))

    return read


def measured(shape: tuple[int, int], cache: int, **how: Any) -> list[dict[str, Any]]:
    """Measure one layer."""
    n, k = shape
    rng = np.random.default_rng(0)
    whole = jnp.asarray(rng.standard_normal((k, n), np.float32) / k**0.5)
    weights: dict[str, Any] = {"float32": whole}
    formats = FORMATS | {name: fmt for name, (fmt, _, _) in OTHERS.items()}
    weights |= {name: quantize_array(whole, fmt, in_axes=0).canonical() for name, fmt in formats.items()}
    sizes = {name: sum(a.nbytes for a in jax.tree.leaves(w)) for name, w in weights.items()}
    copies = {
        name: [jax.tree.map(functools.partial(jnp.array, copy=True), w) for _ in range(-(-cache // sizes[name]) + 1)]
        for name, w in weights.items()
    }
    found = []
    for tokens in TOKENS:
        few = lambda name, tokens=tokens: copies[name] if tokens <= COLD else copies[name][:2]  # noqa: E731
        x = jnp.asarray(rng.standard_normal((tokens, k)), jnp.float32)
        cases = {"float32": in_turn(lambda x, w: x @ w, x, few("float32"))}
        floats = FLOATS if tokens <= COLD or cpu.library.has_bf16_tiles() else []
        for quantized, kinds in ((True, INTEGERS), (False, floats)):
            for name, lowering in kinds:
                cases[label(name, lowering, quantized)] = in_turn(product(lowering, quantized), x, few(name))
        for name, lowering in KINDS:
            if tokens > COLD and not OTHERS[name][1]:
                continue  # for many rows of floats the kernel is not meant
            cases[f"{name} {lowering}"] = in_turn(product(lowering, OTHERS[name][1]), x, few(name))
        if tokens == 1:
            cases["read"] = reading(sizes["W4A8 g128"], max(cache, 2 * sizes["W4A8 g128"]))
        times = measure.interleaved(cases, **how)
        row = {"shape": [n, k], "tokens": tokens, "float_ms": times["float32"].least * 1e3}
        row |= {name: times["float32"].least_over(t) for name, t in times.items() if name not in ("float32", "read")}
        if tokens == 1:
            row["of_reading"] = times["read"].least_over(times["W4A8 g128 native"])
        found.append(row)
        print(row, flush=True)
    return found


def of_experts(**how: Any) -> list[dict[str, Any]]:
    """Measure a mixture of experts, rows shared evenly among them, beside XLA's ragged product of floats."""
    count, n, k = EXPERTS
    rng = np.random.default_rng(0)
    floats = jnp.asarray(rng.standard_normal((count, k, n), np.float32) / k**0.5)
    packed = quantize_array(floats, FORMATS["W4A8 g128"], in_axes=1, stack_axes=0).canonical()
    found = []
    for tokens in TOKENS:
        x = jnp.asarray(rng.standard_normal((tokens, k)), jnp.float32)
        sizes = jnp.asarray([tokens * (g + 1) // count - tokens * g // count for g in range(count)], jnp.int32)

        def ragged(x: Any, w: Any, name: str, sizes: jax.Array = sizes) -> jax.Array:
            return ops.q_ragged_dot(x, w, sizes, act=(TOKEN, ops.activation_aux(x, TOKEN)), implementation=name)

        cases = {"float32": in_turn(lambda x, w, sizes=sizes: jax.lax.ragged_dot(x, w, sizes), x, [floats])}
        cases |= {name: in_turn(functools.partial(ragged, name=name), x, [packed]) for name in ("experts", "native")}
        times = measure.interleaved(cases, **how)
        row = {"experts": [count, n, k], "tokens": tokens, "float_ms": times["float32"].least * 1e3}
        row |= {f"W4A8 g128 {name}": times["float32"].least_over(times[name]) for name in ("experts", "native")}
        found.append(row)
        print(row, flush=True)
    return found


def written(found: list[dict[str, Any]], experts: list[dict[str, Any]], clock: str) -> str:
    """Return the tables, those of int8 activations, of floats, of other formats and of experts, as text."""
    tables = []
    named = [[label(*kind, quantized) for kind in kinds] for quantized, kinds in ((True, INTEGERS), (False, FLOATS))]
    for names in [*named, [f"{name} {lowering}" for name, lowering in KINDS]]:
        shown = lambda f, n: f"{f[n]:.2f}" if n in f else ""  # noqa: E731 (some are for few rows alone)
        rows = [
            [f"{f['shape'][0]} x {f['shape'][1]}", f["tokens"], f"{f['float_ms']:.3g}", *(shown(f, n) for n in names)]
            for f in found
            if names[0] in f
        ]
        tables.append(measure.table(["layer", "tokens", "float32, ms", *names], rows))
    names = [f"W4A8 g128 {name}" for name in ("experts", "native")]
    rows = [[e["tokens"], f"{e['float_ms']:.3g}", *(f"{e[n]:.2f}" for n in names)] for e in experts]
    tables.append(measure.table(["tokens", "float32, ms", *names], rows))
    count, n, k = EXPERTS
    shares = ", ".join(f"{f['of_reading']:.0%} at {f['shape'][0]} x {f['shape'][1]}" for f in found if f["tokens"] == 1)
    busy = os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
    return (
        f"Speed beside XLA's float32 product (above 1: faster), least {clock} time of each. {cpu.status()}.\n\n"
        f"Activations quantized to int8 as they come:\n\n{tables[0]}\n\nFloat activations:\n\n{tables[1]}\n\n"
        f"Other formats:\n\n{tables[2]}\n\n"
        f"{count} experts of {n} x {k}, beside XLA's ragged product of floats:\n\n{tables[3]}\n\n"
        f"W4A8 g128 by one token reaches this share of the speed at which NumPy reads memory: {shares}."
        + ("\n\n**Taken on a busy machine**, to be repeated on an idle one." if busy else "")
    )


def main() -> None:
    """Run, print, save."""
    options = measure.parser(__doc__)
    options.add_argument("--budget", type=float, default=20, help="seconds for each layer and number of tokens")
    options.add_argument("--cache", type=int, default=512, help="MiB of copies of a weight: more than the cache")
    options.add_argument("--clock", choices=["wall", "processor"], default="wall")
    given = options.parse_args()
    clock = time.perf_counter if given.clock == "wall" else time.process_time
    found = []
    for shape in SHAPES:
        found += measured(shape, given.cache << 20, budget=given.budget, least_rounds=4, clock=clock)
    experts = of_experts(budget=given.budget, least_rounds=4, clock=clock)
    figures = {"clock": given.clock, "measured": found, "experts": experts}
    measure.save("cpu_native", figures, written(found, experts, given.clock), given.out)


if __name__ == "__main__":
    main()
