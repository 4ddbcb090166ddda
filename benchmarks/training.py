"""The step of quantization-aware training beside the float step, and beside Qwix, in one process.

    python -m benchmarks.training [--width 512] [--tokens 1024] [--peers torchao=PYTHON modelopt=PYTHON]

The model is that of `benchmarks.qwix`, a Linen transformer of 4 layers; the step is loss, gradient and Adam, jitted,
for rows of 128 tokens. Weight-only: int4 in groups of 128. W4A8: with int8 activations scaled per token. Qwix trains by
`QtProvider` with the same formats. "learned": the scales of the weights are trained as well (LSQ).

Peers are measured after that, each by a Python that has torch and the tool: the same shape of model in torch, with as
many threads, the tool's step beside its own float step in paired rounds, eager and by torch.compile
(`benchmarks.peers`).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import qwix

import qjax
from benchmarks import measure
from benchmarks.measure import interleaved, milliseconds
from benchmarks.qwix import GROUP, HEAD, LAYERS, VOCAB, float_model

ROW = 128
BOUNDS = {"weight-only": 1.1, "W4A8": 1.3}
"""The largest ratios to the float step that the project allows itself."""


def recipe(act: bool, learned: bool = False) -> qjax.Recipe:
    """int4 weights in groups, with int8 activations or without."""
    weights: Any = qjax.Int(4, group=GROUP)
    inputs = qjax.dynamic(qjax.Int(8, per="token")) if act else None
    return qjax.Recipe([qjax.Rule("**", weights=qjax.learned(weights) if learned else weights, inputs=inputs)])


def steps(width: int, count: int) -> dict[str, Callable[[], Any]]:
    """Name -> one step from the same start."""
    module, variables = float_model(width)
    fn, params = qjax.from_linen(module, variables)
    tokens = jax.random.randint(jax.random.key(2), (count // ROW, ROW), 0, VOCAB)
    adam = optax.adam(1e-4)

    def step(forward: Callable[[Any], jax.Array], start: Any) -> Callable[[], Any]:
        def loss(trained: Any) -> jax.Array:
            logits = forward(trained)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        @jax.jit
        def run(trained: Any, moments: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(trained)
            updates, moments = adam.update(grads, moments)
            return optax.apply_updates(trained, updates), moments, value

        return functools.partial(run, start, adam.init(start))

    cases = {"float": step(lambda p: fn(p, tokens), params)}
    for name, act, learned in (("weight-only", False, False), ("W4A8", True, False), ("learned", False, True)):
        t = qjax.fake_quant(fn, recipe(act, learned))
        state = t.init(params, tokens)
        cases[f"qjax {name}"] = step(lambda both, t=t: t.apply(both[0], both[1], tokens)[0], (params, state))
    for name, act in (("weight-only", False), ("W4A8", True)):
        rule = qwix.QtRule(
            module_path=".*",
            op_names=("dot_general",),
            weight_qtype=jnp.int4,
            act_qtype=jnp.int8 if act else None,
            tile_size=GROUP,
        )
        model = qwix.quantize_model(module, qwix.QtProvider([rule]))
        cases[f"Qwix {name}"] = step(lambda p, model=model: model.apply({"params": p}, tokens), variables["params"])
    return cases


def peer(tool: str, python: str, width: int, count: int, budget: float) -> dict[str, Any]:
    """What `benchmarks.peers.<tool>` measures under that Python: versions and rows; or why there are none."""
    shape = {
        "width": width,
        "tokens": count,
        "row": ROW,
        "layers": LAYERS,
        "head": HEAD,
        "vocab": VOCAB,
        "group": GROUP,
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "budget": budget,
    }
    command = [python, "-m", f"benchmarks.peers.{tool}", json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        last = done.stderr.splitlines()[-1:]
        return {"versions": {}, "measured": [{"case": "", "failed": "".join(last) or f"status {done.returncode}"}]}
    return json.loads(done.stdout.splitlines()[-1])


def ratios(row: dict[str, Any]) -> list[str]:
    """Two cells: the median within a round and the ratio of minima; empty where the float step did not run."""
    return [f"{row[key]:.2f}" if key in row else "" for key in ("over_float", "least_over_float")]


def peer_table(peers: dict[str, Any]) -> str:
    """Ratios to the tool's own float step."""
    rows = []
    for tool, found in peers.items():
        for r in found["measured"]:
            name = f"{tool} {r['case']}"
            if "failed" in r:
                rows.append([f"{name}: {r['failed']}".replace("|", "/"), "", "", "", ""])
            else:
                rows.append([name, milliseconds(r["seconds"]), *ratios(r), milliseconds(r["first"])])
    versions = {name: v for found in peers.values() for name, v in found["versions"].items()}
    return (
        "Peers, in torch; ratios are to the tool's own float step of the same kind.\n\n"
        + measure.table(["case", "ms", "over its float", "minima", "first step ms"], rows)
        + "\n\n"
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + "."
    )


def main() -> None:
    """Run, print, save."""
    options = measure.parser(__doc__)
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--tokens", type=int, default=1024, help="of a step")
    options.add_argument("--budget", type=float, default=60.0, help="seconds")
    options.add_argument("--peers", nargs="*", default=[], metavar="TOOL=PYTHON", help="torchao, modelopt")
    given = options.parse_args()
    cases = steps(given.width, given.tokens)
    for case in cases.values():
        jax.block_until_ready(case())
    times = interleaved(cases, budget=given.budget)
    base = times["float"]
    rows = [
        {
            "case": name,
            "seconds": t.least,
            "over_float": t.over(base),
            "least_over_float": t.least_over(base),
            "bound": BOUNDS.get(name.removeprefix("qjax ")),
        }
        for name, t in times.items()
    ]
    text = f"One training step, width {given.width}, {given.tokens} tokens; "
    text += "ratios are medians within a round, beside them those of minima.\n\n"
    text += measure.table(
        ["case", "ms", "over float", "minima", "at most"],
        [[r["case"], milliseconds(r["seconds"]), *ratios(r), r["bound"] or ""] for r in rows],
    )
    pairs = [pair.split("=", 1) for pair in given.peers]
    peers = {tool: peer(tool, python, given.width, given.tokens, given.budget / 2) for tool, python in pairs}
    if peers:
        text += "\n\n" + peer_table(peers)
    record = {"width": given.width, "tokens": given.tokens, "measured": rows, "peers": peers}
    measure.save("training", record, text, given.out)


if __name__ == "__main__":
    main()
