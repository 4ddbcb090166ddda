"""Finding the compiled library, and handing its kernels to XLA.

A library is taken only if it was made from the sources that are here, for this system, with headers that are not newer
than the installed jaxlib: XLA would not start with a newer one. Anything else is no error but a reason, which the table
of lowerings, a named implementation and `status` give.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from pathlib import Path

import jax

from qjax.errors import warn
from qjax.kernels.cpu import build

DOT, FLOAT_DOT = "qjax_dot", "qjax_float_dot"
"""How XLA calls the products, with int8 activations and with floats; so are the handlers in the library called."""

TWO_LEVEL = "qjax_two_level"
"""The product with weights of two levels."""

MIXED = "qjax_mixed"
"""The product of floats with weights of 2-bit and 4-bit strips."""

TRITS = "qjax_trits"
"""The product with trit-planes."""

RAGGED = "qjax_ragged"
"""The product of rows with the matrix of their group."""

ATTENTION = "qjax_attention"
"""Attention over a quantized cache."""

CANDIDATES = "qjax_candidates"
"""Squared errors of products for candidate quantizers of an operand."""

TARGETS = (DOT, FLOAT_DOT, TWO_LEVEL, MIXED, TRITS, RAGGED, ATTENTION, CANDIDATES)
"""All handlers in the library."""

ISAS = ("portable", "avx2", "avx_vnni", "avx512_vnni", "amx", "neon", "dotprod", "i8mm")
"""Instruction sets, as numbered in ``src/problem.h``."""

MAKE = "python -m qjax.kernels.cpu.build makes it"


@functools.cache
def library() -> ctypes.CDLL | str:
    """Return the library, its kernels registered with XLA, or why there is none."""
    if os.environ.get("QJAX_NO_NATIVE"):
        return "QJAX_NO_NATIVE is set"
    found = find(build.HERE)
    if isinstance(found, str):
        return found
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(found, name)), platform="cpu")
    return found


def find(folder: Path) -> ctypes.CDLL | str:
    """Return the library in a folder that this jaxlib can take, loaded and checked, or why none can be taken."""
    try:
        here = build.interface(build.headers())
    except (build.BuildError, OSError) as error:
        return f"{error}, so that it is not known which library XLA would take"
    start, end = build.file_name(here).split(f"{here[0]}.{here[1]}")
    versions = {}
    for path in folder.glob(f"{start}*{end}"):
        if match := re.fullmatch(rf"{re.escape(start)}(\d+)\.(\d+){re.escape(end)}", path.name):
            versions[int(match[1]), int(match[2])] = path
    fit = sorted((v for v in versions if v[0] == here[0] and v <= here), reverse=True)
    if not fit:
        newer = ", ".join(f"{a}.{b}" for a, b in sorted(versions))
        made = (
            f"there is one for version {newer} of XLA's interface, and it takes none newer" if newer else "none is made"
        )
        return f"{made} (this jaxlib has {here[0]}.{here[1]}; {MAKE})"
    reasons = []
    for version in fit:
        found = _checked(versions[version], here)
        if not isinstance(found, str):
            return found
        reasons.append(f"{versions[version].name} {found}")
    return f"{'; '.join(reasons)}; {MAKE} anew"


def _checked(path: Path, here: tuple[int, int]) -> ctypes.CDLL | str:
    """Return a library, or what is wrong with it."""
    try:
        lib = ctypes.CDLL(str(path))
        lib.qjax_digest.restype = lib.qjax_isa_name.restype = ctypes.c_char_p
        digest, version = lib.qjax_digest().decode(), (lib.qjax_interface_major(), lib.qjax_interface_minor())
    except (OSError, AttributeError) as error:
        return f"cannot be loaded ({error})"
    if digest != build.digest():
        return "was made from other sources than these"
    if version > here:  # whatever its name says
        return f"was made for version {version[0]}.{version[1]} of XLA's interface, this jaxlib has {here[0]}.{here[1]}"
    return lib


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets of this processor that there are kernels for, the plainest first; () without any."""
    lib = library()
    return () if isinstance(lib, str) else tuple(name for i, name in enumerate(ISAS) if lib.qjax_has_isa(i))


def has_bf16_tiles() -> bool:
    """Return whether there are kernels, and this processor has AMX with bfloat16 for them."""
    lib = library()
    return not isinstance(lib, str) and bool(lib.qjax_has_bf16_tiles())


def status() -> str:
    """Return in a sentence whether quantized products on CPU have kernels of their own, and by which instructions."""
    lib = library()
    if isinstance(lib, str):
        return f"CPU kernels: not there, products run on XLA: {lib}"
    return f"CPU kernels: there, by {', '.join(instruction_sets())}"


@functools.cache
def say_once() -> None:
    """Warn, the first time in a process, that a product would have had a kernel that was not compiled."""
    lib = library()
    if isinstance(lib, str) and not os.environ.get("QJAX_NO_NATIVE"):
        warn(f"qjax runs without its CPU kernels, on XLA alone: {lib}")
