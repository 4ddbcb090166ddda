"""AutoRound beside Intel auto-round, the tool of its authors: the same weights, calibration rows and scored tokens.

    python -m benchmarks.autoround [--data ../shared/data] [--peer PYTHON] [--iters 200] [--quick]

The language model that comes with the repository, at 4 bits in groups of 128, embeddings and head in float; calibrated
on the 32 rows of 256 tokens of `benchmarks.static`, scored on the whole blocks of its test text. Both sides train
`iters` steps for each block, 8 rows a step. Rounding to nearest and GPTQ of qjax stand beside them. `--platform cuda`
trains both sides on a GPU, in float32 without TF32. `--quick` is 2 steps.
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
import jax.numpy as jnp
import numpy as np

import qjax
from benchmarks import measure
from benchmarks.static import HEADS, ROOT, language_model
from qjax.evaluate import divergence

ROWS = 8
"""Rows of a step, the default of auto-round."""
FORMATS = {
    "int4 g128": qjax.Int(4, group=128),
    "int4 g128 qmax": qjax.Int(4, group=128, scale="qmax"),
    "uint4 g128": qjax.Int(4, group=128, symmetric=False),
}
TRAINED = ("int4 g128", "uint4 g128")
CASES = [{"sym": sym, "amp": amp} for amp in (False, True) for sym in (True, False)]
"""What the peer runs: amp is bfloat16, its default."""


def roundings(iters: int, rows: int) -> dict[str, Any]:
    """Those of qjax; ``rows`` of a batch."""
    return {
        "RTN": None,
        "RTN, MSE range": qjax.RTN(qjax.MSE()),
        "GPTQ": qjax.GPTQ(),
        "GPTQ, static order, MSE range": qjax.GPTQ(actorder="static", observer=qjax.MSE()),
        "AutoRound": qjax.AutoRound(iters=iters, per_step=ROWS // rows),
    }


def ours(fn: Any, params: Any, batches: list[Any], test: list[Any], iters: int) -> list[dict[str, Any]]:
    rows = []
    for name, fmt in FORMATS.items():
        for how, rounding in roundings(iters, len(batches[0][0])).items():
            if how == "AutoRound" and name not in TRAINED:
                continue
            keep = [qjax.Rule(match, skip=True, optional=True) for match in HEADS]
            recipe = qjax.Recipe([*keep, qjax.Rule("**", weights=fmt, rounding=rounding)])
            begun = time.perf_counter()
            if recipe.needs_batches:
                model = qjax.quantize(fn, params, recipe=recipe, batches=batches)
            else:
                model = qjax.quantize(fn, params, *batches[0], recipe=recipe)
            seconds = time.perf_counter() - begun
            found = divergence(fn, params, model, model.params, test, show=False)
            rows.append({"format": name, "rounding": how, "kl": found.kl, "stderr": found.kl_stderr})
            rows[-1] |= {"agreement": found.agreement, "count": found.count, "seconds": seconds}
            print(rows[-1], flush=True)
    return rows


def theirs(python: str, data: Path, iters: int, threads: int, platform: str) -> dict[str, Any]:
    """What auto-round makes of the same weights."""
    said = {"folder": str(ROOT / "examples/assets/books-6m"), "data": str(data), "threads": threads}
    said |= {"iters": iters, "rows": ROWS, "cases": CASES, "device": platform}
    script = ROOT / "benchmarks/peers/autoround.py"
    # -I: transformers would take our folder `kernels` for a package
    run = subprocess.run([python, "-I", str(script), json.dumps(said)], stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise SystemExit("auto-round failed, see above")
    return json.loads(run.stdout.splitlines()[-1])


def table(record: dict[str, Any]) -> str:
    """The rows of both sides, by format."""
    lines = []
    for r in record["measured"]:
        lines.append([r["format"], f"qjax, {r['rounding']}", r])
    for r in (record["peer"] or {}).get("measured", ()):
        name = "int4 g128" if r["sym"] else "uint4 g128"
        lines.append([name, f"auto-round, {'bfloat16 (its default)' if r['amp'] else 'float32'}", r])
    lines.sort(key=lambda line: list(FORMATS).index(line[0]))
    cells = [
        [name, tool, r["failed"], "", ""]
        if "failed" in r
        else [name, tool, f"{r['kl']:.5f}", f"{r['agreement']:.1%}", f"{r['seconds']:.0f}"]
        for name, tool, r in lines
    ]
    return measure.table(["format", "tool", "KL", "agreement", "s"], cells)


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    parser.add_argument("--peer", help="the Python of an environment with auto-round, torch and transformers")
    parser.add_argument(
        "--peer-result", type=Path, help="what the peer printed in an earlier run, in place of a new one"
    )
    parser.add_argument("--platform", choices=("cpu", "cuda"), default="cpu", help="where both sides train")
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help="rows of a calibration batch of qjax; a step takes 8 rows")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the peer")
    parser.add_argument("--quick", action="store_true", help="2 steps: does it run?")
    given = parser.parse_args()
    if ROWS % given.batch:
        raise SystemExit(f"--batch {given.batch}: must divide {ROWS}")
    iters = 2 if given.quick else given.iters
    jax.config.update("jax_platforms", "cuda,cpu" if given.platform == "cuda" else "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    fn, params, batches, blocks = language_model(given.data)
    rows = np.concatenate([np.asarray(batch[0]) for batch in batches])
    batches = [(jnp.asarray(part),) for part in rows.reshape(-1, given.batch, rows.shape[1])]
    longest = max(map(len, blocks.blocks))
    test = [row for row in blocks.blocks if len(row) == longest]  # of one length, so that both sides score the same
    record: dict[str, Any] = {"iters": iters, "blocks": len(test), "batch": given.batch, "peer": None}
    if given.peer_result:
        record["peer"] = json.loads(given.peer_result.read_text().splitlines()[-1])
    elif given.peer:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "rows.npz"
            np.savez(data, calibration=rows, test=np.stack(test))
            record["peer"] = theirs(given.peer, data, iters, given.threads, given.platform)
    record["measured"] = ours(fn, params, batches, test, iters)
    counts = {r["count"] for r in record["measured"]} | ({record["peer"]["count"]} if record["peer"] else set())
    if len(counts) != 1:
        raise SystemExit(f"the sides scored different numbers of tokens: {counts}")
    text = (
        f"KL divergence to float of books-6m in nats and top-1 agreement over {counts.pop()} predictions, and seconds "
        f"with compilation. {iters} steps for each block, {ROWS} rows a step.\n\n"
    ) + table(record)
    measure.save("autoround", record, text, given.out)


if __name__ == "__main__":
    main()
