"""Quantized products beside the float product, op by op: how many times faster or slower.

    python -m benchmarks.cpu_ops                 # about two minutes on two cores
    python -m benchmarks.cpu_ops --figures       # and write what `qjax.ops.choose` says: qjax/kernels/figures.json

Each case is a chain of products with different weights, y = x @ W1 @ W2 .., jitted as one function: what a model
does, weights not cached from the last product, and a compiler free to unpack all of them first. Ratios above 1 are
faster than float. The temporary memory is what the compiled function asks for.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import measure
from qjax import ops
from qjax.formats import MXFP4, NF4, NVFP4, Affine, DualGrained, Float8, Format, Int, quantize_array

FIGURES = Path(__file__).parents[1] / "qjax" / "kernels" / "figures.json"

TOKEN = Int(8, per="token")
# The parameters of a case: weights, activations (None: float).
DOTS: tuple[tuple[Format, Format | None], ...] = (
    (Int(8), None),
    (Int(4, group=128), None),
    (Int(4), None),
    (Int(3, group=128), None),
    (Int(2, group=128), None),
    (NF4(), None),
    (MXFP4(), None),
    (NVFP4(), None),
    (Float8(), None),
    (Int(8), TOKEN),
    (Int(4), TOKEN),
    (Int(8, group=128), TOKEN),
    (Int(4, group=128), TOKEN),
    (Affine(8), Affine(8, per="token")),
    (DualGrained(128), TOKEN),
    (Float8(), Float8(per="token")),
)
WIDTHS = ((512, 6), (1024, 4), (2048, 2), (4096, 2))
ROWS = (1, 16, 256)


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[[], Any], float]:
    """Return the compiled function bound to its arguments, and its temporary memory in MiB."""
    ready = jax.jit(function).lower(*args).compile()
    return functools.partial(ready, *args), ready.memory_analysis().temp_size_in_bytes / 2**20


def label(weight: Format, act: Format | None) -> str:
    """How a case is called."""
    return f"{weight.name}" + (f" x {act.name}" if act else "")


def dots(rng: np.random.Generator, budget: float) -> list[dict[str, Any]]:
    """Measure products of several widths and numbers of rows."""
    found = []
    for width, depth in WIDTHS:
        floats = [jnp.asarray(rng.standard_normal((width, width)) / width**0.5, jnp.float32) for _ in range(depth)]
        packed = {pair: [quantize_array(w, pair[0], in_axes=0) for w in floats] for pair in DOTS}
        for rows in ROWS:
            x = jnp.asarray(rng.standard_normal((rows, width)), jnp.float32)
            cases, temps = {}, {}
            cases["float"], temps["float"] = compiled(chain(lambda x, w: x @ w), x, floats)
            for pair, weights in packed.items():
                cases[label(*pair)], temps[label(*pair)] = compiled(chain(quantized(pair[1])), x, weights)
            times = measure.interleaved(cases, budget=budget, least_rounds=5)
            for weight, act in DOTS:
                name = label(weight, act)
                chosen = ops.choose("dot", weight, act, (rows, width, width), jax.default_backend())
                found.append(
                    {
                        "op": "dot",
                        "weights": name,
                        "kind": ops.kind_of(weight),
                        "act": ops.kind_of(act) if act else "",
                        "shape": [rows, width, width],
                        "rows": rows,
                        "lowering": chosen.name,
                        "speed": times["float"].over(times[name]),
                        "temp_mib": temps[name],
                        "float_ms": times["float"].least * 1e3 / depth,
                    }
                )
            print(f"{rows:4d} x {width}: " + ", ".join(f"{f['weights']} {f['speed']:.2f}" for f in found[-len(DOTS) :]))
    return found


def chain(product: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that multiplies x by one weight after the other."""
    return lambda x, weights: functools.reduce(product, weights, x)


def quantized(act: Format | None) -> Callable[..., Any]:
    """Return the quantized product, activations dynamically quantized if a format is given."""
    return lambda x, w: ops.q_dot(x, w, act=(act, ops.activation_aux(x, act)) if act else None)


def others(rng: np.random.Generator, budget: float) -> list[dict[str, Any]]:
    """Measure convolutions, a mixture of experts and an embedding."""
    found = []

    def compare(op: str, name: str, weight: Format, act: Format | None, lowering: str, pair: Any) -> None:
        cases, temps = {}, {}
        for which, (function, args) in zip(("float", "quantized"), pair, strict=True):
            cases[which], temps[which] = compiled(function, *args)
        times = measure.interleaved(cases, budget=budget, least_rounds=5)
        found.append(
            {
                "op": op,
                "weights": f"{name}: {label(weight, act)}",
                "kind": ops.kind_of(weight),
                "act": ops.kind_of(act) if act else "",
                "rows": None,
                "lowering": lowering,
                "speed": times["float"].over(times["quantized"]),
                "temp_mib": temps["quantized"],
                "float_ms": times["float"].least * 1e3,
            }
        )
        print(f"{op}, {found[-1]['weights']}: {found[-1]['speed']:.2f}")

    numbers = ("NHWC", "HWIO", "NHWC")
    for name, shape, kernel, stride in (
        ("3x3, 64 channels", (4, 32, 32, 64), (3, 3, 64, 64), 1),
        ("patches of 16", (4, 224, 224, 3), (16, 16, 3, 192), 16),
    ):
        x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        w = jnp.asarray(rng.standard_normal(kernel), jnp.float32)
        settings: dict[str, Any] = dict(
            window_strides=(stride,) * 2, padding="SAME" if stride == 1 else "VALID", dimension_numbers=numbers
        )
        for weight, act in ((Int(8), None), (Int(8), Int(8, per="tensor"))):
            q = quantize_array(w, weight, in_axes=(0, 1, 2))
            aux = (act, ops.conv_activation_aux(x, act, numbers)) if act else None
            chosen = ops.choice_for(ops.conv_problem(x, q, jax.default_backend(), act=aux, **settings)).name

            def run(x: Any, q: Any, act: Any = act, settings: Any = settings) -> Any:
                aux = (act, ops.conv_activation_aux(x, act, numbers)) if act else None
                return ops.q_conv(x, q, act=aux, **settings)

            plain = functools.partial(lax.conv_general_dilated, **settings)
            compare("conv", name, weight, act, chosen, ((plain, (x, w)), (run, (x, q))))

    x = jnp.asarray(rng.standard_normal((16, 512)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((8, 512, 1024)), jnp.float32)
    sizes = jnp.array([4, 0, 2, 1, 0, 5, 4, 0])
    for weight, act in ((Int(8), None), (Int(4, group=128), None), (Int(8), TOKEN)):
        q = quantize_array(w, weight, in_axes=1, stack_axes=0)
        chosen = ops.choose("ragged_dot", weight, act, (8, 16, 1024, 512), jax.default_backend()).name

        def experts(x: Any, q: Any, sizes: Any, act: Any = act) -> Any:
            return ops.q_ragged_dot(x, q, sizes, act=(act, ops.activation_aux(x, act)) if act else None)

        compare(
            "ragged_dot", "8 experts", weight, act, chosen, ((lax.ragged_dot, (x, w, sizes)), (experts, (x, q, sizes)))
        )

    table, rows = jnp.asarray(rng.standard_normal((32000, 512)), jnp.float32), jnp.arange(256) * 97
    q = quantize_array(table, Int(4, group=128), in_axes=1)
    look_up = lambda w, i: jnp.take(w, i, axis=0)  # noqa: E731
    compare(
        "take",
        "256 of 32000 rows",
        Int(4, group=128),
        None,
        "rows",
        ((look_up, (table, rows)), (lambda w, i: ops.q_take(w, 0, i), (q, rows))),
    )
    return found


def figures(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Summarize to one row per op, lowering and kinds: the median speed over shapes for each number of rows."""
    groups: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for f in found:
        key = (f["op"], f["lowering"], f["kind"], f["act"])
        groups.setdefault(key, {}).setdefault(str(f["rows"] or "any"), []).append(f["speed"])
    return [
        dict(zip(("op", "lowering", "weights", "act"), key, strict=True))
        | {"speed": {rows: round(statistics.median(v), 2) for rows, v in by_rows.items()}}
        for key, by_rows in sorted(groups.items())
    ]


def main() -> None:
    """Run, print, save."""
    options = measure.parser(__doc__)
    options.add_argument("--budget", type=float, default=2.5, help="seconds for each group of cases")
    options.add_argument("--figures", action="store_true", help=f"write {FIGURES.name}, which reports quote")
    given = options.parse_args()
    rng = np.random.default_rng(0)
    found = dots(rng, given.budget) + others(rng, given.budget / 2)
    widths = [w for w, _ in WIDTHS]
    text = (
        "Speed of quantized products beside float32 (above 1: faster), and temporary memory of the largest chain.\n\n"
    )
    header = ["weights"] + [f"{r} x {w}" for w in widths for r in ROWS] + ["temp MiB"]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for f in found:
        if f["op"] == "dot":
            by_name.setdefault(f["weights"], []).append(f)
    rows = [
        [n, *(f"{f['speed']:.2f}" for f in fs), f"{max(f['temp_mib'] for f in fs):.1f}"] for n, fs in by_name.items()
    ]
    first = next(iter(by_name.values()))
    rows.insert(0, ["float32, ms", *(f"{f['float_ms']:.2f}" for f in first), ""])
    text += measure.table(header, rows) + "\n\n"
    rest = [f for f in found if f["op"] != "dot"]
    text += measure.table(
        ["op", "case", "lowering", "speed", "float ms"],
        [[f["op"], f["weights"], f["lowering"], f"{f['speed']:.2f}", f"{f['float_ms']:.2f}"] for f in rest],
    )
    measure.save("cpu_ops", {"measured": found}, text, given.out)
    if given.figures:
        env = measure.environment()
        record = {
            "about": "median speed beside the float op, by number of rows; written by benchmarks/cpu_ops.py",
            "platform": env["platform"],
            "measured_on": measure.described(env),
            "figures": figures(found),
        }
        FIGURES.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
