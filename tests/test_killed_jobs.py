"""Jobs killed by SIGKILL at random moments, again and again: they end with the result of one that was left alone."""

from __future__ import annotations

import itertools
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
@pytest.mark.parametrize("kind", ["calibrate", "blocks", "search", "collect", "supernet"])
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
    draw, killed, reached, attempts, steps = random.Random(0), 0, set(), 0, []
    while killed < KILLS and attempts < 4 * KILLS:
        attempts += 1
        job = start("killed", "killed.npz")
        try:
            a_while(job, draw, 0.9 * length, tmp_path / "killed.steps" if kind == "supernet" else None)
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
            if kind == "supernet":
                steps.append(tmp_path / f"killed.steps.{len(steps)}")
                (tmp_path / "killed.steps").rename(steps[-1])
        reached.add(len(list((tmp_path / "killed").rglob("CURRENT"))))
    ended(start("killed", "killed.npz"))
    same(tmp_path / "alone.npz", tmp_path / "killed.npz")
    assert killed == KILLS, f"{killed} of {attempts} jobs were killed before their end"
    assert kind != "blocks" or len(reached) > 2, "the job was killed before it had done anything"
    if kind == "supernet":
        tables = [(tmp_path / name / "metrics.csv").read_text() for name in ("alone", "killed")]
        assert tables[0] == tables[1] and len(tables[0].splitlines()) == 1 + killed_job.STEPS
        only_the_work_since_a_checkpoint_was_lost([*steps, tmp_path / "killed.steps"])


def a_while(job, draw, longest, told):
    """Wait for a random time; or, where the job tells its steps, mostly for some of them, however busy the machine."""
    if told is None or draw.random() < 0.3:
        job.wait(draw.uniform(0, longest))
        return

    def lines():
        return len(told.read_text().split()) if told.exists() else 0

    until = lines() + draw.randrange(16)
    while job.poll() is None and lines() < until:
        time.sleep(0.005)
    job.wait(draw.uniform(0, 0.3))


def only_the_work_since_a_checkpoint_was_lost(files):
    """Each holds the steps of one job in the order in which they were done; a step is told after its checkpoint."""
    resumed = 0
    for file in files:
        steps = [int(line) for line in file.read_text().split()]
        untold = set(range(1, killed_job.STEPS + 1)) - set(steps)  # killed after a checkpoint, before it was told
        assert steps[0] == 1 and not any(step % killed_job.SAVED for step in untold)
        for last, first in itertools.pairwise(steps):
            resumed += first != last + 1
            saved = last // killed_job.SAVED * killed_job.SAVED
            assert first in (last + 1, saved + 1, saved + killed_job.SAVED + 1), f"step {first} came after {last}"
    assert resumed > 5, f"the job was killed {resumed} times between two checkpoints"


def same(a, b):
    with np.load(a) as one, np.load(b) as other:
        assert one.files == other.files
        for name in one.files:
            np.testing.assert_array_equal(one[name], other[name])
