"""The kernels that are compiled ahead of time and measured on a device, each with the schedules it is run with.

A family of kernels is one module with ``cases()`` and one entry of `FAMILIES`. A case has ``name`` (the kernel, its
dtype and its schedule, apart by commas), ``multiplies`` (HGMMA, IGMMA, QGMMA, or nothing for kernels without a
product) and ``function()``: what is compiled, and the shapes of its arguments. A family may also have ``programs()``:
whole programs around a kernel, as (function, shapes of arguments, bytes of one layer's codes) by name.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
from pathlib import Path
from typing import Any

FAMILIES = ("weights16", "codes8", "w4a8", "lookup", "mixed", "ragged", "triton", "acts", "log_attention")
"""In the order of the table in docs/kernels.md."""

QJAX = Path(__file__).parents[2] / "qjax"

_WORDS = ("kernels/dot/words16.py", "kernels/dot/widen.py", "formats/words.py", "formats/word_tiles.py")
_HOPPER = "kernels/dot/hopper.py"
_ENDINGS = "kernels/dot/endings.py"

SOURCES = {
    "weights16": (_HOPPER, _ENDINGS, *_WORDS),
    "codes8": (_HOPPER, _ENDINGS, "kernels/dot/codes8.py"),
    "w4a8": (_HOPPER, _ENDINGS, "kernels/dot/codes4x8.py", "formats/code_tiles.py"),
    "lookup": (_HOPPER, _ENDINGS, *_WORDS, "formats/trit_tiles.py"),
    "mixed": (_HOPPER, "kernels/dot/mixed16.py", "formats/mixed_tiles.py", "formats/mixed_words.py"),
    "ragged": (_HOPPER, *_WORDS, "kernels/ragged_dot/experts.py", "kernels/ragged_dot/placing.py"),
    "triton": ("kernels/dot/rows16.py", "kernels/dot/rows8.py", "kernels/dot/triton_call.py"),
    "acts": ("kernels/act/rows.py",),
    "log_attention": (_HOPPER, "kernels/log_attention/hopper.py", "formats/log.py"),
}
"""The modules of qjax that say what a family's kernels do."""


def written_in(family: str) -> str:
    """Return a digest of what a family's kernels are written in, without comments, docstrings and spaces.

    What a device said of kernels counts for those of the same digest.
    """
    digest = hashlib.sha256()
    for source in SOURCES[family]:
        tree = ast.parse((QJAX / source).read_text())
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                body[:] = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        digest.update(repr(_told(tree)).encode())
    return digest.hexdigest()[:16]


def _told(part: Any) -> Any:
    """A tree as lists, without fields that are empty: what they are called differs between versions of Python."""
    if isinstance(part, list):
        return [_told(p) for p in part]
    if not isinstance(part, ast.AST):
        return part
    fields = [(name, _told(value)) for name, value in ast.iter_fields(part) if value is not None and value != []]
    return [type(part).__name__, *fields]


def cases(family: str) -> list[Any]:
    """The kernels of a family."""
    return importlib.import_module(f"benchmarks.kernel_cases.{family}").cases()


def programs(family: str) -> dict[str, tuple[Any, Any, int]]:
    """The whole programs of a family."""
    return getattr(importlib.import_module(f"benchmarks.kernel_cases.{family}"), "programs", dict)()
