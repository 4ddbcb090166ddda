"""A job that says when it begins, keeps what it has done in a folder and writes its result; to be killed.

python killed_job.py calibrate|blocks|search|collect|supernet FOLDER RESULT.npz
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import qjax
from qjax.checkpoint import folded

D, LAYERS = 24, 8
STEPS, SAVED = 60, 4
"""Of a training, and of these between checkpoints."""


def fn(p, x):
    def layer(h, w):
        return h + jnp.tanh(h @ w["up"]) @ w["down"], None

    return lax.scan(layer, x, p["layers"])[0] @ p["head"]


def searched(folder: str) -> list[np.ndarray]:
    """NSGA-II over whole assignments of a sum that takes its time, begun from the exact one."""
    from qjax.search import NSGA2, refine
    from qjax.search.sensitivity import Part, Row, Sensitivities

    rng = np.random.default_rng(0)
    loss = rng.lognormal(0, 1, (12, 1)) * np.array([1.0, 0.2, 0.0])
    names = ("W2", "W4", "float")
    rows = tuple(
        Row(
            f"w{n}",
            (f"w{n}",),
            ("dot",),
            64,
            (Part(8, 8, 1.0),),
            {"W2": 16, "W4": 32, "float": 256},
            {"kl": dict(zip(names, loss[n].tolist(), strict=True))},
            {name: (None, None) for name in names},
        )
        for n in range(12)
    )
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4))]).to_dict()
    sensitivities = Sensitivities(rows, {"W2": recipe, "W4": recipe}, 0, 1, ("kl",))

    def whole(genomes: np.ndarray) -> np.ndarray:
        time.sleep(0.03)
        return loss[np.arange(12), genomes].sum(axis=1) * (1 + 0.1 * (genomes[:, :-1] == genomes[:, 1:]).mean(axis=1))

    best = refine(sensitivities, whole, "4 bits", NSGA2(16, 10), resume=folder)
    points = [(p.cost, p.loss) for curve in best.curves.values() for p in curve]
    return [
        np.array([best.whole, best.cost]),
        np.array(points),
        np.array([list(names).index(c) for c in best.choices.values()]),
    ]


def collected(folder: str) -> list[np.ndarray]:
    """Subnets and their scores."""
    from qjax.search import collect_subnets
    from qjax.supernet import Space

    def score(choices: np.ndarray) -> np.ndarray:
        time.sleep(0.1)
        return 1 - np.exp2(-choices[..., :2].astype(float)).mean(axis=(1, 2))

    found = collect_subnets(score, Space().domain([f"w{n}" for n in range(8)]), [5] * 8, [3] * 8, 160, resume=folder)
    return [found.choices, found.forms, found.scores]


def trained(folder: str) -> list[np.ndarray]:
    """A supernet after training, with a line in FOLDER.steps for each step that is done."""
    from qjax.supernet import Schedule, Space, train

    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal((D, n)).astype(np.float32) / 5 for name, n in (("a", D), ("b", 3))}
    params["norm"] = np.zeros(D, np.float32)

    def network(p, x):
        moved = {**p, "norm": 0.9 * p["norm"] + 0.1 * lax.stop_gradient(x).mean(0)}
        return jnp.tanh((x - p["norm"]) @ p["a"]) @ p["b"], moved

    def batches(step: int):
        time.sleep(0.04)
        x = np.random.default_rng(step).standard_normal((16, D)).astype(np.float32)
        return (x,), (x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 0.5)

    def told(done: int, *_) -> None:
        with Path(f"{folder}.steps").open("a") as file:
            print(done, file=file, flush=True)

    t = qjax.elastic(network, Space((2, 8), (8,), (True,), (True,), (True,), ends=None))
    state = t.init(params, batches(0)[0][0])
    done = train(t, params, state, batches, Schedule(STEPS), folder=folder, save_every=SAVED, progress=told)
    return [*jax.tree.leaves((done.params, done.state)), *(done.metrics[name] for name in sorted(done.metrics))]


def main(kind: str, folder: str, result: str) -> None:
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)  # noqa: E731
    params = {"layers": {"up": make(LAYERS, D, 2 * D), "down": make(LAYERS, 2 * D, D)}, "head": make(D, 5)}
    batches = [jnp.asarray(rng.standard_normal((16, D)), jnp.float32) for _ in range(12)]
    print("begun", flush=True)
    if kind in OTHERS:
        found = OTHERS[kind](folder)
    elif kind == "calibrate":
        folded.SHARE = 1e9  # keep the state after every batch
        inputs = qjax.static(qjax.Int(8, per="tensor"), qjax.Percentile(99.9))
        recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=inputs)])
        found = qjax.calibrate(fn, params, batches, recipe=recipe, resume=folder)
    else:
        recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=8), rounding=qjax.GPTQ())])
        found = qjax.quantize(fn, params, recipe=recipe, batches=batches, resume=folder).params
    leaves = {str(n): np.asarray(a) for n, a in enumerate(jax.tree.leaves(found))}
    fresh = Path(result).with_suffix(".tmp.npz")
    np.savez(fresh, **leaves)
    fresh.replace(result)


OTHERS = {"search": searched, "collect": collected, "supernet": trained}

if __name__ == "__main__":
    main(*sys.argv[1:])
