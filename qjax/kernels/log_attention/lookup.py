"""Log-coded probabilities times codes of values as a product of bfloat16 numbers that are all exact.

The denominator D and the scale of the values move behind the product, so that its operands are

    2**-E[c] * M[c]      M has at most b + 1 bits, 8 for b = 7, which is what a bfloat16 holds; powers of two are free
    u - z                at most 255 in size, 8 bits

and what matrix units accumulate in float32 are exact products of the numbers that the oracle adds up.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from qjax.formats import Int
from qjax.formats.log import Log, decode_unit, denominator
from qjax.kernels.log_attention.reference import codes_of, product
from qjax.kernels.registry import Act, Problem, register_lowering

MOST_BITS = 7
"""Of probabilities: numerators of more have more than the 8 significant bits of a bfloat16."""


def exact(problem: Problem) -> bool | str:
    """Whether both operands of the product are exact in bfloat16, or why not."""
    fmt, act = problem.weight, problem.act
    assert isinstance(fmt, Log)
    if fmt.bits > MOST_BITS:
        return f"numerators of {fmt.bits} bits need more than the 8 bits of a bfloat16"
    if not isinstance(act, Int) or not act.affine:
        return "values are not quantized to integers, so that they would be rounded to bfloat16"
    return True


def _matrix_units(problem: Problem) -> bool | str:
    return problem.platform in ("cuda", "rocm", "tpu") or "float32 products are faster where no unit has bfloat16"


def numbers_of(v: Array, act: Act) -> tuple[Array, Array]:
    """Return the codes of values less their zero point, bfloat16 of the shape of v, and their scale."""
    fmt, aux = act
    codes = fmt.encode(v.astype(jnp.float32), aux).astype(jnp.float32)
    zero: Any = aux.get("zero", 0)
    return (codes - jnp.asarray(zero, jnp.float32)).astype(jnp.bfloat16), jnp.asarray(aux["scale"])


@register_lowering(
    "log_attention",
    Log,
    when=exact,
    worth=_matrix_units,
    name="lookup",
    priority=3,
    about="codes looked up as bfloat16, times bfloat16 codes of the values: exact operands for matrix units",
)
def lookup(problem: Problem, scores: Array, v: Array, act: Act) -> Array:
    """Return y of `qjax.kernels.log_attention.reference`."""
    fmt: Any = problem.weight
    p = decode_unit(codes_of(scores, fmt), fmt, over=1).astype(jnp.bfloat16)
    numbers, scale = numbers_of(v, act)
    y = product(p, numbers) * (scale * jnp.float32(1 / denominator(fmt.bits)))
    return y.astype(problem.out_dtype)
