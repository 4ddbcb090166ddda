"""Recover what rounding to few bits costs a language model, by training it as it will be stored.

    python examples/qat.py --text books/train.txt.gz --valid books/valid.txt --work runs/w3 --bits 3

The float model teaches: the loss is the KL divergence of the rounded model from it on training text (LLM-QAT, Liu et
al. 2023, section 2.2, there on text that the model wrote). Weights are rounded to nearest in groups in every step, with
ranges of the moment or, with ``--learned``, steps that are trained too. Parameters, optimizer and learned steps lie in
the work folder, so the same command goes on where it was killed, exactly; the packed model is written there at the end.

Prints perplexity and KL divergence on the validation text of the float model, of the model rounded to nearest, and of
the trained one, and how much of the gap in perplexity the training has closed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table

import qjax
from qjax.evaluate import divergence, text_blocks

HERE = Path(__file__).resolve().parent


def options() -> argparse.Namespace:
    """Read the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, default=HERE / "assets" / "books-6m", help="a Hugging Face folder")
    p.add_argument("--text", type=Path, required=True, help="training text, UTF-8, .gz or plain")
    p.add_argument("--valid", type=Path, required=True, help="validation text")
    p.add_argument("--work", type=Path, required=True, help="folder for checkpoints and the result")
    p.add_argument("--bits", type=int, default=3)
    p.add_argument("--group", type=int, default=128, help="0: a scale per output channel")
    p.add_argument("--learned", action="store_true", help="train the scales too (LSQ)")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--batch", type=int, default=8, help="sequences per step")
    p.add_argument("--context", type=int, default=256)
    p.add_argument("--rate", type=float, default=3e-4, help="learning rate of the weights, falls to zero by a cosine")
    p.add_argument("--scored", type=int, default=16384, help="tokens of the validation text that are scored")
    p.add_argument("--every", type=int, default=25, help="steps between checkpoints")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args()


def read_text(path: Path) -> str:
    """A text file, gzipped or not."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def windows(ids: np.ndarray, bos: int, o: argparse.Namespace, step: int) -> np.ndarray:
    """The sequences of one step: a function of seed and step, so that a resumed run sees what it would have seen."""
    rng = np.random.default_rng((o.seed, step))
    starts = rng.integers(0, len(ids) - o.context, o.batch)
    return np.stack([np.concatenate([[bos], ids[s : s + o.context - 1]]) for s in starts]).astype(np.int32)


def recipe(o: argparse.Namespace) -> qjax.Recipe:
    """Group-wise integers everywhere but in embeddings and the head."""
    fmt = qjax.Int(o.bits, group=o.group) if o.group else qjax.Int(o.bits)
    return qjax.Recipe(
        [
            qjax.Rule("**/lm_head/**", skip=True, optional=True),
            qjax.Rule("**", op="embedding", skip=True, optional=True),
            qjax.Rule("**/embed*/**", skip=True, optional=True),
            qjax.Rule("**", weights=qjax.learned(fmt, qjax.MSE()) if o.learned else fmt, clamp_group=True),
        ],
        name=f"W{o.bits}{'-learned' if o.learned else ''}",
    )


def main() -> None:
    """Train, measure, write."""
    o = options()
    console = Console()
    fn, params, config = qjax.models.load(o.model)
    tokenizer = qjax.models.tokenizer(o.model)
    bos = tokenizer.bos_id
    ids = np.asarray(tokenizer.encode(read_text(o.text)[: 5 * o.steps * o.batch * o.context], special=False), np.int32)
    valid = text_blocks(tokenizer, read_text(o.valid)[: 7 * o.scored // 2], protocol="B", context=o.context)

    example = jax.ShapeDtypeStruct((o.batch, o.context), jnp.int32)
    t = qjax.fake_quant(fn, recipe(o))
    rates = {"params": o.rate, "state": o.rate}
    optimizer = optax.multi_transform(
        {k: optax.adam(optax.cosine_decay_schedule(rate, o.steps)) for k, rate in rates.items()},
        {"params": "params", "state": "state"},
    )
    trained = {"params": params, "state": t.init(params, windows(ids, bos, o, 0))}
    run = {"trained": trained, "moments": optimizer.init(trained)}
    teacher = params

    def loss(trained: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        logits, state = t.apply(trained["params"], trained["state"], tokens)
        want = jax.nn.log_softmax(fn(teacher, tokens))
        kl = jnp.sum(jnp.exp(want) * (want - jax.nn.log_softmax(logits)), axis=-1)
        return kl.mean(), state

    @jax.jit
    def train(run: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(run["trained"], tokens)
        updates, moments = optimizer.update(grads, run["moments"])
        trained = optax.apply_updates({**run["trained"], "state": state}, updates)
        return {"trained": trained, "moments": moments}, value

    o.work.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) for k, v in vars(o).items() if k not in ("work", "every", "scored", "valid")}
    kept = o.work / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        raise SystemExit(f"{o.work} holds a run with other settings; take another --work, or delete it")
    kept.write_text(json.dumps(settings, indent=1))
    with ocp.CheckpointManager(
        (o.work / "checkpoints").resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as checkpoints:
        step = checkpoints.latest_step() or 0
        if step:
            run = checkpoints.restore(step, args=ocp.args.StandardRestore(run))
            console.print(f"going on from step {step}")
        begun = time.perf_counter()
        while step < o.steps:
            run, value = train(run, windows(ids, bos, o, step))
            step += 1
            if step % o.every == 0 or step == o.steps:
                value = float(value)
                checkpoints.save(step, args=ocp.args.StandardSave(run))
                seconds = time.perf_counter() - begun
                console.print(f"step {step}/{o.steps}  KL {value:.4f}  {seconds:.0f} s")
        checkpoints.wait_until_finished()

    model = t.convert(run["trained"]["params"], run["trained"]["state"], example)
    rounded = qjax.quantize(fn, params, example, recipe=recipe(o))
    qjax.save(o.work / "model", model)
    found = {
        "rounded to nearest": divergence(fn, teacher, rounded, rounded.params, valid),
        "trained": divergence(fn, teacher, model, model.params, valid),
    }
    table = Table(
        title=f"{recipe(o).name}, groups of {o.group or 'a channel'}, {o.steps} steps; {valid.tokens:,} tokens"
    )
    for column in ("", "perplexity", "KL, nats", "top-1 agreement"):
        table.add_column(column, justify="right" if column else "left")
    first = found["trained"]
    table.add_row("float", f"{math.exp(first.nll_a):.2f}", "", "")
    for name, d in found.items():
        table.add_row(name, f"{math.exp(d.nll_b):.2f}", f"{d.kl:.4f}", f"{100 * d.agreement:.1f} %")
    console.print(table)
    before = math.exp(found["rounded to nearest"].nll_b)
    closed = (before - math.exp(first.nll_b)) / (before - math.exp(first.nll_a))
    console.print(f"{100 * closed:.1f} % of the gap in perplexity closed; packed model in {o.work / 'model'}")
    (o.work / "result.json").write_text(json.dumps({"recovered": closed, **{k: d.scores() for k, d in found.items()}}))


if __name__ == "__main__":
    main()
