"""The numbers of a checkpoint, through Orbax: a flat tree of plain arrays in a folder that does not exist yet."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax.checkpoint.leaves import Spec, stored_dtype, with_dtype
from qjax.errors import CheckpointError


def write_arrays(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays (sharded ones too) by key.

    Args:
        folder: absolute; must not exist. Without arrays nothing is written, since Orbax refuses an empty tree.
        arrays: with at least one element each.

    Raises:
        Exception: whatever Orbax raises, on a full disk for instance.
    """
    import orbax.checkpoint as ocp

    if arrays:
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder, dict(arrays))


def read_arrays(folder: Path, specs: Sequence[Spec], shardings: Mapping[str, Any]) -> dict[str, Any]:
    """Read arrays by key.

    Args:
        folder: absolute, as `write_arrays` wrote it.
        specs: of the arrays to read; those without elements are passed over.
        shardings: by key; arrays without one go to the default device, uncommitted.

    Returns:
        Key -> array in the dtype of its spec.

    Raises:
        CheckpointError: Orbax cannot read what was written.
    """
    import orbax.checkpoint as ocp

    specs = [spec for spec in specs if spec["array"]]
    args = {}
    for spec in specs:
        if (sharding := shardings.get(spec["array"])) is None:
            # Through NumPy: an array that Orbax itself places is committed to its device.
            args[spec["array"]] = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            args[spec["array"]] = ocp.ArrayRestoreArgs(
                restore_type=jax.Array,
                sharding=sharding,
                global_shape=tuple(spec["shape"]),
                dtype=stored_dtype(spec["dtype"]),
            )
    stored: dict[str, Any] = {}
    if args:
        try:
            with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                wanted = ocp.args.PyTreeRestore(item=dict.fromkeys(args, 0), restore_args=args)
                stored = dict(checkpointer.restore(folder, wanted))
        except Exception as error:  # its own kinds of errors, and those of the storage beneath it
            raise CheckpointError(
                f"{folder} is complete, but orbax-checkpoint {ocp.__version__} cannot read it "
                f"({' '.join(str(error).split())[:300]}); use the version that metadata.json names"
            ) from error
    # One at a time, so that a host copy is gone when the next is moved to the device.
    return {spec["array"]: with_dtype(stored.pop(spec["array"]), spec) for spec in specs}


class _NotOfOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Orbax's log of what it raises as an exception as well, tracebacks of its threads included."""
    log, silence = logging.getLogger("absl"), _NotOfOrbax()
    log.addFilter(silence)
    try:
        yield
    finally:
        log.removeFilter(silence)
