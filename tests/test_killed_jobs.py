"""Jobs killed by SIGKILL at random moments, again and again: they end with the result of one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import killed_job
import numpy as np
import pytest

KILLS = 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["calibrate", "blocks", "search", "collect"])
def test_killed_at_random_moments(kind, tmp_path, root):
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}

    def start(folder, result):
        command = [sys.executable, killed_job.__file__, kind, str(tmp_path / folder), str(tmp_path / result)]
        job = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert job.stdout is not None and job.stdout.readline() == "begun\n", job.communicate()[1]
        return job

    def ended(job):
        _, errors = job.communicate(timeout=300)
        assert job.returncode == 0, errors

    alone = start("alone", "alone.npz")
    begun = time.monotonic()  # what comes before, importing, is no part of the job
    ended(alone)
    length = time.monotonic() - begun
    draw, killed, reached, attempts = random.Random(0), 0, set(), 0
    while killed < KILLS and attempts < 4 * KILLS:
        attempts += 1
        job = start("killed", "killed.npz")
        try:
            job.wait(draw.uniform(0, 0.9 * length))
        except subprocess.TimeoutExpired:
            job.send_signal(signal.SIGKILL)
            job.communicate()
            killed += 1
        else:  # it came to its end before: begin another
            ended(job)
            same(tmp_path / "alone.npz", tmp_path / "killed.npz")
            for file in sorted((tmp_path / "killed").rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            (tmp_path / "killed.npz").unlink()
        reached.add(len(list((tmp_path / "killed").rglob("CURRENT"))))
    ended(start("killed", "killed.npz"))
    same(tmp_path / "alone.npz", tmp_path / "killed.npz")
    assert killed == KILLS, f"{killed} of {attempts} jobs were killed before their end"
    assert kind != "blocks" or len(reached) > 2, "the job was killed before it had done anything"


def same(a, b):
    with np.load(a) as one, np.load(b) as other:
        assert one.files == other.files
        for name in one.files:
            np.testing.assert_array_equal(one[name], other[name])
