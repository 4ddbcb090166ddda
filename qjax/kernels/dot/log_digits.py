"""Products of logarithmic activations and integer weights as integer products, digit by digit.

An activation of code c is scale * 2**-E[c] * M[c] / D. With T the largest shift of the format it is a whole number of
steps scale / (D * 2**T),

    u = 2**(T - E[c]) * M[c],      0 for the code of zero,

of b + 1 + T bits, which in base 128 has digits d_p that an int8 holds. So

    y = scale / (D * 2**T) * sum_p 128**p * [sum_k d_pk (w_k - z)] * s,

and what stands in brackets is a product of integer codes, exact in int32, that a lowering of int8 activations computes.
Digits are further rows of one such product. Three bits take one digit at q up to 21 and two up to 58, four bits two up
to 24 and three up to 41; from six bits on it is four digits or more, and floats are multiplied instead.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats import Int, QArray
from qjax.formats.log import Log, padded
from qjax.formats.nf4 import lookup
from qjax.kernels.dot.integer import int_dot
from qjax.kernels.dot.xla import both_quantized, fold_rows, over_stack
from qjax.kernels.registry import Act, Problem, refusal, register_lowering, select

DIGIT = 7
"""Bits of a digit: what an int8 holds that is not negative."""

MOST = 3
"""Digits beyond which the integer products take longer than a float product can."""

_INT8 = Int(8, per="tensor")


def digits(fmt: Log) -> tuple[np.ndarray, int]:
    """Return the digits of what codes stand for, lowest first: float32 [digits, codes], and T of the module."""
    shifts, numerators, _ = fmt.tables()
    most = int(shifts[: fmt.levels].max())
    whole = [int(m) << max(most - int(e), 0) for m, e in zip(numerators, shifts, strict=True)]
    whole = whole[: fmt.levels] + [0] * (fmt.zero_code is not None)
    count = -(-max(whole).bit_length() // DIGIT)
    table = [[u >> DIGIT * p & (1 << DIGIT) - 1 for u in whole] for p in range(count)]
    return np.asarray(table, np.float32), most


def _inner(problem: Problem, rows: int | None) -> Problem:
    """The product of digits."""
    return dataclasses.replace(
        problem, act=_INT8, rows=rows, x_dtype=np.dtype(np.float32), out_dtype=np.dtype(np.float32), terms=()
    )


def _few_digits(problem: Problem) -> bool | str:
    fmt = problem.act
    if not isinstance(fmt, Log):
        return "the activations are not logarithmic codes"
    if fmt.shift and not fmt.folded:
        return f"the shift {fmt.shift:.4g} of the activations is not folded into a bias"
    if fmt.per != "tensor":
        return "the activations have more than one scale"
    count = len(digits(fmt)[0])
    if count > MOST:
        return f"{fmt.name} takes {count} digits of {DIGIT} bits, and {MOST} are taken"
    why = refusal(_inner(problem, problem.rows), "int_dot")
    return True if why is None else why


def _one_digit(problem: Problem) -> bool | str:
    fmt: Any = problem.act
    return len(digits(fmt)[0]) == 1 or "it is more than one integer product, whose time has not been measured"


@register_lowering(
    "dot",
    when=_few_digits,
    worth=_one_digit,
    name="log_digits",
    priority=4,
    about="logarithmic activations as digits of an integer: one to three int8 products; chosen for one",
)
def log_digits(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the product, as the module's equations say it."""
    return over_stack(_matrix)(problem, x, w, act)


def _matrix(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the product of one matrix: x [*rows, K], w canonical [N, K]."""
    (fmt, aux), shape = both_quantized(act), x.shape[:-1]
    assert isinstance(fmt, Log)
    scale = fold_rows(jnp.broadcast_to(aux["scale"], (*shape, 1)))  # one for all, or for each of a batch
    codes = fmt.encode(fold_rows(x), {"scale": scale})
    table, most = digits(fmt)
    rows = [lookup(codes, padded(one)) for one in table]
    many = jnp.concatenate(rows)
    inner = _inner(problem, many.shape[0] if isinstance(many.shape[0], int) else None)
    chosen = select(inner)
    product = chosen.function if chosen.name != "reference" else int_dot
    sums = product(inner, many, w, (_INT8, {"scale": jnp.ones((1, 1), jnp.float32)}))
    parts = sums.reshape(len(rows), codes.shape[0], problem.n)
    unit = 1 / (fmt.tables()[2] * 2.0**most)
    y = sum(part * np.float32(2.0 ** (DIGIT * p) * unit) for p, part in enumerate(parts)) * scale
    return y.astype(problem.out_dtype).reshape(*shape, problem.n)
