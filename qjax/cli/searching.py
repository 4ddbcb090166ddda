"""``qjax search``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qjax
from qjax.cli.calibrating import draw
from qjax.cli.output import counting, listed, print_json, print_rich, say, table, waiting
from qjax.cli.scoring import check_data
from qjax.errors import DataError, ModelError, SearchError
from qjax.folders import is_saved, load_float
from qjax.report.text import size
from qjax.search import (
    NSGA2,
    Assignment,
    Budget,
    WholeLosses,
    assign,
    check_budget,
    plot_front,
    refine,
    save_front,
    sensitivities,
)
from qjax.search.assigning import amount
from qjax.search.refining import Progress


def run(args: argparse.Namespace) -> None:
    """Measure, choose, and write the recipe."""
    if args.supernet is not None:
        from qjax.cli import subnets

        return subnets.run(args)
    if any(given is not None for given in (args.predictor, args.form, args.group, args.recalibrate)):
        raise SearchError(
            "--predictor, --form, --group and --recalibrate are of a supernet; give its folder with --supernet"
        )
    start = time.monotonic()
    budget = Budget.of(args.budget)
    if budget.kind in ("seconds", "joules") and not args.device:
        raise SearchError(f"a budget of {budget} needs --device, such as --device h200")
    if args.text is None and args.images is None:
        raise DataError("search needs data: give --text FILE for a language model or --images DIR for a classifier")
    if is_saved(args.folder):
        raise ModelError(f"{args.folder} is quantized already; give the folder of the float model")
    choices = _choices(args)
    settings = None if args.generations is None else NSGA2(args.population, args.generations)
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
    if settings is not None:
        losses = WholeLosses(loaded.fn, loaded.params, drawn.batches, choices, tie=tie)
        more: dict[str, Any] = {"on": args.device, "rows": args.rows, "seed": args.seed, "resume": out / "whole"}
        with counting("generations") as progress:
            best = refine(found, losses, budget, settings, progress=_moved(progress), **more)
    found.save(out / "sensitivities.json")
    (out / "recipe.toml").write_text(best.recipe().to_toml())
    save_front(best, out / "front.json")
    plot_front(best, out / "front.svg")
    if args.json:
        seconds = round(time.monotonic() - start, 2)
        print_json({"model": loaded.name, **best.to_dict(), "out": str(out), "seconds": seconds})
    else:
        _show(loaded.name, best, out, args)


def _choices(args: argparse.Namespace) -> dict[str, qjax.Recipe]:
    """The recipes to choose from, by name."""
    if args.space is not None:
        return space(args.space)
    names = listed(args.recipes)
    choices = {_name(c): qjax.recipe(c) for c in names}
    if len(choices) < len(names):
        raise SearchError(f"--recipes {','.join(names)}: two have one name; give each a name of its own")
    return choices


def space(given: str) -> dict[str, qjax.Recipe]:
    """Recipes of integer weights, one for each number of bits: "2-8", "3,4,8", "2-8/64".

    They leave alone what the preset W4A16 leaves alone.

    Raises:
        SearchError: anything else, or bits outside 2 to 8.
    """
    bits: set[int] = set()
    found = re.fullmatch(r"([0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*)(?:/([0-9]+))?", given.replace(" ", ""))
    if found is None:
        raise SearchError(f"--space {given!r}; give bits and a group, as 2-8, 3,4,6,8 or 2-8/64")
    for part in found.group(1).split(","):
        first, _, last = part.partition("-")
        bits.update(range(int(first), int(last or first) + 1))
    if not bits or min(bits) < 2 or max(bits) > 8:
        raise SearchError(f"--space {given!r} has bits outside 2 to 8; give some of 2, 3, 4, 5, 6, 7 and 8")
    group = int(found.group(2) or 128)
    if group < 1:
        raise SearchError(f"--space {given!r}; a group has at least one weight")
    *kept, rule = qjax.recipe("W4A16").rules
    made = {f"int{b}": dataclasses.replace(rule, weights=qjax.Int(b, group=group)) for b in sorted(bits)}
    return {name: qjax.Recipe([*kept, rule], name=name) for name, rule in made.items()}


def _moved(progress: Callable[[int, int, str], None]) -> Callable[[Progress], None]:
    def moved(at: Progress) -> None:
        best = "" if math.isnan(at.best) else f", best KL {at.best:.3g}"
        progress(at.generation, at.generations, f"{at.measured} assignments measured{best}")

    return moved


def _name(choice: str) -> str:
    return Path(choice).stem if choice.endswith(".toml") else choice.upper()


def _show_curves(best: Assignment) -> None:
    """What both curves give for less than the budget, at some costs."""
    lagrange, evolved = (best.curves[name] for name in ("Lagrangian", "NSGA-II"))
    shown = []
    for point in lagrange[:: max(1, len(lagrange) // 8)]:
        same = [p for p in evolved if p.cost <= point.cost * (1 + 1e-9)]
        shown.append([amount(best.budget.kind, point.cost), f"{point.loss:.3g}", f"{min(p.loss for p in same):.3g}"])
    shown.append([amount(best.budget.kind, best.cost), "", f"{best.whole:.3g}"])
    print_rich(table(("cost", "Lagrangian front", "NSGA-II"), shown))


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
    if best.whole is None:
        print(f"Sum of the groups, each by itself: {best.loss:.3g} ({proof})")
    else:
        print(
            f"KL to float of the whole, measured: {best.whole:.3g} (sum of the groups by themselves: {best.loss:.3g})"
        )
        _show_curves(best)
    print(f"Saved in {out} ({out / 'front.svg'} shows other budgets).")
    print(f"Next: qjax quantize {args.folder} --recipe {out / 'recipe.toml'}")
