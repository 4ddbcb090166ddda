"""``qjax quantize``."""

from __future__ import annotations

import argparse
import dataclasses
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import qjax
from qjax.checkpoint.parts import remove_job
from qjax.cli.calibrating import calibration
from qjax.cli.evaluating import scored_report
from qjax.cli.inspecting import example_input
from qjax.cli.output import counting, print_json, print_rich, say, waiting
from qjax.cli.scoring import check_data, score
from qjax.errors import ModelError
from qjax.folders import Loaded, check_destination, is_saved, load_float, save_folder, size_on_disk, source_size
from qjax.report import Report
from qjax.report.text import size


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
    if args.low_memory and (args.text or args.images):
        raise ModelError("--low-memory never has the whole float model: score the result with `qjax eval`")
    with waiting("reading weights"):
        loaded = load_float(args.folder, lazy=args.low_memory)
    check_data(loaded, args)
    drawn = calibration(loaded, recipe, args)
    if drawn is not None:
        drawn.check_rest(args.text or args.images)
        say(drawn.said)
    model = _quantized(loaded, recipe, drawn.batches if drawn else None, name, args)
    record = dataclasses.asdict(drawn.record) if drawn else None
    held, dtype = source_size(args.folder)
    report, scored = replace(model.report, recipe=recipe_name, source_bytes=held, source_dtype=dtype), None
    if args.text or args.images:
        manifest = {"calibration": record} if record else {}
        quantized = replace(loaded, fn=model, params=model.params, model=model, manifest=manifest)
        scored = score(quantized, loaded, args)
        report = scored_report(report, scored)
    with waiting("saving"):
        save_folder(out, args.folder, model, report, calibration=record)
    if args.resume is not None:
        remove_job(args.resume)  # the result is safe
    if args.json:
        where = {"out": str(out), "disk_bytes": size_on_disk(out)}
        print_json({**_as_json(report), **where, "seconds": round(time.monotonic() - start, 2)})
    else:
        print_rich(report)
        disk = size(size_on_disk(out))
        print(f"Saved in {out} ({out / 'report.html'} has the plots); its checkpoint takes {disk} on disk")


def _quantized(loaded: Loaded, recipe: qjax.Recipe, batches: Any, name: str, args: argparse.Namespace) -> qjax.Model:
    """Quantize the whole model, or block by block where a rounding, the memory or a resumable job asks for it."""
    if recipe.settle is not None and args.low_memory:
        raise ModelError(f"{type(recipe.settle).__name__} runs the whole model: leave out --low-memory")
    by_blocks = batches is not None and (
        recipe.rounds_with_data or recipe.settle is not None or args.low_memory or args.resume is not None
    )
    if args.resume is not None and not by_blocks:
        say(f"{args.recipe} needs no calibration data and is done in one pass: --resume is not looked at")
    state = None
    if batches is not None and not by_blocks:
        state = qjax.calibrate(loaded.fn, loaded.params, batches, recipe=recipe)
    with counting("quantizing") as progress:
        settings: dict[str, Any] = {"batches": batches, "resume": args.resume} if by_blocks else {"state": state}
        example = example_input(loaded.config)
        return qjax.quantize(loaded.fn, loaded.params, example, recipe=recipe, name=name, progress=progress, **settings)


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "model": report.model,
        "recipe": report.recipe,
        "float_bytes": report.float_bytes,
        "source_bytes": report.source_bytes,
        "stored_bytes": report.stored_bytes,
        "compression": report.compression,
        "bits_per_weight": report.bits(report.quantized),
        "sites": len(report.rows),
        "quantized_sites": len(report.quantized),
        "left": [{"name": r.name, "reason": r.reason} for r in report.left],
        "notes": list(report.notes),
        **report.scores,
    }
