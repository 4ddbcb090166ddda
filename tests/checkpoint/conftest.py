"""Tiny models, quantized once, and a checkpoint of one."""

from __future__ import annotations

import pytest
from saved_models import X, apply, make_params

import qjax


@pytest.fixture(scope="session")
def models() -> list[qjax.Model]:
    """Two quantizations of different weights."""
    return [qjax.quantize(apply, make_params(seed), X, recipe="W8A16", name=f"tiny {seed}") for seed in (1, 2)]


@pytest.fixture
def saved(models, tmp_path):
    """A checkpoint of the first model."""
    qjax.save(tmp_path / "model", models[0])
    return tmp_path / "model"
