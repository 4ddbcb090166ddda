"""A study of a tiny model; as a program, one that kills itself between two recipes or within one.

python killed_study.py between|within FOLDER RECIPE...
"""

from __future__ import annotations

import os
import signal
import sys

import jax.numpy as jnp
import numpy as np

import qjax
from qjax import studies
from qjax.evaluate import TextTask
from qjax.evaluate.text import given_blocks

VOCAB, WIDTH = 29, 24
RNG = np.random.default_rng(0)
PARAMS = {
    "embed": {"embedding": RNG.normal(size=(VOCAB, WIDTH)).astype(np.float32)},
    "layers": [
        {"up": RNG.normal(size=(WIDTH, 32)).astype(np.float32) / 5, "down": RNG.normal(size=(32, WIDTH)) / 6}
        for _ in range(2)
    ],
    "lm_head": RNG.normal(size=(WIDTH, VOCAB)).astype(np.float32) / 3,
}
PARAMS["layers"] = [{k: np.asarray(v, np.float32) for k, v in layer.items()} for layer in PARAMS["layers"]]
BLOCKS = given_blocks([RNG.integers(0, VOCAB, n) for n in (9, 12, 17, 5, 12, 30, 8, 8, 21, 13, 11, 16)])
BATCHES = [(RNG.integers(0, VOCAB, (4, 16)).astype(np.int32),) for _ in range(3)]
TASK = TextTask("letters", BLOCKS)


def decoder(params, tokens):
    x = params["embed"]["embedding"][tokens]
    x = jnp.cumsum(x, axis=1) / (1 + jnp.arange(x.shape[1]))[:, None]  # causal
    for layer in params["layers"]:
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x @ params["lm_head"]


def run(recipes=("W8A16", "W4A16"), tasks=TASK, **more):
    return qjax.study(decoder, PARAMS, tasks, recipes, name="tiny", **more)


def main(moment: str, out: str, *recipes: str) -> None:
    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "between":
        run(recipes, batches=BATCHES, out=out, progress=lambda done, total, name: done == 2 and kill())
    quantize = studies.run.quantize
    studies.run.quantize = lambda *a, **k: quantize(*a, **k, progress=kill if k["resume"] else None)
    run(recipes, batches=BATCHES, out=out)


if __name__ == "__main__":
    main(*sys.argv[1:])
