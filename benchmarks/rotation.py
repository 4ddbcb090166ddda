"""Rotations on a real language model: KL to float with and without, of weights alone and of 4-bit activations.

    python -m benchmarks.rotation [--data ../shared/data] [--only W4A4]

The language model that comes with the repository, calibrated and scored as `benchmarks.static` does it. Its embedding
is its head, so the rotation of the residual stream cannot be folded: "rotated" turns the activations of every product
as they pass (`qjax.Rotated`); "heads folded" folds what can be, the values of attention heads (`qjax.passes.Rotate`),
and rotates the rest as it passes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import jax

import qjax
from benchmarks import measure
from benchmarks.static import HEADS, ROOT, language_model
from qjax.evaluate import divergence
from qjax.passes import Rotate, Rotated

TOKEN4, TOKEN8 = qjax.Int(4, per="token"), qjax.Int(8, per="token")
GPTQ = qjax.GPTQ(actorder="static", observer=qjax.MSE())

FORMATS: dict[str, tuple[Any, Any]] = {
    "W4A16, int4 g128": (qjax.Int(4, group=128), None),
    "W3A16, uint3 g128": (qjax.Int(3, group=128, symmetric=False), None),
    "W2A16, uint2 g64": (qjax.Int(2, group=64, symmetric=False), None),
    "W4A8, int4 per channel": (qjax.Int(4), TOKEN8),
    "W4A4, int4 g128, tokens": (qjax.Int(4, group=128), TOKEN4),
}
ROUNDINGS: dict[str, Any] = {
    "RTN": None,
    "RTN, rotated": Rotated(),
    "GPTQ": GPTQ,
    "GPTQ, rotated": Rotated(GPTQ),
    "GPTQ, heads folded": (Rotated(GPTQ), GPTQ),
}


def recipe(weights: Any, inputs: Any, rounding: Any) -> qjax.Recipe:
    """Heads and embeddings in float; a pair of roundings is for what is rotated as it passes and for what is folded."""
    keep = [qjax.Rule(match, skip=True, optional=True) for match in HEADS]
    how: dict[str, Any] = dict(weights=weights, inputs=inputs, clamp_group=True)
    if not isinstance(rounding, tuple):
        return qjax.Recipe([*keep, qjax.Rule("**", rounding=rounding, **how)])
    online, plain = rounding
    folded = qjax.Rule("**/o_proj/**", rounding=plain, **how)
    return qjax.Recipe([*keep, folded, qjax.Rule("**", rounding=online, **how)], prepare=[Rotate(match="**/o_proj/**")])


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    parser.add_argument("--only", default="", help="rows whose format holds this")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    fn, params, batches, blocks = language_model(given.data)
    rows = []
    for name, (weights, inputs) in FORMATS.items():
        if given.only not in name:
            continue
        for how, rounding in ROUNDINGS.items():
            made = recipe(weights, inputs, rounding)
            begun = time.perf_counter()
            if made.needs_batches:
                model = qjax.quantize(fn, params, recipe=made, batches=batches)
            else:
                model = qjax.quantize(fn, params, *batches[0], recipe=made)
            seconds = time.perf_counter() - begun
            kl = divergence(fn, params, model, model.params, blocks, show=False)
            rows.append({"format": name, "rounding": how, "kl": kl.kl, "agreement": kl.agreement, "seconds": seconds})
            print(f"{name}: {how}: KL {kl.kl:.4f}, top-1 {kl.agreement:.1%}, {seconds:.0f} s", flush=True)
    text = "KL divergence to float of books-6m in nats, top-1 agreement, seconds with compilation.\n\n"
    text += measure.table(
        ["format", "rounding", "KL", "agreement", "s"],
        [[r["format"], r["rounding"], f"{r['kl']:.4f}", f"{r['agreement']:.1%}", f"{r['seconds']:.0f}"] for r in rows],
    )
    measure.save("rotation", {"measured": rows}, text, given.out)


if __name__ == "__main__":
    main()
