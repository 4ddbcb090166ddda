"""A mixed assignment of int4 and int8 at six bits beside nvidia-modelopt's auto_quantize: the same weights and texts.

    python -m benchmarks.search [--data ../shared/data] [--modelopt PYTHON] [--bits 6]

The language model that comes with the repository; sensitivities on the calibration rows of `benchmarks.static`, KL to
float on its test text. Bits of qjax count scales as stored (float32: 4.25 for int4 g128), those of modelopt do not (4).
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qjax
from benchmarks import measure
from benchmarks.static import HEADS, ROOT, language_model
from qjax.evaluate import divergence
from qjax.search import assign, sensitivities


def recipe(name: str, fmt: Any, rounding: Any = None) -> qjax.Recipe:
    keep = [qjax.Rule(match, skip=True, optional=True) for match in HEADS]
    return qjax.Recipe([*keep, qjax.Rule("**", weights=fmt, rounding=rounding)], name=name)


NEAREST = [recipe("int4", qjax.Int(4, group=128)), recipe("int8", qjax.Int(8))]
GPTQ = [recipe("int4", qjax.Int(4, group=128), qjax.GPTQ(actorder="static", observer=qjax.MSE())), NEAREST[1]]


def quantized(fn: Any, params: Any, batches: list[Any], how: qjax.Recipe) -> qjax.Model:
    if how.needs_batches:
        return qjax.quantize(fn, params, recipe=how, batches=batches)
    return qjax.quantize(fn, params, *batches[0], recipe=how)


def as_recipe(found: dict[str, int]) -> qjax.Recipe:
    """What modelopt chose for each linear, as a recipe."""
    formats = {4: NEAREST[0].rules[-1].weights, 8: NEAREST[1].rules[-1].weights}
    rules = []
    for name, bits in found.items():
        site = name.removeprefix("model.").replace(".", "/").replace("self_attn", "attn")
        site = (site.removesuffix("_proj") if "/mlp/" in site else site) + "/kernel"
        rules.append(qjax.Rule(site, weights=formats[bits]) if bits in formats else qjax.Rule(site, skip=True))
    return qjax.Recipe([*rules, qjax.Rule("**", skip=True, optional=True)])


def ours(
    fn: Any,
    params: Any,
    batches: list[Any],
    blocks: Any,
    bits: float,
    resume: Path | None,
    peer: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    rows = []

    def add(case: str, how: qjax.Recipe, **more: Any) -> None:
        model = quantized(fn, params, batches, how)
        kl = divergence(fn, params, model, model.params, blocks, show=False)
        stored = model.report.bits(model.report.quantized)
        rows.append({"case": case, "kl": kl.kl, "bits": stored, **more})
        print(rows[-1], flush=True)

    for one in NEAREST:
        add(one.name, one)
    add("int4, GPTQ", GPTQ[0])
    for title, choices, measures in (
        ("to nearest", NEAREST, ("kl", "output", "fisher")),
        ("int4 by GPTQ", GPTQ, ("fisher",)),
    ):
        for by in measures:
            begun = time.perf_counter()
            kept = resume / title.replace(" ", "-") if resume else None
            found = sensitivities(fn, params, batches, choices, by=by, resume=kept)
            best = assign(found, f"{bits} bits")
            more = {} if resume else {"seconds": time.perf_counter() - begun}
            add(f"searched by {by}, {title}", best.recipe(), counts=best.counts, expected=best.loss, **more)
    for row in (peer or {}).get("measured", ()):
        if "found" in row:
            add(f"what modelopt chose by {row['case'].split(', ')[1]}, to nearest", as_recipe(row["found"]))
    return rows


def theirs(python: str, data: Path, bits: float, kept: Path | None) -> dict[str, Any]:
    """What modelopt made of the same weights."""
    if kept is not None and kept.exists():
        return json.loads(kept.read_text())
    folder = ROOT / "examples/assets/books-6m"
    said = json.dumps({"folder": str(folder), "data": str(data), "bits": bits, "threads": 1})
    script = (
        ROOT / "benchmarks/peers/modelopt_search.py"
    )  # -I: transformers would take our folder `kernels` for a package
    run = subprocess.run([python, "-I", str(script), said], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"modelopt failed: {run.stderr[-2000:]}")
    if kept is not None:
        kept.write_text(run.stdout.splitlines()[-1])
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    parser.add_argument("--modelopt", help="the Python of an environment with nvidia-modelopt and transformers")
    parser.add_argument("--bits", type=float, default=6.0)
    parser.add_argument("--resume", type=Path, help="keep measurements here, and go on from there")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    fn, params, batches, blocks = language_model(given.data)
    longest = max(map(len, blocks.blocks))
    rows = [row for row in blocks.blocks if len(row) == longest]  # of one length, so that both sides score the same
    record: dict[str, Any] = {"bits": given.bits, "blocks": len(rows), "peer": None}
    if given.modelopt:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "rows.npz"
            np.savez(data, calibration=np.concatenate([np.asarray(b[0]) for b in batches]), test=np.stack(rows))
            record["peer"] = theirs(given.modelopt, data, given.bits, given.resume and given.resume / "modelopt.json")
    record["measured"] = ours(fn, params, batches, rows, given.bits, given.resume, record["peer"])
    lines = [["qjax, " + r["case"], f"{r['bits']:.2f}", f"{r['kl']:.6f}"] for r in record["measured"]]
    for r in (record["peer"] or {}).get("measured", ()):
        found = f"{r['kl']:.6f}" if "kl" in r else r["failed"]
        lines.append(["modelopt, " + r["case"], f"{r.get('bits', 0):.2f}", found])
    text = (
        f"KL divergence to float of books-6m in nats, {len(rows)} blocks of {longest} tokens; budget {given.bits:g} "
        "bits. Bits of qjax with scales as stored, of modelopt without.\n\n"
    )
    text += measure.table(["case", "bits", "KL"], lines)
    measure.save("search", record, text, given.out)


if __name__ == "__main__":
    main()
