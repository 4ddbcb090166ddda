"""Quantize the language model that comes with the repository, compare it with itself in float, write the report.

    make demo                       or: python examples/demo.py [--model DIR] [--text FILE] [--out DIR]

Nothing is downloaded. The text is a passage written for this demonstration, so it is in nobody's training data; every
format is measured on it against the float model: KL divergence in nats per token, how often the most likely next token
is the same, perplexity, and the time of one forward pass side by side with float.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import qjax
from qjax.evaluate import divergence, perplexity, text_blocks

HERE = Path(__file__).resolve().parent
RECIPES = ("W8A8", "W8A16", "FP8_DYNAMIC", "NF4", "MXFP4A16", "W4A16", "W3A16", "W2A16")
PROMPT = "The old sailor took off his hat and"


def milliseconds(fn, params, tokens, float_fn, float_params) -> tuple[float, float]:
    """Median time of one call of ``fn`` and of the float function, measured in turns."""
    for f, p in ((fn, params), (float_fn, float_params)):
        jax.block_until_ready(f(p, tokens))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(7):
        for slot, (f, p) in enumerate(((fn, params), (float_fn, float_params))):
            start = time.perf_counter()
            jax.block_until_ready(f(p, tokens))
            times[slot].append(1000 * (time.perf_counter() - start))
    return float(np.median(times[0])), float(np.median(times[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "assets" / "books-6m", help="a Hugging Face folder")
    parser.add_argument("--text", type=Path, default=HERE / "assets" / "passage.txt", help="UTF-8 text to compare on")
    parser.add_argument("--out", type=Path, default=HERE.parent / "out" / "demo", help="folder for the report")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="presets to compare")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)

    fn, params, config = qjax.models.load(args.model)
    tokenizer = qjax.models.tokenizer(args.model)
    text = args.text.read_text(encoding="utf-8")
    tokens = np.asarray([tokenizer.encode(text)[:256]], np.int32)
    float_fn = jax.jit(fn)
    float_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    blocks = text_blocks(tokenizer, text, "B", context=min(256, config.max_position_embeddings))
    base = perplexity(fn, params, blocks, show=False).perplexity
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    console.print(f"{args.model.name}: {size:,} parameters, compared on {blocks.tokens} tokens of {args.text.name}\n")

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("recipe", "MB", "smaller", "KL to float", "same top-1", "perplexity", "forward", "speed"):
        table.add_column(title, justify="left" if title == "recipe" else "right")
    _, unit = milliseconds(float_fn, params, tokens, float_fn, params)
    table.add_row("float32", f"{float_bytes / 1e6:.2f}", "", "", "", f"{base:.2f}", f"{unit:.1f} ms", "")
    models = {}
    with console.status("quantizing") as status:
        for name in args.recipes:
            status.update(f"quantizing and measuring {name}")
            model = qjax.quantize(fn, params, tokens, recipe=name, name=args.model.name)
            apart = divergence(fn, params, model, model.params, blocks, show=False)
            score = perplexity(model, model.params, blocks, show=False).perplexity
            own, float_time = milliseconds(model, model.params, tokens, float_fn, params)
            table.add_row(
                name,
                f"{model.report.stored_bytes / 1e6:.2f}",
                f"{model.report.compression:.2f}×",
                f"{apart.kl:.5f}",
                f"{100 * apart.agreement:.1f} %",
                f"{score:.2f}",
                f"{own:.1f} ms",
                f"{float_time / own:.2f}×",
            )
            report = model.report.with_scores(
                kl=apart.kl, agreement=apart.agreement, perplexity=score, float_perplexity=base
            )
            models[name] = (model, report)
    console.print(table)
    console.print("speed: the float model's time divided by this one's, both measured in turns on this machine\n")

    name = "W4A16" if "W4A16" in models else args.recipes[-1]
    model, report = models[name]
    console.print(report.text(width=110))
    console.print(f"{model.explain('layers/0/mlp/down/kernel')}\n")

    ids = tokenizer.encode(PROMPT)
    cache = fn.init_cache(1, len(ids) + 40)
    for title, bind, p in (("float", lambda f: f, params), (name, model.bind, model.params)):
        out = qjax.models.generate(
            p,
            ids,
            40,
            prefill=bind(fn.prefill),
            decode_step=bind(fn.decode_step),
            cache=cache,
            temperature=0.7,  # greedy text of a model this small runs in circles
            key=jax.random.key(1),
        )
        console.print(f"[bold]{title}[/bold]: {tokenizer.decode(out[0])}", highlight=False)
    files = report.save(args.out)
    console.print(f"\nThe report with its plots: {next(f for f in files if f.suffix == '.html')}")


if __name__ == "__main__":
    main()
