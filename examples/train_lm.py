"""Train the small language model that comes with qjax: a byte-pair tokenizer and a Llama of 5.8 million parameters.

    python examples/train_lm.py --text books/train.txt.gz --valid books/valid.txt --work runs/lm --tokens 30e6

Everything lives in the work folder and the command can be repeated at any time: it goes on where the last checkpoint
left off (parameters, optimizer, step, place in the data, all exactly). The learning rate is constant after a short
warm-up and falls linearly to zero over the last part of the run ("warm-up, stable, decay"), so the end can be moved
while the run is on its way: write the new number of tokens into ``runs/lm/end``. ``runs/lm/log.csv`` has one line per
report. When it is done, ``examples/export_lm.py`` writes a Hugging Face folder.

Products run in bfloat16 with float32 accumulation (measured on 2 cores of a Zen 5: 1.45 times as fast as float32);
parameters, optimizer, norms, softmax and attention stay in float32. Unrolled layers: scanning them was 20 % slower.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from qjax.models.config import LlamaConfig
from qjax.models.llama import Llama

BOS = "<s>"


def options() -> argparse.Namespace:
    """Read the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, required=True, help="training text, UTF-8, .gz or plain")
    p.add_argument("--valid", type=Path, required=True, help="validation text, none of it in the training text")
    p.add_argument("--work", type=Path, required=True, help="folder for tokenizer, tokens, checkpoints and log")
    p.add_argument("--tokens", type=float, default=30e6, help="tokens to train on (default 30e6)")
    p.add_argument("--decay", type=float, default=0.3, help="share of the run in which the rate falls (default 0.3)")
    p.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (default 2e-3)")
    p.add_argument("--warmup", type=float, default=5e5, help="tokens of warm-up (default 5e5)")
    p.add_argument("--batch", type=int, default=16, help="sequences per step (default 16)")
    p.add_argument("--context", type=int, default=256, help="tokens per sequence; may change on resuming (default 256)")
    p.add_argument("--vocab", type=int, default=4096, help="size of the vocabulary (default 4096)")
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--mlp", type=int, default=768)
    p.add_argument("--max-context", type=int, default=512, help="context that the model declares (default 512)")
    p.add_argument("--float32", action="store_true", help="products in float32")
    p.add_argument("--every", type=float, default=180.0, help="seconds between checkpoints (default 180)")
    p.add_argument("--stop-after", type=int, help="steps after which to leave; the same command goes on")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args()


# Text and tokens


def read_text(path: Path) -> str:
    """Read a UTF-8 text, gzipped or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8")


def make_tokenizer(text: str, vocab: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer that puts ``<s>`` in front of every text."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tok.train_from_iterator(text.split("\n\n"), trainer)
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tok.token_to_id(BOS))]
    )
    return tok


def encode(tok: Tokenizer, text: str) -> np.ndarray:
    """Tokens of a whole text without ``<s>``: uint16 [n]."""
    paragraphs = text.split("\n\n")
    pieces = ["\n\n".join(paragraphs[i : i + 500]) + "\n\n" for i in range(0, len(paragraphs), 500)]
    ids = [np.array(e.ids, np.uint16) for e in tok.encode_batch_fast(pieces, add_special_tokens=False)]
    return np.concatenate(ids)


def prepare(o: argparse.Namespace) -> tuple[Tokenizer, np.ndarray, np.ndarray, float]:
    """Tokenizer, training and validation tokens (made once, then read back), and bytes per validation token."""
    o.work.mkdir(parents=True, exist_ok=True)
    file, train, valid = o.work / "tokenizer.json", o.work / "train.npy", o.work / "valid.npy"
    if not valid.exists():  # the last of the three to be written
        print("training the tokenizer ...", flush=True)
        text = read_text(o.text)
        tok = make_tokenizer(text, o.vocab)
        tok.save(str(file))
        print("encoding ...", flush=True)
        np.save(train, encode(tok, text))
        np.save(valid, encode(tok, read_text(o.valid)))
    tok, train_ids, valid_ids = Tokenizer.from_file(str(file)), np.load(train), np.load(valid)
    return tok, train_ids, valid_ids, len(read_text(o.valid).encode()) / len(valid_ids)


class Windows:
    """Draws training windows; a function of (seed, epoch, cursor) alone, so that a resumed run sees the same batches.

    Each epoch cuts the tokens at a random phase into windows of ``context`` and shuffles them. Every other window is
    moved to the next paragraph's start, because texts are evaluated from their beginning. ``<s>`` stands in front.
    """

    def __init__(self, ids: np.ndarray, context: int, bos: int, breaks: np.ndarray, seed: int) -> None:
        self.ids, self.context, self.bos, self.breaks, self.seed = ids, context, bos, breaks, seed
        self.drawn: tuple[int, np.ndarray] | None = None

    def starts(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch begin, in the order in which they are seen."""
        if self.drawn is None or self.drawn[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, self.context])
            phase = int(rng.integers(self.context))
            starts = rng.permutation(np.arange(phase, len(self.ids) - 2 * self.context, self.context))
            nearest = self.breaks[np.minimum(np.searchsorted(self.breaks, starts), len(self.breaks) - 1)]
            move = (np.arange(len(starts)) % 2 == 1) & (nearest >= starts) & (nearest < starts + self.context)
            self.drawn = (epoch, np.where(move, nearest, starts))
        return self.drawn[1]

    def batch(self, epoch: int, cursor: int, size: int) -> tuple[np.ndarray, int, int]:
        """``int32 [size, context + 1]`` and the next (epoch, cursor)."""
        starts = self.starts(epoch)
        if cursor + size > len(starts):
            epoch, cursor = epoch + 1, 0
            starts = self.starts(epoch)
        rows = [self.ids[s : s + self.context] for s in starts[cursor : cursor + size]]
        return np.pad(np.stack(rows).astype(np.int32), ((0, 0), (1, 0)), constant_values=self.bos), epoch, cursor + size


# Products in bfloat16, forward and backward; autodiff alone would make the backward ones float32 x bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def bfloat16_dot(x: jax.Array, w: jax.Array, dims: Any) -> jax.Array:
    """``dot_general`` of x [..., K] and a matrix w, both rounded to bfloat16, summed in float32."""
    return _bfloat16_forward(x, w, dims)[0]


def _bfloat16_forward(x: jax.Array, w: jax.Array, dims: Any) -> Any:
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32), (x, w)


def _bfloat16_backward(dims: Any, saved: Any, g: jax.Array) -> Any:
    x, w = saved
    ((_, (contracted,)), _) = dims
    g = g.astype(jnp.bfloat16)
    dx = jax.lax.dot_general(g, w, (((g.ndim - 1,), (1 - contracted,)), ((), ())), preferred_element_type=jnp.float32)
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    dw = jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return dx, dw if contracted == 0 else dw.T


bfloat16_dot.defvjp(_bfloat16_forward, _bfloat16_backward)


def product(x: jax.Array, w: jax.Array, dims: Any, precision: Any = None, **_: Any) -> jax.Array:
    """The form that Flax's linears call."""
    return bfloat16_dot(x, w, dims)


# Checkpoints: one .npz of named arrays, no pickle, written beside and renamed


def save_checkpoint(path: Path, tree: Any, meta: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old or the new one whole."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}
    beside = path.with_suffix(".tmp")
    with beside.open("wb") as file:
        np.savez(file, __meta__=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def load_checkpoint(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """Read a checkpoint into the structure of ``like``."""
    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(file["__meta__"].tobytes())
        named = jax.tree_util.tree_map_with_path(
            lambda p, _: jnp.asarray(file[jax.tree_util.keystr(p, simple=True, separator="/")]), like
        )
    return named, meta


# Training


def schedule(seen: float, end: float, o: argparse.Namespace) -> float:
    """Learning rate after ``seen`` of ``end`` tokens: warm-up, constant, then linearly to zero."""
    return o.rate * min(1.0, (seen + 1) / o.warmup, max(0.0, (end - seen) / (o.decay * end)))


def make_steps(model: Llama, exact: Llama) -> tuple[Any, Any, Any]:
    """The optimizer, the jitted training step and the jitted validation loss."""
    graph, graph_exact = nnx.graphdef(model), nnx.graphdef(exact)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    )

    def loss(graph: Any, params: Any, rows: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, rows: jax.Array, rate: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(functools.partial(loss, graph))(params, rows)
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state, value

    return optimizer, step, jax.jit(functools.partial(loss, graph_exact))


def validate(evaluate: Any, params: Any, ids: np.ndarray, bos: int, context: int, blocks: int | None) -> float:
    """Mean loss in nats per token over consecutive blocks of ``context - 1`` tokens behind ``<s>`` (protocol B)."""
    rows = ids[: len(ids) // (context - 1) * (context - 1)].reshape(-1, context - 1)
    if blocks is not None:  # spread over the text
        rows = rows[np.linspace(0, len(rows) - 1, min(blocks, len(rows))).astype(int)]
    rows = np.pad(rows.astype(np.int32), ((0, 0), (1, 0)), constant_values=bos)
    size = 8
    rows = rows[: len(rows) // size * size]
    return float(np.mean([evaluate(params, rows[i : i + size]) for i in range(0, len(rows), size)]))


def main() -> None:
    """Train until the end is reached."""
    o = options()
    tok, train_ids, valid_ids, bytes_per_token = prepare(o)
    bos = tok.token_to_id(BOS)
    newline = tok.encode("\n", add_special_tokens=False).ids[0]
    is_newline = train_ids == newline
    breaks = np.flatnonzero(is_newline[:-1] & ~is_newline[1:]) + 1
    config = LlamaConfig(
        vocab_size=tok.get_vocab_size(),
        hidden_size=o.hidden,
        intermediate_size=o.mlp,
        num_hidden_layers=o.layers,
        num_attention_heads=o.hidden // 64,
        num_key_value_heads=max(1, o.hidden // 128),
        head_dim=64,
        max_position_embeddings=o.max_context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=bos,
    )
    (o.work / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")
    exact = Llama(config, rngs=nnx.Rngs(o.seed))
    model = exact if o.float32 else Llama(config, dot_general=product, rngs=nnx.Rngs(o.seed))
    optimizer, step, evaluate = make_steps(model, exact)
    params = nnx.state(model)
    count = sum(x.size for x in jax.tree.leaves(params))
    state = optimizer.init(params)
    meta: dict[str, Any] = {"step": 0, "seen": 0, "epoch": 0, "cursor": 0, "context": o.context, "seconds": 0.0}
    checkpoint, log = o.work / "checkpoint.npz", o.work / "log.csv"
    if checkpoint.exists():
        (params, state), meta = load_checkpoint(checkpoint, (params, state))
        print(f"resuming at step {meta['step']}, {meta['seen'] / 1e6:.2f} M tokens", flush=True)
    if meta["context"] != o.context:  # windows of another length: their own epoch
        meta.update(context=o.context, epoch=meta["epoch"] + 1, cursor=0)
    windows = Windows(train_ids, o.context, bos, breaks, o.seed)
    print(f"{count:,} parameters, {len(train_ids):,} training and {len(valid_ids):,} validation tokens", flush=True)

    end_file, end = o.work / "end", float(o.tokens)
    began = saved = reported = time.monotonic()
    base, last_seen, losses, first = meta["seconds"], meta["seen"], [], meta["step"]
    while True:
        if end_file.exists() and end_file.read_text().strip():
            end = float(end_file.read_text())
        if meta["seen"] >= end or meta["step"] - first == o.stop_after:
            break
        rows, meta["epoch"], meta["cursor"] = windows.batch(meta["epoch"], meta["cursor"], o.batch)
        rate = schedule(meta["seen"], end, o)
        params, state, value = step(params, state, rows, jnp.float32(rate))
        losses.append(value)
        meta["step"] += 1
        meta["seen"] += o.batch * o.context
        now = time.monotonic()
        meta["seconds"] = base + now - began
        if meta["step"] % 20 == 0 and now - reported > 20:
            mean = float(np.mean([float(x) for x in losses]))
            if not np.isfinite(mean):
                raise SystemExit(f"the loss is {mean} at step {meta['step']}; resume with a lower --rate")
            now = time.monotonic()
            speed = (meta["seen"] - last_seen) / (now - reported)
            left = (end - meta["seen"]) / speed / 60
            full = now - saved > o.every
            valid = validate(evaluate, params, valid_ids, bos, o.max_context, 32) if full else None
            if full:
                save_checkpoint(checkpoint, (params, state), meta)
                saved = time.monotonic()
            report(log, meta, rate, mean, valid, speed, left)
            losses, last_seen, reported = [], meta["seen"], time.monotonic()
    save_checkpoint(checkpoint, (params, state), meta)
    if meta["seen"] < end:
        print(f"left at step {meta['step']}", flush=True)
        return
    valid = validate(evaluate, params, valid_ids, bos, o.max_context, None)
    bits = valid / np.log(2) / bytes_per_token
    final = {**meta, "valid_nats": valid, "valid_perplexity": float(np.exp(valid)), "bits_per_byte": bits}
    (o.work / "final.json").write_text(json.dumps({**final, "parameters": count}, indent=2) + "\n")
    print(f"done: validation perplexity {np.exp(valid):.3f} per token, {bits:.4f} bits per byte", flush=True)


def report(
    log: Path, meta: dict[str, Any], rate: float, loss: float, valid: float | None, speed: float, left: float
) -> None:
    """One line to the terminal and one to the log."""
    fresh = not log.exists()
    with log.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(["step", "tokens", "seconds", "rate", "train_loss", "valid_loss", "tokens_per_s"])
        shown = "" if valid is None else f"{valid:.4f}"
        writer.writerow(
            [meta["step"], meta["seen"], f"{meta['seconds']:.0f}", f"{rate:.2e}", f"{loss:.4f}", shown, f"{speed:.0f}"]
        )
    tail = "" if valid is None else f"  valid {valid:.4f}  (checkpoint)"
    print(
        f"step {meta['step']:6d}  {meta['seen'] / 1e6:7.2f} M tokens  rate {rate:.1e}  train {loss:.4f}  "
        f"{speed:6.0f} tok/s  {left:5.0f} min left{tail}",
        flush=True,
    )


if __name__ == "__main__":
    main()
