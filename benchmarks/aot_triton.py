"""What `benchmarks.aot` reads of Triton kernels, which XLA compiles: for Hopper, Ampere (A100) and Ada (L40)."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import aot

COUNTED = ("HGMMA", "IGMMA", "HMMA", "IMMA", "QMMA", "LDGSTS", "LDSM", "LDS", "PRMT", "LOP3", "FFMA", "FMUL")


def _described(kind: str, capability: str, processors: int, threads: int, shared: int, cache: int) -> str:
    """A target after the one of Hopper: with so many threads and bytes of shared memory a processor."""
    changes = {
        "NVIDIA H200": kind,
        "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES": capability,
        "core_count: 132": f"core_count: {processors}",
        "threads_per_core_limit: 2048": f"threads_per_core_limit: {threads}",
        "shared_memory_per_core: 233472": f"shared_memory_per_core: {shared}",
        "shared_memory_per_block_optin: 232448": f"shared_memory_per_block_optin: {shared - 1024}",
        "l2_cache_size: 52428800": f"l2_cache_size: {cache}",
    }
    text = aot.TARGET
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


TARGETS = {
    "sm_90a": ("NVIDIA H200", aot.TARGET, aot.LIMIT),
    "sm_80": ("NVIDIA A100", _described("NVIDIA A100", "major: 8 minor: 0", 108, 2048, 167936, 40 << 20), 166912),
    "sm_89": ("NVIDIA L40", _described("NVIDIA L40", "major: 8 minor: 9", 142, 1536, 102400, 96 << 20), 101376),
}
"""The device's name, its description, and the bytes of shared memory that a block may have, by architecture."""


def compiled(function: Any, arguments: Any, architecture: str) -> dict[str, Any]:
    """What the assembler and the disassembler say of the one Triton kernel in a function."""
    kind, target, limit = TARGETS[architecture]
    tools = aot.toolkit()
    assert not isinstance(tools, str), tools
    ptxas, disassembler = tools
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        aot.executable(function, arguments, kind, target, **dump)
        launches = "".join(path.read_text() for path in Path(folder).glob("*thunk_sequence.txt"))
        ((name, shared),) = re.findall(r"(w\da\w+) grid: .*? shared_memory: (\d+) bytes", launches)
        (code,) = (path for path in Path(folder).glob("*.ptx") if f".entry {name}(" in path.read_text())
        binary = code.with_suffix(".cubin")
        report = _output(ptxas, f"-arch={architecture}", "-v", code, "-o", binary)
        assembly = _output(disassembler / "bin/nvdisasm", "-c", binary)
    return {**aot.figures(report.split(f"'{name}'")[-1], assembly, int(shared), COUNTED), "limit": limit}


def _output(*command: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
