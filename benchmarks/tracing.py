"""What rewriting costs before the first number is computed: tracing and compiling a 32-layer Llama.

    python -m benchmarks.tracing [--layers 32] [--width 32] [--rounds 3]

The model is `qjax.models.Llama` with tiny widths, so that the time is that of equations and not of arithmetic; its
layers are unrolled, or scanned over. Parameters are quantized before; recipes are the presets.

Tracing: `jax.make_jaxpr` of the float function against `jax.make_jaxpr` of the quantized one, which traces the float
function, finds its sites, decides and replays; nothing of an earlier round can be reused except jax's own traces of
its library functions. "replayed" is the empty recipe without its shortcut: analysis and replay of every equation.
First in a process: the same as the first thing that a new process traces.
Compiling: `jax.jit(f).trace(...)` is not timed, `.lower().compile()` is.
"""

from __future__ import annotations

import functools
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from benchmarks import measure
from benchmarks.measure import Times, interleaved, milliseconds
from qjax.models import LanguageModel, LlamaConfig
from qjax.transforms import Rewritten

BOUNDS: dict[str, dict[str, float]] = {
    "first": {},
    "tracing": {"empty": 3.0, "replayed": 3.0, "W8A16": 3.0, "W4A16": 3.0, "W8A8": 3.0},
    "unrolled": {"empty": 1.3, "replayed": 1.3, "W8A16": 1.8, "W4A16": 1.8, "W8A8": 2.5},
    "scanned": {"empty": 1.3, "replayed": 1.3, "W8A16": 1.3, "W4A16": 1.3, "W8A8": 1.3},
}
"""The largest ratios to the float function that the project allows itself."""

WIDTH = 32


class Subject:
    """A model and its quantized forms."""

    def __init__(self, layers: int, scan: bool, recipes: tuple[str, ...], width: int = WIDTH):
        self.model = LanguageModel(_config(layers, width), scan_layers=scan)
        self.params = self.model.init()
        self.tokens = jnp.zeros((1, 8), jnp.int32)
        quantize = functools.partial(qjax.quantize, self.model, self.params, self.tokens)
        self.models = {name: quantize(recipe=_recipe(name)) for name in recipes}

    def fresh(self) -> Callable[[Any, Any], Any]:
        """The float function as an object that no cache knows."""
        return lambda params, tokens: self.model(params, tokens)

    def rewritten(self, recipe: str) -> tuple[Callable[..., Any], Any]:
        """The quantized function, likewise, and its parameters."""
        model = self.models[recipe]
        bound = model.bind(self.fresh())
        if recipe == "replayed":  # a rule for inputs, whatever it matches, makes the function be replayed
            bound.has_inputs = True
        return (lambda params, tokens: bound(params, tokens)), model.params


def _config(layers: int, width: int = WIDTH) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=64,
    )


def _recipe(name: str) -> qjax.Recipe:
    return qjax.Recipe([]) if name in ("empty", "replayed") else qjax.recipe(name)


def tracing(subject: Subject, rounds: int) -> dict[str, Times]:
    """CPU seconds of one thread: tracing is single-threaded Python, and what else runs would count in wall time."""
    cases: dict[str, Callable[[], Any]] = {
        "float": lambda: jax.make_jaxpr(subject.fresh())(subject.params, subject.tokens) and None
    }
    for name in subject.models:
        cases[name] = functools.partial(_trace, subject, name)
    for case in cases.values():
        case()
    return interleaved(cases, rounds=rounds, budget=60.0, least_rounds=rounds, clock=time.thread_time)


def _trace(subject: Subject, recipe: str) -> None:
    function, params = subject.rewritten(recipe)
    jax.make_jaxpr(function)(params, subject.tokens)


def compiling(subject: Subject, rounds: int) -> dict[str, Times]:
    """CPU seconds of all threads to lower and compile; tracing is done before, untimed."""
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name in ("float", *subject.models):
            function, params = (subject.fresh(), subject.params) if name == "float" else subject.rewritten(name)
            traced = jax.jit(function).trace(params, subject.tokens)
            start = time.process_time()
            traced.lower().compile()
            taken.setdefault(name, []).append(time.process_time() - start)
    return {name: Times(tuple(seconds)) for name, seconds in taken.items()}


def first(subject: Subject, recipe: str, layers: int) -> float:
    """CPU seconds of the first trace in a new process, which gets the quantized parameters from this one."""
    params = subject.params if recipe == "float" else subject.models[recipe].params
    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        pickle.dump(jax.tree.map(np.asarray, params), file)
        file.flush()
        command = [sys.executable, "-m", "benchmarks.tracing", "--layers", str(layers), "--first", recipe, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def run_first(recipe: str, file: str, layers: int) -> None:
    """Trace once and print the seconds."""
    params = jax.tree.map(jnp.asarray, pickle.loads(Path(file).read_bytes()))
    model = LanguageModel(_config(layers))
    function: Callable[..., Any] = model
    if recipe != "float":
        function = Rewritten(model, _recipe(recipe))
    start = time.thread_time()
    jax.make_jaxpr(lambda params, tokens: function(params, tokens))(params, jnp.zeros((1, 8), jnp.int32))
    print(json.dumps({"seconds": time.thread_time() - start}))


def summary(kind: str, times: dict[str, Times]) -> list[dict[str, Any]]:
    """A row per recipe; ratios are of the least disturbed rounds."""
    base = times["float"]
    return [
        {
            "kind": kind,
            "recipe": name,
            "seconds": t.least,
            "over_float": t.least_over(base),
            "over_float_paired": t.over(base),
            "bound": BOUNDS[kind].get(name),
        }
        for name, t in times.items()
    ]


def render(rows: list[dict[str, Any]], layers: int) -> str:
    titles = {
        "tracing": f"Tracing, {layers} layers unrolled",
        "first": "Tracing, first thing in a new process",
        "unrolled": f"Lowering and compiling, {layers} layers unrolled",
        "scanned": f"Lowering and compiling, {layers} layers scanned",
    }
    parts = [
        "# Tracing and compiling\n\nCPU time (not wall time: the machine is shared), the least of all rounds; ratios "
        "are of those, and in brackets the median of the ratios within a round."
    ]
    for kind, title in titles.items():
        chosen = [r for r in rows if r["kind"] == kind]
        cells = [
            (
                r["recipe"],
                milliseconds(r["seconds"]),
                f"{r['over_float']:.2f} ({r['over_float_paired']:.2f})",
                "" if r["bound"] is None else f"{r['bound']:.1f}",
            )
            for r in chosen
        ]
        if cells:
            parts.append(f"## {title}\n\n" + measure.table(("recipe", "ms", "over float", "at most"), cells))
    return "\n\n".join(parts)


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=WIDTH, help="of the model; `first` is at the default only")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of compiling; tracing gets three times as many")
    parser.add_argument("--recipes", default=",".join(BOUNDS["tracing"]), help="presets, or empty, or replayed")
    parser.add_argument("--kinds", default="tracing,first,unrolled,scanned", help="what to measure")
    parser.add_argument("--first", nargs=2, metavar=("RECIPE", "FILE"), help="trace once in this process")
    args = parser.parse_args()
    if args.first:
        run_first(*args.first, args.layers)
        return
    recipes, kinds = tuple(args.recipes.split(",")), args.kinds.split(",")
    rows: list[dict[str, Any]] = []
    unrolled = Subject(args.layers, False, recipes, args.width) if set(kinds) - {"scanned"} else None
    if unrolled is not None and "tracing" in kinds:
        rows += summary("tracing", tracing(unrolled, 3 * args.rounds))
    if unrolled is not None and "first" in kinds and args.width == WIDTH:
        names = [name for name in ("float", *recipes) if name != "replayed"]
        taken = [{name: first(unrolled, name, args.layers) for name in names} for _ in range(args.rounds)]
        rows += summary("first", {name: Times(tuple(t[name] for t in taken)) for name in names})
    if unrolled is not None and "unrolled" in kinds:
        rows += summary("unrolled", compiling(unrolled, args.rounds))
    if "scanned" in kinds:
        rows += summary("scanned", compiling(Subject(args.layers, True, recipes, args.width), args.rounds))
    name = "tracing" if args.width == WIDTH else f"tracing-{args.width}"
    measure.save(name, {"rows": rows}, render(rows, args.layers), args.out)


if __name__ == "__main__":
    main()
