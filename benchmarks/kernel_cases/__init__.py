"""The kernels that are compiled ahead of time and measured on a device, each with the schedules it is run with.

A family of kernels is one module with ``cases()`` and one entry of `FAMILIES`. A case has ``name`` (the kernel, its
dtype and its schedule, apart by commas), ``multiplies`` (HGMMA, IGMMA, QGMMA, or nothing for kernels without a
product) and ``function()``: what is compiled, and the shapes of its arguments. A family may also have ``programs()``:
whole programs around a kernel, as (function, shapes of arguments, bytes of one layer's codes) by name.
"""

from __future__ import annotations

import importlib
from typing import Any

FAMILIES = ("weights16", "codes8", "w4a8", "lookup", "mixed", "ragged", "triton", "acts")
"""In the order of the table in docs/kernels.md; one a line when there are more."""


def cases(family: str) -> list[Any]:
    """The kernels of a family."""
    return importlib.import_module(f"benchmarks.kernel_cases.{family}").cases()


def programs(family: str) -> dict[str, tuple[Any, Any, int]]:
    """The whole programs of a family."""
    return getattr(importlib.import_module(f"benchmarks.kernel_cases.{family}"), "programs", dict)()
