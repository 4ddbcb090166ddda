"""Trit-planes beside integers: KL to float of a real language model, bits of a layer's weight, and time.

    python -m benchmarks.trits [--data ../shared/data] [--speed]

The language model that comes with the repository, scored as `benchmarks.static` does it; no calibration. ``--speed``
only times the fit: 2**26 weights of a normal distribution, in matrices of 4096 x 4096, and what follows for eight
billion of them (the target on a GPU is 3 minutes).
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import qjax
from benchmarks import measure
from benchmarks.static import HEADS, ROOT, language_model
from qjax.evaluate import divergence
from qjax.formats import TritPlanes

CASES: dict[str, tuple[Any, Any]] = {
    "int4 g128": (qjax.Int(4, group=128), None),
    "trit-planes, 3": (TritPlanes(3), None),
    "trit-planes, 2": (TritPlanes(2), None),
    "trit-planes, 2, from signs": (TritPlanes(2), qjax.PTQTP(init="sign")),
    "trit-planes, 2, tied": (TritPlanes(2, tied=True), None),
    "uint3 g128": (qjax.Int(3, group=128, symmetric=False), None),
    "int3 g128": (qjax.Int(3, group=128), None),
    "trit-planes, 1": (TritPlanes(1), None),
}


def bits(fmt: Any, length: int = 4096) -> float:
    """Bits a weight in a row of so many."""
    spec = jax.ShapeDtypeStruct((8, length), jnp.float32)
    return jax.eval_shape(lambda w: qjax.formats.quantize_array(w, fmt, in_axes=1), spec).bits_per_element


def accuracy(data: Path) -> list[dict[str, Any]]:
    fn, params, batches, blocks = language_model(data)
    rows = []
    for name, (fmt, rounding) in CASES.items():
        keep = [qjax.Rule(match, skip=True, optional=True) for match in HEADS]
        recipe = qjax.Recipe([*keep, qjax.Rule("**", weights=fmt, rounding=rounding)])
        begun = time.perf_counter()
        model = qjax.quantize(fn, params, *batches[0], recipe=recipe)
        jax.block_until_ready(jax.tree.leaves(model.params))
        seconds = time.perf_counter() - begun
        kl = divergence(fn, params, model, model.params, blocks, show=False)
        rows.append({"format": name, "bits": bits(fmt), "kl": kl.kl, "agreement": kl.agreement, "seconds": seconds})
        print(rows[-1], flush=True)
    return rows


@functools.partial(jax.jit, static_argnums=1)
def _rounded(w: jax.Array, fmt: TritPlanes) -> Any:
    return qjax.PTQTP().round(w, fmt)


def speed() -> dict[str, Any]:
    """Seconds for 2**26 weights, compiled."""
    out = {}
    keys = jax.random.split(jax.random.key(0), 4)
    matrices = [jax.random.normal(key, (4096, 4096)) for key in keys]
    for planes in (2, 3):
        jax.block_until_ready(_rounded(matrices[0], TritPlanes(planes)))
        begun = time.perf_counter()
        jax.block_until_ready([_rounded(m, TritPlanes(planes)) for m in matrices])
        seconds = time.perf_counter() - begun
        out[f"{planes} planes"] = {"seconds": seconds, "minutes for 8e9": seconds * 8e9 / 2**26 / 60}
    return out


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    parser.add_argument("--speed", action="store_true", help="time the fit on whatever device there is")
    given = parser.parse_args()
    if given.speed:
        found = speed()
        text = "Fit and rounding of 2**26 normal weights; minutes for 8e9 of them by proportion.\n\n"
        rows = [[name, f"{r['seconds']:.2f}", f"{r['minutes for 8e9']:.1f}"] for name, r in found.items()]
        measure.save("trits-speed", {"measured": found}, text + measure.table(["", "s", "min"], rows), given.out)
        return
    jax.config.update("jax_platforms", "cpu")
    rows = accuracy(given.data)
    text = "KL divergence to float of books-6m in nats, top-1 agreement, bits a weight (rows of 4096).\n\n"
    text += measure.table(
        ["format", "bits", "KL", "agreement"],
        [[r["format"], f"{r['bits']:.3f}", f"{r['kl']:.4f}", f"{r['agreement']:.1%}"] for r in rows],
    )
    measure.save("trits", {"measured": rows}, text, given.out)


if __name__ == "__main__":
    main()
