"""What the lowerings for NVIDIA's Hopper ask, and that of int8 and float8 codes on both sides, by `codes8`.

Weights for 16-bit activations lie in words (`words`), those of 4 bits for codes in tiles (`w4a8`); here both sides are
read as they lie, in neutral order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax import Array

from qjax.formats import CodeTiles, Float8, Format, Int, QArray
from qjax.kernels.devices import has_mosaic
from qjax.kernels.dot.codes8 import codes8
from qjax.kernels.dot.hopper import STEP, WIDE
from qjax.kernels.dot.integer import LARGEST_SUM
from qjax.kernels.dot.reference import encoded
from qjax.kernels.dot.schedules import Footprint, chosen
from qjax.kernels.dot.terms import in_matrices
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
    if problem.act is not None:
        return _refuses_codes(problem, problem.act)
    order = tiled_format(problem.weight, problem.k)
    pack = "the weight lies in neutral order; qjax.ops.pack(w, 'mosaic') makes the kernel's, once"
    return order if isinstance(order, str) else pack


def _refuses_codes(problem: Problem, act: Format) -> str | None:
    weight = problem.weight
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


def _measured(problem: Problem) -> bool | str:
    return "XLA's library has this product as well, and was faster where both were measured"


def coded(problem: Problem, x: Array, act: Act) -> tuple[Array, Array]:
    """Return the codes of activations [E, M, K] and their float32 scales [E, M], one of a tensor for every token."""
    fmt, aux = act
    scale = jnp.broadcast_to(fmt.scale_of(aux), (*x.shape[:-1], 1))
    tokens = math.prod(x.shape[len(problem.stack) : -1])
    return encoded(x, act).reshape(problem.matrices, tokens, problem.k), scale.reshape(problem.matrices, tokens)


@register_lowering(
    "dot",
    (Int, Float8),
    "cuda",
    when=on_hopper(_refuses),
    worth=_measured,
    name="mosaic",
    priority=5,
    about="wgmma on Hopper: int8 x int8 and float8 x float8, codes as they lie; if named",
    adds=True,
)
@in_matrices
def mosaic(problem: Problem, x: Array, w: QArray, act: Act | None, terms: Mapping[str, Array]) -> Array:
    """Return the product by the kernel."""
    assert act is not None
    count, tokens = problem.matrices, math.prod(x.shape[len(problem.stack) : -1])
    codes, of_tokens = coded(problem, x, act)
    of_rows = jnp.broadcast_to(w.fmt.scale_of(w.aux), (*problem.stack, problem.n, 1))
    return codes8(
        w.codes.reshape(count, problem.n, problem.k),
        of_rows.reshape(count, problem.n),
        codes,
        of_tokens,
        out_dtype=problem.out_dtype,
        schedule=chosen("codes8", problem, tokens, CODES8),
        terms=terms,
    )
