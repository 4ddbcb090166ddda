"""Patterns for the names of sites."""

from __future__ import annotations

import re
from functools import lru_cache

from qjax.errors import RecipeError


@lru_cache(maxsize=1024)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return a compiled expression that full-matches ``name + "/"`` for the names that the pattern is for.

    Raises:
        RecipeError: a bad regular expression, or ``**`` inside a segment.
    """
    if pattern.startswith("re:"):
        try:
            return re.compile(f"(?:{pattern[3:]})/")
        except re.error as error:
            raise RecipeError(f"rule {pattern!r} is not a regular expression: {error}") from error
    parts = []
    for segment in pattern.split("/"):
        if segment == "**":
            parts.append("(?:[^/]*/)*")
        elif "**" in segment:
            raise RecipeError(f"rule {pattern!r}: '**' stands for whole segments; write it between slashes, or one '*'")
        else:
            parts.append("[^/]*".join(re.escape(piece) for piece in segment.split("*")) + "/")
    return re.compile("".join(parts))
