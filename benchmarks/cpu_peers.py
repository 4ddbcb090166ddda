"""Quantized products of a layer on a CPU beside torch, torchao and ggml (llama.cpp), in turns.

    python -m benchmarks.cpu_peers --peers PYTHON           # on an idle machine; about ten minutes on two cores
    python -m benchmarks.cpu_peers --peers PYTHON --quick   # small layers, a minute

PYTHON has the other tools: ``pip install torch numpy torchao llama-cpp-python`` in an environment of its own. Those
that it lacks are left out, and a case that fails is named with the reason. Both processes have the same threads, the
same weights and tokens, and several copies of a weight that are together larger than the last-level cache for up to 16
tokens. Each round runs every case of both processes once, in random order; ratios are medians within rounds. Results
are compared with float64 before anything is timed.

Torch and torchao W8A8 quantize activations a token at a time or the tensor, ggml a token in groups of 32; weights are
per channel with 8 bits, in groups of 128 (torch), or of 32 (ggml's Q4_0 and Q8_0) with 4.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.cpu_native import COLD, TOKEN, TOKENS, reading
from benchmarks.peers.products import copies, error, layer
from benchmarks.peers.served import Peer
from qjax import ops
from qjax.formats import Format, Int, quantize_array
from qjax.kernels import cpu

LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (256, 256), (768, 256), (256, 768))
"""Outputs and inputs of the layers of Llama-3-8B, then of the language model that comes with the repository."""
COPIES = 64
"""Most copies of a weight: all of a small model's weights together stay in the cache."""
SMALL = ((512, 512), (512, 1024))

OURS: dict[str, tuple[Format | None, bool]] = {
    "qjax float32": (None, False),
    "qjax bfloat16": (None, False),
    "qjax W8A8": (Int(8), True),
    "qjax W4A8 g128": (Int(4, group=128), True),
    "qjax W8A16": (Int(8), False),
    "qjax W4A16 g128": (Int(4, group=128), False),
}
"""Format of weights, and whether activations become int8."""

LIMITS = {"float32": 1e-5, "bfloat16": 0.01, "8": 0.03, "4": 0.15}
"""Largest error of a case, by what its name has; the last that fits counts."""

SAME = {
    "8 bits": ("qjax W8A8", "torch linear_dynamic", "torchao W8A8", "torchao W8A8 compiled", "ggml Q8_0"),
    "4 bits": ("qjax W4A8 g128", "torch int4pack_mm", "ggml Q4_0"),
    "float activations": ("qjax W8A16", "qjax W4A16 g128", "torchao W8A16 compiled"),
    "floats": ("qjax float32", "qjax bfloat16", "torch float32", "torch bfloat16"),
}
"""Tables, and what stands in them."""

BUFFERS = ("AMX", "CPU_REPACK", "CPU")
"""Kinds of memory in which ggml keeps weights; the fastest one counts."""


def ours(w: np.ndarray, x: np.ndarray, given: dict[str, Any]) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Our cases and the errors of their results."""
    cases: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    for name, (fmt, quantized) in OURS.items():
        if fmt is not None and not quantized and len(x) > COLD and not cpu.library.has_bf16_tiles():
            continue  # for many rows of floats the other kernels are not meant
        dtype = jnp.bfloat16 if name.endswith("bfloat16") else jnp.float32
        weight: Any = jnp.asarray(w.T, dtype)
        if fmt is not None:
            weight = quantize_array(weight, fmt, in_axes=0).canonical()
        act = TOKEN if quantized else None
        product: Callable[..., Any] = lambda x, w: x @ w  # noqa: E731
        if fmt is not None:
            product = functools.partial(ops.q_dot, act=act, implementation="native")
        rows = jnp.asarray(x, dtype)
        ready = jax.jit(product).lower(rows, weight).compile()
        nbytes = sum(a.nbytes for a in jax.tree.leaves(weight))
        many = [jax.tree.map(functools.partial(jnp.array, copy=True), weight) for _ in range(copies(nbytes, given))]
        turn = itertools.cycle(many)
        cases[name] = lambda ready=ready, rows=rows, turn=turn: ready(rows, next(turn))
        errors[name] = error(np.asarray(cases[name](), np.float32), w, x)
    return cases, errors


def checked(errors: dict[str, float]) -> None:
    """Stop where a result is wrong: a quick wrong product is no product.

    Raises:
        SystemExit: naming the case and both numbers.
    """
    for name, value in errors.items():
        kind = next(k for k in ("bfloat16", "float32", "Q8", "W8", "dynamic", "4") if k in name)
        limit = LIMITS["8" if kind in ("Q8", "W8", "dynamic") else kind]
        if not value <= limit:
            raise SystemExit(f"{name}: its result is wrong by {value:.3g}, and {limit:g} is allowed")


def measured(shape: tuple[int, int], tokens: int, cache: int, peer: Peer | None, budget: float) -> dict[str, Any]:
    """Measure one layer at one number of tokens: seconds and rates of all cases."""
    n, k = shape
    cache = min(cache, COPIES * n * k)
    given = {"n": n, "k": k, "tokens": tokens, "cache": cache, "cold": tokens <= COLD}
    w, x = layer(n, k, tokens)
    cases, errors = ours(w, x, given)
    told: list[str] = []
    failed: dict[str, str] = {}
    if peer is not None:
        # ggml's kernels for AMX crash as some compilers make them; it is measured without them then.
        found = peer.prepare({**given, "ggml": BUFFERS}, {"ggml in AMX memory": {"ggml": BUFFERS[1:]}})
        theirs, failed = found["errors"], found["failed"]
        errors, told = errors | theirs, list(theirs)
        cases |= {name: functools.partial(peer.run, name) for name in theirs}
    checked(errors)
    if tokens == 1:
        cases["read"] = reading(n * k // 2, max(cache, n * k))
    times = measure.interleaved(cases, budget=budget, least_rounds=7, told=told, pause=0.01)
    best = {name: name for name in times}
    for kind in ("Q4_0", "Q8_0"):
        kinds = [name for name in times if name.startswith(f"ggml {kind} ")]
        if kinds:
            best[f"ggml {kind}"] = min(kinds, key=lambda name: times[name].median)
    float_ = times["qjax float32"]
    row = {
        "shape": [n, k],
        "tokens": tokens,
        "ms": {name: times[case].median * 1e3 for name, case in best.items()},
        "over float32": {name: float_.over(times[case]) for name, case in best.items() if name != "read"},
        "memory of ggml": {name: case.split(" ")[-1] for name, case in best.items() if name != case},
        "errors": errors,
        "failed": failed,
    }
    if tokens == 1:
        row["of reading"] = times["read"].over(times["qjax W4A8 g128"])
    shown = ", ".join(f"{name} {v:.2f}" for name, v in row["over float32"].items())
    print(f"{n} x {k}, {tokens} tokens: {shown}", flush=True)
    return row


def written(rows: list[dict[str, Any]]) -> str:
    """The tables as text."""
    text = [
        f"Speed beside XLA's float32 product (above 1: faster), medians of ratios within rounds. {cpu.status()}.",
    ]
    for title, names in SAME.items():
        there = [name for name in names if any(name in row["ms"] for row in rows)]
        lines = []
        for row in rows:
            shown = [row["over float32"].get(name) for name in there]
            if any(v is not None for v in shown):
                n, k = row["shape"]
                each = ["" if v is None else f"{v:.2f}" for v in shown]
                lines.append([f"{n} x {k}", row["tokens"], f"{row['ms']['qjax float32']:.3g}", *each])
        header = ["layer", "tokens", "float32, ms", *there]
        text += ["", f"{title[0].upper()}{title[1:]}:", "", measure.table(header, lines)]
    shares = ", ".join(f"{r['of reading']:.0%} at {r['shape'][0]} x {r['shape'][1]}" for r in rows if "of reading" in r)
    if shares:
        text += ["", f"W4A8 g128 by one token, of the speed at which NumPy reads as many bytes of codes: {shares}."]
    failed: dict[str, list[str]] = {}
    for row in rows:
        for name, why in row["failed"].items():
            n, k = row["shape"]
            failed.setdefault(f"{name}, which {why}:", []).append(f"{row['tokens']} tokens of {n} x {k}")
    if failed:
        text += ["", "Not measured: " + "; ".join(f"{name} {', '.join(which)}" for name, which in failed.items()) + "."]
    return "\n".join(text)


def main() -> None:
    """Run, print, save."""
    options = measure.parser(__doc__)
    options.add_argument("--peers", type=Path, metavar="PYTHON", help="an interpreter that has the other tools")
    options.add_argument("--tools", nargs="*", default=["torch", "torchao", "ggml"], help="which of them")
    options.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    options.add_argument("--layers", nargs="+", metavar="NxK", help="other layers, such as 2048x2048")
    options.add_argument("--budget", type=float, default=12, help="seconds for each layer and number of tokens")
    options.add_argument("--cache", type=int, default=512, help="MiB of copies of a weight: more than the cache")
    options.add_argument("--quick", action="store_true", help="small layers, for trying the command")
    given = options.parse_args()
    jax.config.update("jax_platforms", "cpu")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    layers = SMALL if given.quick else LAYERS
    if given.layers:
        layers = [(int(n), int(k)) for n, k in (one.split("x") for one in given.layers)]
    budget, cache = (1.0, 8 << 20) if given.quick else (given.budget, given.cache << 20)
    peer = None
    if given.peers is not None:
        peer = Peer(str(given.peers), "benchmarks.peers.products", str(threads), *given.tools)
    versions = {} if peer is None else peer.ask("versions")["versions"]
    rows = [measured(shape, tokens, cache, peer, budget) for shape in layers for tokens in given.tokens]
    text = written(rows)
    if versions:
        text += f"\n\nBoth with {threads} threads; {', '.join(f'{k} {v}' for k, v in versions.items())}."
    name = "cpu_peers-quick" if given.quick else "cpu_peers"
    measure.save(name, {"measured": rows, "versions": versions}, text, given.out)


if __name__ == "__main__":
    sys.exit(main())
