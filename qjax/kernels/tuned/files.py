"""Files of schedules that were measured: what a row says, reading, writing whole, those that come with qjax.

A file has the form

    {"version": 1, "devices": {"NVIDIA H200": {"measured": "2026-11-27, jax 0.11.2", "results": [
      {"kernel": "words16", "revision": 2, "formats": "int4 g128 tiles", "dtype": "bfloat16", "n": 4096, "k": 4096,
       "tokens": 16, "matrices": 1, "schedule": {"tokens": 16, "stages": 6, "splits": 4}, "us": 7.1,
       "heuristic_us": 7.4}]}}}
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from qjax.errors import DeviceError, warn

FILE = "QJAX_TUNED"
"""Environment variable with the path of a user's own file."""

VERSION = 1
"""Of the form of the file."""


@dataclasses.dataclass(frozen=True, order=True)
class Key:
    """What a schedule was measured for.

    Attributes:
        kernel: its name.
        revision: of the kernel; raised where the same schedule means another program, which forgets what was measured.
        formats: of the weight, and of activations if they are quantized.
        dtype: of the activations.
        n: rows of the weight, as the kernel pads them.
        k: its columns, likewise.
        tokens: `bucket` of the rows of activations.
        matrices: products of that size in one call.
    """

    kernel: str
    revision: int
    formats: str
    dtype: str
    n: int
    k: int
    tokens: int
    matrices: int = 1

    def like(self) -> tuple[Any, ...]:
        """What has to be equal for one shape to stand for another."""
        return (self.kernel, self.revision, self.formats, self.dtype, self.tokens, self.matrices)

    def far(self, other: Key) -> float:
        """Distance to a key of another shape."""
        return abs(math.log(self.n / other.n)) + abs(math.log(self.k / other.k))

    def __str__(self) -> str:
        """Say it in words."""
        many = f" x {self.matrices}" if self.matrices > 1 else ""
        return f"{self.kernel} {self.formats} {self.dtype} [{self.n}, {self.k}]{many}, {self.tokens} tokens"


@dataclasses.dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        key: what was measured.
        schedule: fields of the fastest schedule.
        us: its time, microseconds.
        heuristic_us: the time of the schedule that the rule of thumb gave.
    """

    key: Key
    schedule: Mapping[str, Any]
    us: float
    heuristic_us: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as a file has it."""
        own = {"schedule": dict(self.schedule), "us": self.us, "heuristic_us": self.heuristic_us}
        return {**dataclasses.asdict(self.key), **own}


Tables = dict[str, dict[Key, Row]]
"""By kind of device."""


def read(path: str | Path) -> Tables:
    """Read a file of results.

    Raises:
        DeviceError: no such file, no JSON, another version, or a row that is none; the message names it.
    """
    path = Path(path)
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as e:
        raise DeviceError(f"{path} cannot be read as a table of schedules: {e}") from e


def _parse(text: str, where: str) -> Tables:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        raise DeviceError(f"{where} is no JSON ({e}); delete it, or tune again into another file") from e
    if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("devices"), dict):
        raise DeviceError(f"{where} is no table of schedules of version {VERSION}; tune again into another file")
    out: Tables = {}
    for kind, device in data["devices"].items():
        rows = device.get("results") if isinstance(device, dict) else None
        if not isinstance(rows, list):
            raise DeviceError(f"{where}: {kind!r} has no list of results")
        parsed = [_row(row, f"{where}: result {i} of {kind!r}") for i, row in enumerate(rows)]
        out[kind] = {row.key: row for row in parsed}
    return out


_TYPES = {f.name: str if f.type == "str" else int for f in dataclasses.fields(Key)}


def _row(data: Any, where: str) -> Row:
    if not isinstance(data, dict) or not isinstance(data.get("schedule"), dict):
        raise DeviceError(f"{where} is none: {str(data)[:100]}")
    own = {k: data[k] for k in data if k in _TYPES}
    rest = {k: data[k] for k in data if k not in _TYPES}
    wrong = [k for k, v in own.items() if type(v) is not _TYPES[k] or (isinstance(v, int) and v < 1)]
    wrong += [k for k in ("us", "heuristic_us") if not _is_time(rest.get(k))]
    unknown = rest.keys() - {"schedule", "us", "heuristic_us"}
    try:
        if wrong or unknown:
            raise TypeError(f"look at {', '.join([*wrong, *sorted(unknown)])}")
        return Row(Key(**own), data["schedule"], rest["us"], rest["heuristic_us"])
    except TypeError as e:
        raise DeviceError(f"{where} is none: {e}") from e


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def write(path: str | Path, kind: str, rows: Sequence[Row], measured: str) -> None:
    """Put results of a device into a file, beside those that it has of others; written whole or not at all.

    Raises:
        DeviceError: there is a file that is damaged; it is left as it is.
    """
    path = Path(path)
    devices: dict[str, Any] = {}
    if path.exists():
        read(path)
        devices = json.loads(path.read_text(encoding="utf-8"))["devices"]
    lines = [json.dumps(row.to_dict()) for row in sorted(rows, key=lambda r: r.key)]
    devices[kind] = {"measured": measured, "results": lines}
    parts = []
    for name in sorted(devices):
        about, results = devices[name]["measured"], devices[name]["results"]
        body = ",\n".join(f"  {r if isinstance(r, str) else json.dumps(r)}" for r in results)
        parts.append(f'{json.dumps(name)}: {{"measured": {json.dumps(about)}, "results": [\n{body}\n]}}')
    body = ",\n".join(parts)
    text = f'{{"version": {VERSION}, "devices": {{\n{body}\n}}}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with fresh.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def file_name(kind: str) -> str:
    """Return the name of the file of a kind of device: ``nvidia-h200.json``."""
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-") + ".json"


@functools.cache
def shipped() -> Tables:
    """Return the results that come with qjax, by kind of device."""
    out: Tables = {}
    for file in sorted(resources.files("qjax.kernels.tuned").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".json"):
            out.update(_parse(file.read_text(encoding="utf-8"), file.name))
    return out


def of_user() -> Tables:
    """Return the results of the file that `FILE` names, {} if it names none; a damaged one is warned of, once."""
    path = os.environ.get(FILE)
    if not path:
        return {}
    try:
        stamp = os.stat(path)
    except OSError as e:
        warn_once(f"{FILE}={path} cannot be read ({e.strerror}); schedules are those that come with qjax")
        return {}
    return _read_once(path, stamp.st_mtime_ns, stamp.st_size)


@functools.lru_cache(maxsize=4)
def _read_once(path: str, changed: int, size: int) -> Tables:
    try:
        return read(path)
    except DeviceError as e:
        warn_once(f"{FILE}: {e}. Until then schedules are those that come with qjax")
        return {}


_said: set[str] = set()


def warn_once(message: str) -> None:
    """Warn, but not again of the same."""
    if message not in _said:
        _said.add(message)
        warn(message)
