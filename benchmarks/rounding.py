"""Roundings that look at data beside rounding to nearest: KL to float of a real language model, and their time.

    python -m benchmarks.rounding [--data ../shared/data]

The language model that comes with the repository, calibrated and scored as `benchmarks.static` does it.
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

ROUNDINGS: dict[str, Any] = {
    "RTN": None,
    "RTN, MSE range": qjax.RTN(qjax.MSE()),
    "GPTQ": qjax.GPTQ(),
    "GPTQ, static order": qjax.GPTQ(actorder="static"),
    "GPTQ, static order, MSE range": qjax.GPTQ(actorder="static", observer=qjax.MSE()),
    "AutoRound": qjax.AutoRound(),
}
FORMATS = {
    "int4 g128": qjax.Int(4, group=128),
    "uint4 g128": qjax.Int(4, group=128, symmetric=False),
    "uint3 g128": qjax.Int(3, group=128, symmetric=False),
}


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    fn, params, batches, blocks = language_model(given.data)
    rows = []
    for name, fmt in FORMATS.items():
        for how, rounding in ROUNDINGS.items():
            keep = [qjax.Rule(match, skip=True, optional=True) for match in HEADS]
            recipe = qjax.Recipe([*keep, qjax.Rule("**", weights=fmt, rounding=rounding)])
            begun = time.perf_counter()
            if recipe.needs_batches:
                model = qjax.quantize(fn, params, recipe=recipe, batches=batches)
            else:
                model = qjax.quantize(fn, params, *batches[0], recipe=recipe)
            seconds = time.perf_counter() - begun
            kl = divergence(fn, params, model, model.params, blocks, show=False)
            rows.append({"format": name, "rounding": how, "kl": kl.kl, "agreement": kl.agreement, "seconds": seconds})
    text = "KL divergence to float of books-6m in nats, top-1 agreement, seconds with compilation.\n\n"
    text += measure.table(
        ["format", "rounding", "KL", "agreement", "s"],
        [[r["format"], r["rounding"], f"{r['kl']:.4f}", f"{r['agreement']:.1%}", f"{r['seconds']:.0f}"] for r in rows],
    )
    measure.save("rounding", {"measured": rows}, text, given.out)


if __name__ == "__main__":
    main()
