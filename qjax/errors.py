"""The exceptions that qjax raises for mistakes a user can mend.

Every message names the place, what was given, what is allowed and what to do next; the command line prints
exactly that sentence and no traceback.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable


class QjaxError(ValueError):
    """Base of every error that qjax raises on purpose."""


class RecipeError(QjaxError):
    """A recipe that cannot be built, or asks for what cannot be done on this program."""


class FormatError(QjaxError):
    """A number format whose settings contradict each other."""


class LayoutError(QjaxError):
    """A view of packed codes that would not be exact."""


class LoweringError(QjaxError):
    """A named implementation of a quantized op that cannot run here."""


class TraceError(QjaxError):
    """A function or its arguments that cannot be traced into a program."""


class CheckpointError(QjaxError):
    """A checkpoint that is damaged, of another version, or of another model."""


class ModelError(QjaxError):
    """A model folder that is incomplete, damaged, or of an unsupported architecture."""


class SearchError(QjaxError):
    """A search that cannot be made, or whose budget nothing meets."""


class DeviceError(QjaxError):
    """A device that is not known, or whose description contradicts itself."""


class DataError(QjaxError):
    """Text or images that cannot be used as evaluation or calibration data."""


class QjaxWarning(UserWarning):
    """Something is slower or less accurate than asked for; raised once per site."""


def near(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a hint ``" (did you mean 'a' or 'b'?)"`` with the nearest known names, or an empty string.

    It stands behind the name that was given, and the sentence may go on after it.

    Args:
        name: what was given.
        known: the names that would have worked.
        count: how many names to offer at most.
    """
    known = list(dict.fromkeys(known))
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=count, cutoff=0.45)
    if not close:
        return ""
    return " (did you mean " + " or ".join(repr(lowered[c]) for c in close) + "?)"


def warn(message: str) -> None:
    """Give a `QjaxWarning` that points at the line which called qjax, however deep inside of it this is.

    Frames of qjax and of jax, through which its functions are traced, are passed over. ``warnings.warn`` can skip files
    by itself from Python 3.12 on; counting the frames does the same on every version.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, QjaxWarning, stacklevel=level)


_INSIDE = ("qjax", "jax", "jaxlib", "contextlib", "functools")
"""Packages whose lines a user can do nothing about."""
