"""The command line on every kind of model: sites, quantization, scores, text; and clear refusals where one has none."""

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qjax.cli import main

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 32}
SIZES |= {"bos_token_id": 0, "eos_token_id": 1}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
CONFIGS = {
    "gpt2": {**SIZES, "model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "opt": {**SIZES, "model_type": "opt", "ffn_dim": 24},
    "mixtral": {**SIZES, "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2_moe": {**SIZES, **EXPERTS, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 12},
    "bert": {**SIZES, "model_type": "bert"},
    "cifar_resnet": {
        "model_type": "cifar_resnet",
        "blocks_per_stage": 1,
        "widths": [4, 8],
        "num_classes": 7,
        "image_size": 8,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.2, 0.2, 0.2],
    },
}
MIXTURES = ("mixtral", "qwen2_moe")
DECODERS = ("gpt2", "opt", *MIXTURES)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folders with random weights and a tokenizer over letters, by model_type."""
    made = {}

    def folder(kind):
        if kind in made:
            return made[kind]
        from qjax import models as qmodels

        made[kind] = path = tmp_path_factory.mktemp(kind)
        (path / "config.json").write_text(json.dumps(CONFIGS[kind]))
        letters = ["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", " ", "\n"]
        tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens(["<s>", "</s>"])
        tokenizer.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": True}))
        rng = np.random.default_rng(0)
        _, abstract, config = qmodels.abstract(path)
        params = jax.tree.map(lambda s: np.abs(0.3 * rng.normal(size=s.shape)).astype(np.float32), abstract)
        qmodels.save_weights(path / "model.safetensors", params, config, dtype=np.float32)
        return path

    return folder


def run(capsys, *argv):
    """Run a command: (exit code, JSON of stdout or None, stderr)."""
    capsys.readouterr()
    code = main([*map(str, argv), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


@pytest.mark.every(4)
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders(capsys, folder_of, tmp_path, kind):
    sites = {"gpt2": 4, "opt": 6, "mixtral": 7, "qwen2_moe": 10}[kind]  # the router and the shared gate stay float
    text = tmp_path / "text.txt"
    text.write_text("the cat sat\n\na dog ran far away\n\nhi there\n")
    code, seen, _ = run(capsys, "inspect", folder_of(kind))
    ops = [site["op"] for site in seen["sites"]]
    assert code == 0 and ops.count("attention") == 1 and ops.count("ragged_dot") == (3 if kind in MIXTURES else 0)
    out = tmp_path / "out"
    code, made, _ = run(capsys, "quantize", folder_of(kind), "--recipe", "W8A16", "--out", out, "--text", text)
    assert code == 0 and made["quantized_sites"] == sites and np.isfinite(made["perplexity"])
    code, scored, _ = run(capsys, "eval", out, "--text", text)
    assert code == 0 and scored["perplexity"] == pytest.approx(made["perplexity"], rel=1e-6)
    code, told, _ = run(capsys, "generate", out, "--prompt", "the c", "--max-tokens", 5)
    assert code == 0 and told["text"].startswith("the c") and len(told["tokens"]) <= 5


def test_residual_network(capsys, folder_of, tmp_path):
    folder, pictures, out = folder_of("cifar_resnet"), tmp_path / "set.npz", tmp_path / "out"
    rng = np.random.default_rng(0)
    np.savez(pictures, images=rng.integers(0, 256, (9, 8, 8, 3), np.uint8), labels=rng.integers(0, 7, 9))
    code, seen, _ = run(capsys, "inspect", folder)
    assert code == 0 and [s["op"] for s in seen["sites"] if s["leaf"]] == ["conv"] * 5 + ["dot"]
    code, made, _ = run(capsys, "quantize", folder, "--recipe", "W8A16", "--out", out, "--images", pictures)
    assert code == 0 and made["quantized_sites"] == 6 and made["images"] == 9
    code, scored, _ = run(capsys, "eval", out, "--images", pictures)
    assert code == 0 and (scored["correct"], scored["float_correct"]) == (made["correct"], made["float_correct"])


def test_text_encoder(capsys, folder_of, tmp_path):
    folder, text, out = folder_of("bert"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text("the cat sat\n\na dog ran far away\n\nhi there\n")
    code, seen, _ = run(capsys, "inspect", folder)
    assert code == 0 and sum(s["op"] == "attention" for s in seen["sites"]) == 1
    code, made, _ = run(
        capsys, "quantize", folder, "--recipe", "FP8", "--out", out, "--calibration", text, "--samples", 2
    )
    assert code == 0 and made["quantized_sites"] == 6
    for data in (["--text", text], ["--images", tmp_path]):
        code, nothing, err = run(capsys, "eval", out, *data)
        assert (
            (code, nothing) == (2, None) and "holds a text encoder (BertModel)" in err and "sentence_embedding" in err
        )
    code, nothing, err = run(capsys, "generate", folder, "--prompt", "a")
    assert (code, nothing) == (2, None) and "holds a text encoder; generate needs a language model" in err


def test_study_of_a_text_encoder(capsys, folder_of, tmp_path):
    folder, pairs, calibration = folder_of("bert"), tmp_path / "pairs.txt", tmp_path / "calibration.txt"
    pairs.write_text("the cat\ta dog\nfar away\tso near\n\nhi there\toh\nran off\tcame back\n")
    calibration.write_text("it ran far away\n\nhi\n")
    asked = ("study", folder, "--recipes", "W8A16,FP8", "--text", pairs, "--out", tmp_path / "study")
    code, out, err = run(capsys, *asked, "--calibration", calibration, "--samples", 2)
    assert code == 0 and "1 pairs of" in err and out["counts"] == {"pairs.txt": [3, 3]}
    assert out["units"] == {"pairs.txt": "pairs of sentences"} and out["tasks"] == {"pairs.txt": ""}
    kept = {o["name"]: o["scores"]["pairs.txt"] for o in out["outcomes"]}
    assert all(set(scores) == {"output_error", "cosine_drift"} for scores in kept.values())
    assert 0 < kept["W8A16"]["cosine_drift"]["mean"] < 0.05
    page = (tmp_path / "study" / "study.md").read_text()
    assert "| float | 0 | 0 |" in page and "3 pairs of sentences." in page
    code, _, err = run(capsys, *asked[:-3], pairs, "--images", tmp_path)
    assert code == 2 and "not both" in err
    calibration.write_text("the cat far away hi there ran off")
    code, _, err = run(capsys, *asked, "--calibration", calibration, "--context", 40)
    assert code == 2 and "more than the 32 tokens" in err
    calibration.write_text("the cat far away\n\nhi there ran off")
    code, _, err = run(capsys, *asked, "--calibration", calibration)
    assert code == 2 and "every pair of sentences of" in err


GPTQ = """
[[rules]]
match = "**/lm_head/**"
skip = true
optional = true

[[rules]]
match = "**"
weights = { format = "int", bits = 4, group = 8 }
clamp_group = true
rounding = { rounding = "GPTQ", block_size = 8 }
"""


@pytest.mark.slow
@pytest.mark.every(2)
@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_layer_by_layer(capsys, folder_of, tmp_path, kind):
    """--resume and --low-memory change how the job goes and not what comes out."""
    folder, text, recipe = folder_of(kind), tmp_path / "text.txt", tmp_path / "gptq.toml"
    text.write_text("\n\n".join(["the quick brown fox", "jumps over a lazy dog", "and sleeps"] * 4))
    recipe.write_text(GPTQ)
    scores = []
    for extra in ((), ("--resume", tmp_path / "job", "--low-memory")):
        out = tmp_path / f"out{len(extra)}"
        arguments = ["--recipe", recipe, "--out", out, "--calibration", text, "--samples", 4, *extra]
        code, said, err = run(capsys, "quantize", folder, *arguments)
        assert code == 0, err
        assert any("blocks, one after the other" in note for note in said["notes"])
        assert any("GPTQ" in note for note in said["notes"])
        scores.append(run(capsys, "eval", out, "--text", text, "--no-float")[1]["perplexity"])
    assert scores[0] == scores[1] and not (tmp_path / "job").exists()
    assert main(["quantize", str(folder), "--recipe", str(recipe), "--low-memory", "--text", str(text)]) != 0
    assert "qjax eval" in capsys.readouterr().err
