"""The parts of ``python -m benchmarks.gpu``: one module for a family of kernels.

``checks(quick) -> rows`` compares with float64 NumPy: ``kernel`` (as its cases for the compiler are called, without the
schedule), ``case``, ``error``, ``right``. ``times(clock) -> rows``, the most interesting first: ``kernel``, ``layer``,
``n``, ``k``, ``tokens``, ``us``, ``bytes``, ``flops``, ``peers`` (microseconds by name), ``ceiling_us`` where known.
"""

from __future__ import annotations

import importlib
from typing import Any

PARTS = ("weights16", "codes8", "w4a8", "lookup", "mixed", "ragged", "triton", "acts", "log_attention", "peers")
"""In the order in which they are checked, and then timed."""


def part(name: str) -> Any:
    """The module of a part."""
    return importlib.import_module(f"benchmarks.gpu_parts.{name}")
