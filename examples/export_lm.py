"""Turn a finished (or half-finished) run of ``train_lm.py`` into a Hugging Face folder with a model card.

    python examples/export_lm.py --work runs/lm --valid books/valid.txt --out examples/assets/books-6m

The weights are stored in bfloat16. Every figure of the card is measured on the folder as written, read back by
``qjax.models.load``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax import models
from qjax.models import LlamaConfig

CARD = """---
license: apache-2.0
language: en
library_name: qjax
tags: [llama, byte-pair, small]
---

# {name}

A Llama of {parameters:,} parameters trained from scratch on English books, made to be quantized: small enough to come
with the repository and to run anywhere in seconds, and with every width a multiple of 128 except for the heads of 64.

| | |
| --- | --- |
| architecture | LlamaForCausalLM: hidden {hidden_size}, MLP {intermediate_size}, {num_hidden_layers} layers, \
{num_attention_heads} heads of {head_dim}, {num_key_value_heads} key/value heads, tied embeddings, \
RoPE theta {rope_theta:g} |
| vocabulary | {vocab_size} byte-level BPE pieces, trained on the same text; `<s>` stands in front of every text |
| context | {max_position_embeddings} tokens |
| weights | bfloat16, `model.safetensors` |
| training text | 47.6 MB, 95 English books published 1600-1900: {unique:,} tokens |
| tokens seen | {seen:,} ({passes:.2f} passes) in {step:,} steps |
| validation text | 0.76 MB: parts of *A Tale of Two Cities* and *Treasure Island*, not in the training text |
| **validation perplexity** | **{perplexity:.3f}** per token, {bits:.4f} bits per byte |

Perplexity: the whole validation text is tokenised without `<s>` and cut into consecutive blocks of {block} tokens, each
behind `<s>`; all {block} are scored ({scored:,} tokens); float32 arithmetic on the stored weights.

## Training

`examples/train_lm.py`: AdamW (0.9, 0.98, decay 0.1), peak rate 2e-3, constant, then linearly to zero over the last part
of the run; 4,096 tokens per step; products in bfloat16 with float32 sums. {note}

## Sample

Greedy would loop, as small models do; at temperature 0.7, `jax.random.key(0)`:

> {sample}

## Limits

It writes mostly grammatical nineteenth-century prose without sense. It knows no facts, follows no instructions, has
seen no text after 1900 and repeats the views of its time. It is a yardstick for quantization and nothing else.

## Licence

Weights, tokenizer and this card: Apache-2.0. The books are in the public domain.
"""


def measure(folder: Path, text: str) -> dict[str, float]:
    """Validation figures of a folder: blocks behind ``<s>``, all tokens scored."""
    fn, params, config = models.load(folder)
    tok = models.tokenizer(folder)
    ids = np.array(tok.encode(text, special=False), np.int32)
    block = config.max_position_embeddings - 1
    rows = ids[: len(ids) // block * block].reshape(-1, block)
    rows = np.pad(rows, ((0, 0), (1, 0)), constant_values=tok.bos_id)

    forward = jax.jit(fn)
    total = 0.0
    for start in range(0, len(rows), 4):
        part = rows[start : start + 4]
        padded = np.pad(part, ((0, 4 - len(part)), (0, 0)))  # one shape, one compilation
        logs = np.asarray(jax.nn.log_softmax(forward(params, padded[:, :-1])))[: len(part)]
        total -= np.take_along_axis(logs, part[:, 1:, None], 2).astype(np.float64).sum()
    nats = total / (len(rows) * block)
    covered = len(tok.decode(ids[: len(rows) * block]).encode())
    bits = total / np.log(2) / covered
    return {"perplexity": float(np.exp(nats)), "bits": float(bits), "scored": len(rows) * block, "block": block}


def main() -> None:
    """Export."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, required=True, help="folder of the training run")
    p.add_argument("--valid", type=Path, required=True, help="validation text")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--note", default="", help="what else to say of the training, in sentences")
    o = p.parse_args()
    raw = json.loads((o.work / "config.json").read_text())
    config = LlamaConfig.from_hf(raw)
    fn = models.LanguageModel(config)
    with np.load(o.work / "checkpoint.npz", allow_pickle=False) as file:
        meta = json.loads(file["__meta__"].tobytes())
        leaves, tree = jax.tree_util.tree_flatten_with_path(fn.abstract_params())
        # the checkpoint holds (params, optimizer); a module's leaves end in /value
        named = ["0/" + jax.tree_util.keystr(path, simple=True, separator="/") + "/value" for path, _ in leaves]
        params = jax.tree.unflatten(tree, [file[name] for name in named])
    o.out.mkdir(parents=True, exist_ok=True)
    models.save_weights(o.out / "model.safetensors", params, config)
    write_json(o.out / "config.json", {**raw, "dtype": "bfloat16", "torch_dtype": "bfloat16"})
    write_json(o.out / "generation_config.json", {"bos_token_id": config.bos_token_id, "eos_token_id": None})
    shutil.copyfile(o.work / "tokenizer.json", o.out / "tokenizer.json")
    write_json(
        o.out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    )
    write_json(o.out / "special_tokens_map.json", {"bos_token": "<s>"})

    figures = measure(o.out, o.valid.read_text("utf-8"))
    fn, params, _ = models.load(o.out)
    tok = models.tokenizer(o.out)
    prompt = tok.encode("The old man looked out of the window, and")
    out = fn.generate(params, prompt, 100, temperature=0.7, key=jax.random.key(0))
    unique = int(np.load(o.work / "train.npy", mmap_mode="r").shape[0])
    facts = {
        "name": o.out.name,
        **raw,
        **meta,
        **figures,
        "note": o.note,
        "unique": unique,
        "passes": meta["seen"] / unique,
    }
    facts["parameters"] = sum(x.size for x in jax.tree.leaves(params))
    facts["sample"] = tok.decode(out[0]).replace("\n", "\n> ")
    (o.out / "README.md").write_text(CARD.format(**facts))
    print(f"{o.out}: perplexity {figures['perplexity']:.3f}, {figures['bits']:.4f} bits per byte")
    print(tok.decode(out[0]))


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
