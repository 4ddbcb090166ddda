"""What is added to a product before it is rounded: a bias and a residual.

    y = round(x @ W^T + bias + residual)

with the sum of products and both additions in float32 (float64 where x or y is), in this order, and one rounding. A
float model rounds the product to the dtype of its activations, adds the bias in that dtype, and rounds again.

A lowering may add them itself (``adds`` of `qjax.kernels.register_lowering`). All others give the product in the wide
dtype, and `computed` adds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from qjax.formats import QArray
from qjax.kernels.dot.reference import dot_reference
from qjax.kernels.registry import Act, Function, Lowering, Problem

TERMS = ("bias", "residual")
"""Names of what can be added, in the order in which it is."""


def dtype_of_sum(problem: Problem) -> np.dtype:
    """Return the dtype in which terms are added."""
    return np.dtype(np.float64 if np.dtype(np.float64) in (problem.x_dtype, problem.out_dtype) else np.float32)


def with_terms(total: Array, terms: Mapping[str, Array], dtype: DTypeLike) -> Array:
    """Return a sum of products with its terms added, rounded once.

    Args:
        total: float32 or float64 [*lead, *rows, N].
        terms: "bias" [*lead, N] and "residual" [*lead, *rows, N], or one of them, of any float dtype.
        dtype: of the result.
    """
    for name in TERMS:
        if name in terms:
            term = terms[name].astype(total.dtype)
            total = total + jnp.expand_dims(term, tuple(range(term.ndim - 1, total.ndim - 1)))
    return total.astype(dtype)


def computed(
    lowering: Lowering, problem: Problem, x: Array, w: Any, act: Act | None, *extra: Array, terms: Mapping[str, Array]
) -> Array:
    """Return what a lowering computes, with terms: those that it does not add are added after it."""
    if lowering.adds_terms(problem):
        return lowering.function(problem, x, w, act, *extra, **terms)
    return terms_after(lowering.function, problem, x, w, act, *extra, terms=terms)


def terms_after(
    function: Function, problem: Problem, x: Array, w: Any, act: Act | None, *extra: Array, terms: Mapping[str, Array]
) -> Array:
    """Return the product by a function that knows no terms, and what is added to it."""
    if not terms:
        return function(problem, x, w, act, *extra)
    plain = dataclasses.replace(problem, out_dtype=dtype_of_sum(problem), terms=())
    return with_terms(function(plain, x, w, act, *extra), terms, problem.out_dtype)


def in_matrices(function: Function) -> Function:
    """Make a lowering of ``function(problem, x, w, act, terms) -> [E, M, N]``, with terms in that form.

    Products without any number are left to the oracle, and terms that the kernel cannot add are added after it.
    """

    @functools.wraps(function)
    def run(problem: Problem, x: Array, w: QArray, act: Act | None, **terms: Array) -> Array:
        if x.size == 0 or not problem.n or not problem.matrices:
            return terms_after(dot_reference, problem, x, w, act, terms=terms)
        if "residual" in terms and terms["residual"].dtype != problem.out_dtype:
            return terms_after(run, problem, x, w, act, terms=terms)
        count, rows, n = problem.matrices, x.shape[len(problem.stack) : -1], problem.n
        shapes = {"bias": (count, n), "residual": (count, math.prod(rows), n)}
        y = function(problem, x, w, act, {name: a.reshape(shapes[name]) for name, a in terms.items()})
        return y.reshape(*problem.stack, *rows, n)

    return run
