"""Compiling the native kernels: one shared library from the sources in ``src``, by whatever C++ compiler there is.

    python -m qjax.kernels.cpu.build

makes it for a plain checkout, or anew after the sources changed; `setup.py` calls the same function when the package
is installed, in an environment that has jaxlib for its headers and not qjax, so this file imports nothing but Python's
own library.

The name of the library says for which system and for which version of XLA's foreign function interface it is, so that
environments that share a checkout do not disturb one another. XLA takes handlers made with older headers than its own
(measured: those of jaxlib 0.10.2, version 0.3, run on 0.10.2, 0.11.2 and 0.12), and fails to start with newer ones;
installed packages are therefore made with the oldest.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "src"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
"""No instruction sets here: functions that need one name it and are called only where the processor has it. Sums are
not contracted, so that every instruction set gives the same bits."""


class BuildError(Exception):
    """The library could not be made, with the reason."""


def headers() -> Path:
    """Return the folder of the headers of the jaxlib that can be imported here.

    Raises:
        BuildError: without one.
    """
    spec = importlib.util.find_spec("jaxlib")
    folder = Path(spec.origin).parent / "include" if spec and spec.origin else None
    if folder is None or not (folder / "xla" / "ffi" / "api" / "ffi.h").is_file():
        raise BuildError("there is no jaxlib with headers in this environment")
    return folder


def interface(folder: Path) -> tuple[int, int]:
    """Return the version (major, minor) of XLA's foreign function interface that headers describe."""
    text = (folder / "xla" / "ffi" / "api" / "c_api.h").read_text()
    major, minor = (re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR"))
    if major is None or minor is None:
        raise BuildError(f"the headers in {folder} do not say their version")
    return int(major[1]), int(minor[1])


def file_name(version: tuple[int, int]) -> str:
    """Return how the library for a version of the interface is called on this system."""
    return f"native-{sysconfig.get_platform()}-ffi{version[0]}.{version[1]}.so"


def sources() -> list[Path]:
    """Return the files that are compiled."""
    return sorted(SOURCES.glob("*.cc"))


def digest() -> str:
    """Return a digest of all sources and flags; the library has it in it, and one with another is out of date."""
    found = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted([*SOURCES.glob("*.cc"), *SOURCES.glob("*.h")]):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def compiler() -> list[str]:
    """Return the command of the C++ compiler: that in CXX, else the first of c++, g++ and clang++ on PATH.

    Raises:
        BuildError: without one.
    """
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C++ compiler was found (CXX, c++, g++, clang++)")


def build(folder: Path | None = None) -> Path:
    """Compile the library into a folder, by default this one, in place of one that is there, and return its path.

    Raises:
        BuildError: without compiler or headers, or if the compiler fails, with the end of what it said.
    """
    include = headers()
    version = interface(include)
    target = (folder or HERE) / file_name(version)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as beside:
        made = Path(beside) / target.name
        command = [*compiler(), *FLAGS, f'-DQJAX_DIGEST="{digest()}"', "-isystem", str(include), "-shared"]
        try:
            run = subprocess.run([*command, *map(str, sources()), "-o", str(made)], capture_output=True, text=True)
        except OSError as error:
            raise BuildError(f"{command[0]} could not be started: {error}") from None
        if run.returncode or not made.is_file():
            said = "\n".join((run.stderr or run.stdout).strip().splitlines()[-15:])
            raise BuildError(f"{command[0]} failed with exit code {run.returncode}:\n{said}")
        os.replace(made, target)  # whole or not at all; a process that has the old one open keeps it
    return target


def main() -> int:
    """Build in place and say where; 1 with the reason if it could not be done."""
    try:
        print(f"made {build()}")
    except BuildError as error:
        print(f"the CPU kernels were not made: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
