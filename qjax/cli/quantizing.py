"""``qjax quantize``."""

from __future__ import annotations

import argparse
import dataclasses
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import qjax
from qjax.cli.calibrating import calibration
from qjax.cli.evaluating import scored_report
from qjax.cli.inspecting import example_input
from qjax.cli.output import counting, print_json, print_rich, waiting
from qjax.cli.scoring import check_data, score
from qjax.errors import ModelError
from qjax.folders import check_destination, is_saved, load_float, save_folder
from qjax.report import Report


def run(args: argparse.Namespace) -> None:
    """Quantize a Hugging Face folder and save it."""
    start = time.monotonic()
    recipe = qjax.recipe(args.recipe)
    if is_saved(args.folder):
        raise ModelError(f"{args.folder} is quantized already; give the folder of the float model")
    name = args.folder.resolve().name
    recipe_name = recipe.name or Path(args.recipe).stem
    out = args.out or Path(f"{name}-{recipe_name}")
    check_destination(out, args.folder)
    with waiting("reading weights"):
        loaded = load_float(args.folder)
    check_data(loaded, args)
    drawn = calibration(loaded, recipe, args)
    state = qjax.calibrate(loaded.fn, loaded.params, drawn.batches, recipe=recipe) if drawn else None
    with counting("quantizing") as progress:
        example = example_input(loaded.config)
        model = qjax.quantize(
            loaded.fn, loaded.params, example, recipe=recipe, state=state, name=name, progress=progress
        )
    record = dataclasses.asdict(drawn.record) if drawn else None
    report, scored = replace(model.report, recipe=recipe_name), None
    if args.text or args.images:
        manifest = {"calibration": record} if record else {}
        quantized = replace(loaded, fn=model, params=model.params, model=model, manifest=manifest)
        scored = score(quantized, loaded, args)
        report = scored_report(report, scored)
    with waiting("saving"):
        save_folder(out, args.folder, model, report, calibration=record)
    if args.json:
        print_json({**_as_json(report), "out": str(out), "seconds": round(time.monotonic() - start, 2)})
    else:
        print_rich(report)
        print(f"Saved in {out} ({out / 'report.html'} has the plots)")


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "model": report.model,
        "recipe": report.recipe,
        "float_bytes": report.float_bytes,
        "stored_bytes": report.stored_bytes,
        "compression": report.compression,
        "bits_per_weight": report.bits(report.quantized),
        "sites": len(report.rows),
        "quantized_sites": len(report.quantized),
        "left": [{"name": r.name, "reason": r.reason} for r in report.left],
        "notes": list(report.notes),
        **report.scores,
    }
