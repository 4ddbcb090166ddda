"""The accuracy table: every method on five real models, from one command.

    python -m benchmarks.accuracy [--resume DIR] [--rows 'gptq-*' ...] [--models books-6m ...] [--all] [--workers N]

Each (model, row) is measured once and kept in the folder given by ``--resume``, with every token, image or pair that is
scored; killed, the command goes on, and rows of other methods can be added. Rows that the orderings look at come first.
At the end the table, the plot and the orderings that are judged are written, and the exit code says whether all of them
hold. Workers are processes of one thread each. Figures are of weights as stored; models, data and calibration are said
under the table. ``--all`` adds the rows that say little on small models; ``--quick`` is for tests: a few
tokens of everything.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

import qjax
from benchmarks import measure
from benchmarks.accuracy import rows as registry
from benchmarks.accuracy.checks import FAIL, JUDGED, Check, counted, orderings
from benchmarks.accuracy.layers import layer_checks
from benchmarks.accuracy.measuring import FLOAT, Scorer, claimed, kept, measure_rows
from benchmarks.accuracy.models import CASES, ROOT
from benchmarks.accuracy.table import checks_table, plot, refusals, table
from qjax.checkpoint.parts import open_job

PAGE = ROOT / "docs/methods/index.md"
BEGIN, END = "<!-- accuracy table: written by python -m benchmarks.accuracy -->", "<!-- end -->"
LAYERED = ("books-6m", "minilm")
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    parser.add_argument("--resume", type=Path, metavar="DIR", help="keep results here, and go on from them")
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="only rows of these names (gptq-*)")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES), metavar="MODEL")
    parser.add_argument("--all", action="store_true", help="also the rows that say little on small models")
    parser.add_argument("--quick", action="store_true", help="a few tokens of everything, for tests")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no further row after so many")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes of one thread (default: 2)")
    parser.add_argument("--docs", action="store_true", help="also put the table into docs/methods/index.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(given: argparse.Namespace, folder: Path) -> None:
    """Measure what is missing, in this process."""
    say = functools.partial(print, flush=True)
    end = math.inf if given.minutes is None else time.monotonic() + 60 * given.minutes
    scorers = {
        model: functools.cache(lambda model=model: Scorer(CASES[model](given.data, given.quick)))
        for model in given.models
    }
    for judged in (True, False):
        for model in given.models:
            rows = [row for row in registry.named(given.rows) if row.fits(model, given.all or bool(given.rows))]
            rows = [row for row in rows if (row.name in JUDGED) == judged]
            measure_rows(folder, model, scorers[model], rows, say, end)
            jax.clear_caches()  # every row compiles programs of its own, which together take gigabytes
    for model in given.models:
        path = folder / model / "layers.json"
        if model in LAYERED and not given.rows and time.monotonic() < end:
            with claimed(folder, model, "layers") as mine:
                if mine and not path.exists():
                    found = [vars(c) for c in layer_checks(scorers[model]().case)]
                    path.with_suffix(".partial").write_text(json.dumps(found, indent=1) + "\n")
                    path.with_suffix(".partial").replace(path)


def spread(given: argparse.Namespace, folder: Path) -> None:
    """The same in several processes; they share the folder and take what is free."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.accuracy", "--worker", *sys.argv[1:], "--resume", str(folder)]
    jobs = [subprocess.Popen(command, env=environment) for _ in range(given.workers)]
    try:
        codes = [job.wait() for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    if any(codes):
        raise SystemExit(f"a worker ended with exit code {max(codes, key=abs)}; what is done stands in {folder}")


def main() -> int:
    given = arguments()
    registry.named(given.rows)  # a misspelled pattern is found before anything is measured
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        job = {"qjax": qjax.__version__, "quick": given.quick}
        folder = open_job(given.resume or Path(scratch) / "results", job, "accuracy table")
        if given.worker:
            measured(given, folder)
            return 0
        if given.workers > 1:
            spread(given, folder)
        else:
            measured(given, folder)
        return written(given, folder, time.monotonic() - begun)


def written(given: argparse.Namespace, folder: Path, seconds: float) -> int:
    """Write the table, the plot and the orderings; 1 where an ordering does not hold."""
    rows = registry.named(None)
    models = [m for m in CASES if m in given.models and kept(folder, m, FLOAT)]
    checks = orderings(folder, models)
    for model in models:
        path = folder / model / "layers.json"
        checks += [Check(**c) for c in json.loads(path.read_text())] if path.exists() else []
    said = [f"- {kept(folder, m, FLOAT)['said']}" for m in models]  # type: ignore[index]
    parts = [
        INTRO,
        table(folder, rows, models),
        "\n".join(said),
        f"## Orderings\n\n{counted(checks)}.\n\n{checks_table(checks)}",
    ]
    refused = refusals(folder, rows, models)
    parts += ["## Refused\n\n" + "\n".join(refused)] if refused else []
    results = {m: {r.name: kept(folder, m, r.name) for r in rows if kept(folder, m, r.name)} for m in models}
    record = {
        "float": {m: kept(folder, m, FLOAT) for m in models},
        "measured": results,
        "checks": [vars(c) for c in checks],
        "seconds": round(seconds),
    }
    measure.save("accuracy", record, "\n\n".join(parts), given.out)
    plot(folder, rows, models, given.out / "accuracy-cpu.svg")
    if given.docs:
        page = PAGE.read_text()
        before, rest = page.split(BEGIN)
        _, after = rest.split(END)
        plot(folder, rows, models, PAGE.with_name("accuracy.svg"))
        picture = "![Distance to float against stored bits, by method and model](accuracy.svg)"
        text = table(folder, rows, models, brief=True)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{picture}\n\n{END}{after}")
    for check in checks:
        if check.verdict == FAIL:
            print(f"FAIL: {check.title} on {check.model}: {check.said}")
    print(f"{counted(checks)}; {seconds / 60:.0f} minutes")
    return int(any(c.verdict == FAIL for c in checks))


INTRO = (
    "KL is the divergence to the float model in nats per token or image, error the squared error of the hidden states "
    "over their squared size, drift the mean change of a pair's cosine; ± one standard error (over blocks, images or "
    "pairs). ppl is perplexity by protocol A or B, right the part of the images. Bits are those stored per quantized "
    "weight of the first model that has the row, scales included. Embeddings, heads and first layers stay float."
)


if __name__ == "__main__":
    sys.exit(main())
