"""Roundings of one matrix beside those of other tools: held-out error and CPU seconds, on one pinned thread.

    python -m benchmarks.roundings_peers [--quick] [--core N] [--only GPTQ ...]
        [--peers llmcompressor=PYTHON hqq=PYTHON modelopt_ptq=PYTHON qwix_ptq=PYTHON]

int4 in groups of 128 on the three layers of `benchmarks.matrices`. Every tool runs in a process of its own, one after
the other, each with one thread on one core; seconds are CPU time, the least of 5 calls (or fewer where a call takes
long). GPTQ is given the second moment by both sides; AWQ's seconds contain what it gathers of the activations. Errors
are |X (W - Q)ᵀ| / |X Wᵀ| on rows that no tool has seen.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.matrices import SHAPES, layer

SAME = 1.0002  # the same search in another order of sums
ROOT = Path(__file__).parent.parent
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "JAX_PLATFORMS": "cpu",
}
METHODS = (
    "RTN",
    "RTN asymmetric",
    "MSE",
    "MSE asymmetric",
    "HQQ",
    "AWQ",
    "AWQ asymmetric",
    "GPTQ",
    "GPTQ asymmetric",
    "GPTQ asymmetric, MSE, static",
)
JUDGED = ("MSE", "MSE asymmetric", "HQQ", "AWQ", "GPTQ asymmetric, MSE, static")
"""Methods whose error is to be no higher than the best peer's; the last one's time as well."""


def run(tool: str, python: str, given: dict[str, Any], core: int, folder: Path) -> dict[str, Any]:
    """What `benchmarks.peers.<tool>` measures under that Python; or why there is nothing."""
    # From a folder that holds the benchmarks alone: the links at the top of the repository hide packages of others.
    env = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT) if tool == "qjax_ptq" else str(folder)}
    pin = ["taskset", "-c", str(core)] if shutil.which("taskset") else []
    command = [*pin, python, "-m", f"benchmarks.peers.{tool}", json.dumps(given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=env)
    if done.returncode:
        return {"versions": {}, "measured": [], "failed": f"status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def lines(found: dict[str, Any], shapes: list[str]) -> list[dict[str, Any]]:
    """One line for each case of each tool, by method: errors and seconds by shape."""
    out = []
    for tool, result in found.items():
        for case in dict.fromkeys(row["case"] for row in result["measured"]):
            method, _, detail = case.partition(": ")
            rows = {row["shape"]: row for row in result["measured"] if row["case"] == case}
            # of a file with two tools each case says whose it is
            name = detail if tool == "hqq" else tool.removesuffix("_ptq") + (f", {detail}" if detail else "")
            out.append({"method": method, "tool": name, "ours": tool == "qjax_ptq", "rows": rows})
    return sorted(out, key=lambda line: METHODS.index(line["method"]))


def verdicts(table: list[dict[str, Any]], shapes: list[str]) -> list[dict[str, Any]]:
    """For each judged method and shape: the lowest error of ours and of the peers', and of the last one the times."""
    out = []
    for method in JUDGED:
        for shape in shapes:
            rows = [(line["ours"], line["rows"].get(shape, {})) for line in table if line["method"] == method]
            best = {ours: min((r["error"], r["seconds"]) for o, r in rows if o == ours and "error" in r)
                    for ours in (True, False) if any(o == ours and "error" in r for o, r in rows)}  # fmt: skip
            if len(best) == 2:
                (error, seconds), (theirs, their_seconds) = best[True], best[False]
                met = error <= theirs * SAME and (method != JUDGED[-1] or seconds <= their_seconds)
                out.append({"method": method, "shape": shape, "error": error, "peer": theirs, "seconds": seconds,
                            "peer_seconds": their_seconds, "met": met})  # fmt: skip
    return out


def main() -> None:
    options = measure.parser(__doc__ or "")
    options.add_argument("--quick", action="store_true", help="the smallest layer, one call")
    options.add_argument("--core", type=int, default=0, help="the core that processes are pinned to")
    options.add_argument(
        "--only", nargs="*", default=[], metavar="METHOD", help="cases whose name contains one of these"
    )
    options.add_argument("--peers", nargs="*", default=[], metavar="TOOL=PYTHON", help="files of benchmarks/peers")
    given = options.parse_args()
    shapes = SHAPES[:1] if given.quick else SHAPES
    names = [json.dumps(list(shape)) for shape in shapes]
    pythons = {"qjax_ptq": sys.executable, **dict(pair.split("=", 1) for pair in given.peers)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
        for shape, name in zip(shapes, names, strict=True):
            one = layer(*shape)
            np.savez(folder / f"{name}.npz", w=one.w, calibration=one.calibration, held_out=one.held_out)
        asked = {"folder": str(folder), "repeats": 1 if given.quick else 5, "only": given.only}
        found = {tool: run(tool, python, asked, given.core, folder) for tool, python in pythons.items()}
    table = lines(found, names)
    text = "int4 g128, inputs x outputs " + ", ".join("x".join(map(str, shape)) for shape in shapes)
    text += ": held-out output error; CPU seconds on one thread (first call, with compilation).\n\n"

    def cells(rows: dict[str, Any]) -> list[str]:
        out = []
        for key, form in (("error", "{:.4f}"), ("seconds", "{:.3g}"), ("first", "{:.2g}")):
            known = [rows.get(name, {}).get(key) for name in names]
            out.append(" / ".join("" if v is None else form.format(v) for v in known))
        return out

    text += measure.table(
        ["method, tool", "error", "s", "first s"],
        [[f"{line['method']}, {line['tool']}", *cells(line["rows"])] for line in table],
    )
    judged = verdicts(table, names)
    if judged:
        text += "\n\nAgainst the best peer's error, and for GPTQ with MSE and static order its time:\n\n"
        text += measure.table(
            ["method, shape", "error", "peer", "s", "peer s", ""],
            [
                [f"{v['method']}, {v['shape']}", f"{v['error']:.5f}", f"{v['peer']:.5f}", f"{v['seconds']:.3g}",
                 f"{v['peer_seconds']:.3g}", "met" if v["met"] else "missed"]
                for v in judged
            ],
        )  # fmt: skip
    failed = [
        f"{tool} {row['case']}: {row['failed']}"
        for tool, r in found.items()
        for row in r["measured"]
        if "failed" in row
    ]
    failed += [f"{tool}: {r['failed']}" for tool, r in found.items() if "failed" in r]
    if failed:
        text += "\n\nDid not run: " + "; ".join(failed) + "."
    versions = {name: v for r in found.values() for name, v in r["versions"].items()}
    text += "\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
    measure.save("roundings", {"shapes": names, "tools": found, "judged": judged}, text, given.out)


if __name__ == "__main__":
    main()
