"""A folder as `qjax.supernet.train` leaves it, without the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

import qjax
from qjax.checkpoint.parts import open_job, save_part
from qjax.supernet import Schedule, Space
from qjax.supernet.training import _plain


def save_supernet(folder: Path, fn: Any, params: Any, space: Space, x: Any, step: float = 0.1) -> Path:
    """Write the folder of a supernet of ``fn`` whose steps and offsets are all ``step``."""
    t = qjax.elastic(fn, space)
    state = jax.tree.map(lambda a: np.full(a.shape, step, np.float32), jax.eval_shape(t.init, params, x))
    said = {"space": space.to_dict(), "sites": list(t.domain(params, x).sites), "schedule": _plain(Schedule(1))}
    job = open_job(folder, said, "training of a supernet")
    leaves = {str(n): np.asarray(a) for n, a in enumerate(jax.tree.leaves((params, state)))}
    save_part(job / "training", leaves, {"step": 1, "metrics": {"loss": [1.0]}})
    return folder
