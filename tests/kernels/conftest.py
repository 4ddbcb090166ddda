"""The compiled CPU kernels, made here if they are not there yet."""

import pytest

from qjax.kernels import cpu
from qjax.kernels.cpu import build, library


@pytest.fixture(scope="session")
def native():
    """The library; skips where there is no compiler to make it, and fails where one does not manage."""
    if isinstance(library.library(), str):
        try:
            build.compiler()
        except build.BuildError as error:
            pytest.skip(str(error))
        build.build()
        library.library.cache_clear()
    found = library.library()
    assert not isinstance(found, str), found
    return cpu
