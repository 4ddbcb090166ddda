"""The lowering of attention with log-coded probabilities on NVIDIA's Hopper: `qjax.kernels.log_attention.hopper`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from qjax.formats.log import Log
from qjax.kernels.devices import has_mosaic
from qjax.kernels.log_attention.hopper import CHANNELS, MEMORY, attend, memory, padded_channels, scaled
from qjax.kernels.log_attention.lookup import exact, numbers_of
from qjax.kernels.log_attention.reference import log_attention_reference
from qjax.kernels.registry import Act, Problem, register_lowering

MOST_BITS = 5
"""Of probabilities: a number takes a comparison with each bound of the format."""


def _runs(problem: Problem) -> bool | str:
    if problem.capability is None:
        return "it is not known for which GPU is compiled (no CUDA device, no jax.sharding.AbstractDevice)"
    if problem.capability[0] != 9:
        major, minor = problem.capability
        return f"it has been compiled for compute capability 9.0 (Hopper) alone, and this device has {major}.{minor}"
    sizes = (*problem.stack, problem.rows, problem.k, problem.n)
    if not all(isinstance(n, int) for n in sizes):
        return "sizes are not known when compiling"
    if problem.devices > 1:
        return f"the compiler would partition it over {problem.devices} devices; call it inside jax.shard_map"
    fmt: Any = problem.weight
    if fmt.bits > MOST_BITS:
        return f"probabilities have {fmt.bits} bits; up to {MOST_BITS} are possible"
    held = exact(problem)
    if held is not True:
        return held
    if problem.x_dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"scores are {problem.x_dtype.name}; bfloat16, float16 and float32 are possible"
    if padded_channels(problem.n) > CHANNELS:
        return f"values have {problem.n} channels, more than {CHANNELS}"
    taken = memory(problem.k, problem.n, problem.x_dtype.itemsize * 8)
    if taken > MEMORY:
        return f"{problem.k} keys of {problem.n} channels take {taken} bytes of shared memory, more than {MEMORY}"
    return has_mosaic()


def _measured(problem: Problem) -> bool | str:
    return "it has run on no device, and whether it is faster than XLA is not known"


@register_lowering(
    "log_attention",
    Log,
    "cuda",
    when=_runs,
    worth=_measured,
    name="mosaic",
    priority=5,
    about="64 queries of a head in a block, scores and values in shared memory for both passes; if named",
)
def mosaic(problem: Problem, scores: Array, v: Array, act: Act) -> Array:
    """Return y of `qjax.kernels.log_attention.reference` by the kernel."""
    if not scores.size or not v.size:
        return log_attention_reference(problem, scores, v, act)
    fmt: Any = problem.weight
    numbers, scale = numbers_of(v, act)
    flat = lambda a: a.reshape(problem.matrices, *a.shape[-2:])  # noqa: E731
    y = attend(flat(scores), flat(numbers), fmt=fmt)
    y = y.reshape(*scores.shape[:-1], problem.n)
    return scaled(y, fmt, scale).astype(problem.out_dtype)
