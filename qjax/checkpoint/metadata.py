"""metadata.json: everything about a saved model but its numbers.

    format           version of the checkpoint format
    qjax, jax, orbax versions that wrote it
    created          when, UTC, ISO 8601
    source           sha256 of the float model's tree (names, shapes, dtypes); files: their SHA-256 where given
    recipe           what was asked for, with its hash
    options          max_runs and implementation of the model
    report           what was done
    leaves           name, shape and dtype of each parameter leaf, and how it is stored (see `qjax.checkpoint.leaves`)
    containers       the tree where it is made of dicts, lists and tuples, else null

It is plain JSON, so that other programs can read it as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from qjax.checkpoint.store import FORMAT_VERSION, METADATA, reading, refuse_newer, verify
from qjax.errors import CheckpointError
from qjax.recipe import Recipe
from qjax.report.data import Report


def make_metadata(
    *,
    leaves: Sequence[Mapping[str, Any]],
    containers: Any,
    recipe: Recipe,
    report: Report,
    options: Mapping[str, Any],
    source: str | Path | None,
) -> dict[str, Any]:
    """The content of metadata.json, from what `qjax.checkpoint.transfer` found."""
    from qjax import __version__

    return {
        "format": FORMAT_VERSION,
        "qjax": __version__,
        "jax": jax.__version__,
        "orbax": version("orbax-checkpoint"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": {"sha256": tree_hash(leaves), **({} if source is None else {"files": file_hashes(Path(source))})},
        "recipe": {"hash": recipe.hash, **_recipe_data(recipe)},
        "options": dict(options),
        "report": report.to_dict(),
        "leaves": list(leaves),
        "containers": containers,
    }


def _recipe_data(recipe: Recipe) -> dict[str, Any]:
    """The recipe as data, refused where it could not be read back."""
    data = recipe.to_dict()
    if Recipe.from_dict(data).hash != recipe.hash:
        raise CheckpointError(
            "the recipe cannot be saved: it reads back from its own to_dict() as another one; give the roundings, "
            "observers and passes in it fields of plain values"
        )
    return data


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read what a checkpoint says about itself, without its numbers.

    Args:
        path: the folder that `qjax.save` wrote, or one version in it.

    Returns:
        The keys listed in `qjax.checkpoint.metadata`, as plain JSON data.

    Raises:
        CheckpointError: there is no checkpoint, its metadata is damaged, or its format is newer.
    """
    with reading(Path(path).absolute()) as folder:
        refuse_newer_metadata(folder)
        verify(folder, [METADATA])
        return load_metadata(folder)


def refuse_newer_metadata(folder: Path) -> None:
    """Refuse a newer format before checksums are looked at, whose rules may be newer too."""
    try:
        refuse_newer(folder / METADATA, load_metadata(folder))
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        # Missing or damaged: verifying says so.


def load_metadata(folder: Path) -> dict[str, Any]:
    """The content of metadata.json in a version."""
    return json.loads((folder / METADATA).read_text(encoding="utf-8"))


def tree_hash(leaves: Iterable[Mapping[str, Any]]) -> str:
    """A digest of a parameter tree: names, shapes and dtypes of its leaves."""
    said = sorted([leaf["name"], leaf["shape"], leaf["dtype"]] for leaf in leaves)
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def file_hashes(source: Path) -> dict[str, str]:
    """SHA-256 of a file, or of every file in a folder whose name does not begin with a dot, by relative path.

    Raises:
        CheckpointError: there is no such file or folder.
    """
    if source.is_file():
        files = {source.name: source}
    elif source.is_dir():
        inside = sorted(p for p in source.rglob("*") if p.is_file())
        files = {p.relative_to(source).as_posix(): p for p in inside}
        files = {name: p for name, p in files.items() if not any(part.startswith(".") for part in name.split("/"))}
    else:
        raise CheckpointError(f"source={str(source)!r} is no file or folder; give the one of the float weights")
    hashes = {}
    for name, file in files.items():
        with file.open("rb") as f:
            hashes[name] = hashlib.file_digest(f, "sha256").hexdigest()
    return hashes
