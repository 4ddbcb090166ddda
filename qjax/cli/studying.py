"""``qjax study``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import qjax
from qjax import evaluate, models
from qjax.cli.calibrating import Calibration, calibration, left_out, text_blocks
from qjax.cli.output import counting, listed, print_json, print_rich, say, table, waiting
from qjax.cli.scoring import check_data
from qjax.errors import DataError, ModelError
from qjax.folders import Loaded, fingerprint, is_saved, load_float, source_size

PAIRS = 256
"""Pairs of sentences that a text encoder is scored on, without --limit."""


def run(args: argparse.Namespace) -> None:
    """Apply each recipe to a Hugging Face folder, score it, and write tables and plots."""
    if is_saved(args.folder):
        raise ModelError(f"{args.folder} is quantized already; give the folder of the float model")
    recipes = [qjax.recipe(name) for name in listed(args.recipes)]
    if args.text is None and args.images is None:
        raise DataError(
            "study needs data: give --text FILE for a language model or a text encoder, --images DIR for a classifier"
        )
    with waiting("reading weights"):
        loaded = load_float(args.folder)
    check_data(loaded, args, pairs=True)
    wanting = [recipe for recipe in recipes if recipe.needs_batches]
    drawn = None
    if wanting:
        args.recipe = wanting[0].name
        drawn = calibration(loaded, wanting[0], args)
    elif args.calibration is not None:
        say("none of the recipes needs calibration data: --calibration is not looked at")
    if drawn is not None and loaded.kind == "text encoder":  # as its task calls it: with a mask of what counts
        masked = [(tokens, np.ones(tokens.shape, bool)) for (tokens,) in drawn.batches]
        drawn = dataclasses.replace(drawn, batches=masked)
    out = args.out or Path(f"{loaded.name}-study")
    tasks = list(_tasks(loaded, drawn, args))
    if drawn is not None:
        say(drawn.said)
    with counting("studying") as progress:
        result = qjax.study(
            loaded.fn,
            loaded.params,
            tasks,
            recipes,
            batches=drawn.batches if drawn else None,
            out=out,
            name=loaded.name,
            digest=fingerprint(args.folder),
            calibration=_sentence(drawn),
            progress=progress,
        )
    if args.json:
        print_json({**result.to_dict(), "out": str(out)})
        return
    print(f"{loaded.name}, {len(result.outcomes)} recipes\n")
    print_rich(table(result.columns(), result.rows()))
    print()
    print_rich(table(result.size_columns(), result.size_rows()))
    held, dtype = source_size(args.folder)
    if held < result.float_bytes:
        print(f"\nSizes are beside those of the widened weights; the folder holds {held / 1e3:,.0f} kB of {dtype}.")
    print(f"\nSaved in {out} ({out / 'study.html'} has the plots and the paired tests)")


def _tasks(loaded: Loaded, drawn: Calibration | None, args: argparse.Namespace) -> Iterable[Any]:
    """What is scored, without the rows that were drawn for calibration."""
    record = {"calibration": vars(drawn.record)} if drawn else {}
    marked = Loaded(**{**vars(loaded), "manifest": record})
    if args.images is not None:
        data = evaluate.read_images(args.images)
        data = data.only(left_out(marked, args.images, len(data)))
        pixels = np.asarray(models.image_processor(loaded.folder)(data.images))
        keep = _unseen(list(pixels), [row for (batch,) in drawn.batches for row in batch] if drawn else [], args.images)
        keep = keep[: args.limit]
        yield evaluate.ImageTask(args.images.name, pixels[keep], np.asarray(data.labels)[keep])
        return
    for path in args.text:
        if loaded.kind == "text encoder":
            yield _sentences(loaded, path, drawn, args)
            continue
        blocks = text_blocks(loaded, path, args)
        blocks = blocks.only(left_out(marked, path, len(blocks.blocks), blocks.protocol, blocks.context))
        keep = _unseen(blocks.blocks, [row for (batch,) in drawn.batches for row in batch] if drawn else [], path)
        yield evaluate.TextTask(path.name, blocks.only(keep).first(args.limit))


def _sentences(loaded: Loaded, path: Path, drawn: Calibration | None, args: argparse.Namespace) -> Any:
    """Pairs of sentences of a text, without those that stand in the calibration data."""
    encode, longest = models.tokenizer(loaded.folder).encode, loaded.config.max_position_embeddings
    used = ["".join(f" {i}" for i in row) + " " for batch in drawn.batches for row in batch[0]] if drawn else []
    pairs, count = [], PAIRS if args.limit is None else args.limit
    found = evaluate.sentence_pairs(evaluate.read_text(path), count, args.seed)
    for pair in found:
        inner = [encode(sentence, special=False) for sentence in pair]
        if any("".join(f" {i}" for i in ids) + " " in row for ids in inner for row in used):
            continue
        pairs.append(tuple(ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]] for ids in map(encode, pair)))
    if not pairs:
        raise DataError(f"every pair of sentences of {path} is among the calibration data; score on other data")
    if len(pairs) < len(found):
        say(f"{len(found) - len(pairs)} pairs of {path} with sentences of the calibration data are left out")
    return evaluate.SentenceTask(path.name, pairs)


def _unseen(rows: Any, used: list[np.ndarray], path: Path) -> list[int]:
    """Numbers of the rows that do not begin with a calibration row: a text may be part of another file."""
    seen: dict[int, set[bytes]] = {}
    for row in used:
        seen.setdefault(len(row), set()).add(np.ascontiguousarray(row).tobytes())
    keep = [
        n
        for n, row in enumerate(rows)
        if not any(np.ascontiguousarray(row[:length]).tobytes() in known for length, known in seen.items())
    ]
    if len(keep) < len(rows):
        say(f"{len(rows) - len(keep)} further rows of {path} are among the calibration data and left out")
    if not keep:
        raise DataError(f"every row of {path} is among the calibration data; score on other data")
    return keep


def _sentence(drawn: Calibration | None) -> str:
    if drawn is None:
        return ""
    record = drawn.record
    return f"Calibrated on {len(record.rows)} rows of {Path(record.data).name}, drawn by seed {record.seed}."
