"""4-bit weights with 8-bit activations: DGQ and QoQ beside rounding to nearest, on a real language model.

    python -m benchmarks.w4a8 [--data ../shared/data]

The language model that comes with the repository, calibrated and scored as `benchmarks.static` does: KL divergence to
float, top-1 agreement and perplexity of the same text. ``--only DGQ`` runs the rows whose name holds that.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import jax

import qjax
from benchmarks import measure
from benchmarks.static import HEADS, ROOT, language_model
from qjax.evaluate import divergence
from qjax.formats import DualGrained, Progressive
from qjax.passes import DGQSmooth, Reorder, SmoothOutputs

TOKEN = qjax.Int(8, per="token")
TENSOR = qjax.Int(8, per="tensor", scale="qmax")
CHANNEL, GROUPS = qjax.Int(4, symmetric=False), qjax.Int(4, group=128, symmetric=False)

METHODS: dict[str, tuple[Any, ...]] = {  # weights, rounding, inputs, and what is done before
    "W4A16 RTN, int4 g128": (qjax.Int(4, group=128), None, None),
    "W4A16 RTN, uint4 g128": (GROUPS, None, None),
    "W4A8 RTN, int4 per channel": (qjax.Int(4), None, TOKEN),
    "W4A8 RTN, uint4 per channel": (CHANNEL, None, TOKEN),
    "W4A8 RTN, int4 g128": (qjax.Int(4, group=128), None, TOKEN),
    "W4A8 RTN, uint4 g128": (GROUPS, None, TOKEN),
    "W4A8 RTN, dual_grained g128": (DualGrained(), None, TOKEN),
    "DGQ, per token": (DualGrained(), qjax.DGQ(), TOKEN),
    "DGQ, smoothed, per token": (DualGrained(), qjax.DGQ(), TOKEN, DGQSmooth()),
    "DGQ, static per tensor": (DualGrained(), qjax.DGQ(), qjax.static(TENSOR)),
    "DGQ, static per tensor, MaxMin": (DualGrained(), qjax.DGQ(), qjax.static(TENSOR, qjax.MaxMin())),
    "DGQ, smoothed, static per tensor": (DualGrained(), qjax.DGQ(), qjax.static(TENSOR), DGQSmooth()),
    "DGQ, smoothed, static per tensor, MaxMin": (
        DualGrained(),
        qjax.DGQ(),
        qjax.static(TENSOR, qjax.MaxMin()),
        DGQSmooth(),
    ),
    "DGQ, float activations": (DualGrained(), qjax.DGQ(), None),
    "W4A8 RTN, progressive g128": (Progressive(), None, TOKEN),
    "QoQ g128, rounding to nearest, clipped": (Progressive(), qjax.QoQ(clip=True, error_feedback=False), TOKEN),
    "QoQ g128": (Progressive(), qjax.QoQ(), TOKEN),
    "QoQ g128, clipped": (Progressive(), qjax.QoQ(clip=True), TOKEN),
    "QoQ g128, outputs smoothed, reordered": (Progressive(), qjax.QoQ(), TOKEN, SmoothOutputs(0.3), Reorder()),
    "QoQ per channel, rounding to nearest": (CHANNEL, qjax.QoQ(error_feedback=False), TOKEN),
    "QoQ per channel": (CHANNEL, qjax.QoQ(), TOKEN),
    "GPTQ, uint4 g128": (GROUPS, qjax.GPTQ(), TOKEN),
}


def recipe(weights: Any, rounding: Any, inputs: Any, *prepare: Any) -> qjax.Recipe:
    """Heads and embeddings in float, everything else so; a group longer than an axis is one group."""
    keep = [qjax.Rule(match, skip=True, optional=True) for match in HEADS]
    rule = qjax.Rule("**", weights=weights, rounding=rounding, inputs=inputs, clamp_group=True)
    return qjax.Recipe([*keep, rule], prepare=list(prepare))


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    parser.add_argument("--only", default="", help="rows whose name holds this")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    fn, params, batches, blocks = language_model(given.data)
    rows: list[dict[str, Any]] = []
    for name, how in METHODS.items():
        if given.only not in name:
            continue
        made = recipe(*how)
        begun = time.perf_counter()
        if made.needs_batches:
            model = qjax.quantize(fn, params, recipe=made, batches=batches)
        else:
            model = qjax.quantize(fn, params, *batches[0], recipe=made)
        seconds = time.perf_counter() - begun
        d = divergence(fn, params, model, model.params, blocks, show=False)
        if not rows:
            rows.append({"method": "float", "kl": 0.0, "agreement": 1.0, "perplexity": math.exp(d.nll_a), "seconds": 0})
        rows.append(
            {"method": name, "kl": d.kl, "agreement": d.agreement, "perplexity": math.exp(d.nll_b), "seconds": seconds}
        )
        print(rows[-1], flush=True)
    text = "books-6m, embeddings and head in float: KL divergence to float in nats, top-1 agreement, perplexity.\n\n"
    text += measure.table(
        ["weights and activations", "KL", "agreement", "perplexity"],
        [[r["method"], f"{r['kl']:.4f}", f"{r['agreement']:.1%}", f"{r['perplexity']:.3f}"] for r in rows],
    )
    if given.only:
        print(text)
    else:
        measure.save("w4a8", {"measured": rows}, text, given.out)


if __name__ == "__main__":
    main()
