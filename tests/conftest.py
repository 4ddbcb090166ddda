"""Settings and fixtures for all tests: eight virtual CPU devices, the data folder, steady random examples."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType

# Before the first import of jax, which reads them once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Most of the time of the tests is the compiler's; .ci/run runs them a second time with all optimizations.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if os.environ.get("QJAX_BEARTYPE"):  # check every annotation of qjax at every call; before its first import
    from beartype import BeartypeConf
    from beartype.claw import beartype_package

    beartype_package("qjax", conf=BeartypeConf(is_pep484_tower=True))

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]

# The same examples on every run, so that a fresh clone passes or fails as the last one did. HYPOTHESIS_PROFILE=thorough
# takes three times as many (the second run of .ci/run does), and =explore looks for new ones.
_COMMON = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("steady", max_examples=7, derandomize=True, **_COMMON)
hypothesis.settings.register_profile("thorough", max_examples=20, derandomize=True, **_COMMON)
hypothesis.settings.register_profile("explore", max_examples=200, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, help="skip the tests that have not started after so many seconds")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_START] = time.monotonic()


_START = pytest.StashKey[float]()


def _most_cases_are_slow(items: list[pytest.Item]) -> None:
    """Of a test marked every(n), leave each n-th case to the usual run; the others are slow."""
    seen: dict[str, int] = {}
    for item in items:
        marker = item.get_closest_marker("every")
        if marker is None:
            continue
        name = item.nodeid.split("[")[0]
        seen[name] = seen.get(name, -1) + 1
        if seen[name] % marker.args[0]:
            item.add_marker("slow")


# Before the expressions of -m are looked at, which happens in this hook too.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _most_cases_are_slow(items)
    without_torch = None
    if importlib.util.find_spec("torch") is None:
        without_torch = pytest.mark.skip(reason="torch is not installed; it comes with qjax[test] on Python 3.11")
    for item in items:
        if "data_dir" in getattr(item, "fixturenames", ()):
            item.add_marker("data")
        if without_torch and item.get_closest_marker("torch"):
            item.add_marker(without_torch)


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--seconds")
    if limit is not None and time.monotonic() - item.config.stash[_START] > limit:
        pytest.skip(f"the {limit:.0f} seconds given for this run are used up")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real models and texts: QJAX_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no test data at {folder}; set QJAX_DATA to the folder that holds models/ and text/")
    return folder


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
