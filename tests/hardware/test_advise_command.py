"""``qjax advise``."""

from __future__ import annotations

import json

import pytest

from qjax.cli import main
from qjax.hardware import size_of

SIZES = ["--parameters", "70.6e9", "--layers", "80", "--kv-heads", "8", "--head-dim", "128", "--kept", "2.1e9"]
RECOVERS = ["--measured-recovery", "W8A8-INT=99.5"]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def ran(capsys, *args):
    code = main(["advise", *map(str, args)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_config_is_enough(capsys, folder):
    size = size_of(folder)
    assert size.params == pytest.approx(8.03e9, rel=1e-3) and size.kept == pytest.approx(1.05e9, rel=2e-3)
    assert (size.layers, size.kv_heads, size.head_dim, size.experts) == (32, 8, 128, 1)
    code, out, err = ran(capsys, folder, "--device", "h200", "--workload", "chat")
    assert code == 0 and not err
    assert "Take W4A16-INT (recipe W4A16_INT)" in out and "H200 is unmeasured" in out and " second" in out


def test_experts_from_a_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    size = size_of(tmp_path)
    assert size.params == pytest.approx(46.7e9, rel=5e-3) and size.active == pytest.approx(12.9e9, rel=5e-3)
    assert (size.experts, size.experts_per_token) == (8, 2)


def test_other_decoders_have_sizes(tmp_path):
    gpt2 = {
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "vocab_size": 50257,
        "n_positions": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(gpt2))
    size = size_of(tmp_path)
    assert size.params == pytest.approx(124.4e6, rel=1e-2) and (size.layers, size.kv_heads, size.head_dim) == (
        12,
        12,
        64,
    )
    assert size.kept == pytest.approx((50257 + 1024) * 768, rel=0.01)


def test_json(capsys):
    code, out, _ = ran(
        capsys, *SIZES, "--device", "h100", "--mode", "async", "--recovery", "99.5", "--price", "2.5", "--json"
    )
    data = json.loads(out)
    assert code == 0 and data["choice"] == "W8A8-FP" and data["price_per_hour"] == 2.5


def test_too_close_to_tell(capsys):
    _, out, _ = ran(capsys, *SIZES, "--device", "a6000", "--mode", "async", "--max-batch", "32")
    assert "W4A16-INT is 5 % ahead of W8A8-INT: too close to tell, measure both. Until then take W4A16-INT" in out
    _, out, _ = ran(capsys, *SIZES, "--device", "a6000", "--mode", "async", "--max-batch", "32", *RECOVERS)
    assert "too close to tell, measure both. Until then take W8A8-INT (recipe W8A8_INT), which keeps more" in out
    assert "(99.5 % against 99.0 %)" in out and "published is that of Llama 3.1" in out


def test_where_recoveries_come_from(capsys):
    _, out, _ = ran(capsys, *SIZES[2:], "--parameters", "3e9", "--device", "h100")
    assert "96.6 %  extrapolated" in out and "a guess from other sizes" in out
    _, out, _ = ran(capsys, *SIZES[2:], "--parameters", "30e9", "--device", "h100")
    assert "interpolated is between sizes" in out and "extrapolated" not in out


def test_nothing_is_faster_than_a_tiny_model(capsys):
    _, out, _ = ran(capsys, "--parameters", "260e3", *SIZES[2:-2], "--device", "h200")
    assert "260 K parameters" in out and "Take BF16 (no quantization): no format is noticeably faster." in out


def test_more_tokens_than_the_model_takes(capsys, folder):
    _, out, _ = ran(capsys, *SIZES, "--device", "h100", "--workload", "summarization", "--context", "4096")
    assert "takes sequences of at most 4,096 tokens, and a query of this workload has 4,608." in out
    _, out, _ = ran(capsys, folder, "--device", "h200", "--workload", "2048/1")
    assert "at most 2,048 tokens" in out, "a folder says how many"
    _, out, _ = ran(capsys, folder, "--device", "h200", "--workload", "2047/1", "--json")
    assert json.loads(out)["notes"] == []


def test_measured_tables(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "60")  # a pipe is not a narrow terminal
    model = {"params": 70.6e9, "layers": 80, "kv_heads": 8, "head_dim": 128}
    row = {
        "device": "H100",
        "format": "W4A16-INT",
        "devices": 1,
        "prompt": 256,
        "output": 128,
        "seconds": 4.0,
        "model": model,
    }
    (tmp_path / "m.json").write_text(json.dumps({"serving": [row]}))
    _, out, _ = ran(capsys, *SIZES, "--device", "h100", "--measured", tmp_path)
    assert "fitted to 1 measurement)" in out
    _, out, _ = ran(capsys, *SIZES, "--device", "h100", "--measured-recovery", "w4a16-int=99.9", "--recovery", "99.5")
    assert "99.9 % measured choice" in " ".join(out.split())
    assert "Take W4A16-INT" in out and "measured is what you gave" in out


def test_devices_are_listed(capsys):
    code, out, _ = ran(capsys, "--device", "list")
    assert code == 0 and "H200" in out and "TPU-v5e" in out
    _, out, _ = ran(capsys, "--device", "list", "--json")
    assert len(json.loads(out)["devices"]) == 7


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((*SIZES, "--device", "h300"), "unknown device 'h300'"),
        ((*SIZES, "--device", "h100", "--workload", "talk"), "unknown workload 'talk'"),
        (("--device", "h100"), "--parameters, --layers, --kv-heads, --head-dim missing"),
        (("--device", "h100", "--parameters", "8e9"), "--layers, --kv-heads, --head-dim missing"),
        ((*SIZES, "--device", "h100", "--mode", "rate"), "needs the queries a second"),
        ((*SIZES, "--device", "h100", "--measured-recovery", "W4A16-INT=good"), "'good' is not a number"),
        ((*SIZES, "--device", "h100", "--measured-recovery", "W9=9"), "unknown format 'W9'"),
        ((*SIZES, "--device", "h100", "--formats", "W9"), "unknown format 'W9'"),
    ],
)
def test_mistakes(capsys, args, says):
    code, out, err = ran(capsys, *args)
    assert code == 2 and not out and says in err and "Traceback" not in err


def test_folder_and_sizes_exclude_each_other(capsys, folder):
    code, _, err = ran(capsys, folder, *SIZES, "--device", "h100")
    assert code == 2 and "not both" in err


def test_no_decoder(capsys, tmp_path):
    vit = {
        "architectures": ["ViTForImageClassification"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    }
    (tmp_path / "config.json").write_text(
        json.dumps(vit | {"num_attention_heads": 2, "image_size": 8, "patch_size": 4})
    )
    code, _, err = ran(capsys, tmp_path, "--device", "h100")
    assert code == 2 and "the advisor is for decoders" in err
