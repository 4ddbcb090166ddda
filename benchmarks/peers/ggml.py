"""Products of matrices by ggml, the library below llama.cpp, through its C interface.

Needs the package llama-cpp-python, whose shared libraries these are. Weights lie in the buffer that llama.cpp itself
would take for them: the first of the CPU's extra kinds that takes the weight (repacked for SIMD, or for AMX), else the
plain one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import sys
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30}


class _Given(ctypes.Structure):
    """What ``ggml_init`` takes."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


_POINTERS = (
    "ggml_init ggml_new_tensor_2d ggml_mul_mat ggml_new_graph ggml_backend_cpu_init ggml_backend_cpu_reg "
    "ggml_backend_reg_dev_get ggml_backend_reg_get_proc_address ggml_backend_get_default_buffer_type "
    "ggml_backend_alloc_ctx_tensors_from_buft"
).split()


def _allow_tiles() -> None:
    """Ask Linux for the registers of AMX, which this ggml uses without asking where it is called below llama.cpp."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)


ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


class NotTaken(LookupError):
    """A kind of buffer that does not take such weights."""


class Ggml:
    """The library with one CPU backend.

    Args:
        threads: of the backend.
    """

    def __init__(self, threads: int):
        found = importlib.util.find_spec("llama_cpp")
        if found is None or found.origin is None:
            raise ImportError("llama-cpp-python is not installed")
        folder = Path(found.origin).parent / "lib"
        names = ("libggml-base.so", "libggml-cpu.so")
        self.libraries = [ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in names]
        for name in _POINTERS:
            self._function(name).restype = c_void_p
        for name in ("ggml_tensor_overhead", "ggml_graph_overhead", "ggml_quantize_chunk", "ggml_nbytes"):
            self._function(name).restype = c_size_t
        self._function("ggml_backend_buft_name").restype = c_char_p
        self._function("ggml_backend_dev_supports_op").restype = c_bool
        _allow_tiles()
        self.backend = c_void_p(self._function("ggml_backend_cpu_init")())
        self.registry = c_void_p(self._call("ggml_backend_cpu_reg"))
        self.device = c_void_p(self._call("ggml_backend_reg_dev_get", self.registry, c_size_t(0)))
        self._function("ggml_backend_cpu_set_n_threads")(self.backend, c_int(threads))
        self.contexts: list[c_void_p] = []
        self.allocated: list[c_void_p] = []

    def release(self) -> None:
        """Free all weights and results; what `products` has returned cannot run any more."""
        for buffer in self.allocated:
            self._call("ggml_backend_buffer_free", buffer)
        for context in self.contexts:
            self._call("ggml_free", context)
        self.allocated, self.contexts = [], []

    def _function(self, name: str) -> Any:
        for library in self.libraries:
            try:
                return getattr(library, name)
            except AttributeError:
                continue
        raise AttributeError(f"this ggml has no {name}")

    def _call(self, name: str, *args: Any) -> Any:
        return self._function(name)(*args)

    def buffers(self) -> dict[str, c_void_p]:
        """Name -> kind of buffer, the extra ones first."""
        address = self._call("ggml_backend_reg_get_proc_address", self.registry, b"ggml_backend_dev_get_extra_bufts")
        kinds = []
        if address:
            listed = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.device)
            at = 0
            while listed[at]:
                kinds.append(c_void_p(listed[at]))
                at += 1
        kinds.append(c_void_p(self._call("ggml_backend_get_default_buffer_type", self.backend)))
        return {self._call("ggml_backend_buft_name", kind).decode(): kind for kind in kinds}

    def _context(self, tensors: int, graphs: int = 0) -> c_void_p:
        size = tensors * self._call("ggml_tensor_overhead") + graphs * self._call("ggml_graph_overhead")
        self._function("ggml_init").argtypes = [_Given]
        made = c_void_p(self._call("ggml_init", _Given(size + 4096, None, True)))
        self.contexts.append(made)
        return made

    def _allocate(self, context: c_void_p, buffer: c_void_p) -> None:
        """Give the tensors of a context room in a kind of buffer."""
        made = self._call("ggml_backend_alloc_ctx_tensors_from_buft", context, buffer)
        if not made:
            raise MemoryError("ggml has no room")
        self.allocated.append(c_void_p(made))

    def _tensor(self, context: c_void_p, kind: str, columns: int, rows: int) -> c_void_p:
        made = self._call("ggml_new_tensor_2d", context, c_int(TYPES[kind]), c_int64(columns), c_int64(rows))
        return c_void_p(made)

    def quantized(self, weight: np.ndarray, kind: str) -> np.ndarray:
        """Bytes of a weight float32 [N, K] in a type of ggml."""
        n, k = weight.shape
        size = self._call("ggml_nbytes", self._tensor(self._context(1), kind, k, n))
        out = np.zeros(size, np.uint8)
        source = np.ascontiguousarray(weight, np.float32)
        self._call(
            "ggml_quantize_chunk", c_int(TYPES[kind]), source.ctypes.data_as(c_void_p),
            out.ctypes.data_as(c_void_p), c_int64(0), c_int64(n), c_int64(k), None,
        )  # fmt: skip
        return out

    def products(
        self, weight: np.ndarray, kind: str, x: np.ndarray, copies: int, buffer: c_void_p
    ) -> tuple[Callable[[], None], Callable[[], np.ndarray]]:
        """Return what multiplies x [tokens, K] by the next copy of the weight [N, K], and what reads the last result.

        Raises:
            NotTaken: the kind of buffer does not take such a weight.
            MemoryError: no buffer could be had.
        """
        (n, k), tokens = weight.shape, len(x)
        stored = self.quantized(weight, kind)
        of_weights, of_rest, of_graphs = self._context(copies), self._context(copies + 1), self._context(0, copies)
        weights = [self._tensor(of_weights, kind, k, n) for _ in range(copies)]
        self._allocate(of_weights, buffer)
        inputs = self._tensor(of_rest, "F32", k, tokens)
        outputs = [c_void_p(self._call("ggml_mul_mat", of_rest, w, inputs)) for w in weights]
        if not self._call("ggml_backend_dev_supports_op", self.device, outputs[0]):
            raise NotTaken(f"this kind of buffer does not take {kind} [{n}, {k}]")
        for w in weights:
            self._call(
                "ggml_backend_tensor_set", w, stored.ctypes.data_as(c_void_p), c_size_t(0), c_size_t(len(stored))
            )
        self._allocate(of_rest, c_void_p(self._call("ggml_backend_get_default_buffer_type", self.backend)))
        source = np.ascontiguousarray(x, np.float32)
        self._call(
            "ggml_backend_tensor_set", inputs, source.ctypes.data_as(c_void_p), c_size_t(0), c_size_t(source.nbytes)
        )
        graphs = []
        for y in outputs:
            graph = c_void_p(self._call("ggml_new_graph", of_graphs))
            self._call("ggml_build_forward_expand", graph, y)
            graphs.append(graph)
        turn = [0]

        def run() -> None:
            turn[0] = (turn[0] + 1) % copies
            status = self._call("ggml_backend_graph_compute", self.backend, graphs[turn[0]])
            if status != 0:
                raise RuntimeError(f"ggml returned status {status}")

        def result() -> np.ndarray:
            out = np.empty((tokens, n), np.float32)
            y = outputs[turn[0]]
            self._call("ggml_backend_tensor_get", y, out.ctypes.data_as(c_void_p), c_size_t(0), c_size_t(out.nbytes))
            return out

        return run, result
