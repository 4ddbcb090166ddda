"""Products of codes where an operand has a real offset: `qjax.formats.Affine` weights or activations.

With value = s (c - z) + b on either side (codes c, scale s; an integer zero z from `Int`, a real offset b from
`Affine`; what a format has not is 0), over K terms:

    y = s_w s_x sum (c_w - z_w)(c_x - z_x)  +  b_x s_w sum (c_w - z_w)  +  b_w (s_x sum (c_x - z_x) + K b_x)

The first sum is the integer product of `qjax.kernels.dot.integer` (codes 0 .. 255 are shifted by 128 there and
corrected), exact in int32. The second comes out of the same product, by a row of ones below the activations' codes; on
several devices it is a sum over the codes. The third costs a sum over the activations' codes, and only where the weight
has an offset: symmetric weights with asymmetric activations are the cheap pair.

Measured on a busy CPU beside the float product of decoded operands: 2 to 15 times as fast from matrices of 1,024 by
1,024 on, about even at 256 by 256 and up to a tenth of a millisecond slower there with one row. Formats with groups
keep the float product.

Source: EQ-Net (Xu et al. 2023, arXiv:2308.07650) for the grids; the expansion is plain algebra.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats import Affine, Aux, Format, Int, QArray
from qjax.kernels.dot.integer import LARGEST_SUM, int_dot
from qjax.kernels.dot.reference import CODES, encoded
from qjax.kernels.dot.xla import both_quantized, fold_rows, on_one_cpu, over_stack
from qjax.kernels.registry import Act, Problem, register_lowering


def _affine_pair(problem: Problem) -> bool | str:
    act, weight = problem.act, problem.weight
    if act is None:
        return "the activations are not quantized"
    if not (isinstance(act, Affine) or isinstance(weight, Affine)):
        return "neither operand has an offset"
    for fmt in (act, weight):
        if not isinstance(fmt, Affine | Int):
            return f"{fmt.name} codes are no integers with one factor and one offset"
        if fmt.per == "group":
            return f"{fmt.name} has a scale per group, and sums are over whole rows"
    if problem.k > LARGEST_SUM:
        return f"a sum of {problem.k} products may overflow int32"
    return True


def _worth(problem: Problem) -> bool | str:
    return problem.platform == "cpu" or "it was measured on CPU alone; elsewhere it runs where it is named"


def twin(fmt: Format) -> Int:
    """The `Int` with the same codes, which leaves the offset out."""
    if isinstance(fmt, Int):
        return fmt
    assert isinstance(fmt, Affine)
    return Int(fmt.bits, per=fmt.per, symmetric=fmt.signed)


@register_lowering(
    "dot",
    when=_affine_pair,
    worth=_worth,
    name="affine_dot",
    priority=4,
    about="int8 x int8 -> int32 on codes of operands with offsets, then scaled and corrected",
)
def affine_dot(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the product of integer codes times both scales, and what the offsets add."""
    if on_one_cpu(problem) and x.size:
        return over_stack(_cpu_matrix)(problem, x, w, act)
    return _whole(problem, x, w, both_quantized(act))


def _codes_alone(problem: Problem, x: Array, codes: Array, w: QArray, act: Act, scale: Array | None = None) -> Array:
    """The first sum, scaled: float32 [*stack, *rows, N]."""
    fmt, aux = act
    own: Aux = {"scale": fmt.scale_of(aux) if scale is None else scale, CODES: codes}
    if "zero" in aux:
        own["zero"] = aux["zero"]
    weight = dataclasses.replace(w, fmt=twin(w.fmt), aux={k: a for k, a in w.aux.items() if k in ("scale", "zero")})
    inner = dataclasses.replace(
        problem, weight=weight.fmt, act=twin(fmt), rows=None, out_dtype=np.dtype(np.float32), terms=()
    )
    return int_dot(inner, x, weight, (twin(fmt), own))


def _cpu_matrix(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    shape, x = x.shape[:-1], fold_rows(x)
    fmt, aux = both_quantized(act)
    aux: Aux = {k: jnp.broadcast_to(a, (*shape, a.shape[-1])).reshape(x.shape[0], -1) for k, a in aux.items()}
    codes = encoded(x, (fmt, aux))
    offset, scale = aux.get("offset"), fmt.scale_of(aux)
    if offset is None:
        y = _codes_alone(problem, x, codes, w, (fmt, aux))
    else:
        ones = jnp.ones((1, problem.k), codes.dtype)
        below = jnp.concatenate([codes, ones])
        y = _codes_alone(problem, jnp.concatenate([x, ones.astype(x.dtype)]), below, w, (fmt, aux),
                         jnp.concatenate([scale, jnp.ones((1, 1), scale.dtype)]))  # fmt: skip
        y = y[:-1] + offset * y[-1:]
    if "offset" in w.aux:
        y = y + _of_activations(codes, fmt, aux, problem.k) * w.aux["offset"][:, 0]
    return y.astype(problem.out_dtype).reshape(*shape, problem.n)


def _of_activations(codes: Array, fmt: Format, aux: Aux, k: int) -> Array:
    """s_x sum (c_x - z_x) + K b_x, float32 [..., 1]."""
    sums = jnp.sum(codes.astype(jnp.int32), axis=-1, keepdims=True)
    zero, offset = fmt.zero_of(aux), aux.get("offset")
    if zero is not None:
        sums = sums - k * zero.astype(jnp.int32)
    total = sums.astype(jnp.float32) * fmt.scale_of(aux)
    return total if offset is None else total + k * offset


def _whole(problem: Problem, x: Array, w: QArray, act: Act) -> Array:
    """The product as whole-array operations, which stay sharded."""
    fmt, aux = act
    codes, stacks = encoded(x, act), len(problem.stack)
    y = _codes_alone(problem, x, codes, w, act)

    def beside(a: Array) -> Array:
        """[*stack, N or 1] -> beside the result."""
        return a.reshape(*a.shape[:-1], *(1,) * (y.ndim - stacks - 1), a.shape[-1])

    if "offset" in aux:
        sums = jnp.sum(w.unpacked().astype(jnp.int32), axis=-1)
        zero = w.fmt.zero_of(w.aux)
        if zero is not None:
            sums = sums - problem.k * zero.astype(jnp.int32)[..., 0]
        y = y + aux["offset"] * beside(sums.astype(jnp.float32) * w.fmt.scale_of(w.aux)[..., 0])
    if "offset" in w.aux:
        y = y + _of_activations(codes, fmt, aux, problem.k) * beside(w.aux["offset"][..., 0])
    return y.astype(problem.out_dtype)
