"""One save by all processes of a jax.distributed job: the first keeps the folder, all write their shards.

Arrays that lie on one process alone (constant scales, weights that were never sharded) have a copy on each. They have
to be equal, and the first process writes its own.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax.checkpoint.store import VERSIONS, writing
from qjax.errors import CheckpointError

_NAME_BYTES = 64


@contextlib.contextmanager
def writing_together(path: Path, keep: int) -> Iterator[Path]:
    """`qjax.checkpoint.store.writing`, by the first process for all: each gets the same folder.

    Every process returns when the save has taken effect.

    Raises:
        CheckpointError: as `writing`; in the other processes, that the first one could not begin.
    """
    if jax.process_count() == 1:
        with writing(path, keep) as folder:
            yield folder
        return
    from jax.experimental import multihost_utils

    if jax.process_index() == 0:
        told = False
        try:
            with writing(path, keep) as folder:
                told = bool(_broadcast(folder.name))
                yield folder
        except BaseException:
            if not told:  # the others wait for a name: tell them that there is none
                _broadcast("")
            raise
    else:
        name = _broadcast("")
        if not name:
            raise CheckpointError(f"the first process could not begin to save to {path}; its own error says why")
        yield path / VERSIONS / name
    multihost_utils.sync_global_devices(f"qjax.save {path}")


def with_copies(arrays: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The arrays as all processes can save them: those of which each has a copy as NumPy arrays.

    Args:
        arrays: by key, the same keys in every process.
        names: the leaf of each key, for errors.

    Raises:
        CheckpointError: copies differ between processes; in all of them.
    """
    if jax.process_count() == 1:
        return dict(arrays)
    from jax.experimental import multihost_utils

    own = {key: np.asarray(a) for key, a in arrays.items() if getattr(a, "is_fully_addressable", True)}
    digests = [_digest(key, own.get(key)) for key in arrays]
    every = np.asarray(multihost_utils.process_allgather(np.stack(digests))) if digests else np.zeros((1, 0))
    for key, column in zip(arrays, every.swapaxes(0, 1), strict=True):
        if (column != column[0]).any():
            raise CheckpointError(
                f"{names[key]}: the processes of this job hold different copies of it; calibrate on the batches of all "
                "(Observed.merge_processes), or put the parameters on a mesh over all processes"
            )
    return {**arrays, **own}


def _digest(key: str, a: np.ndarray | None) -> np.ndarray:
    """SHA-256 of an array with its key, uint8 [32]; of one that is spread over processes, of its key."""
    said = hashlib.sha256(key.encode())
    if a is not None:
        said.update(f"{a.dtype} {a.shape}".encode())
        said.update(np.ascontiguousarray(a).view(np.uint8).data if a.size else b"")
    return np.frombuffer(said.digest(), np.uint8)


def _broadcast(text: str) -> str:
    """The text that the first process gives."""
    from jax.experimental import multihost_utils

    padded = np.frombuffer(text.encode().ljust(_NAME_BYTES), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode().strip()
