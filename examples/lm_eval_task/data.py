"""The data of the two tasks: JSON lines beside this file, so that they are found from any folder and offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

HERE = Path(__file__).resolve().parent


def sentences(**_: Any) -> dict[str, Dataset]:
    """Rows of ``text``, four ``choices`` and the number of the right one, ``answer``."""
    return {"test": _read("sentences.jsonl")}


def tales(**_: Any) -> dict[str, Dataset]:
    """Rows of ``text``."""
    return {"test": _read("tales.jsonl")}


def _read(name: str) -> Dataset:
    return Dataset.from_list([json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()])
