"""Whole models on a CPU: tokens a second of a Llama in floats, quantized and by llama.cpp; images a second of a ViT.

    python -m benchmarks.cpu_models                                  # on an idle machine; some ten minutes on two cores
    python -m benchmarks.cpu_models --peers PYTHON --models 1b       # beside llama.cpp, in turns
    python -m benchmarks.cpu_models --quick --peers PYTHON           # a small model, to try the command

PYTHON has ``llama-cpp-python`` and ``gguf`` in an environment of its own. A step is one of greedy decoding of one
sequence; a prompt is read into an empty cache, with the logits of all its tokens here and of the last one in llama.cpp.
All models of a size are in memory and take turns, a round of each. Ratios are medians within rounds.

"1b" has TinyLlama's shape and random weights, "books-6m" is the model that comes with the repository, "vit" ViT-Ti of
``shared/data``. Heads and llama.cpp's embeddings have 8 bits in all quantized models. llama.cpp's weights are in the
memory that it chooses by itself (``--no-extra``: in the order of the file). Here q, k and v are one matrix, gate and up
another (`qjax.models.fuse`), in floats too: fewer calls for a step; ``--apart`` leaves them as they are loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from benchmarks import measure
from benchmarks.gpu_parts.model import compiled, greedy, parameters
from benchmarks.peers.served import Peer
from benchmarks.static import ROOT
from qjax.formats import Int
from qjax.kernels import cpu
from qjax.models import LanguageModel, LlamaConfig

TOKEN = qjax.dynamic(Int(8, per="token"))
SIZES = {
    "1b": LlamaConfig(32000, 2048, 5632, 22, 32, 4, 64, 2048),
    "small": LlamaConfig(4096, 1024, 2816, 4, 16, 4, 64, 2048),
}
"""TinyLlama-1.1B; one to try the command with."""

SCHEMES: dict[str, tuple[Int, Any] | None] = {
    "float32": None,
    "bfloat16": None,
    "W8A16": (Int(8), None),
    "W4A16": (Int(4, group=128), None),
    "W8A8": (Int(8), TOKEN),
    "W4A8": (Int(4, group=128), TOKEN),
    "W4A8, int8 cache": (Int(4, group=128), TOKEN),
}
KINDS = ("Q4_0", "Q8_0")
STEPS = 8
"""Steps of one call."""


def recipe(scheme: tuple[Int, Any]) -> qjax.Recipe:
    """Layers in the format, the head in int8."""
    weights, inputs = scheme
    return qjax.Recipe(
        [
            qjax.Rule("layers/**", weights=weights, inputs=inputs),
            qjax.Rule("lm_head/**", weights=Int(8), inputs=inputs, optional=True),
        ]
    )


@dataclasses.dataclass
class Llama:
    """One model: a call goes on with the sequence of the last one, or reads a prompt."""

    fn: LanguageModel
    decode: Any
    prefill: Any
    params: Any
    cache: Any
    prompt: jax.Array

    @staticmethod
    def made(fn: LanguageModel, params: Any, name: str, context: int, prompt: int) -> Llama:
        """Float parameters, or none for random ones, quantized by a scheme's name."""
        scheme = SCHEMES[name]
        dtype = jnp.bfloat16 if name == "bfloat16" else jnp.float32
        if scheme is None:
            chosen = parameters(fn, lazily=False, dtype=dtype) if params is None else params
            chosen = jax.tree.map(lambda a: jnp.asarray(a, dtype), chosen)
            decode, prefill = fn.decode_step, fn.prefill
        else:
            drawn = parameters(fn, lazily=True, dtype=dtype) if params is None else params
            model = qjax.quantize(fn, drawn, jnp.zeros((1, 8), jnp.int32), recipe=recipe(scheme))
            chosen, decode, prefill = model.params, model.bind(fn.decode_step), model.bind(fn.prefill)
        cache = fn.init_cache(1, context, dtype)
        if name.endswith("int8 cache"):
            cache = qjax.quantize_cache(cache, Int(8, per="token"))
        tokens = jnp.arange(prompt, dtype=jnp.int32)[None] % fn.config.vocab_size
        one, _ = compiled(greedy(decode), chosen, jnp.zeros(1, jnp.int32), cache, donate=(1, 2))
        whole, _ = compiled(prefill, chosen, tokens, cache)
        return Llama(fn, one, whole, chosen, cache, tokens)

    def decoding(self, context: int) -> Callable[[], Any]:
        """Some steps behind those of the last call."""
        begin = jax.tree.map(functools.partial(jnp.array, copy=True), (jnp.zeros(1, jnp.int32), self.cache))
        state, read = [begin], itertools.count(1)

        def run() -> Any:
            tokens, cache = state[0]
            if next(read) * STEPS >= context:
                cache = {**cache, "length": jnp.int32(0)}
            for _ in range(STEPS):
                tokens, cache = self.decode(tokens, cache)
            state[0] = tokens, cache
            return tokens

        return run

    @property
    def nbytes(self) -> int:
        """What a step reads of the parameters."""
        return sum(a.nbytes for a in jax.tree.leaves({k: v for k, v in self.params.items() if k != "embed"}))


def llama(name: str, given: Any, peer: Peer | None) -> dict[str, Any]:
    """Measure one language model."""
    params: Any = None
    if name in SIZES:
        fn = LanguageModel(SIZES[name], fused=not given.apart)
    else:
        fn, params, _ = qjax.models.load(ROOT / "examples" / "assets" / name)
        if not given.apart:
            fn, params = dataclasses.replace(fn, fused=True), qjax.models.fuse(params)
    cases: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, int] = {}
    agree: dict[str, float] = {}
    want = None
    for scheme in given.schemes:
        model = Llama.made(fn, params, scheme, given.context, given.prompt)
        logits = np.asarray(model.prefill(model.prompt, model.cache)[0], np.float64)
        want = logits if want is None else want
        agree[scheme] = float(np.linalg.norm(logits - want) / np.linalg.norm(want))
        cases[f"{scheme} decode"] = model.decoding(given.context)
        cases[f"{scheme} prompt"] = functools.partial(model.prefill, model.prompt, model.cache)
        sizes[scheme] = model.nbytes
        print(f"{name} {scheme}: {sizes[scheme] / 1e6:.0f} MB, logits differ by {agree[scheme]:.3f}", flush=True)
    told: list[str] = []
    failed: dict[str, str] = {}
    if peer is not None and name in SIZES:
        config = {f: getattr(fn.config, f) for f in CONFIG}
        asked = {"name": name, "config": config, "kinds": KINDS, "context": given.context, "prompt": given.prompt}
        found = peer.prepare(
            {**asked, "steps": STEPS, "extra": not given.no_extra}, {"llama.cpp's own memory": {"extra": False}}
        )
        told, failed = list(found["errors"]), found["failed"]
        cases |= {case: functools.partial(peer.run, case) for case in told}
    rows = []
    for what, count in (("decode", STEPS), ("prompt", given.prompt)):
        some = {case: run for case, run in cases.items() if case.endswith(what)}
        times = measure.interleaved(some, budget=given.budget, least_rounds=5, told=told, pause=0.02)
        for case, one in times.items():
            scheme = case.removesuffix(f" {what}")
            row = {"model": name, "what": what, "scheme": scheme, "tokens_per_second": count / one.median}
            row["over float32"] = times[f"{given.schemes[0]} {what}"].over(one)
            row["over Q4_0"] = times[case].over(times[q]) if (q := f"llama.cpp Q4_0 {what}") in times else None
            row |= {"bytes": sizes.get(scheme), "difference": agree.get(scheme)}
            rows.append(row)
            print(row, flush=True)
    return {"rows": rows, "failed": failed}


CONFIG = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip


def vit(given: Any) -> dict[str, Any]:
    """Measure ViT-Ti: images a second, some at a time."""
    fn, params, _ = qjax.models.load(given.data / "models" / "vit-tiny-patch16-224")
    rows = []
    for batch in (1, 8):
        images = jnp.asarray(np.random.default_rng(0).standard_normal((batch, 224, 224, 3)), jnp.float32)
        cases: dict[str, Callable[[], Any]] = {"float32": functools.partial(jax.jit(fn), params, images)}
        half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
        cases["bfloat16"] = functools.partial(jax.jit(fn), half, images.astype(jnp.bfloat16))
        for name in ("W8A8", "W8A16"):
            model = qjax.quantize(fn, params, images, recipe=name)
            cases[name] = functools.partial(jax.jit(model), model.params, images)
        for run in cases.values():
            jax.block_until_ready(run())
        times = measure.interleaved(cases, budget=given.budget, least_rounds=5)
        for name, one in times.items():
            row = {
                "model": "ViT-Ti",
                "what": f"{batch} images",
                "scheme": name,
                "images_per_second": batch / one.median,
            }
            rows.append({**row, "over float32": times["float32"].over(one)})
            print(rows[-1], flush=True)
    return {"rows": rows, "failed": {}}


def written(record: dict[str, Any]) -> str:
    """The tables as text."""
    form = "q, k and v in one matrix, gate and up too" if record["fused"] else "projections apart"
    text = [f"Medians; ratios within rounds, above 1: faster. {cpu.status()}. Here: {form}."]
    for what, title in (("decode", "Decoding, one sequence"), ("prompt", f"Reading {record['prompt']} tokens")):
        rows = [r for r in record["rows"] if r["what"] == what]
        if rows:
            lines = [
                [
                    f"{r['model']} {r['scheme']}",
                    f"{r['tokens_per_second']:.1f}",
                    f"{r['over float32']:.2f}",
                    "" if r["over Q4_0"] is None else f"{1 / r['over Q4_0']:.2f}",
                    "" if r["bytes"] is None else f"{r['bytes'] / 1e6:.0f}",
                ]
                for r in rows
            ]
            head = ["model", "tokens/s", "x float32", "x llama.cpp Q4_0", "MB read a step"]
            text += ["", f"{title}:", "", measure.table(head, lines)]
    rows = [r for r in record["rows"] if "images_per_second" in r]
    if rows:
        lines = [
            [f"{r['model']} {r['scheme']}, {r['what']}", f"{r['images_per_second']:.1f}", f"{r['over float32']:.2f}"]
            for r in rows
        ]
        text += ["", measure.table(["model", "images/s", "x float32"], lines)]
    if record["failed"]:
        text += ["", "Not measured: " + "; ".join(f"{n} ({why})" for n, why in record["failed"].items()) + "."]
    return "\n".join(text)


def main() -> None:
    """Run, print, save."""
    options = measure.parser(__doc__)
    options.add_argument("--models", nargs="+", default=["books-6m", "vit", "1b"], help="books-6m, vit, 1b, small")
    options.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES), help="the first is 1")
    options.add_argument("--peers", type=Path, metavar="PYTHON", help="an interpreter that has llama.cpp and gguf")
    options.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    options.add_argument("--context", type=int, default=320, help="positions of the cache")
    options.add_argument("--prompt", type=int, default=256)
    options.add_argument("--budget", type=float, default=60, help="seconds for each table of a model")
    options.add_argument("--apart", action="store_true", help="q, k and v, and gate and up, as matrices of their own")
    options.add_argument("--no-extra", action="store_true", help="llama.cpp: weights in the order of the file")
    options.add_argument("--quick", action="store_true", help="a small model, for trying the command")
    given = options.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if given.quick:
        given.models, given.budget = ["small"], 2.0
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    record: dict[str, Any] = {"prompt": given.prompt, "context": given.context, "fused": not given.apart}
    record |= {"rows": [], "failed": {}}
    with tempfile.TemporaryDirectory() as folder:
        peer = None
        if given.peers is not None:
            peer = Peer(str(given.peers), "benchmarks.peers.llama", str(threads), folder)
            record["versions"] = peer.ask("versions")["versions"]
        for name in given.models:
            found = vit(given) if name == "vit" else llama(name, given, peer)
            record["rows"] += found["rows"]
            record["failed"] |= found["failed"]
    text = written(record)
    if "versions" in record:
        versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        text += f"\n\n{threads} threads; {versions}" + (
            ", weights in the order of the file." if given.no_extra else "."
        )
    measure.save("cpu_models-quick" if given.quick else "cpu_models", record, text, given.out)


if __name__ == "__main__":
    main()
