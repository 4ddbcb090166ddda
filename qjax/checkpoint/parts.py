"""Parts of a job on disk: named leaves and a few words about them, complete or not there.

A job that takes long keeps what it has done in a folder, part by part; killed at any moment, it goes on with the parts
that are complete. A part is a checkpoint folder as `qjax.save` writes it (`qjax.checkpoint.store`), so a damaged one is
reported and not half-read.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qjax.checkpoint.arrays import read_arrays, write_arrays
from qjax.checkpoint.leaves import array_key, build, describe, plain_specs
from qjax.checkpoint.store import ARRAYS, METADATA, POINTER, reading, verify, write_json, writing
from qjax.errors import CheckpointError

SHORT = 120
"""Settings of two jobs that differ stand in the message up to so many characters."""


def save_part(path: Path, leaves: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Write a part; it is there when this returns, and not at all if it is killed before.

    Args:
        path: its folder, absolute.
        leaves: arrays and quantized arrays by name.
        said: JSON-able.
    """
    arrays: dict[str, Any] = {}
    specs = {name: describe(name, leaf, array_key(n, name), arrays) for n, (name, leaf) in enumerate(leaves.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path, 1) as folder:
        write_arrays(folder / ARRAYS, arrays)
        write_json(folder / METADATA, {"leaves": specs, "said": dict(said)})


def load_part(path: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Read a part: its leaves and what was said of them; None if it was never completed.

    Raises:
        CheckpointError: it is damaged.
    """
    if not (path / POINTER).is_file():
        return None
    with reading(path) as folder:
        verify(folder)
        data = json.loads((folder / METADATA).read_text("utf-8"))
        specs = [spec for leaf in data["leaves"].values() for spec in plain_specs(leaf)]
        arrays = read_arrays(folder / ARRAYS, specs, {})
    return {name: build(spec, arrays) for name, spec in data["leaves"].items()}, data["said"]


def open_job(path: str | Path, job: Mapping[str, Any], what: str) -> Path:
    """Begin or go on with a job in a folder.

    Args:
        path: the folder; made where it is missing.
        job: what the job is, JSON-able; a folder of another job is refused.
        what: a word for messages, such as "quantization".

    Returns:
        The folder, absolute.

    Raises:
        CheckpointError: the folder belongs to another job, or holds something else.
    """
    folder = Path(path).absolute()
    found = load_part(folder / "job") if folder.is_dir() else None
    if found is None:
        if folder.is_dir() and any(p.name != "job" for p in folder.iterdir()):
            raise CheckpointError(f"{folder} holds other things and no begun {what}; give a new or an empty folder")
        save_part(folder / "job", {}, job)
        return folder
    check_same(folder, found[1], job, what)
    return folder


def check_same(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any], what: str) -> None:
    """See that a folder's job is the one that is asked for.

    Args:
        folder: for the message.
        there, here: descriptions, JSON-able.
        what: as for `open_job`.

    Raises:
        CheckpointError: they differ; the message says where, and short values.
    """
    differ = sorted(key for key in {**there, **here} if there.get(key) != here.get(key))
    if differ:
        both = "; ".join(line for key in differ for line in _differences(key, there.get(key), here.get(key)))
        raise CheckpointError(
            f"{folder} holds a begun {what} of something else: {', '.join(differ)} differ; give another folder, or "
            f"remove this one to begin again{f' ({both})' if both else ''}"
        )


def _differences(name: str, there: Any, here: Any) -> list[str]:
    """What differs between two values, down to settings; long ones are left out."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        return [line for key in keys for line in _differences(f"{name}.{key}", there.get(key), here.get(key))]
    texts = json.dumps(there), json.dumps(here)
    return [f"{name}: {texts[0]} there, {texts[1]} here"] if max(map(len, texts)) <= SHORT else []


def remove_job(folder: str | Path) -> None:
    """Remove what a job has kept, once its result is safe; anything else in the folder stays."""
    folder = Path(folder)
    if not (folder / "job" / POINTER).is_file():
        return
    for name in ("blocks", "state", "job"):  # the job last: without the rest it only begins again
        shutil.rmtree(folder / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
