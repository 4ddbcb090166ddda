"""The models of the accuracy table: what each is calibrated on and scored on. No row of one is in the other."""

from __future__ import annotations

import dataclasses
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.evaluate import ImageTask, SentenceTask, TextTask, read_images, read_text, sentence_pairs, text_blocks

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A model with its data.

    Attributes:
        name: as on the command line.
        fn, params: the float model.
        tasks: what it is scored on; orderings are judged on the first.
        batches: calibration data.
        blocks: pattern of the sites that are quantized: the blocks' products, not embeddings, heads or first layers.
        said: sentences on the data.
    """

    name: str
    fn: Callable[..., Any]
    params: Any
    tasks: tuple[Any, ...]
    batches: list[tuple[Any, ...]]
    blocks: str
    said: str


def books(data: Path, quick: bool) -> Case:
    """The project's language model: calibrated on its training text, scored on held-out books."""
    folder = ROOT / "examples/assets/books-6m"
    fn, params, _ = qjax.models.load(folder)
    tokenizer = qjax.models.tokenizer(folder)
    count = 2 if quick else 8
    with gzip.open(data / "text/books/train.txt.gz", "rt") as file:
        ids = np.asarray(tokenizer.encode(file.read()[:200_000], special=False), np.int32)[: count * 4 * 255]
    rows = np.concatenate([np.full((count * 4, 1), tokenizer.bos_id, np.int32), ids.reshape(-1, 255)], axis=1)
    text = read_text(data / "text/books/valid.txt")
    whole = text_blocks(tokenizer, text[:100_000], "B", context=256).first(8 if quick else 64)
    pieces = text_blocks(tokenizer, text[-40_000:], "A", context=256).first(16 if quick else 128)
    return Case(
        "books-6m",
        fn,
        params,
        (TextTask("B", whole), TextTask("A", pieces)),
        [(part,) for part in np.split(rows, count)],
        "layers/**",
        f"books-6m (the project's Llama, 6 M parameters): calibrated on {rows.size:,} tokens of its training text; "
        f"B: {whole.tokens:,} tokens of held-out books in blocks of 255, A: {pieces.tokens:,} tokens in "
        f"{len(pieces.blocks)} other paragraphs of them.",
    )


def stories(data: Path, quick: bool) -> Case:
    """stories260k, calibrated on stories that it generates itself."""
    folder = data / "models/stories260k"
    fn, params, _ = qjax.models.load(folder)
    tokenizer = qjax.models.tokenizer(folder)
    rows = own_stories(fn, params, tokenizer.bos_id, 8 if quick else 32, 64 if quick else 256)
    text = read_text(data / "text/tinystories-sample.txt")
    a = text_blocks(tokenizer, text, "A", context=512)
    a, b = a.first(10 if quick else None), text_blocks(tokenizer, text, "B", context=512).first(2 if quick else 32)
    return Case(
        "stories260k",
        fn,
        params,
        (TextTask("A", a), TextTask("B", b)),
        [(part,) for part in np.split(rows, len(rows) // 4)],
        "layers/**",
        f"stories260k: calibrated on {rows.size:,} tokens of stories that it generated itself (temperature 1, seed 0); "
        f"A: {len(a.blocks)} stories of the sample, {a.tokens:,} tokens; B: its first {len(b.blocks)} blocks of 511.",
    )


def own_stories(fn: Any, params: Any, bos: int, count: int, length: int, seed: int = 0) -> np.ndarray:
    """What a language model says by itself, int32 [count, length]: drawn at temperature 1 from one seed.

    A model that ends a story begins the next one in the same row, as in its training data.
    """
    prompt = np.full((count, 1), bos, np.int32)
    return fn.generate(params, prompt, length - 1, temperature=1.0, key=jax.random.key(seed)).astype(np.int32)


def vit(data: Path, quick: bool) -> Case:
    """ViT-Ti: 32 of the 500 images, drawn by seed 0, calibrate it; the other 468 are scored."""
    folder = data / "models/vit-tiny-patch16-224"
    fn, params, _ = qjax.models.load(folder)
    found = read_images(data / "images/imagenet-sample-500")
    drawn = np.sort(np.random.default_rng(0).choice(len(found), 32, replace=False))
    rest = np.setdiff1d(np.arange(len(found)), drawn)[: 20 if quick else None]
    prepare = qjax.models.image_processor(folder)
    pixels = np.asarray(prepare(found.only(drawn[: 8 if quick else None].tolist()).images))
    scored = found.only(rest.tolist())
    task = ImageTask("images", np.asarray(prepare(scored.images)), np.asarray(scored.labels), batch_size=52)
    return Case(
        "vit-tiny",
        fn,
        params,
        (task,),
        [(part,) for part in np.split(pixels, len(pixels) // 8)],
        "layers/**",
        f"vit-tiny (ViT-Ti/16): calibrated on {len(pixels)} photographs, scored on {len(rest)} others.",
    )


def minilm(data: Path, quick: bool) -> Case:
    """The sentence encoder: cosines of sentence pairs; calibrated on sentences of other books."""
    folder = data / "models/all-minilm-l6-v2"
    fn, params, _ = qjax.models.load(folder)
    tokenizer = qjax.models.tokenizer(folder)
    pairs = book_pairs(data, 12 if quick else 150)
    count, length = (16, 32) if quick else (128, 64)
    with gzip.open(data / "text/books/train.txt.gz", "rt") as file:
        ids = tokenizer.encode(file.read()[: count * length * 8], special=False)
    room = length - 2  # rows without padding: what stands in it would be counted
    first, last = tokenizer.encode("", special=True)
    rows = [[first, *ids[i * room : (i + 1) * room], last] for i in range(count)]
    tokens = np.asarray(rows, np.int32)
    task = SentenceTask("pairs", [tuple(tokenizer.encode(s)[:128] for s in pair) for pair in pairs])
    return Case(
        "minilm",
        fn,
        params,
        (task,),
        [(part, np.ones(part.shape, bool)) for part in np.split(tokens, count // 16)],
        "layers/**",
        f"minilm (all-MiniLM-L6-v2): calibrated on {tokens.size:,} tokens of other books; {len(pairs)} pairs of "
        "sentences of held-out books and of TinyStories, half of them neighbours and half drawn.",
    )


def book_pairs(data: Path, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs of sentences, ``count`` from each of two texts."""
    rng = np.random.default_rng(seed)
    names = ("text/books/valid.txt", "text/tinystories-sample.txt")
    return [pair for name in names for pair in sentence_pairs(read_text(data / name), count, rng)]


def resnet(data: Path, quick: bool) -> Case:
    """ResNet20 on CIFAR-10."""
    folder = data / "models/resnet20-cifar10"
    fn, params, _ = qjax.models.load(folder)
    prepare = qjax.models.image_processor(folder)
    seen, scored = (read_images(data / f"images/cifar10/{name}.npz") for name in ("calib-500", "test-2000"))
    scored = scored.first(100 if quick else None)
    pixels = np.asarray(prepare(seen.images[: 64 if quick else 256]))
    task = ImageTask("images", np.asarray(prepare(scored.images)), np.asarray(scored.labels), batch_size=100)
    return Case(
        "resnet20",
        fn,
        params,
        (task,),
        [(jnp.asarray(part),) for part in np.split(pixels, len(pixels) // 64)],
        "stage*/**",
        f"resnet20 (CIFAR-10): calibrated on {len(pixels)} training images, scored on {len(scored)} test images. "
        "Every weight has one scale per output channel here, whatever group the row names.",
    )


CASES: dict[str, Callable[[Path, bool], Case]] = {
    "books-6m": books,
    "stories260k": stories,
    "vit-tiny": vit,
    "minilm": minilm,
    "resnet20": resnet,
}
LANGUAGE = ("books-6m", "stories260k")
