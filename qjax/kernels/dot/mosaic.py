"""The lowering of products on NVIDIA's Hopper.

With 16-bit activations and 8-bit integers by the kernel of `tiles16`, which reads weights in tiles (`qjax.ops.pack`);
with int8 or float8 activations by that of `codes8`, which reads codes in neutral order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax import Array

from qjax.formats import CodeTiles, Float8, Format, Int, QArray
from qjax.formats.tiles import IntTiles
from qjax.kernels.devices import has_mosaic
from qjax.kernels.dot.codes8 import codes8
from qjax.kernels.dot.hopper import STEP, WIDE
from qjax.kernels.dot.integer import LARGEST_SUM
from qjax.kernels.dot.reference import encoded
from qjax.kernels.dot.schedules import Footprint, chosen
from qjax.kernels.dot.terms import in_matrices
from qjax.kernels.dot.tiles16 import tiles16
from qjax.kernels.pack import tiled_format
from qjax.kernels.registry import Act, Problem, When, register_lowering

CODES8 = Footprint(WIDE * STEP, act=1)
"""What the kernel of `codes8` holds of a step."""


def on_hopper(refuses: Callable[[Problem], str | None]) -> When:
    """Return the condition of a kernel for Hopper: what all of them need, and what this one refuses and why."""

    def runs(problem: Problem) -> bool | str:
        if problem.capability is None:
            return "it is not known for which GPU is compiled (no CUDA device, no jax.sharding.AbstractDevice)"
        if problem.capability[0] != 9:
            major, minor = problem.capability
            return f"wgmma exists on compute capability 9.0 (Hopper) alone, and this device has {major}.{minor}"
        if not isinstance(problem.rows, int):
            return "the number of rows is not known when compiling"
        if problem.devices > 1:
            return f"the compiler would partition it over {problem.devices} devices; call it inside jax.shard_map"
        return refuses(problem) or has_mosaic()

    return runs


def _refuses(problem: Problem) -> str | None:
    return refuses_tiles(problem) if problem.act is None else _refuses_codes(problem, problem.act)


def refuses_tiles(problem: Problem) -> str | None:
    """Return why a weight and 16-bit activations have no kernel of `tiles16`, or None."""
    if not isinstance(problem.weight, IntTiles):
        order = tiled_format(problem.weight, problem.k)
        return (
            order
            if isinstance(order, str)
            else "the weight lies in neutral order; qjax.ops.pack(w, 'mosaic') makes the kernel's, once"
        )
    if problem.x_dtype not in (jnp.bfloat16, jnp.float16):
        return f"activations are {problem.x_dtype.name}; cast them to bfloat16 or float16"
    return None


def _refuses_codes(problem: Problem, act: Format) -> str | None:
    weight = problem.weight
    if isinstance(weight, IntTiles):
        return f"activations are quantized ({act.name}), and a weight in tiles takes 16-bit floats; qjax.ops.neutral(w)"
    if isinstance(weight, Int) and weight.bits == 4 and CodeTiles.cannot(weight, problem.k) is None:
        return "codes of 4 bits are read in an order of their own; qjax.ops.pack(w, 'mosaic_int8') makes it, once"
    for fmt in (weight, act):
        if fmt.per == "group":
            return f"{fmt.name} has a scale per group, which a product of codes would have to sum one by one"
    integers = all(isinstance(fmt, Int) and fmt.symmetric and fmt.bits == 8 for fmt in (weight, act))
    floats = all(isinstance(fmt, Float8) and fmt.code_dtype == jnp.float8_e4m3fn for fmt in (weight, act))
    if not integers and not floats:
        return f"{weight.name} x {act.name} is neither int8 x int8, both symmetric, nor float8_e4m3fn x float8_e4m3fn"
    if integers and problem.k > LARGEST_SUM:
        return f"a sum of {problem.k} products may overflow int32"
    if problem.n % STEP or problem.k % STEP:
        return f"N = {problem.n} and K = {problem.k} have to be multiples of {STEP}: codes are read as they lie"
    return None


def footprint(fmt: IntTiles) -> Footprint:
    """Return what the kernel of `tiles16` holds of a step: codes, float32 scales and bfloat16 zero points."""
    numbers = WIDE * (STEP // fmt.block if fmt.block else 1) * (4 if fmt.symmetric else 6)
    return Footprint(WIDE * STEP + numbers)


def _measured(problem: Problem) -> bool | str:
    return problem.act is None or "XLA's library has this product as well, and was faster where both were measured"


def coded(problem: Problem, x: Array, act: Act) -> tuple[Array, Array]:
    """Return the codes of activations [E, M, K] and their float32 scales [E, M], one of a tensor for every token."""
    fmt, aux = act
    scale = jnp.broadcast_to(fmt.scale_of(aux), (*x.shape[:-1], 1))
    tokens = math.prod(x.shape[len(problem.stack) : -1])
    return encoded(x, act).reshape(problem.matrices, tokens, problem.k), scale.reshape(problem.matrices, tokens)


@register_lowering(
    "dot",
    (IntTiles, Int, Float8),
    "cuda",
    when=on_hopper(_refuses),
    worth=_measured,
    name="mosaic",
    priority=5,
    about="wgmma on Hopper: 8-bit integers, packed for it, with 16-bit activations; W8A8, if named",
    adds=True,
)
@in_matrices
def mosaic(problem: Problem, x: Array, w: QArray, act: Act | None, terms: Mapping[str, Array]) -> Array:
    """Return the product by the kernel."""
    count, tokens = problem.matrices, math.prod(x.shape[len(problem.stack) : -1])
    if act is not None:
        schedule = chosen("codes8", problem, tokens, CODES8)
        codes, of_tokens = coded(problem, x, act)
        of_rows = jnp.broadcast_to(w.fmt.scale_of(w.aux), (*problem.stack, problem.n, 1))
        return codes8(
            w.codes.reshape(count, problem.n, problem.k),
            of_rows.reshape(count, problem.n),
            codes,
            of_tokens,
            out_dtype=problem.out_dtype,
            schedule=schedule,
            terms=terms,
        )
    assert isinstance(problem.weight, IntTiles)
    zero = w.aux.get("zero")
    schedule = chosen("tiles16", problem, tokens, footprint(problem.weight))
    return tiles16(
        w.aux["tiles"].reshape(count, -1),
        w.aux["scale"].reshape(count, -1),
        None if zero is None else zero.reshape(count, -1),
        x.reshape(count, tokens, problem.k),
        fmt=problem.weight,
        n=problem.n,
        out_dtype=problem.out_dtype,
        schedule=schedule,
        terms=terms,
    )
