"""The table of number formats by key, so that recipes and checkpoints can name them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar, overload

from qjax import plugins
from qjax.errors import FormatError, near
from qjax.formats.base import Format

F = TypeVar("F", bound=type[Format])

_FORMATS: dict[str, type[Format]] = {}


@overload
def register_format(key: str, cls: None = None) -> Callable[[F], F]: ...
@overload
def register_format(key: str, cls: F) -> F: ...
def register_format(key, cls=None):
    """Make a format known by ``key``: ``register_format("ternary", Ternary)``, or as a class decorator.

    Raises:
        FormatError: if the key is taken by another class.
    """
    if cls is None:
        return lambda decorated: register_format(key, decorated)
    known = _FORMATS.get(key)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise FormatError(f"format key {key!r} is taken by {known.__module__}.{known.__qualname__}; choose another key")
    cls.key = key
    _FORMATS[key] = cls
    return cls


def formats() -> dict[str, type[Format]]:
    """Return every registered format by key, plugins included."""
    plugins.load()
    return dict(_FORMATS)


def get(key: str) -> type[Format]:
    """Return the format class registered under ``key``.

    Raises:
        FormatError: if there is none, with the nearest keys.
    """
    if key not in _FORMATS:
        plugins.load()
    if key not in _FORMATS:
        raise FormatError(f"unknown format {key!r}{near(str(key), _FORMATS)}; known: {', '.join(sorted(_FORMATS))}")
    return _FORMATS[key]


def format_from_dict(spec: Mapping[str, object]) -> Format:
    """Build a format from what `Format.to_dict` wrote, such as ``{"format": "int", "bits": 4, "group": 128}``.

    Raises:
        FormatError: on a missing or unknown key, an unknown setting (nearest ones named), or a wrong value.
    """
    if not isinstance(spec, Mapping) or "format" not in spec:
        raise FormatError(f"a format is described by a table with the key 'format', not by {spec!r}")
    settings = {k: v for k, v in spec.items() if k != "format"}
    return get(str(spec["format"])).from_dict(settings)
