"""A calibration, or a quantization block by block, that says when it begins and writes its result; to be killed.

python killed_job.py calibrate|blocks FOLDER RESULT.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import qjax
from qjax.checkpoint import folded

D, LAYERS = 24, 8


def fn(p, x):
    def layer(h, w):
        return h + jnp.tanh(h @ w["up"]) @ w["down"], None

    return lax.scan(layer, x, p["layers"])[0] @ p["head"]


def main(kind: str, folder: str, result: str) -> None:
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)  # noqa: E731
    params = {"layers": {"up": make(LAYERS, D, 2 * D), "down": make(LAYERS, 2 * D, D)}, "head": make(D, 5)}
    batches = [jnp.asarray(rng.standard_normal((16, D)), jnp.float32) for _ in range(12)]
    print("begun", flush=True)
    if kind == "calibrate":
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


if __name__ == "__main__":
    main(*sys.argv[1:])
