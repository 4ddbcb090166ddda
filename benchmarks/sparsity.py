"""2:4 sparsity with int4: KL to float of a real language model, by magnitude and by SparseGPT.

    python -m benchmarks.sparsity [--data ../shared/data]

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
from benchmarks.trits import bits
from qjax.evaluate import divergence
from qjax.formats import Sparse24

CASES: dict[str, tuple[Any, Any]] = {
    "int4 g128, RTN": (qjax.Int(4, group=128), None),
    "int4 g128, GPTQ": (qjax.Int(4, group=128), qjax.GPTQ()),
    "uint3 g128, GPTQ": (qjax.Int(3, group=128, symmetric=False), qjax.GPTQ()),
    "2:4 int4 g128, magnitude": (Sparse24(), None),
    "2:4 int4 g128, SparseGPT": (Sparse24(), qjax.SparseGPT()),
    "2:4 int8 g128, magnitude": (Sparse24(8), None),
    "2:4 int8 g128, SparseGPT": (Sparse24(8), qjax.SparseGPT()),
}


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    fn, params, batches, blocks = language_model(given.data)
    rows = []
    for name, (fmt, rounding) in CASES.items():
        keep = [qjax.Rule(match, skip=True, optional=True) for match in HEADS]
        recipe = qjax.Recipe([*keep, qjax.Rule("**", weights=fmt, rounding=rounding)])
        begun = time.perf_counter()
        if recipe.needs_batches:
            model = qjax.quantize(fn, params, recipe=recipe, batches=batches)
        else:
            model = qjax.quantize(fn, params, *batches[0], recipe=recipe)
        jax.block_until_ready(jax.tree.leaves(model.params))
        seconds = time.perf_counter() - begun
        kl = divergence(fn, params, model, model.params, blocks, show=False)
        rows.append({"format": name, "bits": bits(fmt), "kl": kl.kl, "agreement": kl.agreement, "seconds": seconds})
        print(rows[-1], flush=True)
    text = "KL divergence to float of books-6m in nats, top-1 agreement, bits a weight (rows of 4096).\n\n"
    text += measure.table(
        ["format and rounding", "bits", "KL", "agreement"],
        [[r["format"], f"{r['bits']:.3f}", f"{r['kl']:.4f}", f"{r['agreement']:.1%}"] for r in rows],
    )
    measure.save("sparsity", {"measured": rows}, text, given.out)


if __name__ == "__main__":
    main()
