"""The training script in miniature: it learns, a run cut in two equals a whole one, and its export loads."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest

from qjax import models


def script(root, name):
    spec = importlib.util.spec_from_file_location(name, root / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Sentences of a dozen words: quickly learnt."""
    folder = tmp_path_factory.mktemp("books")
    rng = np.random.default_rng(0)
    words = np.array("the a small old ship man sea wind saw heard left found".split())
    sentences = [" ".join(rng.choice(words, 8)) + "." for _ in range(600)]
    (folder / "train.txt").write_text("\n\n".join(sentences[:500]))
    (folder / "valid.txt").write_text("\n\n".join(sentences[500:]))
    return folder


def train(monkeypatch, root, books, work, *more):
    sizes = "--vocab 300 --layers 1 --hidden 128 --mlp 128 --batch 2 --context 16 --max-context 32 --warmup 64"
    text = ["--text", str(books / "train.txt"), "--valid", str(books / "valid.txt")]
    monkeypatch.setattr(sys, "argv", ["train", *text, "--work", str(work), *sizes.split(), "--tokens", "1280", *more])
    script(root, "train_lm").main()


@pytest.mark.slow
def test_cut_in_two_is_whole(monkeypatch, root, books, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(monkeypatch, root, books, whole)
    train(monkeypatch, root, books, cut, "--stop-after", "17")
    assert not (cut / "final.json").exists()
    train(monkeypatch, root, books, cut)
    assert "resuming at step 17" in capsys.readouterr().out
    with np.load(whole / "checkpoint.npz") as one, np.load(cut / "checkpoint.npz") as two:
        assert set(one.files) == set(two.files)
        for name in set(one.files) - {"__meta__"}:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    final = json.loads((cut / "final.json").read_text())
    assert final["seen"] == 1280
    assert final["valid_nats"] < 0.95 * np.log(300), "better than a guess"

    out = tmp_path / "asset"
    monkeypatch.setattr(
        sys, "argv", ["export", "--work", str(cut), "--valid", str(books / "valid.txt"), "--out", str(out)]
    )
    script(root, "export_lm").main()
    fn, params, config = models.load(out)
    assert config.tie_word_embeddings and config.max_position_embeddings == 32
    card = (out / "README.md").read_text()
    perplexity = float(card.split("**validation perplexity** | **")[1].split("**")[0])
    assert perplexity == pytest.approx(np.exp(final["valid_nats"]), rel=0.02)  # bfloat16, and all blocks
    assert models.tokenizer(out).encode("the sea")[0] == config.bos_token_id


def test_rate(root):
    module = script(root, "train_lm")
    options = type("Options", (), {"rate": 1.0, "warmup": 10.0, "decay": 0.5})
    rates = [module.schedule(seen, 100, options) for seen in (0, 4, 9, 30, 50, 75, 100)]
    assert rates == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0])


def test_bfloat16_product_and_gradients(root):
    import jax
    import jax.numpy as jnp

    module = script(root, "train_lm")
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 3, 16)).astype(np.float32), rng.normal(size=(2, 3, 8)).astype(np.float32)
    for shape, contracted in (((16, 8), 0), ((8, 16), 1)):
        w = rng.normal(size=shape).astype(np.float32)
        dims = (((2,), (contracted,)), ((), ()))
        ours, pull = jax.vjp(lambda x, w, d=dims: module.product(x, w, d), x, w)
        theirs, pull_exact = jax.vjp(lambda x, w, d=dims: jax.lax.dot_general(x, w, d), x, w)
        for a, b in zip((ours, *pull(g)), (theirs, *pull_exact(g)), strict=True):
            assert a.shape == b.shape and a.dtype == jnp.float32
            np.testing.assert_allclose(a, b, rtol=0, atol=0.02 * np.abs(b).max())
