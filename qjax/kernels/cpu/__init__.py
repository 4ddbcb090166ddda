"""Kernels for CPUs, compiled from C++: `build` makes them, `library` loads them, the other files are lowerings.

Without a compiler there are none, and products run on XLA.
"""

from qjax.kernels.cpu import attention, dot, library, mixed, ragged, trits, two_level
from qjax.kernels.cpu.library import instruction_sets, status

__all__ = ["attention", "dot", "instruction_sets", "library", "mixed", "ragged", "status", "trits", "two_level"]

library.library()  # now, for programs that were exported with a kernel in them and are run without asking for one
