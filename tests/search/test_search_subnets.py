"""``qjax search --supernet`` on a tiny residual network."""

from __future__ import annotations

import json

import numpy as np
import pytest

import qjax
from qjax.cli import main
from qjax.search import site_costs
from qjax.supernet import Space, load_trained
from tests.helpers.saved_supernets import save_supernet

TINY = {
    "architectures": ["CifarResNet"],
    "model_type": "cifar_resnet",
    "blocks_per_stage": 1,
    "widths": [4],
    "image_size": 8,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.2, 0.2, 0.2],
    "num_classes": 3,
}
DEVICE = """
name = "chip"
memory_gb = 1.0
bandwidth_tb_s = 0.001
capability = 9.0
tdp_w = 10.0

[tflops]
bf16 = 0.01
int8 = 0.02
"""
SPACE = Space((2, 4, 8), (4, 5, 8), (True,), (True,), (True,), ends=None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model folder, a supernet folder as training leaves it, and images."""
    where = tmp_path_factory.mktemp("made")
    folder = where / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    fn, abstract, config = qjax.models.abstract(folder)
    params = fn.init(0)
    qjax.models.save_weights(folder / "model.safetensors", params, config, dtype=np.float32)
    save_supernet(where / "job", fn.train_step_stats, params, SPACE, np.zeros((1, 8, 8, 3), np.float32))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 3), np.uint8)
    np.savez(where / "set.npz", images=images, labels=rng.integers(0, 3, 40), classes=np.array(["a", "b", "c"]))
    return where


@pytest.mark.slow
def test_a_subnet_is_found_and_becomes_a_recipe(made, capsys, tmp_path):
    out = tmp_path / "out"
    args = ["search", made / "tiny", "--supernet", made / "job", "--images", made / "set.npz", "--out", out]
    args += ["--samples", "16", "--recalibrate", "16", "--population", "8", "--generations", "1"]
    code = main([*map(str, args), "--budget", "5 bits"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "top-1 on 16 images, batch norms recalibrated on 16 others" in said.out and "Lagrangian" in said.out
    assert {p.name for p in out.iterdir()} == {
        "measured",
        "choice.json",
        "recipe.toml",
        "front.json",
        "front.svg",
        "packed",
    }
    data = json.loads((out / "choice.json").read_text())
    assert all(4.5 < v <= 5 for v in data["average_bits"]) and data["form"] == "channel/sym/sym"
    fn, params, _ = qjax.models.load(made / "tiny")
    t, trained = load_trained(made / "job", fn, params, np.zeros((1, 8, 8, 3), np.float32))
    choice = np.array(data["choice"])
    recipe = t.recipe(trained.params, trained.state, choice, np.zeros((1, 8, 8, 3), np.float32))
    assert qjax.recipe(str(out / "recipe.toml")).hash == recipe.hash
    assert main(["eval", str(out / "packed"), "--images", str(made / "set.npz"), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert 0 <= scored["top1"] <= 1 and scored["images"] == 40
    lines = (out / "measured/measured.jsonl").read_text()
    assert main([*map(str, args), "--budget", "5 bits", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["choice"] == data["choice"] and (out / "measured/measured.jsonl").read_text() == lines


def test_what_cannot_be_searched(made, capsys, tmp_path):
    args = ["search", made / "tiny", "--supernet", made / "job", "--images", made / "set.npz", "--out", tmp_path / "o"]
    args += ["--samples", "16", "--recalibrate", "16"]
    for budget, more, words in (
        ("100 B,5 bits", [], "no choice costs as little as"),
        ("2 bits", ["--form", "tensor/sym/sym"], "the supernet has channel/sym/sym"),
        ("9 bits", [], "can be reached"),
        ("2 ms", [], "needs --device"),
    ):
        assert main([*map(str, args), "--budget", budget, *more]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "o").exists(), "it is said before anything is measured"
    assert main(["search", str(made / "tiny"), "--budget", "5 bits", "--predictor", "20"]) == 2
    assert "--supernet" in capsys.readouterr().err


@pytest.mark.slow
def test_a_predictor_is_fitted_and_what_it_finds_is_run(made, capsys, tmp_path):
    args = [
        "search",
        made / "tiny",
        "--supernet",
        made / "job",
        "--images",
        made / "set.npz",
        "--out",
        tmp_path / "out",
    ]
    args += ["--samples", "17", "--recalibrate", "16", "--generations", "3", "--predictor", "12"]
    assert main([*map(str, args), "--budget", "5 bits,6 kB"]) == 0
    said = capsys.readouterr().out
    assert "as run, " in said and "as predicted" in said and "Predictor on held-out subnets: Pearson" in said
    assert "best of 16 random valid choices" in said and "everywhere" in said
    assert "top-1 on 17 images" in said


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "kind"), [("6.5 bits,7 us", "seconds"), ("60 uJ", "joules")])
def test_budgets_of_time_and_energy_hold(made, capsys, tmp_path, budget, kind):
    """Budgets between the least and the most that subnets cost: the winner is within, and costs what the model says."""
    device = tmp_path / "chip.toml"
    device.write_text(DEVICE)
    args = ["search", made / "tiny", "--supernet", made / "job", "--images", made / "set.npz", "--out", tmp_path / "o"]
    args += ["--samples", "16", "--recalibrate", "16", "--population", "8", "--generations", "1"]
    args += ["--device", device, "--rows", "64", "--json"]
    assert main([*map(str, args), "--budget", budget]) == 0
    data = json.loads(capsys.readouterr().out)
    fn, params, _ = qjax.models.load(made / "tiny")
    x = np.zeros((1, 8, 8, 3), np.float32)
    t, trained = load_trained(made / "job", fn, params, x)
    costs = site_costs(t, trained.params, trained.state, x, kind=kind, on=str(device), rows=64)
    most = next(b["amount"] for b in data["budget"] if b["kind"] == kind)
    spent = float(costs.of(np.array(data["choice"])))
    assert spent <= most and data["costs"][kind] == pytest.approx(spent)
    assert float(costs.of(t.domain(params, x).uniform(8, 8))) > most, "the budget forbids something"
