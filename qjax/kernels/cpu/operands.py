"""What lowerings to the compiled kernels share: what they refuse, and operands in the shapes that handlers take."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats import Int, QArray
from qjax.formats.numerics import AnyArray
from qjax.kernels.act.reference import unit_scale
from qjax.kernels.cpu.library import instruction_sets, library, say_once
from qjax.kernels.dot.reference import CODES
from qjax.kernels.registry import Act, Problem

SMALLEST = 1 << 14
"""Weights of fewer elements are left to XLA unless the kernel is named; ``benchmarks/cpu_models.py`` has such ones."""

SMALLEST_MEASURED = 1 << 12
"""The same for `MixedBits` weights and for one expert of a ragged product, by ``benchmarks/cpu_small.py``."""

FAST = "avx512_vnni"
"""The plainest instruction set by which kernels are taken by themselves: that of `Int` was measured ahead of XLA. Those
of ARM were run on emulated processors alone and not measured, and like AVX2 they have to be named."""


def refuses_activations(problem: Problem) -> str | None:
    """Say why kernels for int8 activations do not take these, or None."""
    act = problem.act
    if act is None:
        return "the activations are not quantized"
    if not (isinstance(act, Int) and act.symmetric and act.per != "group"):
        return f"{act.name} activations have no kernel; Int(8, per='token') have, or 'tensor', fewer bits too"
    return None


def refuses_place(problem: Problem, large: bool = True) -> str | None:
    """Say why no kernel can run there, or None; once also that they were not compiled, for a problem that is large."""
    if problem.rows is None:
        return "the number of rows is not known"
    if problem.devices > 1:
        return "it is for one device; inside shard_map it runs on each"
    if isinstance(lib := library(), str):
        if large and problem.n * problem.k >= SMALLEST and not problem.exported:
            say_once()
        return lib
    return None


def not_worth(problem: Problem, smallest: int | None = None) -> str | None:
    """Say why a kernel that can run is not taken unless it is named, or None.

    Weights of fewer than ``smallest`` elements, `SMALLEST` at most, are left to XLA.
    """
    least = SMALLEST if smallest is None else min(smallest, SMALLEST)
    if problem.exported:
        return "a program that is exported has to run where these kernels are not, and jax.export refuses them"
    if problem.n * problem.k < least:
        return f"the weight has fewer than {least} elements; so few are left to XLA"
    if FAST not in instruction_sets():
        return f"this processor has no {FAST}; by other instructions it has to be named"
    return None


def merged(problem: Problem, a: AnyArray, m: int, n: int) -> Array:
    """Return `matrices` of the stack of a problem."""
    return matrices(a, m, n, problem.stack)


def matrices(a: AnyArray, m: int, n: int, lead: tuple[int, ...]) -> Array:
    """Return [S, m, n] from [*lead or 1.., anything of m * n elements]: S matrices."""
    a = jnp.asarray(a)
    a = a.reshape(*a.shape[: len(lead)], m, n)
    return jnp.broadcast_to(a, (*lead, m, n)).reshape(math.prod(lead), m, n)


def integers(w: QArray) -> tuple[Array, Array, Array]:
    """Return codes, float32 scales and zero points of an `Int` weight [*lead, N, K], as `matrices`.

    A symmetric one has zero points [S, 0, 0].
    """
    lead = tuple(w.codes.shape[:-2])
    codes, scale = (matrices(a, *a.shape[-2:], lead=lead) for a in (w.codes, w.fmt.scale_of(w.aux)))
    zero = jnp.zeros((len(codes), 0, 0), jnp.uint8)
    if "zero" in w.aux:
        zero = matrices(w.aux["zero"], *w.aux["zero"].shape[-2:], lead=lead)
    return codes, scale, zero


def one_of(w: QArray, layer: Array | None) -> QArray:
    """Return the layer of a stack of weights that handlers would read, of clamped number; without one the weight."""
    return w if layer is None else w.index_stack(0, jnp.clip(layer, 0, w.codes.shape[0] - 1))


def numbered(layer: Array | None) -> Array:
    """Return the number of a layer, int32 [1], or [0] without one, as handlers take it."""
    return jnp.zeros((0,), jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(1)


def activations(problem: Problem, x: Array, act: Act) -> tuple[Array, Array | None]:
    """Return x, float32 or int8 codes [S, M, K], and its scales, float32 [S, M or 1, 1], or None: fitted to rows."""
    fmt, aux = act
    stacks, rows = len(problem.stack), x.shape[len(problem.stack) : -1]
    given = jnp.broadcast_to(jnp.asarray(aux[CODES]), x.shape) if CODES in aux else x.astype(jnp.float32)
    given = merged(problem, given, math.prod(rows), problem.k)
    if problem.settings is not None and problem.settings.fitted:
        return given, None  # those in aux are not read, and so XLA does not compute them
    scale = fmt.scale_of(aux)
    if any(d > 1 for d in scale.shape[stacks:-1]):
        scale = jnp.broadcast_to(scale, (*scale.shape[:stacks], *rows, 1))
    return given, merged(problem, scale, math.prod(scale.shape[stacks:]), 1)


def quantizing(x: Array, x_scale: Array | None, act: Int) -> tuple[Array, dict[str, Any]]:
    """Return the scales and the settings by which a handler quantizes x [S, M, K]."""
    low, high = act.code_range
    own: dict[str, Any] = {"low": np.int64(low), "high": np.int64(high), "unit": np.float32(0)}
    if x_scale is None:
        own["unit"] = np.float32(unit_scale(act))
        x_scale = jnp.zeros((x.shape[0], 0, 0), jnp.float32)
    return x_scale, own


def placed(problem: Problem, y: Array, x: Array) -> Array:
    """Return [S, M, N] as the result of the op: [*stack, *rows, N] in its dtype."""
    rows = x.shape[len(problem.stack) : -1]
    return y.astype(problem.out_dtype).reshape(*problem.stack, *rows, problem.n)
