"""From how many elements of a weight, and up to how many rows, the compiled CPU kernels are ahead of XLA's products.

    python -m benchmarks.cpu_small                      # on an idle machine; about ten minutes on two cores
    python -m benchmarks.cpu_small --clock processor    # on a busy one: processor time of all threads, not wall time

Square weights of layers in a row, as in a small model: the result of one is the input of the next. Unrolled, layers
have weights of their own; in a scan (`--scan`) they are a stack, out of which XLA's products copy a layer at each step,
and the kernels do not. XLA's products are those that are taken without the kernels. Both are asked for by name,
whatever the limits of the kernels are.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.cpu_native import TOKEN
from qjax import ops
from qjax.formats import DualGrained, Format, Int, MixedBits, TritPlanes, quantize_array
from qjax.kernels import cpu

SIDES = (32, 64, 128, 256, 512, 1024, 2048)
"""Outputs and inputs of a weight: 2^10 to 2^22 elements."""

ROWS = (1, 4, 16, 64, 128, 256)
LAYERS = 12
EXPERTS = 4

FORMATS: dict[str, tuple[Format, bool, str]] = {
    "W4A8 g32": (Int(4, group=32), True, "int_dot"),
    "W4A16 g32": (Int(4, group=32), False, "dequantize"),
    "DualGrained g32": (DualGrained(32), True, "int_dot"),
    "TritPlanes g32": (TritPlanes(group=32), True, "dequantize"),
    "MixedBits": (MixedBits(outliers=0.005), False, "dequantize"),
    "experts W4A8 g32": (Int(4, group=32), True, "experts"),
}
"""Formats, whether activations are int8, and which of XLA's lowerings is taken; experts are ragged products."""


def chain(name: str, rows: int, implementation: str, scan: bool) -> Callable[..., Any]:
    """Return a function of activations and weights, a stack for a scan or a list: the product with each in turn."""
    quantized = FORMATS[name][1]
    sizes = jnp.asarray([rows * (g + 1) // EXPERTS - rows * g // EXPERTS for g in range(EXPERTS)], jnp.int32)

    def product(x: jax.Array, w: Any, i: Any = None) -> jax.Array:
        if name.startswith("experts"):
            act = (TOKEN, ops.activation_aux(x, TOKEN))
            return ops.q_ragged_dot(x, w, sizes, act=act, implementation=implementation, layer=i)
        return ops.q_dot(x, w, act=TOKEN if quantized else None, implementation=implementation, layer=i, streamed=scan)

    def scanned(x: jax.Array, stack: Any) -> jax.Array:
        return jax.lax.fori_loop(0, LAYERS, lambda i, x: product(x, stack, i), x)

    return scanned if scan else lambda x, weights: functools.reduce(product, weights, x)


def measured(side: int, names: list[str], scan: bool, **how: Any) -> list[dict[str, Any]]:
    """Measure weights of one size."""
    rng = np.random.default_rng(0)
    found: list[dict[str, Any]] = [{"side": side, "rows": rows} for rows in ROWS]
    for name in names:
        fmt, _, xla = FORMATS[name]
        stack = (LAYERS, EXPERTS) if name.startswith("experts") else (LAYERS,)
        floats = jnp.asarray(rng.standard_normal((*stack, side, side), np.float32) / side**0.5)
        packed = quantize_array(floats, fmt, in_axes=len(stack) + 1, stack_axes=tuple(range(len(stack)))).canonical()
        weights = packed if scan else [jax.tree.map(jnp.array, packed[i]) for i in range(LAYERS)]
        for row in found:
            x = jnp.asarray(rng.standard_normal((row["rows"], side)), jnp.float32)
            cases = {}
            for implementation in (xla, "native"):
                ready = jax.jit(chain(name, row["rows"], implementation, scan)).lower(x, weights).compile()
                cases[implementation] = lambda ready=ready, x=x, weights=weights: ready(x, weights)
            times = measure.interleaved(cases, **how)
            row[name] = times[xla].over(times["native"])
            row[f"{name}, us"] = times["native"].least / LAYERS * 1e6
        print({"side": side, name: [round(row[name], 2) for row in found]}, flush=True)
    return found


def main() -> None:
    """Run, print, save."""
    options = measure.parser(__doc__ or "")
    options.add_argument("--budget", type=float, default=3, help="seconds for each format, size and number of rows")
    options.add_argument("--clock", choices=["wall", "processor"], default="wall")
    options.add_argument("--formats", nargs="*", choices=list(FORMATS), default=list(FORMATS))
    options.add_argument("--sides", nargs="*", type=int, default=SIDES, help="outputs and inputs of a weight")
    options.add_argument("--scan", action="store_true", help="layers in a scan, not unrolled")
    given = options.parse_args()
    clock = time.perf_counter if given.clock == "wall" else time.process_time
    found = []
    for side in given.sides:
        found += measured(side, given.formats, given.scan, budget=given.budget, least_rounds=9, clock=clock)
    rows = [[f"{f['side']} x {f['side']}", f["rows"], *(f"{f[n]:.2f}" for n in given.formats)] for f in found]
    busy = os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
    text = (
        f"XLA's {given.clock} time over that of the kernels (above 1: these are ahead), medians within rounds, "
        f"{LAYERS} layers {'in a scan' if given.scan else 'unrolled'}; experts are {EXPERTS} of the size. "
        f"{cpu.status()}.\n\n"
        + measure.table(["weight", "rows", *given.formats], rows)
        + ("\n\n**Taken on a busy machine**, to be repeated on an idle one." if busy else "")
    )
    measure.save("cpu_small", {"clock": given.clock, "scan": given.scan, "measured": found}, text, given.out)


if __name__ == "__main__":
    main()
