"""Two processes of one jax.distributed job save one model, each its shards, and calibrate one, each on its batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from calibrating_process import RECIPE, apply, batches, model

import qjax


def run_two(script, root, folder):
    """What two processes with two devices each have printed; the folder is their last argument."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parents[1] / "helpers" / script
    env = {**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    commands = [[sys.executable, str(script), str(index), str(port), str(folder)] for index in (0, 1)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        said = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    return [out for out, _ in said]


def test_two_processes(tmp_path, root):
    said = run_two("saving_process.py", root, tmp_path / "m")
    (version,) = (tmp_path / "m" / "versions").iterdir()
    assert said[0].strip().endswith("is a file; give a folder to save to")
    assert "its own error says why" in said[1] and all(version.name in out for out in said)

    loaded = qjax.load(tmp_path / "m", lambda p, x: x)  # in one process, the whole of it
    w = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    assert np.abs(np.asarray(loaded.params["w"].dequantize()) - w).max() < 0.02


@pytest.mark.slow
def test_two_processes_calibrate_what_one_loads(tmp_path, root):
    said = run_two("calibrating_process.py", root, tmp_path)
    for out in said:
        assert "w: the processes of this job hold different copies of it; calibrate on the batches of all" in out
        assert out.count("its state lies on a mesh over several processes") == 2
    assert not (tmp_path / "unmerged").exists()

    alone = qjax.quantize(apply, model(), recipe=RECIPE, batches=batches())
    want = [alone(alone.params, x) for x in batches()]
    for name in ("own", "Auto", "Explicit"):
        loaded = qjax.load(tmp_path / name, apply, like=model())
        assert set(loaded.params["v"].aux) == {"scale", "input.scale", "input.zero"}
        same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)  # noqa: E731
        jax.tree.map(same, loaded.params, alone.params)
        for x, y in zip(batches(), want, strict=True):
            np.testing.assert_allclose(loaded(loaded.params, x), y, rtol=1e-5, atol=1e-5)
