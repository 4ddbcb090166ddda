"""``qjax search`` on a tiny language model."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import qjax
from qjax.cli import main
from qjax.supernet import Space, load_trained
from tests.helpers.saved_supernets import save_supernet

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a language model over letters."""
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    letters = {t: i for i, t in enumerate(["<s>", "</s>", *"\nabcdefghijklmnopqrstuvwxyz ,."])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(0)
    _, abstract, config = qjax.models.abstract(folder)
    params = jax.tree.map(lambda s: 0.3 * rng.normal(size=s.shape).astype(np.float32), abstract)
    qjax.models.save_weights(folder / "model.safetensors", params, config, dtype=np.float32)
    (folder.parent / "text.txt").write_text("the cat sat\n\na dog ran far away\n\nhi there\n")
    return folder


def ran(capsys, *args):
    code = main(["search", *map(str, args)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_search_then_quantize(capsys, folder, tmp_path):
    text, out = folder.parent / "text.txt", tmp_path / "found"
    args = (folder, "--recipes", "W4A16,W8A16", "--text", text, "--samples", "2", "--out", out)
    code, said, err = ran(capsys, *args, "--budget", "7.2 bits", "--tie", "q_proj,k_proj,v_proj")
    assert code == 0, err
    assert "5 groups of layers, budget 7.2 bits" in said and "the least that the budget allows" in said
    assert "recipe.toml" in said and said.count("bits per weight") == 1 and " kB in all" in said
    files = {"recipe.toml", "sensitivities.json", "front.json", "front.svg"}
    assert {p.name for p in out.iterdir()} == {"measured", *files}
    recipe = qjax.recipe(str(out / "recipe.toml"))
    names = {r.match: r for r in recipe.rules}
    assert "layers/0/attn/q_proj/kernel" in names
    of_qkv = {names[f"layers/0/attn/{p}_proj/kernel"].weights for p in "qkv"}
    assert len(of_qkv) == 1, "they are tied"
    asked = ["--recipe", str(out / "recipe.toml"), "--out", str(tmp_path / "q"), "--json"]
    assert main(["quantize", str(folder), *asked]) == 0
    stored = json.loads(capsys.readouterr().out)
    front = json.loads((out / "front.json").read_text())
    assert stored["stored_bytes"] == front["stored_bytes"] and stored["bits_per_weight"] <= 7.2

    lines = (out / "measured" / "measured.jsonl").read_text()
    code, said, _ = ran(capsys, *args, "--budget", "2 MB", "--tie", "q_proj,k_proj,v_proj", "--json")
    assert code == 0 and json.loads(said)["counts"] == {"float": 5}
    assert (out / "measured" / "measured.jsonl").read_text() == lines, "nothing is measured again"


@pytest.mark.slow
def test_generations_on_a_space(capsys, folder, tmp_path):
    text, out = folder.parent / "text.txt", tmp_path / "found"
    tie = ("--tie", "q_proj,k_proj,v_proj", "--tie", "gate,up")
    args = (folder, "--space", "2,4-5/16", "--text", text, "--samples", "2", "--protocol", "B", "--context", "8", *tie)
    more = ("--generations", "3", "--population", "8", "--out", out, "--budget", "6 bits")
    code, said, err = ran(capsys, *args, *more)
    assert code == 0, err
    assert "KL to float of the whole, measured" in said and "Lagrangian front" in said and "int5" in said
    front = json.loads((out / "front.json").read_text())
    assert set(front["curves"]) == {"Lagrangian", "NSGA-II"}
    assert front["whole"] == front["curves"]["NSGA-II"][-1]["loss"]
    assert "NSGA-II, measured" in (out / "front.svg").read_text()
    formats = {r.weights for r in qjax.recipe(str(out / "recipe.toml")).rules}
    assert formats <= {None, *(qjax.Int(b, group=16) for b in (2, 4, 5))}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--budget", "six"), "say '6 bits'"),
        (("--budget", "6 bits"), "search needs data"),
        (("--budget", "6 bits", "--text", "TEXT", "--space", "1-4"), "bits outside 2 to 8"),
        (("--budget", "6 bits", "--text", "TEXT", "--space", "few"), "give bits and a group"),
        (("--budget", "6 bits", "--text", "TEXT", "--generations", "2", "--population", "7"), "even number"),
        (("--budget", "2 ms", "--text", "TEXT"), "needs --device"),
        (("--budget", "1 bits", "--text", "TEXT", "--samples", "1"), "below the smallest possible"),
        (("--budget", "2 ms", "--device", "h300", "--text", "TEXT", "--samples", "1"), "unknown device 'h300'"),
        (("--budget", "6 bits", "--text", "TEXT", "--recipes", "W5"), "W5"),
        (("--budget", "6 bits", "--text", "TEXT", "--recipes", "W4A16,w4a16"), "two have one name"),
        (("--budget", "6 bits", "--text", "TEXT", "--samples", "99"), "ask for fewer"),
    ],
)
def test_mistakes(capsys, folder, tmp_path, args, says):
    given = [str(folder.parent / "text.txt") if a == "TEXT" else a for a in args]
    code, _, err = ran(capsys, folder, *given, "--by", "output", "--out", tmp_path / "out")
    assert code == 2 and says in err and "Traceback" not in err
    assert not (tmp_path / "out").exists(), "said before anything is measured"


@pytest.mark.slow
def test_a_subnet_of_a_language_model_is_searched_and_packed(capsys, folder, tmp_path):
    fn, params, _ = qjax.models.load(folder)
    tokens = np.zeros((1, 8), np.int32)
    space = Space((2, 4, 8), (0,), weight_symmetric=(True,), act_symmetric=(True,), groups=(16, 8), ends=None)
    save_supernet(tmp_path / "job", fn, params, space, tokens)
    out = tmp_path / "out"
    args = [folder, "--supernet", tmp_path / "job", "--text", folder.parent / "text.txt", "--out", out, "--group", "8"]
    args += ["--samples", "3", "--population", "8", "--generations", "1", "--budget", "4 bits"]
    code, said, err = ran(capsys, *args, "--json")
    assert code == 0, err
    data = json.loads(said)
    choice = np.array(data["choice"])
    assert (choice[:, 5] == 1).all() and (choice[:, 1] == 0).all() and data["average_bits"][0] <= 4
    t, trained = load_trained(tmp_path / "job", fn, params, tokens)
    recipe = qjax.recipe(str(out / "recipe.toml"))
    assert recipe.hash == t.recipe(trained.params, trained.state, choice, tokens).hash
    packed = t.convert(trained.params, trained.state, choice, tokens)
    ours = t.apply(trained.params, trained.state, choice, tokens)[0]
    np.testing.assert_allclose(packed(packed.params, tokens), ours, atol=1e-5)
