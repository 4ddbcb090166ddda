"""The lowering of products on NVIDIA's Hopper.

With 16-bit activations by the kernel of `tiles16`, which reads weights in tiles (`qjax.ops.pack`); with int8 or float8
activations by that of `codes8`, which reads codes in neutral order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax import Array

from qjax.formats import CodeTiles, Float8, Format, Int, QArray
from qjax.formats.tiles import ROWS, IntTiles, rounded_up
from qjax.kernels.devices import has_mosaic
from qjax.kernels.dot.codes8 import codes8
from qjax.kernels.dot.hopper import STEP, TOKENS, WARPGROUPS, Schedule
from qjax.kernels.dot.integer import LARGEST_SUM
from qjax.kernels.dot.reference import dot_reference, encoded
from qjax.kernels.dot.tiles16 import tiles16
from qjax.kernels.pack import tiled_format
from qjax.kernels.registry import Act, Problem, When, register_lowering
from qjax.kernels.tuned import Key, bucket, schedule_of

PROCESSORS = 132
"""Streaming multiprocessors of an H100 SXM or H200: one block of threads each."""

FEWEST_STEPS = 4
"""Steps that a part of a cut K has at least, so that its ring fills."""

STAGES = {8: 6, 16: 6, 32: 6, 64: 5, 128: 3}
"""Steps under way by tokens of a tile: what shared memory holds, or enough to cover the latency of a fetch. Untuned."""


def schedule_for(n: int, k: int, rows: int, matrices: int = 1) -> Schedule:
    """Return how a product is cut; a rule of thumb until configurations are tuned on a device.

    The smallest tile that holds all tokens, or 128 tokens; K is cut where the tiles leave processors without work.

    Args:
        n: rows of the weight.
        k: its columns.
        rows: tokens.
        matrices: products of that size.
    """
    tokens = next((t for t in TOKENS if t >= rows), TOKENS[-1])
    blocks = rounded_up(n) // (WARPGROUPS * ROWS) * -(-rows // tokens) * matrices
    steps = rounded_up(k) // STEP
    fits = [s for s in range(1, steps + 1) if steps % s == 0 and steps // s >= FEWEST_STEPS]
    splits = max([s for s in fits if s * blocks <= PROCESSORS], default=1)
    return Schedule(tokens, STAGES[tokens], splits)


REVISIONS = {"tiles16": 1, "codes8": 1, "codes4x8": 1, "words16": 1, "mixed16": 1}
"""Of each kernel; raised where a schedule means another program, so that what was measured before is not taken."""


def chosen(kernel: str, problem: Problem, tokens: int, stages: Mapping[int, int] = STAGES) -> Schedule:
    """Return how a product is cut: as was measured best on this device, else by `schedule_for`.

    Args:
        kernel: one of `REVISIONS`.
        problem: what is to be computed.
        tokens: rows of one matrix product.
        stages: steps under way by tokens of a tile, where the kernel's own differ from `STAGES`.
    """
    formats = problem.weight.name + (f" x {problem.act.name}" if problem.act else "")
    n, k = rounded_up(problem.n), rounded_up(problem.k)
    key = Key(kernel, REVISIONS[kernel], formats, problem.x_dtype.name, n, k, bucket(tokens), problem.matrices)
    rule = schedule_for(problem.n, problem.k, tokens, problem.matrices)
    rule = dataclasses.replace(rule, stages=stages[rule.tokens])
    return schedule_of(key, rule, lambda s: k // STEP % s.splits == 0)


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
        wanted = "qjax.ops.neutral(w)" if weight.like.bits == 8 else "qjax.ops.pack(w, 'mosaic_int8')"
        return f"activations are quantized ({act.name}), and a weight in tiles takes 16-bit floats; {wanted}"
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
    about="wgmma on Hopper: codes of 4 or 8 bits, packed for it, with 16-bit activations; W8A8, if named",
)
def mosaic(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the product by the kernel."""
    rows = x.shape[len(problem.stack) : -1]
    if x.size == 0 or not problem.n or not problem.matrices:
        return dot_reference(problem, x, w, act)
    count, tokens = problem.matrices, math.prod(rows)
    schedule = chosen("tiles16" if act is None else "codes8", problem, tokens)
    if act is not None:
        codes, of_tokens = coded(problem, x, act)
        of_rows = jnp.broadcast_to(w.fmt.scale_of(w.aux), (*problem.stack, problem.n, 1))
        y = codes8(
            w.codes.reshape(count, problem.n, problem.k),
            of_rows.reshape(count, problem.n),
            codes,
            of_tokens,
            out_dtype=problem.out_dtype,
            schedule=schedule,
        )
        return y.reshape(*problem.stack, *rows, problem.n)
    assert isinstance(problem.weight, IntTiles)
    zero = w.aux.get("zero")
    y = tiles16(
        w.aux["tiles"].reshape(count, -1),
        w.aux["scale"].reshape(count, -1),
        None if zero is None else zero.reshape(count, -1),
        x.reshape(count, tokens, problem.k),
        fmt=problem.weight,
        n=problem.n,
        out_dtype=problem.out_dtype,
        schedule=schedule,
    )
    return y.reshape(*problem.stack, *rows, problem.n)
