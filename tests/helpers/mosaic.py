"""What the tests of Mosaic GPU kernels share: weights with an oracle, a GPU that is described, the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats import Format, Int, QArray, assemble, quantize_array


def described_gpu(kind: str = "NVIDIA H200", **axes: int) -> Any:
    """A context in which jax compiles for a GPU that is not there, or a mesh of them."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=kinds, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def weight(fmt: Int, n: int, k: int, stack: tuple[int, ...] = (), seed: int = 0) -> tuple[QArray, np.ndarray]:
    """A weight of random codes, canonical, and the numbers it stands for in float64 [*stack, N, K]."""
    rng = np.random.default_rng(seed)
    low, high = fmt.code_range
    codes = rng.integers(low, high + 1, (*stack, n, k))
    groups = fmt.groups(k)
    one = 1 if fmt.per == "tensor" else n
    scale = rng.uniform(0.5, 1.5, (*stack, one, groups)).astype(np.float32)
    aux = {"scale": jnp.asarray(scale)}
    numbers = codes.astype(np.float64)
    span = fmt.group if fmt.per == "group" else max(k, 1)
    spread = lambda a: np.repeat(a.astype(np.float64), span, axis=-1)[..., :k]  # noqa: E731
    if not fmt.symmetric:
        zero = rng.integers(low, high + 1, scale.shape)
        aux["zero"] = jnp.asarray(zero, jnp.uint8)
        numbers = numbers - spread(zero)
    w = assemble(
        jnp.asarray(codes, fmt.code_dtype),
        aux,
        fmt,
        shape=(*stack, n, k),
        in_axes=len(stack) + 1,
        stack_axes=tuple(range(len(stack))),
    )
    return w, numbers * spread(scale)


def blank(fmt: Format, n: int, k: int, stack: tuple[int, ...] = ()) -> QArray:
    """A weight of zeros, canonical; for its shapes."""
    zeros = jnp.zeros((*stack, n, k))
    return quantize_array(zeros, fmt, in_axes=len(stack) + 1, stack_axes=tuple(range(len(stack))))


def in_threads(layout: Any, numbers: np.ndarray) -> np.ndarray:
    """Where a layout of Mosaic's puts an array: [warp, lane, *registers, element of a register]."""
    for tile in layout.tiling.tiles:
        lead, sizes = numbers.shape[: -len(tile)], numbers.shape[-len(tile) :]
        numbers = numbers.reshape(*lead, *(n for size, t in zip(sizes, tile, strict=True) for n in (size // t, t)))
        first = len(lead)
        outer, inner = range(first, numbers.ndim, 2), range(first + 1, numbers.ndim, 2)
        numbers = numbers.transpose(*range(first), *outer, *inner)
    assert layout.vector_dim == -1
    places = [*layout.warp_dims, *layout.lane_dims]
    for i, place in enumerate(places):
        if not isinstance(place, int):  # the same for so many threads
            numbers = np.repeat(numbers[None], place.times, axis=0)
            places[i] = -numbers.ndim
    numbers = np.moveaxis(numbers, places, range(len(places)))
    return numbers.reshape(4, 32, *numbers.shape[len(places) :])


@contextlib.contextmanager
def interpreter(detect_races: bool = True) -> Iterator[Any]:
    """Settings for ``interpret=``, with `wgmma` taught to read its left operand from registers; jax 0.11 or newer.

    jax's interpreter knows `wgmma` on shared memory alone. The product itself is the same; that registers are in the
    layout which the instruction wants is for the compiler to check.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory
    from jax.experimental.pallas import mosaic_gpu as plgpu

    original = gpu_callbacks.wgmma

    def wgmma(**call: Any) -> Any:
        left = call["a_allocation_key_as_array"]
        if getattr(left, "ndim", 1) != 2:
            return original(**call)
        memory = gpu_callbacks._get_shared_memory()
        where = shared_memory.GPULoggingInfo(call["mesh_location"], call["thread"], call.get("source_info"))
        keys, ranges, values = {}, {}, {}
        for name in ("acc", "b"):
            keys[name] = gpu_callbacks.HostAllocationKey.from_array(call[f"{name}_allocation_key_as_array"])
            moves = gpu_callbacks._remove_noop_transforms(call[f"{name}_transforms"])
            ranges[name] = memory.access(keys[name], jax.tree.map(int, moves))
            found = memory.get_buffer_content(keys[name], ranges[name], call["thread"], logging_info=where)
            values[name] = found[0]
        out = values["acc"] + np.matmul(np.asarray(left), values["b"], dtype=values["acc"].dtype)
        memory.store_buffer_content(keys["acc"], ranges["acc"], out, call["thread"], logging_info=where)
        return call["token"]

    gpu_callbacks.wgmma = wgmma
    try:
        yield plgpu.InterpretGPUParams(detect_races=detect_races)
    finally:
        gpu_callbacks.wgmma = original
        gpu_callbacks.reset_gpu_interpret_mode_state()


def races_found() -> bool:
    """Whether the last kernel that was interpreted had a race."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return interpret_pallas_call.get_races().races_found
