"""A state that is folded over batches, kept on disk from time to time."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax.checkpoint.parts import load_part, open_job, save_part
from qjax.errors import CheckpointError
from qjax.lazy import Lazy
from qjax.trees import is_array

SHARE = 0.05
"""The part of the time that keeping the state may take."""


def update_digest(digest: Any, batch: Any) -> None:
    """Feed a tree of arrays and plain values to a hash."""
    for leaf in jax.tree.leaves(batch):
        digest.update(str((getattr(leaf, "shape", ()), str(getattr(leaf, "dtype", type(leaf))))).encode())
        digest.update(np.ascontiguousarray(np.asarray(leaf)).tobytes() if is_array(leaf) else repr(leaf).encode())


def update_with_sample(digest: Any, leaf: Any) -> None:
    """Feed some thousand numbers of a parameter to a hash: enough to tell one checkpoint from another.

    Of a `Lazy` leaf that is read slice by slice, the first slice stands for all.
    """
    digest.update(str((leaf.shape, str(leaf.dtype))).encode())
    if not math.prod(leaf.shape):
        return
    part = np.asarray(leaf[0] if isinstance(leaf, Lazy) and leaf.ndim > 1 else leaf).reshape(-1)
    digest.update(np.ascontiguousarray(part[:: -(-part.size // 4096)]).tobytes())


class Folded:
    """The state of a fold over batches, in a folder.

    Args:
        path: the folder; a begun fold of another job is refused.
        job: what is folded, JSON-able.

    Raises:
        CheckpointError: the folder belongs to something else, or is damaged.
    """

    def __init__(self, path: str | Path, job: Mapping[str, Any]):
        self.folder = open_job(path, job, "calibration")
        self.digest = hashlib.sha256()
        self.expected: tuple[int, str] = (0, "")
        self.last, self.cost = time.monotonic(), 0.0

    def load(self, start: dict[str, dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], int]:
        """The state that was kept and how many batches are in it; ``start`` and 0 if there is none."""
        found = load_part(self.folder / "state")
        if found is None:
            return start, 0
        arrays, said = found
        state: dict[str, dict[str, Any]] = {site: {} for site in start}
        for key, array in arrays.items():
            site, _, field = key.rpartition("|")
            state[site][field] = array
        self.expected = (int(said["batches"]), said["digest"])
        return state, self.expected[0]

    def passed(self, number: int, batch: Any) -> None:
        """Look at a batch that is gone through: those that are in the state have to be the ones that were.

        Raises:
            CheckpointError: they are others.
        """
        update_digest(self.digest, batch)
        if number + 1 == self.expected[0] and self.digest.hexdigest() != self.expected[1]:
            raise CheckpointError(
                f"{self.folder} holds a calibration begun with other batches; give the same ones, another folder, or "
                "remove this one to begin again"
            )

    def save(self, state: Mapping[str, Mapping[str, Any]], done: int, now: bool = False) -> None:
        """Keep a state after ``done`` batches, unless that was done a moment ago."""
        start = time.monotonic()
        if not now and start - self.last < self.cost / SHARE:
            return
        leaves = {f"{site}|{field}": array for site, fields in state.items() for field, array in fields.items()}
        save_part(self.folder / "state", leaves, {"batches": done, "digest": self.digest.hexdigest()})
        self.last = time.monotonic()
        self.cost = self.last - start
