"""Results that a long job keeps one by one: a JSON object a line, added as they are found.

A kill can cut the last line short; it is passed over, and what is added then begins on a line of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, which may not be there; lines that are no objects are passed over."""
    if not file.exists():
        return
    text = file.read_text("utf-8")
    if text and not text.endswith("\n"):
        with file.open("a", encoding="utf-8") as f:
            f.write("\n")
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def add_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add objects, in one write."""
    with file.open("a", encoding="utf-8") as f:
        f.write("".join(json.dumps(row) + "\n" for row in rows))
