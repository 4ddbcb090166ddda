"""Keeps the reading links at the top level from becoming a second copy of their packages."""

from __future__ import annotations


def only_inside_qjax(name: str) -> None:
    """Refuse an import by another path than ``qjax``: every class and registry in the package would exist twice.

    Args:
        name: ``__name__`` of the package that asks.

    Raises:
        ImportError: the package is imported as ``passes``, ``kernels`` or ``models``.
    """
    if not name.startswith("qjax."):
        raise ImportError(f"the folder {name!r} at the top level is a link for reading; import qjax.{name} instead")
