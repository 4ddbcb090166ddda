"""``qjax generate``."""

from __future__ import annotations

import argparse
import sys
import time

from qjax import models
from qjax.cli.output import print_json, say, waiting, with_article
from qjax.errors import DataError, ModelError
from qjax.folders import Loaded, load_folder


def run(args: argparse.Namespace) -> None:
    """Continue a prompt; the text appears as it is made."""
    with waiting("reading weights"):
        loaded = load_folder(args.folder)
    if not loaded.is_language_model:
        raise ModelError(f"{args.folder} holds {with_article(loaded.kind)}; generate needs a language model")
    prompt = sys.stdin.read().rstrip("\n") if args.prompt == "-" else args.prompt
    tokenizer = models.tokenizer(loaded.folder)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise DataError("the prompt is empty and this tokenizer begins texts with no token of its own; give a prompt")
    count = _room(loaded, len(ids), args.max_tokens)
    start = time.monotonic()
    if not args.json:
        _write(tokenizer.decode(ids))
    new: list[int] = []
    shown = tokenizer.decode(ids)
    for token in _tokens(loaded, ids, count, args):
        new.append(token)
        if not args.json:
            text = tokenizer.decode([*ids, *new])
            # A character of several tokens shows as a replacement mark until it is whole.
            if not text.endswith("\ufffd"):
                _write(text[len(shown) :])
                shown = text
    seconds = time.monotonic() - start
    if args.json:
        whole = tokenizer.decode([*ids, *new])
        print_json(
            {
                "model": loaded.name,
                "prompt": prompt,
                "text": whole,
                "completion": whole[len(tokenizer.decode(ids)) :],
                "prompt_tokens": len(ids),
                "tokens": new,
                "seconds": round(seconds, 3),
                "temperature": args.temperature,
                "seed": args.seed,
            }
        )
    else:
        _write("\n")
        say(f"{len(new)} tokens in {seconds:.1f} s, compilation included")


def _room(loaded: Loaded, used: int, wanted: int) -> int:
    """How many new tokens fit behind the prompt."""
    context = loaded.config.max_position_embeddings
    if used >= context:
        raise DataError(f"the prompt has {used} tokens and the model reads {context}; give a shorter prompt")
    if used + wanted > context:
        say(f"the model reads {context} tokens: stopping after {context - used} new ones")
    return min(wanted, context - used)


def _tokens(loaded: Loaded, ids: list[int], count: int, args: argparse.Namespace):  # noqa: ANN202
    import jax
    import numpy as np

    stop = loaded.config.eos_token_id
    stop = stop if isinstance(stop, tuple) else (stop,)
    stream = models.stream(
        loaded.params,
        np.asarray(ids, np.int32),
        count,
        prefill=loaded.bind(loaded.base.prefill),
        decode_step=loaded.bind(loaded.base.decode_step),
        cache=loaded.base.init_cache(1, len(ids) + count),
        temperature=args.temperature,
        key=jax.random.key(args.seed),
    )
    for tokens in stream:
        token = int(tokens[0])
        if token in stop:
            return
        yield token


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
