"""2 to 3 bits a weight: KL to float of a real language model, by method and storage.

    python -m benchmarks.two_bit [--data ../shared/data]

The language model that comes with the repository, calibrated and scored as `benchmarks.static` does it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qjax
from benchmarks import measure
from benchmarks.static import HEADS, ROOT, language_model
from qjax.evaluate import divergence
from qjax.formats import MixedBits

SPARSE = 0.005
ROWS: list[tuple[str, Any, Any]] = [
    ("int2 g64, nearest", qjax.Int(2, group=64), None),
    ("uint2 g64, nearest", qjax.Int(2, group=64, symmetric=False), None),
    ("uint2 g64, GPTQ", qjax.Int(2, group=64, symmetric=False), qjax.GPTQ()),
    ("strips of 2 bits", MixedBits(0, select="global"), qjax.TwoBit()),
    ("1/4 of 4 bits, data-free", MixedBits(), None),
    ("1/4 of 4 bits, nearest", MixedBits(), qjax.TwoBit(feedback=False)),
    ("1/4 of 4 bits, by range", MixedBits(), qjax.TwoBit(sensitivity="range")),
    ("1/4 of 4 bits, by inverse", MixedBits(), qjax.TwoBit(sensitivity="inverse")),
    ("1/4 of 4 bits", MixedBits(), qjax.TwoBit()),
    ("1/4 of 4 bits, anywhere", MixedBits(select="global"), qjax.TwoBit()),
    ("1/8 of 4 bits, 0.5 % FP16", MixedBits(1 / 8, select="global", wide_group=16, outliers=SPARSE), qjax.TwoBit()),
    ("1/4 of 4 bits, 0.25 % FP16", MixedBits(outliers=SPARSE / 2), qjax.TwoBit()),
    ("1/4 of 4 bits, 0.5 % FP16", MixedBits(outliers=SPARSE), qjax.TwoBit()),
    ("int3 g128, nearest", qjax.Int(3, group=128), None),
    ("uint3 g128, nearest", qjax.Int(3, group=128, symmetric=False), None),
    ("uint3 g128, GPTQ", qjax.Int(3, group=128, symmetric=False), qjax.GPTQ()),
]


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    fn, params, batches, blocks = language_model(given.data)
    rows = []
    for name, fmt, rounding in ROWS:
        keep = [qjax.Rule(match, skip=True, optional=True) for match in HEADS]
        recipe = qjax.Recipe([*keep, qjax.Rule("**", weights=fmt, rounding=rounding)])
        if recipe.needs_batches:
            model = qjax.quantize(fn, params, recipe=recipe, batches=batches)
        else:
            model = qjax.quantize(fn, params, *batches[0], recipe=recipe)
        packed = [x for x in jax.tree.leaves(model.params, is_leaf=qjax.formats.is_quantized)]
        packed = [x for x in packed if qjax.formats.is_quantized(x)]
        bits = 8 * sum(x.nbytes for x in packed) / sum(x.size for x in packed)
        formula = fmt.average_bits() if isinstance(fmt, MixedBits) else np.nan
        kl = divergence(fn, params, model, model.params, blocks, show=False)
        rows.append({"name": name, "bits": bits, "formula": formula, "kl": kl.kl, "agreement": kl.agreement})
        print(f"{name:30} {bits:.3f} bits  KL {kl.kl:.4f}  {kl.agreement:.1%}", flush=True)
    text = "Bits as stored per quantized weight; those of the formula for large matrices; KL divergence to float of "
    text += "books-6m in nats; top-1 agreement.\n\n"
    text += measure.table(
        ["weights", "bits", "formula", "KL", "agreement"],
        [
            [
                r["name"],
                f"{r['bits']:.3f}",
                "" if np.isnan(r["formula"]) else f"{r['formula']:.3f}",
                f"{r['kl']:.4f}",
                f"{r['agreement']:.1%}",
            ]
            for r in rows
        ],
    )
    for r in rows:
        r["formula"] = None if np.isnan(r["formula"]) else r["formula"]
    measure.save("two_bit", {"measured": rows}, text, given.out)


if __name__ == "__main__":
    main()
