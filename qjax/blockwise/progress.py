"""What a block-wise job has finished, on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Key = tuple[int, ...]


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

    def load(self, number: int, name: str) -> tuple[dict[tuple[int, Key], Any], dict[int, dict[Key, float]]] | None:
        """The pieces of a finished block and their SQNR; None if it is not finished."""
        from qjax.checkpoint.parts import load_part

        found = load_part(self._part(number))
        if found is None or found[1]["block"] != name:
            return None
        pieces = {_parsed(label): leaf for label, leaf in found[0].items()}
        figures: dict[int, dict[Key, float]] = {}
        for label, sqnr in found[1]["sqnr"].items():
            position, key = _parsed(label)
            figures.setdefault(position, {})[key] = float(sqnr)
        return pieces, figures

    def save(
        self, number: int, name: str, pieces: Mapping[tuple[int, Key], Any], figures: Mapping[int, Mapping[Key, float]]
    ) -> None:
        """Keep a finished block."""
        from qjax.checkpoint.parts import save_part

        leaves = {_label(position, key): leaf for (position, key), leaf in pieces.items()}
        # as text, because an exact slice has an infinite SQNR, which JSON lacks
        sqnr = {_label(p, key): str(value) for p, found in figures.items() for key, value in found.items()}
        save_part(self._part(number), leaves, {"block": name, "sqnr": sqnr})

    def _part(self, number: int) -> Path:
        return self.folder / "blocks" / f"{number:04d}"


def _label(position: int, key: Key) -> str:
    return "-".join(map(str, (position, *key)))


def _parsed(label: str) -> tuple[int, Key]:
    position, *key = map(int, label.split("-"))
    return position, tuple(key)
