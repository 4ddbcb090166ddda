"""For which GPU is compiled, and what this jax has for it."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax

from qjax.errors import DeviceError, near

FAMILIES = (
    ("H100", (9, 0)),
    ("H200", (9, 0)),
    ("H800", (9, 0)),
    ("H20", (9, 0)),
    ("B200", (10, 0)),
    ("A100", (8, 0)),
    ("A30", (8, 0)),
    ("A10", (8, 6)),
    ("L40", (8, 9)),
    ("L4", (8, 9)),
    ("RTX 4090", (8, 9)),
)
"""Compute capability by a part of a device's name, for devices that are described and not there."""

KINDS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 108),
    "a10": ("NVIDIA A10", 72),
    "l4": ("NVIDIA L4", 58),
    "l40s": ("NVIDIA L40S", 142),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 128),
    "h100": ("NVIDIA H100 80GB HBM3", 132),
    "h200": ("NVIDIA H200", 132),
    "b200": ("NVIDIA B200", 148),
}
"""Names and streaming multiprocessors of GPUs that can be described, by short names."""

PROCESSORS = 108
"""Streaming multiprocessors of an A100, where the device does not say."""

NEEDED = (
    "kernel",
    "emit_pipeline_warp_specialized",
    "wgmma",
    "layout_cast",
    "load",
    "inline_mgpu",
    "ACC",
    "SMEM",
    "CompilerParams",
)


def cuda_capability() -> tuple[int, int] | None:
    """Return the compute capability of the CUDA device for which is compiled, or None if none is known.

    It is that of the mesh's `jax.sharding.AbstractDevice` where there is one (compiling ahead of time, or for a GPU on
    a machine without), else that of the default backend's device.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        kind = described.device_kind
        return next((capability for name, capability in FAMILIES if name in kind), None)
    if jax.default_backend() not in ("gpu", "cuda"):
        return None
    major, _, minor = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def device_kind() -> str | None:
    """Return the kind of the CUDA device for which is compiled, such as "NVIDIA H200"; None where there is none."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.device_kind
    return jax.local_devices()[0].device_kind if jax.default_backend() in ("gpu", "cuda") else None


def cuda_processors() -> int:
    """Return how many streaming multiprocessors the CUDA device has for which is compiled, or those of an A100."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.num_cores or PROCESSORS
    there = jax.local_devices()[0] if jax.default_backend() in ("gpu", "cuda") else None
    return getattr(there, "core_count", None) or PROCESSORS


def platform_here() -> str:
    """Return for which platform is compiled, as lowerings call it: "cuda" and "rocm" where jax's backend is "gpu"."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if described is None else getattr(described, "platform", None) or "gpu"
    if name != "gpu":
        return name
    if described is not None:
        return "cuda"
    return "rocm" if "rocm" in jax.local_devices()[0].client.platform_version else "cuda"


@functools.cache
def has_mosaic() -> bool | str:
    """Return whether this jax can compile Mosaic GPU kernels as ours are written, or why not."""
    try:
        from jax.experimental.pallas import mosaic_gpu as plgpu
    except ImportError as error:
        return f"jax {jax.__version__} offers no Mosaic GPU here ({error})"
    missing = [name for name in NEEDED if not hasattr(plgpu, name)]
    return not missing or f"Mosaic GPU of jax {jax.__version__} lacks {', '.join(missing)}, which the kernel needs"


def described(name: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which jax traces and lowers for a GPU that need not be there.

    Args:
        name: one of `KINDS`, such as "h200".

    Raises:
        DeviceError: for another name, with those that there are.
    """
    found = KINDS.get(name.lower().replace(" ", "").replace("-", ""))
    if found is None:
        raise DeviceError(f"device={name!r}{near(name, KINDS)}; there is {', '.join(KINDS)}")
    kind, cores = found
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
