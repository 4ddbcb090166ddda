"""A study in Optuna's storage, shared by two workers; skipped where Optuna is not installed."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import CheckpointError, SearchError
from qjax.search import WholeLosses, refine, sensitivities

RNG = np.random.default_rng(0)
PARAMS = {name: RNG.standard_normal((16, 16)).astype(np.float32) / 3 for name in "abc"}
BATCHES = [(RNG.standard_normal((8, 16)).astype(np.float32),)]
CHOICES = [qjax.Recipe([qjax.Rule("**", weights=qjax.Int(b, group=16))], name=f"W{b}") for b in (2, 4)]


def fn(params, x):
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]


def test_workers_share_a_study(tmp_path):
    optuna = pytest.importorskip("optuna")
    from qjax.interop.optuna import optimize

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = sensitivities(fn, PARAMS, BATCHES, CHOICES)
    losses = WholeLosses(fn, PARAMS, BATCHES, CHOICES)
    url = f"sqlite:///{tmp_path / 'search.db'}"
    more = {"storage": url, "study": "s"}
    first = optimize(found, losses, "8 bits", trials=6, seed=0, **more)
    lagrange = [p.loss for p in first.curves["Lagrangian"]]
    assert first.whole <= min(lagrange) and first.cost <= 8
    again = optimize(found, losses, "8 bits", trials=6, seed=1, **more)
    assert (again.choices, again.whole) == (first.choices, first.whole), "there was nothing left to do"
    last = optimize(found, losses, "8 bits", trials=40, seed=1, **more)
    study = optuna.load_study(study_name="s", storage=url)
    assert len(study.trials) == 40 and last.whole <= first.whole
    every = np.array(list(itertools.product(range(3), repeat=3)))
    cost = np.array([[row.bytes[c] * 8 / found.elements for c in found.choices] for row in found.rows])
    fine = cost[np.arange(3), every].sum(axis=1) <= 8
    assert last.whole >= losses(every[fine]).min() * (1 - 1e-6)
    for trial in study.trials:
        assert trial.user_attrs["measured"] == (trial.values[0] <= 8 + 1e-9)
    assert refine(found, losses, "8 bits").whole == pytest.approx(losses(every[fine]).min(), rel=1e-6)
    with pytest.raises(CheckpointError, match="budget differ"):
        optimize(found, losses, "9 bits", trials=6, **more)
    with pytest.raises(SearchError, match="below the smallest possible"):
        optimize(found, losses, "1 bits", trials=6, **more)
    with pytest.raises(SearchError, match="trials=0"):
        optimize(found, losses, "8 bits", trials=0, **more)
