"""The training script: killed at random moments it goes on to the same numbers."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

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
