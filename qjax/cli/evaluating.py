"""``qjax eval``."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from qjax.cli.output import print_json, print_rich, say, waiting
from qjax.cli.scoring import Scored, as_json, check_data, score
from qjax.errors import DataError
from qjax.folders import Loaded, float_source, load_float, load_folder
from qjax.report import Report
from qjax.report.text import scores_table

NOTE = "scored on "


def run(args: argparse.Namespace) -> None:
    """Score a folder; a quantized one beside its float original where that is still there."""
    if args.text is None and args.images is None:
        raise DataError(
            "eval needs data: give --text FILE for a language model or --images DIR for an image classifier"
        )
    start = time.monotonic()
    with waiting("reading weights"):
        loaded = load_folder(args.folder)
        check_data(loaded, args)
        original = _original(loaded, args)
    scored = score(loaded, original, args)
    recipe = (loaded.manifest or {}).get("recipe", "")
    if args.json:
        head = {"model": loaded.name, **({"recipe": recipe} if recipe else {})}
        print_json({**head, **as_json(scored), "seconds": round(time.monotonic() - start, 2)})
    else:
        print(f"{' · '.join(t for t in (loaded.name, recipe) if t)} on {scored.on}\n")
        print_rich(scores_table(scored.scores, "quantized" if loaded.quantized else "float"))
    if loaded.quantized:
        _update_report(loaded, scored)


def scored_report(report: Report, scored: Scored) -> Report:
    """The report with these scores in place of older ones, and a note of what they were measured on."""
    notes = tuple(n for n in report.notes if not n.startswith(NOTE))
    return replace(report, notes=(*notes, f"{NOTE}{scored.on}"), scores=scored.scores)


def _original(loaded: Loaded, args: argparse.Namespace) -> Loaded | None:
    if not loaded.quantized or args.no_float:
        return None
    source = float_source(loaded)
    if source is None:
        say("the float model is no longer where it was, or has changed: scoring the quantized model alone")
        return None
    return load_float(source)


def _update_report(loaded: Loaded, scored: Scored) -> None:
    try:
        scored_report(loaded.report, scored).save(loaded.folder)
    except OSError as e:  # a folder that may only be read is no reason to fail after the work is done
        say(f"the report in {loaded.folder} could not be brought up to date: {e.strerror}")
