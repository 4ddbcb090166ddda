"""The real checkpoints: published figures reproduced with nothing but this package's models and NumPy."""

from __future__ import annotations

import csv

import jax
import numpy as np
import pytest

from qjax import models


@pytest.mark.slow
def test_stories260k_perplexity(data_dir):
    """Protocol A: each blank-line separated story alone, behind ``<s>``, cut to 512 tokens."""
    folder = data_dir / "models" / "stories260k"
    fn, params, _ = models.load(folder)
    tok = models.tokenizer(folder)
    text = (data_dir / "text" / "tinystories-sample.txt").read_text("utf-8")
    stories = [tok.encode(s.strip("\n"))[:512] for s in text.split("\n\n") if s.strip()]
    assert len(stories) == 141 and all(s[0] == tok.bos_id for s in stories)
    score = jax.jit(lambda p, t: jax.nn.log_softmax(fn(p, t)))
    total, count = 0.0, 0
    for start in range(0, len(stories), 16):
        batch = stories[start : start + 16]
        rows = np.zeros((16, 512), np.int32)  # what stands behind a story cannot change its own positions
        for row, story in zip(rows, batch, strict=False):
            row[: len(story)] = story
        logs = np.asarray(score(params, rows), np.float64)
        for log, story in zip(logs, batch, strict=False):
            total -= log[np.arange(len(story) - 1), story[1:]].sum()
            count += len(story) - 1
    assert count == 56046
    assert np.exp(total / count) == pytest.approx(4.294, abs=5e-4)


def test_stories260k_text(data_dir):
    folder = data_dir / "models" / "stories260k"
    fn, params, _ = models.load(folder)
    tok = models.tokenizer(folder)
    out = fn.generate(params, tok.encode("Once upon a time"), 24)
    assert tok.decode(out[0]).startswith("Once upon a time, there was a little girl named Lily. She loved to play")


@pytest.mark.slow
def test_vit_tiny_accuracy(data_dir):
    pytest.importorskip("PIL")
    folder, photos = data_dir / "models" / "vit-tiny-patch16-224", data_dir / "images" / "imagenet-sample-500"
    fn, params, config = models.load(folder)
    assert config.labels[0] == "tench"
    process = models.image_processor(folder)
    with (photos / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    classify = jax.jit(lambda p, x: jax.lax.top_k(fn(p, x), 5)[1])
    top1 = top5 = 0
    for start in range(0, 500, 50):
        batch = rows[start : start + 50]
        best = np.asarray(classify(params, process([photos / r["file"] for r in batch])))
        truth = np.array([int(r["class_index"]) for r in batch])
        top1 += int((best[:, 0] == truth).sum())
        top5 += int((best == truth[:, None]).any(axis=1).sum())
    assert (top1, top5) == (401, 472)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_tokenizers_agree_with_transformers(data_dir, transformers):
    folder = data_dir / "models" / "stories260k"
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), models.tokenizer(folder)
    text = (data_dir / "text" / "tinystories-sample.txt").read_text("utf-8")[:5000]
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
