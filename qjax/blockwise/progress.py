"""What a block-wise job has finished, on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qjax.analysis.naming import SliceKey

Key = tuple[int, ...]

Kept = tuple[dict[tuple[int, Key], Any], dict[int, dict[Key, float]], dict[tuple[int, SliceKey], Any], list[str]]

EDIT = "edit-"
"""In front of the labels of float slices that prepare passes changed."""


class Progress:
    """The finished blocks of one job. Made by `open`."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def open(cls, path: str | Path, job: Mapping[str, Any]) -> Progress:
        """Begin a job in a folder, or go on with it.

        Raises:
            CheckpointError: the folder is that of another job.
        """
        from qjax.checkpoint.parts import open_job

        return cls(open_job(path, job, "quantization"))

    def load(self, number: int, name: str) -> Kept | None:
        """A finished block: its pieces, their SQNR, float slices that passes changed, notes. None if not finished."""
        from qjax.checkpoint.parts import load_part

        found = load_part(self._part(number))
        if found is None or found[1]["block"] != name:
            return None
        pieces = {_parsed(label): leaf for label, leaf in found[0].items() if not label.startswith(EDIT)}
        edited = {_parsed_slice(label): leaf for label, leaf in found[0].items() if label.startswith(EDIT)}
        figures: dict[int, dict[Key, float]] = {}
        for label, sqnr in found[1]["sqnr"].items():
            position, key = _parsed(label)
            figures.setdefault(position, {})[key] = float(sqnr)
        return pieces, figures, edited, list(found[1].get("notes", ()))

    def save(
        self,
        number: int,
        name: str,
        pieces: Mapping[tuple[int, Key], Any],
        figures: Mapping[int, Mapping[Key, float]],
        edited: Mapping[tuple[int, SliceKey], Any],
        notes: Sequence[str],
    ) -> None:
        """Keep a finished block."""
        from qjax.checkpoint.parts import save_part

        leaves = {_label(position, key): leaf for (position, key), leaf in pieces.items()}
        leaves |= {_slice_label(position, key): leaf for (position, key), leaf in edited.items()}
        # as text, because an exact slice has an infinite SQNR, which JSON lacks
        sqnr = {_label(p, key): str(value) for p, found in figures.items() for key, value in found.items()}
        save_part(self._part(number), leaves, {"block": name, "sqnr": sqnr, "notes": list(notes)})

    def _part(self, number: int) -> Path:
        return self.folder / "blocks" / f"{number:04d}"


def _slice_label(position: int, key: SliceKey) -> str:
    return EDIT + "-".join([str(position), *(f"{axis}.{at}" for axis, at in key)])


def _parsed_slice(label: str) -> tuple[int, SliceKey]:
    position, *key = label.removeprefix(EDIT).split("-")
    return int(position), tuple((int(axis), int(at)) for axis, at in (part.split(".") for part in key))


def _label(position: int, key: Key) -> str:
    return "-".join(map(str, (position, *key)))


def _parsed(label: str) -> tuple[int, Key]:
    position, *key = map(int, label.split("-"))
    return position, tuple(key)
