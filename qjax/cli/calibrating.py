"""Calibration data of ``quantize``: which rows of a text or of a set of images are taken, and how eval leaves them out.

Rows are the blocks of a text, cut as ``eval`` cuts them (``--protocol``, ``--context``), or the images of a set. Which
ones were drawn stands in the folder's ``qjax.json``, with a digest of the data.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qjax import evaluate, models
from qjax.cli.output import say
from qjax.errors import DataError, RecipeError
from qjax.folders import Loaded

IMAGES_PER_BATCH = 8
CUT = 64
"""Blocks of a text are cut to multiples of so many tokens: observed padding would widen the ranges, and each length is
compiled once."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What was used for calibration.

    Attributes:
        data: path of the text or of the images.
        digest: SHA-256 of the text, or of the list of images.
        rows: numbers of the blocks or images, ascending.
        protocol, context: how the text was cut; "" and 0 for images.
        seed: of the draw.
    """

    data: str
    digest: str
    rows: tuple[int, ...]
    protocol: str = ""
    context: int = 0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Batches, and the record of them."""

    batches: list[tuple[Any, ...]]
    record: Record


def calibration(loaded: Loaded, recipe: Any, args: argparse.Namespace) -> Calibration | None:
    """Draw the calibration data that the command line asks for.

    Raises:
        RecipeError: the recipe needs data and none is given.
        DataError: the data cannot be read, or has fewer rows than asked for.
    """
    if args.calibration is None:
        if recipe.needs_batches:
            kind = "FILE, a text" if loaded.reads_text else "DIR, a set of images"
            raise RecipeError(f"{recipe.needs_batches}, which need calibration data: give --calibration {kind}")
        return None
    if not recipe.needs_batches:
        say(f"{args.recipe} needs no calibration data: --calibration is not looked at")
        return None
    return draw(loaded, args)


def draw(loaded: Loaded, args: argparse.Namespace) -> Calibration:
    """Draw ``args.samples`` rows of ``args.calibration``.

    Raises:
        DataError: the data cannot be read, or has fewer rows than asked for.
    """
    return _from_text(loaded, args) if loaded.reads_text else _from_images(loaded, args)


def _rows(count: int, args: argparse.Namespace, what: str) -> np.ndarray:
    if args.samples > count:
        raise DataError(f"{args.calibration} has {count} {what} and --samples asks for {args.samples}; ask for fewer")
    return np.sort(np.random.default_rng(args.seed).choice(count, args.samples, replace=False))


def _from_text(loaded: Loaded, args: argparse.Namespace) -> Calibration:
    blocks = text_blocks(loaded, args.calibration, args)
    rows = _rows(len(blocks.blocks), args, "blocks")
    by_length: dict[int, list[np.ndarray]] = {}
    for row in rows:
        ids = blocks.blocks[row]
        length = len(ids) - len(ids) % CUT if len(ids) > CUT else len(ids)
        by_length.setdefault(length, []).append(ids[:length])
    per_batch = max(1, 1024 // max(by_length))
    batches = [
        (np.stack(group[at : at + per_batch]),)
        for group in by_length.values()
        for at in range(0, len(group), per_batch)
    ]
    return Calibration(batches, _record(args, rows, blocks.protocol, blocks.context))


def _from_images(loaded: Loaded, args: argparse.Namespace) -> Calibration:
    data = evaluate.read_images(args.calibration)
    rows = _rows(len(data), args, "images")
    prepare = models.image_processor(loaded.folder)
    pixels = np.asarray(prepare(data.only(rows.tolist()).images))
    batches = [(pixels[at : at + IMAGES_PER_BATCH],) for at in range(0, len(pixels), IMAGES_PER_BATCH)]
    return Calibration(batches, _record(args, rows))


def _record(args: argparse.Namespace, rows: np.ndarray, protocol: str = "", context: int = 0) -> Record:
    used = tuple(int(row) for row in rows)
    return Record(str(args.calibration), _digest(args.calibration), used, protocol, context, args.seed)


def text_blocks(loaded: Loaded, path: Path, args: argparse.Namespace) -> evaluate.TextBlocks:
    """The blocks of a text, as ``--protocol`` and ``--context`` say.

    Raises:
        DataError: the text cannot be used, or the context is longer than the model's.
    """
    longest = loaded.config.max_position_embeddings
    if args.context and args.context > longest:
        raise DataError(f"--context {args.context} is more than the {longest} tokens of the model")
    context = args.context or min(longest, 2048)
    tokenizer = models.tokenizer(loaded.folder)
    return evaluate.text_blocks(tokenizer, evaluate.read_text(path), args.protocol, context=context)


def left_out(loaded: Loaded, path: Path, count: int, protocol: str = "", context: int = 0) -> Sequence[int]:
    """Rows of a text or of a set of images that may be scored: all but those that a quantized model was calibrated on.

    Says on stderr what it leaves out, or that it cannot tell.

    Raises:
        DataError: nothing would be left.
    """
    record = (loaded.manifest or {}).get("calibration")
    every = range(count)
    if record is None or record["digest"] != _digest(path):
        return every
    if (record["protocol"], record["context"]) != (protocol, context):
        say(
            f"the model was calibrated on blocks of this text cut otherwise (protocol {record['protocol']}, context "
            f"{record['context']}): they are among those scored"
        )
        return every
    used = set(record["rows"])
    rest = [row for row in every if row not in used]
    if not rest:
        what = "block" if protocol else "image"
        raise DataError(f"every {what} of {path} was used to calibrate the model; score it on other data")
    say(f"{len(used)} rows that the model was calibrated on are left out")
    return rest


def _digest(path: Path) -> str:
    """SHA-256 of a file; of a folder of images, of its list."""
    with (path / "labels.csv" if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
