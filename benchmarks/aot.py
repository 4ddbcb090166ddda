"""Compile the GPU kernels for sm_90a without a GPU, and read registers, spills, shared memory and instructions.

    PYTHONPATH=. python -m benchmarks.aot [--check] [--family NAME ...] [--only TEXT]

Needs the CUDA plugin of jax and a toolkit, or the wheels that stand for it (240 MB), in an environment of Python 3.12:

    pip install 'jax==0.11.2' && pip install --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 \
        nvidia-cuda-nvdisasm nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88      # the last two unless ptxas is there

It refuses kernels that spill, touch local memory, are serialized by the assembler (C7512, C7514), do not use the tensor
cores (HGMMA, IGMMA, QGMMA) or convert codes number by number (I2F), and programs of several layers that copy a weight
before it is read. It writes `benchmarks/results/aot-sm_90a/FAMILY.json`; `--check` compares with it instead, figure by
figure where jax and the assembler are of the versions that wrote it. `python -m benchmarks.kernel_states` then renews
the table of `docs/kernels.md`. 37 kernels take three quarters of a minute on one core.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.kernel_cases import FAMILIES, cases, programs

RESULTS = Path(__file__).parent / "results" / "aot-sm_90a"
COUNTED = ("HGMMA", "IGMMA", "QGMMA", "UTMALDG", "LDSM", "LDS", "PRMT", "SHFL", "LOP3", "HADD2", "FFMA", "FMUL")
LIMIT = 232448
"""Bytes of shared memory that a block may have on Hopper."""

TARGET = """platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 12 patch: 0 }
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048 core_count: 132
 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 registers_per_core_limit: 65536
 registers_per_block_limit: 65536 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
 device_memory_size: 150000000000 device_address_bits: 64
 cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES } name: "NVIDIA H200"
 device_vendor: "NVIDIA Corporation" driver_version: "13.0.0" runtime_version: "13.0.0"
 compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0" }"""
"""A `GpuTargetConfigProto`. The accelerated features make it sm_90a, which wgmma needs."""


def wheels() -> list[Path]:
    """Folders in which the wheels of NVIDIA put programs."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(p) / "cu13" for p in (spec.submodule_search_locations or [])] if spec else []


def toolkit() -> tuple[Path, Path] | str:
    """The assembler and a folder with bin/nvdisasm, or what is missing."""
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        return "the CUDA plugin of jax (jax-cuda13-plugin, jax-cuda13-pjrt) is not installed"
    roots = [Path("/usr/local/cuda"), *wheels()]
    on_path = [Path(p) for name in ("ptxas",) if (p := shutil.which(name))]
    ptxas = next((p for p in [*on_path, *(r / "bin/ptxas" for r in roots)] if p.exists()), None)
    disassembler = next((r for r in reversed(roots) if (r / "bin/nvdisasm").exists()), None)
    if ptxas is None:
        return "no ptxas (CUDA toolkit, or nvidia-cuda-nvcc and nvidia-nvvm)"
    return (ptxas, disassembler) if disassembler else "no nvdisasm (nvidia-cuda-nvdisasm)"


def executable(function: Any, arguments: Any, kind: str = "NVIDIA H200", target: str = TARGET, **options: Any) -> Any:
    """A function compiled for a GPU that is described, by default the one above."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("one",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    there = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*there).lower().compile(compiler_options=options or None)


def copies(function: Any, arguments: Any, weight: int) -> list[str]:
    """What is wrong with a whole program: it does without the kernel, or holds a copy of a weight of so many bytes."""
    program = executable(function, arguments)
    held = program.memory_analysis().temp_size_in_bytes
    out = [] if "mosaic_gpu" in program.as_text() else ["the kernel is not in it"]
    return out + [f"{held} bytes of temporary memory, which hold a weight of {weight}"] * (held >= weight)


def compiled(function: Any, arguments: Any) -> dict[str, Any]:
    """What the assembler and the disassembler say of the one kernel in a function, written in Mosaic GPU."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            executable(function, arguments)
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
        (report,) = Path(folder).glob("*.ptxas")
        text = report.read_text()
        assembly = report.with_suffix(".sass_ctrl").read_text()
        passes = report.with_name(report.stem + ".mlir-passes.log")
        with passes.open() as lines:
            shared = next(m for line in lines if (m := re.search(r"dynamic_shared_memory_size %c(\d+)", line)))
    return figures(text, assembly, int(shared[1]), COUNTED)


def figures(text: str, assembly: str, shared: int, counted: tuple[str, ...]) -> dict[str, Any]:
    """The row of a kernel, from what the assembler says, the disassembly and the bytes of shared memory."""
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", assembly)
    count = collections.Counter(name.split(".")[0] for name in names)
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.search(r"Used (\d+) registers", text)
    assert spills and registers, text
    return {
        "registers": int(registers[1]),
        "stack_bytes": int(spills[1]),
        "spilled_bytes": int(spills[2]) + int(spills[3]),
        "shared_bytes": shared,
        "instructions": sum(count.values()),
        "local": count["LDL"] + count["STL"],
        "I2F": sum(n for name, n in count.items() if name.startswith("I2F")),
        **{name: count[name] for name in counted},
        "warnings": sorted(set(re.findall(r"\((C\d+)\)", text))),
    }


def faults(found: dict[str, Any]) -> list[str]:
    """What must not be in a kernel, and is. Sums of integers are converted at the end, codes are not."""
    out = [f"{name} is {found[name]}" for name in ("stack_bytes", "spilled_bytes", "local") if found[name]]
    out += [f"I2F is {found['I2F']}"] * (found["I2F"] > 0 and found["multiplies"] not in ("IGMMA", "IMMA"))
    needed = (found["multiplies"], "UTMALDG" if "UTMALDG" in found else "LDGSTS") if found["multiplies"] else ()
    out += [f"{name} is missing" for name in needed if not found[name]]
    out += [f"warning {code}" for code in found["warnings"] if code in ("C7512", "C7514")]
    return out + [f"{found['shared_bytes']} bytes of shared memory"] * (
        found["shared_bytes"] > found.get("limit", LIMIT)
    )


def stored(family: str) -> dict[str, Any]:
    """The committed table of a family."""
    path = RESULTS / f"{family}.json"
    return json.loads(path.read_text()) if path.exists() else {"made_by": {}, "kernels": {}}


def compared(found: dict[str, Any], stored: dict[str, Any] | None) -> list[str]:
    """Figures that are not those of the table."""
    if stored is None:
        return ["it is not in the table"]
    return [f"{key} is {value}, in the table {stored[key]}" for key, value in found.items() if stored[key] != value]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the table in place of writing it")
    parser.add_argument("--only", default="", help="kernels whose name holds this text; nothing is written")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES, help="default: all")
    given = parser.parse_args()
    tools = toolkit()
    if isinstance(tools, str):
        print(f"nothing was compiled: {tools}")
        return 3
    # jax reads both when it is imported; with a GPU platform it would look for a driver.
    os.environ.update(JAX_PLATFORMS="cpu", CUDA_ROOT=str(tools[1]), JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    import jax

    version = subprocess.run([str(tools[0]), "--version"], capture_output=True, text=True, check=True).stdout
    made_by = {"jax": jax.__version__, "ptxas": re.findall(r"V(\d+\.\d+)\.\d+", version)[0]}
    count, wrong = 0, []
    for family in given.family:
        table = stored(family)
        same = table["made_by"] == made_by
        kernels, faulty = {}, []
        for case in cases(family):
            if given.only not in case.name:
                continue
            read = getattr(case, "compiled", compiled)  # a family of another kind brings its own
            found = kernels[case.name] = {"multiplies": case.multiplies, **read(*case.function())}
            why = faults(found) + (compared(found, table["kernels"].get(case.name)) if given.check and same else [])
            faulty += [f"{case.name}: {w}" for w in why]
            figures = (
                f"{found['registers']:4} registers {found['shared_bytes']:7} shared {found['instructions']:5} long"
            )
            print(f"{case.name:48} {figures}  {'; '.join(why) or 'fine'}", flush=True)
        for name, program in programs(family).items() if not given.only else ():
            why = copies(*program)
            faulty += [f"{name}: {w}" for w in why]
            print(f"{name:48} {'; '.join(why) or 'the weights are read where they lie'}", flush=True)
        if given.check and not same:
            print(f"the table of {family} is of {table['made_by']}, this is {made_by}: figures were not compared")
        if not given.check and not given.only and not faulty:
            path = RESULTS / f"{family}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"made_by": made_by, "kernels": kernels}, indent=1) + "\n")
            print(f"written to {path}")
        count, wrong = count + len(kernels), wrong + faulty
    print("\n".join(["", *wrong]) if wrong else f"{count} kernels, all as they have to be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
