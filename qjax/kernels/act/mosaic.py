"""The lowering of quantized rows on NVIDIA's Hopper: the kernel of `qjax.kernels.act.rows`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from qjax.formats import Float8, Int
from qjax.kernels.act.reference import quantize_rows_reference
from qjax.kernels.act.rows import THREADS, quantize
from qjax.kernels.devices import has_mosaic
from qjax.kernels.registry import Problem, register_lowering

LONGEST = 32768
"""Elements of a row; the longest of which is known that it compiles without spills."""


def _runs(problem: Problem) -> bool | str:
    fmt = problem.weight
    if problem.capability is None:
        return "it is not known for which GPU is compiled (no CUDA device, no jax.sharding.AbstractDevice)"
    if problem.capability[0] != 9:
        major, minor = problem.capability
        return f"it has been compiled for compute capability 9.0 (Hopper) alone, and this device has {major}.{minor}"
    if not isinstance(problem.rows, int):
        return "the number of rows is not known when compiling"
    if problem.devices > 1:
        return f"the compiler would partition it over {problem.devices} devices; call it inside jax.shard_map"
    if isinstance(fmt, Float8) and fmt.code_dtype != jnp.float8_e4m3fn:
        return f"of 8-bit floats it writes float8_e4m3fn, not {fmt.name}"
    if problem.x_dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"activations are {problem.x_dtype.name}; bfloat16, float16 and float32 are possible"
    if not THREADS <= problem.k <= LONGEST:
        return f"rows have {problem.k} elements; {THREADS} to {LONGEST} are possible"
    return has_mosaic()


def _measured(problem: Problem) -> bool | str:
    return "XLA fuses this as well, and which is faster has not been measured"


@register_lowering(
    "quantize_rows",
    (Int, Float8),
    "cuda",
    when=_runs,
    worth=_measured,
    name="mosaic",
    priority=5,
    about="a warpgroup a row, kept in registers, with a norm or a gate in front; if named",
)
def mosaic(problem: Problem, x: Array, extra: Sequence[Array]) -> tuple[Array, Array]:
    """Return codes and scales by the kernel."""
    if x.size == 0:
        return quantize_rows_reference(problem, x, extra)
    rows = math.prod(x.shape[:-1])
    flat = [a.reshape(rows, problem.k) if a.ndim > 1 else a for a in (x, *extra)]
    fmt = problem.weight
    assert isinstance(fmt, Int | Float8)
    codes, scale = quantize(flat[0], flat[1:], fmt=fmt, before=problem.settings)
    return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)
