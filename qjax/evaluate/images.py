"""Top-1 and top-5 accuracy of an image classifier, and the labelled image sets it is measured on."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import DataError
from qjax.evaluate.progress import track

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
"""Of the files in a folder of a class that are taken for images, in upper case too."""


@dataclass(frozen=True)
class LabelledImages:
    """Images with the class of each.

    Attributes:
        images: paths of files, or a uint8 array [N, H, W, C] or [N, H, W].
        labels: int64 [N].
        classes: names by class index; () where the set does not name them.
    """

    images: Any
    labels: np.ndarray
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> LabelledImages:
        """The first `count` images; all of them for None."""
        return LabelledImages(self.images[:count], self.labels[:count], self.classes)

    def only(self, rows: Sequence[int]) -> LabelledImages:
        """The images of these numbers."""
        rows = list(rows)
        images = self.images[rows] if isinstance(self.images, np.ndarray) else [self.images[row] for row in rows]
        return LabelledImages(images, self.labels[rows], self.classes)


@dataclass(frozen=True)
class Accuracy:
    """How often a classifier is right.

    Attributes:
        top1, top5: part of the images, 0 to 1, whose class is the first choice, or among the first five.
        correct, correct_top5: the same as counts.
        images: number of images.
        nll: mean cross-entropy in nats.
        logits: float32 [N, classes], where they were kept.
    """

    top1: float
    top5: float
    correct: int
    correct_top5: int
    images: int
    nll: float
    logits: np.ndarray | None = None

    def scores(self) -> dict[str, float]:
        """As scores of a report."""
        return {"top1": self.top1, "top5": self.top5, "correct": float(self.correct), "images": float(self.images)}


def read_images(path: str | Path) -> LabelledImages:
    """Read a labelled set of images.

    Args:
        path: a folder with ``labels.csv`` (columns ``file`` and ``class_index``, others are ignored; ``name`` names the
            class); a folder with a folder of images for each class, as ImageNet's, where classes are counted in the
            order of the folders' names, empty ones too; or an ``.npz`` file with ``images`` (uint8) and ``labels`` (and
            ``classes``).

    Raises:
        DataError: a file is missing, damaged or lacks what is named above.
    """
    path = Path(path)
    if not path.is_dir():
        return _from_npz(path)
    listed = (path / "labels.csv").exists() or not any(p.is_dir() for p in path.iterdir())
    return _from_folder(path) if listed else _from_classes(path)


def accuracy(
    fn: Callable[[Any, Any], Any],
    params: Any,
    images: Any,
    labels: Any,
    *,
    prepare: Callable[[Any], np.ndarray] | None = None,
    batch_size: int = 50,
    keep_logits: bool = False,
    show: bool | None = None,
) -> Accuracy:
    """Top-1 and top-5 accuracy.

    Args:
        fn: ``fn(params, images) -> logits``, float [B, H, W, C] to [B, classes].
        params: its parameters, any pytree.
        images: what `prepare` takes, sliced in batches: an array or a sequence of paths; prepared images without it.
        labels: integers [N].
        prepare: from a slice of `images` to the model's input, such as `qjax.models.image_processor(folder)`.
        batch_size: images at a time; the last batch is padded, so one shape is compiled.
        keep_logits: keep all logits in the result.
        show: progress bar on stderr; None: where that is a terminal.

    Returns:
        The counts. Equal logits rank in class order, as argmax does; an image whose logits hold NaN is wrong.

    Raises:
        DataError: numbers of images and labels differ, there are none, or a label is no class of the model.
    """
    labels = np.asarray(labels)
    if len(images) != len(labels) or labels.ndim != 1:
        raise DataError(f"there are {len(images)} images and labels of shape {labels.shape}; give one label per image")
    if not len(labels):
        raise DataError("there is no image to score; give at least one")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels are {labels.dtype}; give class numbers as integers")
    run = _ranked_of(fn)
    batch_size = min(batch_size, len(labels))
    ranks: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    for start in track(range(0, len(labels), batch_size), "scoring images", show=show):
        part, wanted = images[start : start + batch_size], labels[start : start + batch_size]
        x = np.asarray(prepare(part) if prepare else part)
        padding = [(0, batch_size - len(wanted))]
        x = np.pad(x, padding + [(0, 0)] * (x.ndim - 1), mode="edge")
        logits, rank, loss = run(params, x, np.pad(wanted, padding, mode="edge").astype(np.int32))
        if logits.ndim != 2 or len(logits) != batch_size:
            raise DataError(f"a classifier gives logits [{batch_size}, classes], but this one gave {logits.shape}")
        if wanted.min() < 0 or wanted.max() >= logits.shape[1]:
            raise DataError(
                f"labels reach from {wanted.min()} to {wanted.max()}, but the model has "
                f"{logits.shape[1]} classes; use images that are labelled for this model"
            )
        ranks.append(np.asarray(rank)[: len(wanted)])
        losses.append(np.asarray(loss, np.float64)[: len(wanted)])
        if keep_logits:
            kept.append(np.asarray(logits, np.float32)[: len(wanted)])
    rank = np.concatenate(ranks)
    first, five, n = int((rank < 1).sum()), int((rank < 5).sum()), len(rank)
    nll = float(np.concatenate(losses).mean())
    return Accuracy(first / n, five / n, first, five, n, nll, np.concatenate(kept) if keep_logits else None)


def _ranked(fn: Callable[[Any, Any], Any], params: Any, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
    """Logits, the place of each label among them (0 is first) and its cross-entropy."""
    logits = fn(params, x)
    if logits.ndim != 2:
        return logits, labels, labels
    values = logits.astype(jnp.float32)
    own = jnp.take_along_axis(values, labels[:, None], axis=1)
    before = jnp.arange(values.shape[1]) < labels[:, None]
    rank = jnp.sum((values > own) | ((values == own) & before), axis=1)
    rank = jnp.where(jnp.isnan(values).any(axis=1), values.shape[1], rank)
    return logits, rank, jax.nn.logsumexp(values, axis=1) - own[:, 0]


@functools.lru_cache(maxsize=8)
def _jitted_ranked(fn: Callable[[Any, Any], Any]) -> Callable[..., tuple[jax.Array, ...]]:
    return jax.jit(functools.partial(_ranked, fn))


def _ranked_of(fn: Callable[[Any, Any], Any]) -> Callable[..., tuple[jax.Array, ...]]:
    try:
        return _jitted_ranked(fn)
    except TypeError:  # a function that cannot be hashed is compiled once per call
        return _jitted_ranked.__wrapped__(fn)


def _from_folder(folder: Path) -> LabelledImages:
    table = folder / "labels.csv"
    try:
        with table.open(encoding="utf-8-sig", newline="") as f:
            rows: Sequence[dict[str, str]] = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(
            f"{folder} has no readable labels.csv ({e}); give a folder with labels.csv "
            "(columns file, class_index) or with a folder for each class, or an .npz file with images and labels"
        ) from e
    if not rows or not {"file", "class_index"} <= set(rows[0]):
        found = ", ".join(rows[0]) if rows else "no row"
        raise DataError(f"{table} holds {found}; it needs the columns file and class_index and at least one row")
    try:
        labels = np.array([int(r["class_index"]) for r in rows], np.int64)
    except (TypeError, ValueError) as e:
        raise DataError(f"{table} has a class_index that is no whole number ({e}); mend that row") from e
    files = [folder / r["file"] for r in rows]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise DataError(
            f"{table} names {missing[0]} and {len(missing) - 1} more files that are not in {folder}; "
            "restore them or drop their rows"
        )
    names = {int(r["class_index"]): r["name"] for r in rows if r.get("name")}
    classes = tuple(names.get(i, str(i)) for i in range(max(names) + 1)) if names else ()
    return LabelledImages(files, labels, classes)


def _from_classes(folder: Path) -> LabelledImages:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in IMAGE_ENDINGS
    ]
    if not found:
        raise DataError(
            f"{folder} has {len(names)} folders and no image in them ({', '.join(IMAGE_ENDINGS)}); give a folder with "
            "labels.csv, or one with a folder of images for each class"
        )
    files, labels = zip(*found, strict=True)
    return LabelledImages(list(files), np.array(labels, np.int64), tuple(names))


def _from_npz(path: Path) -> LabelledImages:
    try:
        with np.load(path, allow_pickle=False) as f:
            arrays = {k: f[k] for k in ("images", "labels", "classes") if k in f}
    except (OSError, ValueError, EOFError, KeyError) as e:
        raise DataError(
            f"{path} is not a readable .npz file ({e}); give one with images and labels, or a folder with labels.csv"
        ) from e
    if not {"images", "labels"} <= set(arrays):
        raise DataError(f"{path} holds {', '.join(arrays) or 'neither'}; it needs the arrays images and labels")
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{path} has images {images.dtype} {images.shape} and labels {labels.shape}; images are uint8 "
            "[N, H, W] or [N, H, W, C] with one label each"
        )
    return LabelledImages(images, labels.astype(np.int64), tuple(map(str, arrays.get("classes", ()))))
