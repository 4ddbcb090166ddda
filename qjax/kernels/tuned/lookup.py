"""How a kernel asks for a schedule, and what it gets. See the package."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from qjax.kernels.devices import device_kind
from qjax.kernels.tuned import files
from qjax.kernels.tuned.files import Key, Row, warn_once

FARTHEST = 1.5
"""Factor in N times factor in K up to which the schedule of another shape is taken."""

S = TypeVar("S")


def bucket(tokens: int) -> int:
    """Return the number of tokens that stands for a number of tokens: the next power of two, at least 8."""
    return max(8, 1 << max(tokens - 1, 0).bit_length())


@dataclasses.dataclass(frozen=True)
class Found:
    """A schedule with where it comes from: "your file", "table", "near N x K" or "heuristic"."""

    schedule: Any
    source: str


def schedule_of(key: Key, heuristic: S, fits: Callable[[S], bool] = lambda _: True) -> S:
    """Return the schedule to compile a kernel with; see the module. Never an error.

    Args:
        key: of the kernel.
        heuristic: what its rule of thumb gives; a frozen dataclass.
        fits: whether a schedule can be taken for this shape.
    """
    for hook in _hooks:
        asked = hook(key, heuristic)
        if asked is not None:
            return asked
    return look_up(key, heuristic, fits).schedule


def look_up(key: Key, heuristic: S, fits: Callable[[S], bool] = lambda _: True, device: str | None = None) -> Found:
    """Return the schedule of `schedule_of` and where it comes from.

    Args:
        key: of the kernel.
        heuristic: what its rule of thumb gives.
        fits: whether a schedule can be taken for this shape.
        device: kind of device; None takes that for which is compiled.
    """
    kind = device or device_kind()
    if kind is None:
        return Found(heuristic, "heuristic")
    sources = [("your file", files.of_user().get(kind, {})), ("table", files.shipped().get(kind, {}))]
    for name, rows in sources:
        made = _made(rows.get(key), heuristic, fits)
        if made is not None:
            return Found(made, name)
    near = [r for _, rows in sources for r in rows.values() if r.key.like() == key.like() and r.key != key]
    limit = math.log(FARTHEST) + 1e-9
    near = [r for r in near if r.key.far(key) <= limit]
    for row in sorted(near, key=lambda r: (round(r.key.far(key), 9), r.key.n * r.key.k, r.key.n)):
        made = _made(row, heuristic, fits)
        if made is not None:
            return Found(made, f"near {row.key.n} x {row.key.k}")
    return Found(heuristic, "heuristic")


def _made(row: Row | None, heuristic: S, fits: Callable[[S], bool]) -> S | None:
    if row is None:
        return None
    try:
        schedule = type(heuristic)(**row.schedule)
    except (TypeError, ValueError):  # written by another version of qjax that forgot to raise the kernel's revision
        warn_once(f"the tuned schedule {dict(row.schedule)} of {row.key} is none of this version and passed over")
        return None
    return schedule if fits(schedule) else None


_hooks: list[Callable[[Key, Any], Any]] = []


@contextlib.contextmanager
def forced(schedule: Any, kernel: str | None = None) -> Iterator[None]:
    """Let kernels that are traced inside take this schedule, whatever is known; only those of the name, if given."""
    hook = lambda key, heuristic: schedule if kernel in (None, key.kernel) else None  # noqa: E731
    _hooks.insert(0, hook)
    try:
        yield
    finally:
        _hooks.remove(hook)


@contextlib.contextmanager
def asked() -> Iterator[list[tuple[Key, Any]]]:
    """Collect ``(key, heuristic)`` of the kernels that are traced inside."""
    found: list[tuple[Key, Any]] = []

    def hook(key: Key, heuristic: Any) -> None:
        found.append((key, heuristic))

    _hooks.insert(0, hook)
    try:
        yield found
    finally:
        _hooks.remove(hook)
