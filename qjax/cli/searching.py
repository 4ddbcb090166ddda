"""``qjax search``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import qjax
from qjax.cli.calibrating import draw
from qjax.cli.output import counting, listed, print_json, print_rich, say, table, waiting
from qjax.cli.scoring import check_data
from qjax.errors import DataError, ModelError, SearchError
from qjax.folders import is_saved, load_float
from qjax.report.text import size
from qjax.search import Assignment, Budget, assign, check_budget, plot_front, save_front, sensitivities
from qjax.search.assigning import amount


def run(args: argparse.Namespace) -> None:
    """Measure, choose, and write the recipe."""
    start = time.monotonic()
    budget = Budget.of(args.budget)
    if budget.kind in ("seconds", "joules") and not args.device:
        raise SearchError(f"a budget of {budget} needs --device, such as --device h200")
    if args.text is None and args.images is None:
        raise DataError("search needs data: give --text FILE for a language model or --images DIR for a classifier")
    if is_saved(args.folder):
        raise ModelError(f"{args.folder} is quantized already; give the folder of the float model")
    names = listed(args.recipes)
    choices = {_name(c): qjax.recipe(c) for c in names}
    if len(choices) < len(names):
        raise SearchError(f"--recipes {','.join(names)}: two have one name; give each a name of its own")
    out = args.out or Path(f"{args.folder.resolve().name}-search")
    with waiting("reading weights"):
        loaded = load_float(args.folder)
    check_data(loaded, args)
    args.calibration = args.text or args.images
    drawn = draw(loaded, args)
    say(drawn.said)
    tie = [listed([t]) for t in args.tie]
    sizes = sensitivities(loaded.fn, loaded.params, drawn.batches, choices, by=(), tie=tie)
    check_budget(sizes, budget, on=args.device, rows=args.rows)  # not after an hour of measuring
    out.mkdir(parents=True, exist_ok=True)
    with counting("measuring") as progress:
        found = sensitivities(
            loaded.fn,
            loaded.params,
            drawn.batches,
            choices,
            by=args.by,
            tie=tie,
            resume=out / "measured",
            seed=args.seed,
            progress=progress,
        )
    best = assign(found, budget, on=args.device, rows=args.rows)
    found.save(out / "sensitivities.json")
    (out / "recipe.toml").write_text(best.recipe().to_toml())
    save_front(best, out / "front.json")
    plot_front(best, out / "front.svg")
    if args.json:
        seconds = round(time.monotonic() - start, 2)
        print_json({"model": loaded.name, **best.to_dict(), "out": str(out), "seconds": seconds})
    else:
        _show(loaded.name, best, out, args)


def _name(choice: str) -> str:
    return Path(choice).stem if choice.endswith(".toml") else choice.upper()


_LOSS = {"kl": "KL to float in nats", "fisher": "second-order KL to float in nats", "output": "error of its outputs"}


def _show(name: str, best: Assignment, out: Path, args: argparse.Namespace) -> None:
    rows, choices = best.sensitivities.rows, best.sensitivities.choices[:-1]
    print(f"{name}: {len(rows)} groups of layers, budget {best.budget}")
    print(f"{_LOSS[best.by]}, with one group alone in each recipe:\n")
    shown = []
    for row in rows:
        losses = (row.losses[best.by].get(c) for c in choices)
        shown.append([row.name, best.choices[row.name], *("" if v is None else f"{v:.2e}" for v in losses)])
    print_rich(table(("group", "choice", *choices), shown, left=(0, 1)))
    counts = ", ".join(f"{n} × {c}" for c, n in best.counts.items())
    # What is stored is said in any case; a budget in bits or bytes is not said twice.
    spent = "" if best.budget.kind in ("bits", "bytes") else f"{amount(best.budget.kind, best.cost)}, "
    proof = (
        "the least that the budget allows" if best.exact else f"at most {best.loss - best.bound:.2g} above the least"
    )
    print(f"\n{counts}: {spent}{best.bits:.3f} bits per weight, {size(best.stored_bytes)} in all")
    print(f"Sum of the groups, each by itself: {best.loss:.3g} ({proof})")
    print(f"Saved in {out} ({out / 'front.svg'} shows other budgets).")
    print(f"Next: qjax quantize {args.folder} --recipe {out / 'recipe.toml'}")
