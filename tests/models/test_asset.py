"""The language model that comes with the repository."""

from __future__ import annotations

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import models


@pytest.fixture(scope="module")
def asset(root):
    return root / "examples" / "assets" / "books-6m"


def test_folder(asset):
    fn, params, config = models.load(asset, dtype=None)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(jnp.bfloat16)}
    count = sum(x.size for x in jax.tree.leaves(params))
    assert 5e6 <= count <= 8e6
    assert config.hidden_size % 128 == config.intermediate_size % 128 == 0 and config.head_dim == 64
    assert sum(f.stat().st_size for f in asset.iterdir()) < 16 * 2**20
    assert f"{count:,} parameters" in (asset / "README.md").read_text()


def test_tokenizer(asset):
    tok = models.tokenizer(asset)
    text = 'It was the best of times;\n\n\t"naïve 北" he said — 1859.'
    ids = tok.encode(text)
    assert ids[0] == tok.bos_id == 0
    assert tok.decode(ids) == text


def test_perplexity_is_the_cards(asset, data_dir):
    fn, params, config = models.load(asset)
    tok = models.tokenizer(asset)
    ids = np.array(tok.encode((data_dir / "text" / "books" / "valid.txt").read_text("utf-8"), special=False))
    rows = ids[: len(ids) // 511 * 511].reshape(-1, 511)[::18]  # every 18th block: within 5 % of all of them
    rows = np.pad(rows, ((0, 0), (1, 0)), constant_values=tok.bos_id)
    score = jax.jit(
        lambda p, r: -jnp.take_along_axis(jax.nn.log_softmax(fn(p, r[:, :-1])), r[:, 1:, None], axis=2).mean()
    )
    nats = np.mean([score(params, rows[i : i + 4]) for i in range(0, len(rows) // 4 * 4, 4)])
    said = re.search(r"\*\*validation perplexity\*\* \| \*\*([\d.]+)\*\*", (asset / "README.md").read_text())
    assert np.exp(nats) == pytest.approx(float(said.group(1)), rel=0.05)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_it(asset, transformers):
    torch = importlib.import_module("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(asset, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(asset)
    fn, params, _ = models.load(asset)
    text = "The old man looked out of the window, and saw the ship."
    ids = models.tokenizer(asset).encode(text)
    assert tokenizer(text)["input_ids"] == ids
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits.numpy()
    ours = np.asarray(fn(params, np.array([ids])))
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
