"""Squared errors of products for candidate quantizers of one operand, compiled: see ``src/candidates.h``.

It is no lowering of an op: searches call it (`qjax.passes.fpcs_losses`). Errors are made 32 rows at a time in the
nearest cache, rounded to bfloat16 and multiplied by AMX, and their products enter the sum from there: nothing of the
size of the operand is written, where XLA writes the errors and the products of each candidate. All of XLA's threads
share the rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.kernels.cpu.library import CANDIDATES, has_bf16_tiles, library

FORMS = ("product", "quadratic", "own")
"""What is summed, as numbered in ``src/candidates.h``."""


def available() -> str:
    """Why it cannot run here; "" where it can."""
    lib = library()
    if isinstance(lib, str):
        return lib
    return "" if has_bf16_tiles() else "this processor has no AMX with bfloat16"


def losses(
    x: Array,
    scale: Array,
    other: Array,
    *,
    form: str,
    matrix: Array | None = None,
    rest: Array | None = None,
    top: int = 0,
    number: Array | None = None,
    table: Array | None = None,
    least: float = 0.0,
    by_row: bool = False,
) -> Array:
    """Return the losses of candidates.

    Args:
        x: float32 [S, M, K]: numbers, or with tables their logarithms to base 2.
        scale, other: float32 [A, C]: scales and zero points; with tables, logarithms of scales and codes an octave.
            Slice s of x has row s % A of them.
        form: one of `FORMS`.
        matrix: float32 [S, P, K], rounded to bfloat16 here; for "quadratic" P = K.
        rest: float32 [S, M, P].
        top: the last code of even quantizers.
        number: float32 [S, M, K]: what the entries of tables stand for.
        table: float32 [C, entries]: what a code becomes; codes beyond the last entry are the last one.
        least: logarithms below count as this.
        by_row: each row has its own candidates and its own loss; S is 1 then, and A is M.

    Returns:
        float32 [S, C], or [M, C] by row.
    """
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    none = jnp.zeros((x.shape[0], 0, 0), jnp.float32)
    rows = x.shape[1] if by_row else x.shape[0]
    return jax.ffi.ffi_call(CANDIDATES, jax.ShapeDtypeStruct((rows, scale.shape[1]), jnp.float32))(
        f32(x),
        *(none if a is None else f32(a) for a in (number, matrix, rest)),
        f32(scale),
        f32(other),
        jnp.zeros((scale.shape[1], 0), jnp.float32) if table is None else f32(table),
        form=np.int64(FORMS.index(form)),
        by_row=np.int64(by_row),
        top=np.float32(top),
        least=np.float32(least),
    )
