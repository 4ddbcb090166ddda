"""One save by all processes of a jax.distributed job: the first keeps the folder, all write their shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

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


def _broadcast(text: str) -> str:
    """The text that the first process gives."""
    from jax.experimental import multihost_utils

    padded = np.frombuffer(text.encode().ljust(_NAME_BYTES), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode().strip()
