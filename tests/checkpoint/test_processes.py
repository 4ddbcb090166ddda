"""Two processes of one jax.distributed job save one model, each its shards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

import qjax


def test_two_processes(tmp_path, root):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parents[1] / "helpers" / "saving_process.py"
    env = {**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    commands = [[sys.executable, str(script), str(index), str(port), str(tmp_path / "m")] for index in (0, 1)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        said = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    (version,) = (tmp_path / "m" / "versions").iterdir()
    assert said[0][0].strip().endswith("is a file; give a folder to save to")
    assert "its own error says why" in said[1][0] and all(version.name in out for out, _ in said)

    loaded = qjax.load(tmp_path / "m", lambda p, x: x)  # in one process, the whole of it
    w = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    assert np.abs(np.asarray(loaded.params["w"].dequantize()) - w).max() < 0.02
