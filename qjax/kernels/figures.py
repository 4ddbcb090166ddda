"""Measured speed of the lowerings beside the float op, and how a report says it.

The figures are data, `figures.json`, written by ``python -m benchmarks.cpu_ops --figures``: for each op, lowering and
pair of kinds of codes, the median over shapes of (time of the float op / time of the quantized one), by number of
rows. Nothing is said about a platform that was not measured.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from typing import Any

from qjax.formats import Format

CLOSE = 0.95
"""A lowering below this speed is called slower than float."""

HOW = {
    "dequantize": "unpacked whole for a float product",
    "dequantize_blocks": "unpacked a block of rows at a time for float products",
    "reference": "unpacked whole for a float product",
    "experts": "unpacked one matrix at a time",
    "int_dot": "int8 x int8 -> int32 product on codes",
    "affine_dot": "int8 x int8 -> int32 product on codes, corrected for offsets",
    "native": "integer products on codes by compiled kernels",
    "int_conv": "int8 x int8 -> int32 convolution on codes",
    "float8_dot": "float8 product on codes, which XLA on CPU widens first",
}


@functools.cache
def table() -> dict[str, Any]:
    """Return the figures as stored: {"platform", "measured_on", "figures": [{..., "speed": {rows: ratio}}]}."""
    path = importlib.resources.files("qjax.kernels").joinpath("figures.json")
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {"platform": "", "measured_on": "", "figures": []}


def kind_of(fmt: Format) -> str:
    """Return how figures call the codes of a format: "int4 grouped", "int8", "nf4 grouped", ..."""
    name = f"{fmt.key}{fmt.code_bits}" if fmt.key == "int" else fmt.key
    return name + (" grouped" if fmt.per == "group" else "")


def speed(op: str, lowering: str, weight: Format, act: Format | None, platform: str) -> dict[int | None, float]:
    """Return the measured speeds by number of rows (None: any); {} where nothing like it was measured."""
    measured = table()
    if platform != measured["platform"]:
        return {}
    kinds = (kind_of(weight), kind_of(act) if act else "")
    rows = [f for f in measured["figures"] if (f["op"], f["lowering"]) == (op, lowering)]
    exact = [f for f in rows if (f["weights"], f["act"]) == kinds]
    if not exact:  # the same number of bits is the nearest thing: unpacking is most of the work
        bits = {f["weights"]: f for f in rows if bool(f["act"]) == bool(act)}
        name = next((n for n in bits if n.startswith(f"int{weight.code_bits}")), None)
        exact = [bits[name]] if name else []
    return {None if k == "any" else int(k): v for k, v in exact[0]["speed"].items()} if exact else {}


def describe(
    op: str, lowering: str, weight: Format, act: Format | None, rows: int | None, platform: str
) -> tuple[str, bool]:
    """Return one sentence on a lowering's speed beside float, "" if it was not measured, and whether it is slower."""
    speeds = speed(op, lowering, weight, act, platform)
    if not speeds:
        return "", False
    numbers = [r for r in speeds if r is not None]
    here = speeds[min(numbers, key=lambda r: abs(math.log(r / max(rows, 1))))] if numbers and rows else None
    here = next(iter(speeds.values())) if here is None else here
    slower = here < CLOSE
    parts = [
        f"{v:.2g}x at {r} row{'s' if r != 1 else ''}" if r else f"{v:.2g}x"
        for r, v in sorted(speeds.items(), key=_rows)
    ]
    what = f"{weight.name} x {act.name}" if act else f"{weight.name} weight-only"
    gain = "; the gain is memory, not time" if slower else ""
    return (
        f"{what} on XLA {platform.upper()}: {HOW.get(lowering, lowering)}; about {', '.join(parts)} the speed of "
        f"float{gain}",
        slower,
    )


def _rows(item: tuple[int | None, float]) -> int:
    return item[0] or 0
