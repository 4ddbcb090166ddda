"""Decode attention over quantized caches beside XLA: one token a sequence, cold caches of 512 and 4096 positions.

    python -m benchmarks.cpu_attention                       # on an idle machine; about two minutes on two cores
    python -m benchmarks.cpu_attention --clock processor     # on a busy one: processor time of all threads

"float32" is `jax.nn.dot_product_attention` over a float32 cache of the same size, "reference" XLA's lowering over the
quantized one, which unpacks it. Every call reads the next of several caches, together larger than the last-level cache.
"read" is NumPy's maximum over as many bytes as the quantized cache has, by as many threads: the share of it that the
kernel reaches is the ratio of the two.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.cpu_native import in_turn, reading
from qjax import ops
from qjax.formats import KV4, Format, Int, QArray, quantize_array
from qjax.kernels import cpu

SHAPES = {"32 heads": (32, 1), "8 heads x 4": (8, 4)}
"""Heads of keys, and query heads that share one, of 128 channels: Llama-2-7B and Llama-3-8B."""

CHANNELS = 128
FORMATS: dict[str, Format] = {"int8": Int(8, per="token"), "int4": Int(4, per="token"), "KV4": KV4()}
LOWERINGS = ("reference", "native")


def quantized(rng: np.random.Generator, shape: tuple[int, ...], fmt: Format) -> QArray:
    """Random keys or values [1, KV, S, D]."""
    x = jnp.asarray(rng.standard_normal(shape, np.float32))
    return quantize_array(x, fmt, in_axes=3, stack_axes=(0, 1))


def attend(name: str) -> Any:
    """Return attention of q [1, 1, H, D] over a cache, by a lowering."""
    return lambda q, kv: ops.q_attention(q, *kv, kv[0].codes.shape[2], implementation=name)


def by_floats(q: jax.Array, kv: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The same over a float cache [1, KV, S, D], which XLA reads in the order of the products."""
    k, v = (jnp.swapaxes(a, 1, 2) for a in kv)
    return jax.nn.dot_product_attention(q, k, v)


def measured(heads: tuple[int, int], context: int, cache: int, **how: Any) -> dict[str, Any]:
    """Measure one shape at one length."""
    rng = np.random.default_rng(0)
    keys, group = heads
    shape = (1, keys, context, CHANNELS)
    q = jnp.asarray(rng.standard_normal((1, 1, keys * group, CHANNELS), np.float32))
    floats = tuple(jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))
    caches: dict[str, Any] = {"float32": floats}
    caches |= {name: tuple(quantized(rng, shape, fmt) for _ in range(2)) for name, fmt in FORMATS.items()}
    sizes = {name: sum(a.nbytes for a in jax.tree.leaves(kv)) for name, kv in caches.items()}
    copies = {
        name: [jax.tree.map(functools.partial(jnp.array, copy=True), kv) for _ in range(-(-cache // sizes[name]) + 1)]
        for name, kv in caches.items()
    }
    cases = {"float32": in_turn(by_floats, q, copies["float32"])}
    for name in FORMATS:
        cases |= {f"{name} {by}": in_turn(attend(by), q, copies[name]) for by in LOWERINGS}
        cases[f"read {name}"] = reading(sizes[name], max(cache, 2 * sizes[name]))
    times = measure.interleaved(cases, **how)
    row: dict[str, Any] = {"heads": list(heads), "context": context, "float_ms": times["float32"].least * 1e3}
    for name in FORMATS:
        row |= {f"{name} {by}": times["float32"].least_over(times[f"{name} {by}"]) for by in LOWERINGS}
        row[f"{name} over reference"] = times[f"{name} reference"].least_over(times[f"{name} native"])
        row[f"{name} of reading"] = times[f"read {name}"].least_over(times[f"{name} native"])
    print(row, flush=True)
    return row


def written(found: list[dict[str, Any]], clock: str) -> str:
    """Return the table as text."""
    columns = [f"{name} {what}" for name in FORMATS for what in ("reference", "native", "of reading")]
    names = {tuple(shape): name for name, shape in SHAPES.items()}
    rows = [
        [
            f"{names.get(tuple(f['heads']), f['heads'])}, {f['context']}",
            f"{f['float_ms']:.3g}",
            *(f"{f[c]:.0%}" if c.endswith("reading") else f"{f[c]:.2f}" for c in columns),
        ]
        for f in found
    ]
    table = measure.table(["heads, positions", "float32, ms", *columns], rows)
    return (
        f"Speed of attention of one token beside XLA's over a float32 cache (above 1: faster), least {clock} time of "
        "each, and the share of the speed at which NumPy reads memory that the kernel reads the cache with. "
        f"{cpu.status()}.\n\n{table}"
    )


def main() -> None:
    """Run, print, save."""
    options = measure.parser(__doc__)
    options.add_argument("--budget", type=float, default=20, help="seconds for each shape and length")
    options.add_argument("--cache", type=int, default=512, help="MiB of copies of each cache, to have them cold")
    options.add_argument("--contexts", type=int, nargs="+", default=[512, 4096], help="positions")
    options.add_argument("--clock", choices=["wall", "processor"], default="wall")
    given = options.parse_args()
    clock = time.perf_counter if given.clock == "wall" else time.process_time
    found = [
        measured(shape, context, given.cache << 20, budget=given.budget, least_rounds=4, clock=clock)
        for shape in SHAPES.values()
        for context in given.contexts
    ]
    measure.save("cpu_attention", {"clock": given.clock, "measured": found}, written(found, given.clock), given.out)


if __name__ == "__main__":
    main()
