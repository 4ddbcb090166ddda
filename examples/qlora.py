"""Fine-tune the language model that comes with the repository by low-rank adapters: on float and on packed weights.

    python examples/qlora.py --text tinyshakespeare.txt [--bases float W4A16 NF4] [--steps 60] [--rank 8]

The base is frozen, float or packed (QLoRA), and only the adapters are trained, from the same start, on the same rows in
the same order. The last tenth of the text is never trained on; losses are measured on it, with the adapters beside the
weights and merged into them. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import qjax

HERE = Path(__file__).resolve().parent


def rows_of(tokenizer: Any, text: str, context: int) -> np.ndarray:
    """The text as rows [n, 1 + context] of tokens, each behind the token that starts a text."""
    ids = np.asarray(tokenizer.encode(text, special=False), np.int32)
    rows = ids[: len(ids) // context * context].reshape(-1, context)
    return np.pad(rows, ((0, 0), (1, 0)), constant_values=tokenizer.bos_id)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, packed ones as they are stored."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def mean_loss(logits: jax.Array, rows: jax.Array) -> jax.Array:
    """Nats per token of rows [B, 1 + T], from the logits [B, T, vocab] of all but their last tokens."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), rows[:, 1:]).mean()


def train(fn: Any, params: Any, train_rows: np.ndarray, test_rows: np.ndarray, o: argparse.Namespace) -> dict[str, Any]:
    """Train adapters on a frozen base; what it cost and gave."""
    example = train_rows[: o.batch, :-1]
    t = qjax.lora(fn, o.rank, alpha=2 * o.rank, key=jax.random.key(o.seed))
    state = t.init(params, example)
    qjax.check_trainable(state)
    optimizer = optax.adam(optax.cosine_decay_schedule(o.rate, o.steps))
    moments = optimizer.init(state)

    def step(state: Any, moments: Any, params: Any, rows: jax.Array) -> Any:
        gradient = jax.grad(lambda s: mean_loss(t.apply(params, s, rows[:, :-1])[0], rows))(state)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(state, updates), moments

    step = jax.jit(step, donate_argnums=(0, 1)).lower(state, moments, params, train_rows[: o.batch]).compile()

    def held_out(call: Any, *weights: Any) -> float:
        measure = jax.jit(lambda rows, *weights: mean_loss(call(*weights, rows[:, :-1]), rows))
        batches = test_rows.reshape(-1, o.batch, test_rows.shape[1])
        return float(np.mean([measure(rows, *weights) for rows in batches]))

    def adapted(params: Any, state: Any, tokens: jax.Array) -> jax.Array:
        return t.apply(params, state, tokens)[0]

    before = held_out(adapted, params, state)
    order = np.random.default_rng(o.seed).permutation(len(train_rows))
    start = time.perf_counter()
    for i in range(o.steps):
        chosen = np.take(order, range(i * o.batch, (i + 1) * o.batch), mode="wrap")
        state, moments = step(state, moments, params, train_rows[chosen])
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - start) / o.steps
    return {
        "before": before,
        "after": held_out(adapted, params, state),
        "merged": held_out(fn, t.merge(params, state, example)),
        "base": nbytes(params),
        "adapters": nbytes(state),
        "working": step.memory_analysis().temp_size_in_bytes,
        "seconds": seconds,
    }


def compare(o: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Train on each base; what each cost and gave, by its name."""
    fn, params, _ = qjax.models.load(o.model)
    params = qjax.astype(params, o.dtype)
    tokenizer = qjax.models.tokenizer(o.model)
    text = o.text.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    train_rows = rows_of(tokenizer, text[:cut], o.context)
    test_rows = rows_of(tokenizer, text[cut:], o.context)[: o.test_rows]
    if len(test_rows) < o.test_rows or len(train_rows) < o.batch:
        raise SystemExit(
            f"{o.text} has {len(train_rows)} rows of {o.context} tokens to train on and {len(test_rows)} behind them "
            f"to measure on; --batch {o.batch} and --test-rows {o.test_rows} need more text, or a smaller --context"
        )
    found = {}
    for name in o.bases:
        base, weights = fn, params
        if name != "float":
            base = qjax.quantize(fn, params, train_rows[: o.batch, :-1], recipe=name)
            weights = base.params
        found[name] = train(base, weights, train_rows, test_rows, o)
    return found


def main() -> None:
    """Compare and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, default=HERE / "assets" / "books-6m", help="a Hugging Face folder")
    p.add_argument("--text", type=Path, required=True, help="UTF-8 text to fine-tune on")
    p.add_argument("--bases", nargs="+", default=["float", "W4A16", "NF4"], help="'float', or presets of the base")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of float weights")
    p.add_argument("--rank", type=int, default=8, help="of the adapters (default 8)")
    p.add_argument("--steps", type=int, default=60, help="optimizer steps (default 60)")
    p.add_argument("--batch", type=int, default=8, help="rows in a step (default 8)")
    p.add_argument("--context", type=int, default=128, help="tokens in a row (default 128)")
    p.add_argument("--test-rows", type=int, default=64, help="rows to measure on, from the last tenth (default 64)")
    p.add_argument("--rate", type=float, default=5e-3, help="peak learning rate (default 5e-3)")
    p.add_argument("--seed", type=int, default=0, help="of A and of the order of rows (default 0)")
    o = p.parse_args()
    if o.test_rows % o.batch or o.test_rows < 1:
        p.error(f"--test-rows {o.test_rows} is no multiple of --batch {o.batch}")

    found = compare(o)
    first = found[o.bases[0]]
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("base", "loss before", "after", "change", "merged", "base MB", "adapters", "sum", "work", "s/step")
    for title in titles:
        table.add_column(title, justify="left" if title == "base" else "right")
    for name, f in found.items():
        share = (f["base"] + f["adapters"]) / (first["base"] + first["adapters"])
        table.add_row(
            name,
            f"{f['before']:.4f}",
            f"{f['after']:.4f}",
            f"{100 * (f['after'] / first['after'] - 1):+.2f} %",
            f"{f['merged']:.4f}",
            f"{f['base'] / 1e6:.2f}",
            f"{f['adapters'] / 1e6:.2f}",
            f"{100 * share:.0f} %",
            f"{f['working'] / 1e6:.0f}",
            f"{f['seconds']:.2f}",
        )
    console = Console(width=100)
    console.print(
        f"{o.model.name} ({o.dtype}) on {o.text.name}: rank {o.rank}, {o.steps} steps of {o.batch} x {o.context}\n"
        f"loss in nats per token on {o.test_rows} rows of the last tenth, which is not trained on\n"
    )
    console.print(table)


if __name__ == "__main__":
    main()
