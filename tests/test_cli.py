"""The command line, in process, on a tiny language model and a tiny classifier that are written here."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import qjax.report
from qjax.cli import main
from qjax.cli.output import print_rich
from qjax.folders import fingerprint, load_folder, source_size

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
VIT = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 7,
    "id2label": {str(i): f"class {i}" for i in range(7)},
}
TEXT = "the cat sat\n\na dog ran far away\n\nhi there\n"


def write_weights(folder, seed):
    """Random weights for the folder's config.json, without compiling an initialiser."""
    from qjax import models as qmodels

    rng = np.random.default_rng(seed)
    _, abstract, config = qmodels.abstract(folder)
    params = jax.tree.map(lambda s: 0.3 * rng.normal(size=s.shape).astype(np.float32), abstract)
    qmodels.save_weights(folder / "model.safetensors", params, config, dtype=np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a language model over letters."""
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    letters = ["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", " ", "\n"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
    )
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A float model\n")
    write_weights(folder, 3)
    return folder


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "vit"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(VIT))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 8, "width": 8}}))
    write_weights(folder, 4)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "set.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (9, 8, 8, 3), np.uint8), labels=rng.integers(0, 7, 9))
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "small"
    assert main(["quantize", str(folder), "--recipe", "W8A16", "--out", str(out), "--json"]) == 0
    return out


def run(capsys, *argv):
    """Run a command: (exit code, JSON of stdout, stderr)."""
    capsys.readouterr()
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, (json.loads(out) if "--json" in argv and out else out), err


def fails(capsys, *argv, code=2):
    """Run a command that must fail with one sentence and nothing on stdout; return the sentence."""
    got, out, err = run(capsys, *argv)
    lines = [line for line in err.splitlines() if not line.startswith("qjax: warning:")]
    assert (got, out, len(lines)) == (code, "", 1), (got, out, err)
    assert lines[0].startswith("qjax: ") and "Traceback" not in err
    return lines[0]


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "quantize", "eval", "study", "generate", "recipes"])
def test_every_command_shows_examples(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and f"examples:\n  qjax {command}" in out
    assert max(map(len, out.splitlines())) <= 120


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from qjax.cli import main; code = main(['--help']); "
        "heavy = {'jax', 'numpy', 'rich', 'matplotlib'} & set(sys.modules); sys.exit(str(heavy) if heavy else code)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_usage_errors_have_code_2(capsys):
    assert run(capsys)[0] == 2
    assert run(capsys, "frobnicate")[0] == 2
    assert run(capsys, "quantize", "x")[0] == 2
    assert run(capsys, "generate", "x", "--prompt", "a", "--max-tokens", "0")[0] == 2
    assert run(capsys, "--version")[0] == 0


# -- inspect, recipes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env", [{"COLUMNS": "40"}, {"COLUMNS": ""}, {"TERM": "dumb", "FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}]
)
def test_a_row_in_a_pipe_is_a_line(capsys, monkeypatch, env):
    for name in ("COLUMNS", "TERM", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    table = Table("a name", "why")
    words = [" ".join(["word"] * n) for n in (1, 60)]
    for text in words:
        table.add_row("layers/0/" + "x" * 90, text)
    print_rich(table)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "\x1b" not in "".join(lines)
    assert all("x" * 90 in line and text in line for line, text in zip(lines[3:], words, strict=False))


def test_recipes(capsys):
    code, out, _ = run(capsys, "recipes", "--json")
    assert code == 0 and "W4A16" in [r["name"] for r in out["recipes"]]
    assert run(capsys, "recipes")[1].startswith("W8A16 ")


def test_inspect(capsys, folder):
    code, out, _ = run(capsys, "inspect", folder, "--json")
    names = [s["name"] for s in out["sites"]]
    assert code == 0 and "layers/1/mlp/down/kernel" in names and out["architecture"] == "LlamaForCausalLM"
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 0 and "layers/{0,1}/mlp/up/kernel" in out


def test_inspect_with_a_recipe_says_what_it_would_store(capsys, folder):
    _, out, _ = run(capsys, "inspect", folder, "--recipe", "w8a16", "--json")
    assert out["recipe"] == "W8A16" and out["stored_bytes"] < out["float_bytes"]


# -- quantize, eval, generate ------------------------------------------------------------------------------------------


def test_a_saved_folder_is_sufficient(saved, folder):
    names = {p.name for p in saved.iterdir()}
    assert {
        "qjax.json",
        "config.json",
        "tokenizer.json",
        "checkpoint",
        "report.json",
        "report.html",
        "report.txt",
    } <= names
    assert "model.safetensors" not in names
    card = (saved / "README.md").read_text()
    assert "license: mit" in card and "# tiny, quantized" in card and "qjax.load" in card
    assert (saved / "README.original.md").read_text().endswith("# A float model\n")
    manifest = json.loads((saved / "qjax.json").read_text())
    assert (manifest["model"], manifest["recipe"]) == ("tiny", "W8A16")
    assert manifest["source_fingerprint"] == fingerprint(folder)
    assert not [p for p in saved.parent.iterdir() if p.name.startswith(".")]


def test_quantize_says_what_it_did(capsys, folder, tmp_path, text):
    code, out, _ = run(
        capsys, "quantize", folder, "--recipe", "w8a16", "--out", tmp_path / "q", "--text", text, "--json"
    )
    assert code == 0 and out["stored_bytes"] < out["float_bytes"] and out["out"] == str(tmp_path / "q")
    assert out["quantized_sites"] == 14 and out["bits_per_weight"] < 10
    assert (out["source_bytes"], "float32") == source_size(folder) and out["disk_bytes"] > 0
    assert 0 <= out["kl"] < 0.01 and out["agreement"] > 0.8 and abs(out["recovery"] - 100) < 2
    code, out, _ = run(capsys, "inspect", tmp_path / "q", "--json")
    assert out["scores"]["kl"] >= 0 and any("text.txt" in n for n in out["notes"])


def test_default_name_and_replacing(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # an older qjax folder is replaced
        code, out, _ = run(capsys, "quantize", folder, "--recipe", "W8A16")
        assert code == 0 and "tiny-W8A16" in out and "report.html" in out
    assert (tmp_path / "tiny-W8A16" / "qjax.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-W8A16"]


def test_eval_compares_with_the_float_model(capsys, saved, folder, text):
    code, plain, err = run(capsys, "eval", folder, "--text", text, "--json")
    assert code == 0 and err == "" and plain["protocol"] == "A"
    code, out, err = run(capsys, "eval", saved, "--text", text, "--json")
    assert code == 0 and err == ""
    assert out["float_perplexity"] == pytest.approx(plain["perplexity"], rel=1e-6)
    assert out["perplexity"] == pytest.approx(plain["perplexity"], rel=0.02)
    assert out["tokens"] == plain["tokens"] == 11 + 18 + 8
    assert out["recipe"] == "W8A16" and out["recovery"] == pytest.approx(100, abs=2)
    report = json.loads((saved / "report.json").read_text())
    assert report["scores"]["perplexity"] == out["perplexity"]
    code, again, _ = run(capsys, "eval", saved, "--text", text, "--json", "--no-float")
    assert again["perplexity"] == pytest.approx(out["perplexity"], rel=1e-6) and "kl" not in again


def test_eval_without_the_float_model(capsys, saved, folder, text, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(saved, moved)
    manifest = json.loads((moved / "qjax.json").read_text())
    (moved / "qjax.json").write_text(json.dumps({**manifest, "source": "/nowhere", "source_relative": "nowhere"}))
    code, out, err = run(capsys, "eval", moved, "--text", text, "--json")
    assert code == 0 and "perplexity" in out and "float_perplexity" not in out and "no longer" in err


def test_eval_as_text(capsys, saved, text):
    code, out, _ = run(capsys, "eval", saved, "--text", text, "--protocol", "b", "--context", "9", "--limit", "2")
    assert code == 0 and "protocol B, 16 tokens" in out and "Perplexity" in out and "recovery" in out


def test_generate(capsys, saved, folder):
    code, a, _ = run(capsys, "generate", folder, "--prompt", "the cat", "--max-tokens", "6", "--json")
    assert code == 0 and a["prompt_tokens"] == 8 and len(a["tokens"]) <= 6 and a["text"].startswith("the cat")
    code, out, err = run(capsys, "generate", saved, "--prompt", "the cat", "--max-tokens", "6")
    assert code == 0 and out.startswith("the cat") and out.endswith("\n") and "tokens in" in err


def test_generate_draws_the_same_with_the_same_seed(capsys, folder):
    draw = ["generate", folder, "--prompt", "a", "--max-tokens", "12", "--temperature", "2", "--json", "--seed"]
    one, same, other = (run(capsys, *draw, seed)[1]["tokens"] for seed in (1, 1, 2))
    assert one == same and one != other


def test_images(capsys, vit_folder, pictures, tmp_path):
    code, plain, _ = run(capsys, "eval", vit_folder, "--images", pictures, "--json")
    assert code == 0 and plain["images"] == 9 and plain["correct"] == round(9 * plain["top1"])
    assert 0 <= plain["top1"] <= plain["top5"] <= 1
    out_dir = tmp_path / "q"
    code, out, _ = run(
        capsys, "quantize", vit_folder, "--recipe", "W8A8", "--out", out_dir, "--images", pictures, "--json"
    )
    assert code == 0 and out["float_top1"] == plain["top1"] and out["kl"] < 0.01
    code, out, _ = run(capsys, "eval", out_dir, "--images", pictures, "--limit", "4", "--json")
    assert code == 0 and out["images"] == 4 and out["agreement"] >= 0.75


@pytest.mark.slow
def test_calibration_on_a_text(capsys, folder, tmp_path):
    pieces = tmp_path / "pieces.txt"
    pieces.write_text("\n\n".join(f"the cat number {'abcdefghij'[i]} sat" for i in range(10)))
    out_dir = tmp_path / "q"
    draw = ("--calibration", pieces, "--samples", "4", "--seed", "1")
    code, out, err = run(
        capsys, "quantize", folder, "--recipe", "FP8", *draw, "--text", pieces, "--out", out_dir, "--json"
    )
    assert code == 0 and "4 rows that the model was calibrated on are left out" in err
    assert out["kl"] < 0.1
    record = json.loads((out_dir / "qjax.json").read_text())["calibration"]
    assert len(record["rows"]) == 4 and record["rows"] == sorted(set(record["rows"])) and record["seed"] == 1
    code, everything, _ = run(capsys, "eval", folder, "--text", pieces, "--json")
    code, out, err = run(capsys, "eval", out_dir, "--text", pieces, "--json")
    assert code == 0 and out["blocks"] == 6 and everything["blocks"] == 10
    assert "are left out" in err and out["tokens"] == everything["tokens"] * 6 // 10
    code, out, err = run(capsys, "eval", out_dir, "--text", pieces, "--protocol", "B", "--json")
    assert code == 0 and "cut otherwise (protocol A" in err
    other = tmp_path / "other.txt"
    other.write_text("a dog ran far away")
    code, out, err = run(capsys, "eval", out_dir, "--text", other, "--json")
    assert code == 0 and err == ""
    again = tmp_path / "again"
    run(capsys, "quantize", folder, "--recipe", "FP8", *draw, "--out", again)
    assert json.loads((again / "qjax.json").read_text())["calibration"] == record
    for a, b in zip(*(jax.tree.leaves(load_folder(f).params) for f in (out_dir, again)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_calibration_on_images(capsys, vit_folder, pictures, tmp_path):
    out_dir = tmp_path / "q"
    draw = ("--calibration", pictures, "--samples", "3")
    code, _, _ = run(capsys, "quantize", vit_folder, "--recipe", "fp8", *draw, "--out", out_dir)
    assert code == 0
    code, out, err = run(capsys, "eval", out_dir, "--images", pictures, "--json")
    assert code == 0 and out["images"] == 6 and "3 rows" in err and out["kl"] < 0.1


@pytest.mark.slow
def test_calibration_that_cannot_be(capsys, folder, text, tmp_path):
    quantize = (capsys, "quantize", folder, "--recipe", "FP8")
    assert "FP8 needs calibration data: give --calibration FILE, a text that" in fails(*quantize)
    said = fails(*quantize, "--calibration", text, "--samples", "4", "--out", tmp_path / "q")
    assert "has 3 blocks and --samples asks for 4" in said
    code, _, err = run(capsys, *quantize[1:], "--calibration", text, "--out", tmp_path / "q")
    assert code == 0 and "all 3 blocks, fewer than the usual 32, 40 tokens" in err
    code, _, err = run(capsys, "quantize", folder, "--recipe", "W8A16", "--calibration", text, "--out", tmp_path / "w")
    assert code == 0 and "W8A16 needs no calibration data" in err
    every = ("--calibration", text, "--samples", "3", "--text", text)
    assert "none is left to score on" in fails(*quantize, *every, "--out", tmp_path / "q")


def test_calibration_lengths_are_few_and_lose_little():
    from qjax.cli.calibrating import cut_lengths

    lengths = np.random.default_rng(0).integers(40, 512, 32)
    cut = cut_lengths(lengths)
    assert len(set(cut)) == 4 and all(0 <= n - c for n, c in zip(lengths, cut, strict=True))
    assert sum(cut) > 0.75 * lengths.sum()
    assert cut_lengths([512] * 5) == [512] * 5 and set(cut_lengths([511, 512, 512])) == {511}


def test_progress_in_a_pipe_is_a_line_at_times(capsys, monkeypatch):
    from qjax.cli import output

    clock = iter([0.0, 4.0, 12.0, 15.0])
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
    with output.counting("quantizing") as progress:
        for n in range(1, 4):
            progress(n, 3, f"layers/{n}")
    assert capsys.readouterr().err == "quantizing: 2 of 3 done after 12 s (layers/2)\n"


# -- study -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_study_of_a_language_model(capsys, folder, text, tmp_path):
    out_dir, other = tmp_path / "s", tmp_path / "other.txt"
    other.write_text("so long\n\na dog ran far away\n\nthe end of it\n")  # one block is in the other file too
    recipes = ("--recipes", "W8A16,FP8", "w4a16-int")
    data = ("--text", text, other, "--calibration", text, "--samples", "1", "--seed", "1")  # the dog
    code, out, err = run(capsys, "study", folder, *recipes, *data, "--out", out_dir, "--json")
    assert code == 0 and "1 rows that the model was calibrated on are left out" in err
    assert [o["name"] for o in out["outcomes"]] == ["W8A16", "FP8", "W4A16_INT"] and not out["outcomes"][2]["refused"]
    units = {name: count for name, (count, _) in out["counts"].items()}
    whole = {path.name: evaluated_tokens(folder, path) for path in (text, other)}
    dog = len("a dog ran far away")
    assert units == {name: count - dog for name, count in whole.items()} and "1 further rows of" in err
    assert {"study.html", "study.md", "study.json"} <= {p.name for p in out_dir.iterdir()}
    code, again, _ = run(capsys, "study", folder, *recipes, *data, "--out", out_dir)
    assert code == 0 and "W4A16_INT" in again and "study.html" in again
    code, out, err = run(capsys, "study", folder, *recipes, *data, "--samples", "2", "--out", out_dir)
    assert code == 2 and out == "" and "begun study of something else: calibration, tasks differ" in err


def evaluated_tokens(folder, path):
    tokenizer = qjax.models.tokenizer(folder)
    return qjax.evaluate.text_blocks(tokenizer, path.read_text(), "A", context=32).tokens


@pytest.mark.slow
def test_study_of_images(capsys, vit_folder, pictures, tmp_path):
    data = ("--images", pictures, "--calibration", pictures, "--samples", "3")
    code, out, err = run(
        capsys, "study", vit_folder, "--recipes", "W8A8_INT,FP8", *data, "--out", tmp_path / "s", "--json"
    )
    assert code == 0 and "3 rows" in err and out["counts"] == {"set.npz": [6, 6]}
    assert set(out["outcomes"][0]["scores"]["set.npz"]) == {"kl", "agreement", "top1", "nll"}


def test_studies_that_cannot_be(capsys, folder, text, pictures, tmp_path):
    assert "did you mean 'W4A16'" in fails(capsys, "study", folder, "--recipes", "W4A61", "--text", text)
    assert "--text FILE" in fails(capsys, "study", folder, "--recipes", "W4A16")
    assert "scored on --text" in fails(capsys, "study", folder, "--recipes", "W4A16", "--images", pictures)
    said = fails(capsys, "study", folder, "--recipes", "W4A16,FP8", "--text", text, "--out", tmp_path / "s")
    assert "give --calibration FILE" in said and not (tmp_path / "s").exists()


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_unknown_preset(capsys, folder):
    assert "'W4A16'" in fails(capsys, "quantize", folder, "--recipe", "W4A61")


def test_rule_that_matches_nothing(capsys, folder, tmp_path):
    toml = tmp_path / "mine.toml"
    toml.write_text('[[rules]]\nmatch = "**/mpl/**"\nweights = { format = "int", bits = 8 }\n')
    message = fails(capsys, "quantize", folder, "--recipe", toml, "--out", tmp_path / "q")
    assert "mpl" in message and "mlp" in message
    assert not (tmp_path / "q").exists()


def test_folders_that_are_none(capsys, tmp_path, text):
    assert "no config.json" in fails(capsys, "eval", tmp_path, "--text", text)
    assert "not a folder" in fails(capsys, "inspect", tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    assert "MambaForCausalLM" in fails(capsys, "quantize", tmp_path, "--recipe", "W8A16")


@pytest.mark.parametrize("command", ["inspect", "quantize", "eval", "generate"])
def test_damaged_weights(capsys, folder, tmp_path, command, text):
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    weights = bad / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    more = {
        "inspect": [],
        "quantize": ["--recipe", "W8A16", "--out", tmp_path / "q"],
        "eval": ["--text", text],
        "generate": ["--prompt", "a"],
    }[command]
    assert "damaged" in fails(capsys, command, bad, *more)


@pytest.mark.parametrize("raw, says", [(b"", "empty"), (b" \n", "empty"), ("café".encode("latin-1"), "not UTF-8")])
def test_bad_text(capsys, folder, tmp_path, raw, says):
    (tmp_path / "bad.txt").write_bytes(raw)
    assert says in fails(capsys, "eval", folder, "--text", tmp_path / "bad.txt")


def test_data_that_does_not_fit(capsys, folder, vit_folder, text, pictures):
    assert "needs data" in fails(capsys, "eval", folder)
    assert "scored on --text" in fails(capsys, "eval", folder, "--images", pictures)
    assert "an image classifier" in fails(capsys, "eval", vit_folder, "--text", text)
    assert "not both" in fails(capsys, "eval", folder, "--text", text, "--images", pictures)
    assert "needs a language model" in fails(capsys, "generate", vit_folder, "--prompt", "a")
    assert "cannot be read" in fails(capsys, "eval", folder, "--text", "missing.txt")
    assert "--context 64" in fails(capsys, "eval", folder, "--text", text, "--context", "64")


def test_destinations(capsys, folder, saved, tmp_path):
    quantize = ["quantize", folder, "--recipe", "W8A16", "--out"]
    assert "own folder" in fails(capsys, *quantize, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "was not written by qjax" in fails(capsys, *quantize, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert "is a file" in fails(capsys, *quantize, tmp_path / "mine" / "thesis.txt")
    assert "quantized already" in fails(capsys, "quantize", saved, "--recipe", "W8A16")
    assert "quantized already" in fails(capsys, "inspect", saved, "--recipe", "W8A16")


def test_damaged_saved_folder(capsys, saved, tmp_path, text):
    for change, says in (("{", "damaged"), ('{"version": 99}', "version 99")):
        bad = tmp_path / says.replace(" ", "")
        shutil.copytree(saved, bad)
        (bad / "qjax.json").write_text(change)
        assert says in fails(capsys, "eval", bad, "--text", text)
    gone = tmp_path / "gone"
    shutil.copytree(saved, gone)
    shutil.rmtree(gone / "checkpoint")
    fails(capsys, "eval", gone, "--text", text)


def test_a_failed_save_leaves_the_older_folder(capsys, folder, saved, tmp_path, monkeypatch):
    out = tmp_path / "q"
    shutil.copytree(saved, out)
    before = (out / "qjax.json").read_text()

    def full(path, model, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(qjax, "save", full)
    assert "No space left" in fails(capsys, "quantize", folder, "--recipe", "W4A16", "--out", out)
    assert (out / "qjax.json").read_text() == before and sorted(p.name for p in tmp_path.iterdir()) == ["q"]


def test_an_older_folder_that_a_kill_left_aside_is_put_back(folder, saved, tmp_path):
    from qjax.folders import save_folder

    shutil.copytree(saved, tmp_path / ".q.old")
    with pytest.raises(qjax.errors.CheckpointError):
        unsaved = SimpleNamespace(recipe=qjax.Recipe([]))  # no model that can be saved
        save_folder(tmp_path / "q", folder, unsaved, qjax.report.Report.load(saved))
    assert [p.name for p in tmp_path.iterdir()] == ["q"] and (tmp_path / "q" / "qjax.json").is_file()


def test_unexpected_errors_are_one_line_and_debug_shows_them(capsys, folder, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("line one\nline two")

    monkeypatch.setattr(qjax, "trace", broken)
    assert "unexpected RuntimeError: line one line two" in fails(capsys, "inspect", folder, code=1)
    monkeypatch.setenv("QJAX_DEBUG", "1")
    with pytest.raises(RuntimeError):
        main(["inspect", str(folder)])


def test_ctrl_c(capsys, folder, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(qjax, "trace", stop)
    assert fails(capsys, "inspect", folder, code=130) == "qjax: interrupted"


# -- the real models ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stories_at_8_bits(capsys, data_dir, tmp_path):
    out, stories = tmp_path / "q", data_dir / "text" / "tinystories-sample.txt"
    code, _, _ = run(
        capsys, "quantize", data_dir / "models" / "stories260k", "--recipe", "W8A16", "--out", out, "--json"
    )
    assert code == 0
    code, scores, _ = run(capsys, "eval", out, "--text", stories, "--json")
    assert code == 0 and scores["tokens"] == 56_046
    assert scores["float_perplexity"] == pytest.approx(4.294, abs=5e-4)
    assert scores["perplexity"] == pytest.approx(4.294, rel=0.002)


@pytest.mark.slow
def test_vit_at_8_bits(capsys, data_dir, tmp_path):
    out, pictures = tmp_path / "q", data_dir / "images" / "imagenet-sample-500"
    assert (
        run(capsys, "quantize", data_dir / "models" / "vit-tiny-patch16-224", "--recipe", "W8A8", "--out", out)[0] == 0
    )
    code, scores, _ = run(capsys, "eval", out, "--images", pictures, "--json")
    assert code == 0 and scores["float_correct"] == 401 and abs(scores["correct"] - 401) <= 3


@pytest.mark.slow
def test_vit_with_constant_scales(capsys, data_dir, tmp_path):
    out, pictures = tmp_path / "q", data_dir / "images" / "imagenet-sample-500"
    folder = data_dir / "models" / "vit-tiny-patch16-224"
    draw = ("--calibration", pictures, "--samples", "32")
    assert run(capsys, "quantize", folder, "--recipe", "FP8", *draw, "--out", out)[0] == 0
    code, scores, _ = run(capsys, "eval", out, "--images", pictures, "--json")
    assert code == 0 and scores["images"] == 468
    assert abs(scores["correct"] - scores["float_correct"]) <= 5
