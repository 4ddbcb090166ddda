"""Compile products for four GPUs without one, and see that each device runs the kernel and no weight is gathered.

    PYTHONPATH=. python -m benchmarks.aot_sharded

Needs what `benchmarks.aot` needs. A product that is partitioned over a mesh (`qjax.ops.partition`) is compiled for four
described H200, with the shardings of its arguments, and the program of a device is read: one kernel, these collectives
and no others, and no temporary of the size of a device's weight.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from benchmarks.aot import TARGET, toolkit

DEVICES = 4

CASES: dict[str, tuple[str, tuple[int, int], tuple[Any, ...], tuple[Any, ...], dict[str, int]]] = {
    "outputs": ("dot", (4, 1), ("model", None), (), {}),
    "inputs": ("dot", (1, 4), (None, "model"), (None, "model"), {"all-reduce": 1}),
    "tokens": ("dot", (1, 1), (None, None), ("model",), {}),
    "experts": ("ragged", (1, 1), ("model", None, None), (), {"all-reduce": 1}),
    "outputs of experts": ("ragged", (4, 1), (None, "model", None), (), {}),
    "inputs of experts": ("ragged", (1, 4), (None, None, "model"), (None, "model"), {"all-reduce": 1}),
    "tokens of experts": ("ragged", (1, 1), (None, None, None), ("model",), {}),
}
"""By what is sharded: the op, parts of the weight, where it and the activations are cut, collectives."""

N, K, EXPERTS, TOKENS = 1024, 2048, 8, 16


def program(case: str) -> tuple[Any, int]:
    """What a device runs, and the bytes of the weight that it holds."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from qjax import ops
    from qjax.formats import Int, quantize_array

    kind, parts, of_w, of_x, _ = CASES[case]
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology=f"1x1x{DEVICES}")
    mesh = topologies.make_mesh(topology, (DEVICES,), ("model",))
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)
    there = jax.sharding.AbstractMesh((DEVICES,), ("model",), axis_types=auto, abstract_device=device)

    def cut(a: Any, *spec: Any) -> Any:
        spec = tuple(s if d > 1 else None for s, d in zip(spec, a.shape, strict=False))
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    stack = (EXPERTS,) if kind == "ragged" else ()
    axes = {"in_axes": len(stack) + 1, "stack_axes": tuple(range(len(stack)))}
    made = quantize_array(jnp.zeros((*stack, N, K)), Int(4, group=128), **axes)
    w = jax.tree.map(lambda a: cut(a, *of_w), ops.pack(made, parts=parts))
    x = cut(jax.ShapeDtypeStruct((TOKENS, K), jnp.bfloat16), *of_x)
    function, more = ops.q_dot, ()
    if kind == "ragged":
        function, more = ops.q_ragged_dot, (cut(jax.ShapeDtypeStruct((EXPERTS,), jnp.int32)),)
    with jax.sharding.use_abstract_mesh(there):
        held = made.nbytes // (1 if of_x[:1] == ("model",) else DEVICES)
        return jax.jit(function).lower(x, w, *more).compile(), held


def faults(case: str) -> list[str]:
    """What is wrong with the program of a device."""
    done, held = program(case)
    text = done.as_text()
    kernels = text.count('custom_call_target="mosaic_gpu')
    found = re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
    counted = {kind: found.count(kind) for kind in found}
    temporary = done.memory_analysis().temp_size_in_bytes
    out = [f"{kernels} kernels in place of 1"] * (kernels != 1)
    out += [f"it communicates by {counted}, in place of {CASES[case][-1]}"] * (counted != CASES[case][-1])
    return out + [f"{temporary} bytes of temporary memory beside a weight of {held}"] * (temporary >= held)


def main() -> int:
    tools = toolkit()
    if isinstance(tools, str):
        print(f"nothing was compiled: {tools}")
        return 3
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    os.environ.update(JAX_PLATFORMS="cpu", CUDA_ROOT=str(tools[1]), JAX_DISABLE_MOST_OPTIMIZATIONS="0", XLA_FLAGS=flags)
    wrong = 0
    for case in CASES:
        why = faults(case)
        wrong += bool(why)
        print(f"{case:20} {'; '.join(why) or 'fine'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
