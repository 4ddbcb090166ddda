"""The training script: killed at random moments it goes on to the same numbers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

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
    moments, kills = random.Random(0), int(os.environ.get("QJAX_KILLS", "4"))
    left = kills
    while True:
        process = subprocess.Popen(
            command(root, tmp_path / "killed", text), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            out, _ = process.communicate(timeout=moments.uniform(0, seconds) if left else None)
            break  # it was done before its moment came
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            left -= 1
    assert process.returncode == 0, out
    whole, killed = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed"))
    assert whole == killed
