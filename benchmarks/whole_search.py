"""Mixed precision at few bits: sums of single losses, NSGA-II on whole assignments, random assignments, uniform bits.

    python -m benchmarks.whole_search [--data ../shared/data] [--budget "2.5 bits"] [--resume DIR]

The language model that comes with the repository, integer weights of 2 to 8 bits in groups of 128. Sensitivities
(second order) and whole losses on 6 blocks of 256 tokens of the training text; NSGA-II with 24 assignments for 24
generations; up to 100 random assignments within the budget, drawn near it; the best of each scored on 33 blocks of the
validation text. KL to float in nats.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from benchmarks.static import ROOT, language_model
from qjax.cli.searching import space
from qjax.search import NSGA2, WholeLosses, Windows, assign, refine, sensitivities
from qjax.search.assigning import cost_table
from qjax.search.whole import Remembered
from qjax.search.windows import tilted


def random_within(found: Any, best: Any, count: int) -> np.ndarray:
    """Different random assignments within the budget, drawn so that their average cost is just below it."""
    costs, fixed = cost_table(found, best.budget)
    allowed, limit = np.isfinite(costs), best.budget.amount - fixed
    table = np.where(allowed, costs, 0.0)
    window = Windows(table[None], np.array([limit - 0.1]), np.array([limit]))
    chances = tilted(window, allowed)
    rng, out = np.random.default_rng(0), {}
    while len(out) < count:
        one = np.array([rng.choice(len(p), p=p) for p in chances])
        if window.hold(one[None])[0]:
            out[tuple(one.tolist())] = None
    return np.array(list(out), np.int32)


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    parser.add_argument("--budget", default="2.5 bits")
    parser.add_argument("--resume", type=Path, help="keep measurements here, and go on from there")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    fn, params, batches, blocks = language_model(given.data)
    batches = [(batches[0][0],), (batches[1][0][:2],)]
    longest = max(map(len, blocks.blocks))
    rows = [row for row in blocks.blocks if len(row) == longest]
    test = [(np.stack(rows[at : at + 3]),) for at in range(0, len(rows) - len(rows) % 3, 3)]
    choices = space("2-8")
    found = sensitivities(fn, params, batches, choices, by="fisher", resume=given.resume and given.resume / "single")
    losses = WholeLosses(fn, params, batches, choices)
    told = lambda p: print(f"generation {p.generation}: {p.measured} measured, {p.best:.5f}", flush=True)  # noqa: E731
    kept = given.resume and given.resume / "whole"
    best = refine(found, losses, given.budget, NSGA2(24, 24), resume=kept, progress=told)
    start, names = assign(found, given.budget), list(found.choices)
    memory = Remembered(losses, given.resume and given.resume / "random.jsonl", progress=lambda n: print(n, flush=True))
    measured = len((kept / "measured.jsonl").read_text().splitlines()) if kept else 24 * 25
    random = random_within(found, best, min(measured, 100))
    of_random = memory(random)

    def genome(chosen: Any) -> list[int]:
        return [names.index(chosen.choices[row.name]) for row in found.rows]

    cases = {
        "int2 everywhere": [names.index("int2")] * len(found.rows),
        "int3 everywhere": [names.index("int3")] * len(found.rows),
        f"best of {len(random)} random ones within the budget": random[int(of_random.argmin())].tolist(),
        "exact, by sums": genome(start),
        f"NSGA-II on whole assignments ({measured} measured)": genome(best),
    }
    costs, _ = cost_table(found, best.budget)
    genomes = np.array(list(cases.values()), np.int32)
    on_train, on_test = losses(genomes), WholeLosses(fn, params, test, choices)(genomes)
    lines, record = [], []
    for case, one, train, valid in zip(cases, genomes, on_train, on_test, strict=True):
        bits = float(costs[np.arange(len(one)), one].sum())
        record.append({"case": case, "cost": bits, "kl_searched": float(train), "kl": float(valid)})
        lines.append([case, f"{bits:.3f}", f"{train:.5f}", f"{valid:.5f}"])
    text = f"KL divergence to float of books-6m in nats, budget {best.budget}; {len(test) * 3} blocks of {longest}.\n\n"
    text += measure.table(["case", "cost", "KL, text searched on", "KL, validation text"], lines)
    measure.save("whole_search", {"budget": given.budget, "measured": record}, text, given.out)


if __name__ == "__main__":
    main()
