"""The CPU kernels of 64-bit ARM, compiled on another processor and run on emulated ones of each kind."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from qjax.kernels.cpu import build, library

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
LIBRARIES = Path("/usr/aarch64-linux-gnu")
PROCESSORS = {"cortex-a72": ["neon"], "neoverse-n1": ["neon", "dotprod"], "max": ["neon", "dotprod", "i8mm"]}
"""As the emulator calls them, from the plainest, with what each has."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def tools():
    """What Debian has in g++-aarch64-linux-gnu and qemu-user-static."""
    for name in (COMPILER, EMULATOR):
        if shutil.which(name) is None:
            pytest.skip(f"there is no {name}")


def compiled(root, command, flags, to):
    """The driver of the kernels, from the repository at `root`."""
    sources = [str(p) for p in build.sources() if not p.name.startswith("ffi")]
    command = [*command, *build.FLAGS, *flags.split(), "-I", str(build.SOURCES)]
    made = subprocess.run(
        [*command, str(root / "tests" / "native" / "driver.cc"), *sources, "-o", str(to)],
        capture_output=True,
        text=True,
    )
    if made.returncode and "cannot find" in made.stderr:
        pytest.skip(f"{command[0]} has no library for {flags}")
    assert made.returncode == 0, made.stderr
    return to


def emulated(processor, driver, *arguments):
    """What the driver says on a processor."""
    leaks = {"ASAN_OPTIONS": "detect_leaks=0"}  # looking for them takes ptrace, which the emulator has not
    command = [EMULATOR, "-cpu", processor, "-L", str(LIBRARIES), str(driver), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **leaks})
    if run.returncode and "ASan cannot proceed" in run.stderr + run.stdout:
        pytest.skip(f"the sanitizer for addresses does not start in the emulator: {run.stderr[:200]}")
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_every_processor_gives_the_bits_of_this_one(root, tmp_path):
    """The same problems of integer sums, by all that a processor has, and by all that this one has."""
    here = compiled(root, build.compiler(), "-O2", tmp_path / "here")
    there = compiled(root, [COMPILER], "-O3", tmp_path / "there")
    expected = subprocess.run([str(here), "digest", "150"], capture_output=True, text=True, check=True).stdout
    for processor in PROCESSORS:
        assert emulated(processor, there, "digest", "150") == expected, processor


@pytest.mark.parametrize("flags", ["-O3", "-g -O1 -fno-sanitize-recover=all -fsanitize=address,undefined"])
def test_random_problems(root, tmp_path, flags):
    """Every instruction set against the plain one; arrays end at forbidden pages (``tests/native/driver.cc``)."""
    driver = compiled(root, [COMPILER], flags, tmp_path / "driver")
    for processor, instructions in PROCESSORS.items():
        said = emulated(processor, driver, "20")
        assert said.partition("instruction sets:")[2].split() == ["portable", *instructions], processor
        assert int(said.split()[0]) >= 5


def test_the_library_is_compiled_whole(tmp_path, monkeypatch):
    """With its handlers, by the command that an installation uses."""
    monkeypatch.setenv("CXX", COMPILER)
    made = build.build(tmp_path).read_bytes()
    assert made[:4] == b"\x7fELF" and int.from_bytes(made[18:20], "little") == 183  # 64-bit ARM
    assert all(name.encode() in made for name in library.TARGETS)
