"""Training scripts: killed at random moments one goes on to the same numbers; ImageNet's recipe runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from qjax import models

pytestmark = pytest.mark.slow

KILLS = 20
SETTINGS = "--bits 3 --learned --steps 8 --every 2 --batch 1 --context 32 --scored 512".split()


def command(root, folder, text):
    script = [sys.executable, str(root / "examples" / "qat.py")]
    return [*script, "--text", str(text), "--valid", str(text), "--work", str(folder), *SETTINGS]


def test_a_killed_training_goes_on_to_the_same_numbers(root, tmp_path):
    text = root / "examples" / "assets" / "passage.txt"
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    begun = time.perf_counter()
    done = subprocess.run(command(root, tmp_path / "whole", text), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds = time.perf_counter() - begun
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    moments, left = random.Random(0), KILLS
    while True:
        process = subprocess.Popen(
            command(root, tmp_path / "killed", text), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            out, _ = process.communicate(timeout=moments.uniform(0, seconds) if left else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            left -= 1
            continue
        assert process.returncode == 0, out
        assert json.loads((tmp_path / "killed" / "result.json").read_text()) == whole
        if not left:
            break
        shutil.rmtree(tmp_path / "killed")  # it was done before its moment came: begin another


def test_the_imagenet_recipe_runs_from_a_folder_and_goes_on(root, tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    raw = {
        "architectures": ["ResNetForImageClassification"],
        "layer_type": "basic",
        "embedding_size": 4,
        "num_labels": 2,
    }
    raw |= {"hidden_sizes": [4], "depths": [1], "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_size": 32}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    fn, _, config = models.abstract(tmp_path / "model")
    models.save_weights(tmp_path / "model" / "model.safetensors", fn.init(), config, dtype=np.float32)
    for part, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 255, (40, 50, 3), np.uint8)
                image.fromarray(pixels).save(tmp_path / part / name / f"{n}.png")
    script = [sys.executable, str(root / "examples" / "imagenet_supernet.py"), "--bits", "2", "8", "--batch", "4"]
    script += ["--steps", "4", "--save-every", "2", "--calibration-batches", "2", "--threads", "2"]
    script += [f"--{name}={tmp_path / name}" for name in ("model", "train", "val", "work")]
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(script, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "work" / "result.json").read_text())
    assert len(table) == 16 and all(0 <= share <= 1 for share in table.values())
    shutil.rmtree(tmp_path / "train" / "dog")
    done = subprocess.run(script, env=env, capture_output=True, text=True, check=False)
    assert done.returncode and "has 1 folders" in done.stderr
