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
from qjax.evaluate.text import bucket_ends
from qjax.folders import Loaded

IMAGES_PER_BATCH = 8
LENGTHS = 4
"""Blocks of a text are cut to so many lengths at most: each is compiled once, and padding would be observed too."""
TOKENS_PER_BATCH = 1024


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
    """Batches, the record of them, how many rows there were to draw from, and what to tell of the draw."""

    batches: list[tuple[Any, ...]]
    record: Record
    available: int
    said: str

    def check_rest(self, path: Path | None) -> None:
        """Refuse to score on data of which calibration has taken every row; said before the work and not after it.

        Raises:
            DataError: it has.
        """
        if path is not None and len(self.record.rows) == self.available and self.record.digest == _digest(path):
            raise DataError(
                f"calibration takes all {self.available} rows of {path}, and none is left to score on; score on other "
                "data, or leave some out with --samples"
            )


def calibration(loaded: Loaded, recipe: Any, args: argparse.Namespace) -> Calibration | None:
    """Draw the calibration data that the command line asks for.

    Raises:
        RecipeError: the recipe needs data and none is given.
        DataError: the data cannot be read, or has fewer rows than asked for.
    """
    if args.calibration is None:
        if recipe.needs_batches:
            kind = "FILE, a text" if loaded.reads_text else "DIR, a set of images"
            raise RecipeError(
                f"{recipe.name or args.recipe} needs calibration data: give --calibration {kind} that is like what the "
                f"model will see ({recipe.needs_batches})"
            )
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
    """Which rows are drawn: as many as asked for, or the usual number as far as there are so many."""
    wanted = min(count, args.usual_samples) if args.samples is None else args.samples
    if wanted > count:
        raise DataError(f"{args.calibration} has {count} {what} and --samples asks for {wanted}; ask for fewer")
    return np.sort(np.random.default_rng(args.seed).choice(count, wanted, replace=False))


def _drawn(rows: np.ndarray, count: int, args: argparse.Namespace, what: str) -> str:
    few = f", fewer than the usual {args.usual_samples}" if args.samples is None and count < args.usual_samples else ""
    return f"{args.calibration}: " + (f"all {count} {what}{few}" if len(rows) == count else f"{len(rows)} {what} drawn")


def _from_text(loaded: Loaded, args: argparse.Namespace) -> Calibration:
    blocks = text_blocks(loaded, args.calibration, args)
    rows = _rows(len(blocks.blocks), args, "blocks")
    lengths = cut_lengths([len(blocks.blocks[row]) for row in rows])
    by_length: dict[int, list[np.ndarray]] = {}
    for row, length in zip(rows, lengths, strict=True):
        by_length.setdefault(length, []).append(blocks.blocks[row][:length])
    batches = []
    for length, group in by_length.items():
        size = _batch_size(len(group), max(1, TOKENS_PER_BATCH // length))
        batches += [(np.stack(group[at : at + size]),) for at in range(0, len(group), size)]
    said = f"{_drawn(rows, len(blocks.blocks), args, 'blocks')}, {sum(lengths):,} tokens"
    if len(by_length) > 1:
        shown = ", ".join(map(str, sorted(by_length)))
        said += f", cut to the lengths {shown}: each is compiled by itself (--protocol B gives all blocks one length)"
    return Calibration(batches, _record(args, rows, blocks.protocol, blocks.context), len(blocks.blocks), said)


def cut_lengths(lengths: Sequence[int], most: int = LENGTHS) -> list[int]:
    """To which length each block is cut, so that there are few lengths and few tokens are lost.

    Args:
        lengths: tokens of the blocks, 1 or more each.
        most: how many lengths there may be.
    """
    top = max(lengths) + 1
    short = np.array([top - n for n in lengths])  # cutting to few lengths is padding of what lacks to the longest
    ends = np.array(bucket_ends(short, most, least=0.03 * sum(lengths)))
    return [top - int(ends[np.searchsorted(ends, n)]) for n in short]


def _batch_size(rows: int, most: int) -> int:
    """The largest number of rows, ``most`` at most, that divides all: another last batch would be compiled again."""
    return next(size for size in range(min(rows, most), 0, -1) if rows % size == 0)


def _from_images(loaded: Loaded, args: argparse.Namespace) -> Calibration:
    data = evaluate.read_images(args.calibration)
    rows = _rows(len(data), args, "images")
    prepare = models.image_processor(loaded.folder)
    pixels = np.asarray(prepare(data.only(rows.tolist()).images))
    batches = [(pixels[at : at + IMAGES_PER_BATCH],) for at in range(0, len(pixels), IMAGES_PER_BATCH)]
    return Calibration(batches, _record(args, rows), len(data), _drawn(rows, len(data), args, "images"))


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
    """SHA-256 of a file; of a folder of images, of its list, or of the names in it where each class has a folder."""
    listed = path / "labels.csv"
    if path.is_dir() and not listed.is_file():
        names = sorted(str(file.relative_to(path)) for file in path.glob("*/*"))
        return hashlib.sha256("\n".join(names).encode()).hexdigest()
    with (listed if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
