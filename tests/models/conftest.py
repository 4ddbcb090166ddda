"""The oracle of the parity tests."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def transformers(root: Path) -> ModuleType:
    """The transformers library with torch; skips where either is missing.

    transformers asks whether a package named ``kernels`` can be imported. Where the checkout is on ``sys.path`` (as
    under ``python -m pytest``) it finds our link of that name and fails, so it is asked while the checkout is not.
    """
    pytest.importorskip("torch")
    kept = sys.path[:]
    sys.path[:] = [p for p in kept if Path(p or ".").resolve() != root]
    try:
        library = pytest.importorskip("transformers")
        library.utils.is_kernels_available()  # remembers the answer
    finally:
        sys.path[:] = kept
    return library
