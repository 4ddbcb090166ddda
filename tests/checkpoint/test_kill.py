"""Saves killed by SIGKILL at every step, and at any moment: the checkpoint is the older or the newer one, whole."""

from __future__ import annotations

import os
import subprocess
import sys

import killed_saves
import numpy as np
import pytest

import qjax
from qjax.errors import CheckpointError


@pytest.fixture(scope="module")
def killed(tmp_path_factory, root):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    folder = tmp_path_factory.mktemp("killed")
    env = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, killed_saves.__file__, str(folder), "5"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def loaded_seed(path) -> int:
    """Which of the two models is there, all of it."""
    model = qjax.load(path, killed_saves.apply)
    seed = int(model.params["b"][0])
    expected = killed_saves.make_model(seed)
    assert np.array_equal(model.params["w"].codes, expected.params["w"].codes)
    assert np.array_equal(model.params["w"].aux["scale"], expected.params["w"].aux["scale"])
    assert model.report == expected.report
    return seed


def test_killed_at_each_step(killed):
    folders = sorted(killed.glob("killed-*"))
    seeds = [loaded_seed(folder) for folder in folders]
    assert len(seeds) > 10 and seeds == sorted(seeds)  # the older one until the pointer moves, then the newer one
    assert set(seeds) == {1, 2}
    for folder in folders[:: len(folders) // 4]:
        qjax.save(folder, killed_saves.make_model(3))
        assert loaded_seed(folder) == 3
        assert len(list((folder / "versions").iterdir())) == 1 and len(list(folder.iterdir())) == 2


def test_first_save_killed(killed):
    for folder in killed.glob("first-*"):
        with pytest.raises(CheckpointError, match="no checkpoint"):
            qjax.load(folder, killed_saves.apply)
        qjax.save(folder, killed_saves.make_model(3))
        assert loaded_seed(folder) == 3 and len(list((folder / "versions").iterdir())) == 1


def test_killed_at_any_moment(killed):
    folders = sorted(killed.glob("anytime-*"))
    assert len(folders) == 5 and {loaded_seed(folder) for folder in folders} <= {1, 2}
