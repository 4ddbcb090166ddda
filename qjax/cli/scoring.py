"""Scores of one model, or of a quantized model beside its float original: what ``eval`` and ``quantize`` share."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qjax import evaluate, models
from qjax.cli.calibrating import left_out, text_blocks
from qjax.cli.output import with_article
from qjax.errors import ModelError
from qjax.folders import Loaded


@dataclass(frozen=True)
class Scored:
    """Scores of a report, what they were measured on, and further facts for JSON."""

    scores: dict[str, float]
    on: str
    facts: dict[str, Any]


def check_data(loaded: Loaded, args: argparse.Namespace, pairs: bool = False) -> None:
    """Refuse data that this kind of model cannot be scored on.

    Args:
        loaded: the model.
        args: with text and images.
        pairs: whether text encoders are scored, on pairs of sentences of the text.

    Raises:
        ModelError: text for a classifier, images for a language model, or both; for a text encoder images, and text
            where no pairs are made of it.
    """
    if args.text and args.images:
        raise ModelError("give --text or --images, not both")
    if loaded.kind == "text encoder":
        if pairs and args.images:
            raise ModelError(f"{loaded.folder} holds a text encoder, which is scored on --text FILE")
        if not pairs and (args.text or args.images):
            raise ModelError(
                f"{loaded.folder} holds a text encoder ({loaded.config.architecture}), which has no perplexity and no "
                "classes to be scored on; `qjax study` scores recipes on pairs of sentences, and "
                "qjax.models.sentence_embedding gives the vectors of texts"
            )
        return
    needed = "--text FILE" if loaded.is_language_model else "--images DIR"
    if (args.images if loaded.is_language_model else args.text) is not None:
        raise ModelError(f"{loaded.folder} holds {with_article(loaded.kind)}, which is scored on {needed}")


def score(loaded: Loaded, original: Loaded | None, args: argparse.Namespace) -> Scored:
    """Score a model on ``args.text`` or ``args.images``.

    Args:
        loaded: the model.
        original: its float original to compare with, or None.
        args: with text, images, protocol, context and limit.
    """
    return _on_text(loaded, original, args) if args.text else _on_images(loaded, original, args)


def _on_text(loaded: Loaded, original: Loaded | None, args: argparse.Namespace) -> Scored:
    blocks = text_blocks(loaded, args.text, args)
    rows = left_out(loaded, args.text, len(blocks.blocks), blocks.protocol, blocks.context)
    blocks = blocks.only(rows).first(args.limit)
    if original is None:
        scores = evaluate.perplexity(loaded.fn, loaded.params, blocks).scores()
    else:
        scores = evaluate.divergence(original.fn, original.params, loaded.fn, loaded.params, blocks).scores()
    facts = {"text": str(args.text), "protocol": args.protocol, "context": blocks.context, "blocks": len(blocks.blocks)}
    return Scored(scores, f"{Path(args.text).name}, protocol {args.protocol}, {blocks.tokens:,} tokens", facts)


def _on_images(loaded: Loaded, original: Loaded | None, args: argparse.Namespace) -> Scored:
    data = evaluate.read_images(args.images)
    rows = left_out(loaded, args.images, len(data))
    data = data.only(rows).first(args.limit)
    prepare = models.image_processor(loaded.folder)
    both = [
        evaluate.accuracy(m.fn, m.params, data.images, data.labels, prepare=prepare, keep_logits=original is not None)
        for m in (loaded, original)
        if m is not None
    ]
    scores = both[0].scores()
    if original is not None:
        reference = both[1]
        apart = evaluate.logit_divergence(reference.logits, both[0].logits)
        scores |= {f"float_{k}": v for k, v in reference.scores().items() if k != "images"}
        scores |= {"recovery": evaluate.recovery(both[0].top1, reference.top1), **apart.scores()}
    return Scored(scores, f"{Path(args.images).name}, {len(data):,} images", {"images_from": str(args.images)})


def as_json(scored: Scored) -> dict[str, Any]:
    """Scores and facts as one JSON object; counts as whole numbers."""
    whole = ("tokens", "correct", "float_correct", "images")
    return {**scored.facts, **{k: int(v) if k in whole else v for k, v in scored.scores.items()}}
