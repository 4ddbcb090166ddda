"""Fake quantization: a program in which weights and activations are rounded to their formats, and stay float.

Each product whose site a recipe quantizes gets operands that have passed through their format and back. Derivatives
pass straight through the rounding (Bengio et al. 2013, arXiv:1308.3432), so the function can be trained as it will be
stored. Ranges are those of the moment: of the weight as it is now, of the activations as they pass.

A weight is rounded where it is used and as it lies: reshaped into its groups, not transposed, which would cost more
than the rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from qjax._compat import bind
from qjax.calibration import Observer
from qjax.errors import RecipeError
from qjax.formats import Format
from qjax.rewrite import Rewriter
from qjax.rewriting.emit import Act, operand_axes, rounded


@dataclasses.dataclass(frozen=True)
class Faked:
    """What is rounded at a site: the weight's format and observer, and the activations' format; None is float."""

    weights: Format | None = None
    observer: Observer | None = None
    inputs: Format | None = None


class FakeRewriter(Rewriter):
    """Replays a program with rounded operands in the products for which ``inputs`` holds a `Faked`."""

    def product(
        self, emit: Callable[..., Any], number: int | None, acts: Any, eqn: Any, values: list[Any], context: Any
    ) -> list[Any]:
        """Emit a product of rounded operands."""
        where = self.where(number)
        distinct = list(dict.fromkeys(act for _, act in acts))
        if number is None or distinct == [None]:
            return bind(eqn, values)
        if len(distinct) > 1:
            raise RecipeError(
                f"{where}: its format changes with a loop index that only the run knows; fake quantization needs one "
                "format for all steps of such a loop"
            )
        faked: Faked = distinct[0]
        at = self.weight_side(number, eqn)
        sums, stacks = operand_axes(eqn, at)
        ref = self.program.analysis.reads[number].ref
        if ref is not None and eqn.primitive.name == "dot_general":
            # Groups run through the leaf's axes, in the leaf's order; a product may name them in another.
            sums = tuple(sorted(sums, key=lambda d: [(axis, -stride) for axis, stride, _ in ref.dims[d]]))
        values = list(values)
        if faked.weights is not None:
            values[at] = straight_through(values[at], faked.weights, sums, stacks, faked.observer)
        if faked.inputs is not None:
            values[1 - at] = rounded(values[1 - at], Act(faked.inputs), operand_axes(eqn, 1 - at)[0])
        return bind(eqn, values)


def straight_through(
    w: Any, fmt: Format, sums: tuple[int, ...], stacks: tuple[int, ...] = (), observer: Observer | None = None
) -> Any:
    """Round a weight to a format and back; the derivative is that of the identity.

    Args:
        w: float, any shape.
        fmt: the format.
        sums: axes that a product sums over, in the order in which groups run through them.
        stacks: axes of independent matrices.
        observer: how the range is chosen; None takes all of it.

    Returns:
        The rounded weight, of the shape and dtype of w.
    """
    stop = lax.stop_gradient(w)
    outs = tuple(d for d in range(w.ndim) if d not in sums and d not in stacks)
    plain = observer is None and type(fmt).fit is Format.fit and type(fmt).shared_aux is Format.shared_aux
    whole = fmt.per in ("channel", "token")
    even = fmt.per == "group" and len(sums) == 1 and w.shape[sums[0]] % (fmt.group or 1) == 0
    if plain and fmt.elementwise and (whole or even):
        near = _as_it_lies(stop, fmt, sums, fmt.group if even else None)
    else:
        order = (*stacks, *outs, *sums)
        sizes = [math.prod(w.shape[d] for d in axes) for axes in (outs, sums)]
        moved = lax.transpose(stop, order)
        matrix = moved.reshape(*(w.shape[d] for d in stacks), *sizes).astype(jnp.float32)
        aux = fmt.fit(matrix) if observer is None else observer.fit(matrix, fmt)
        flat = fmt.decode(fmt.encode(matrix, aux), aux).reshape(moved.shape)
        near = lax.transpose(flat, tuple(order.index(d) for d in range(w.ndim)))
    return w + lax.stop_gradient(near.astype(w.dtype) - w)


def _as_it_lies(w: Any, fmt: Format, sums: tuple[int, ...], group: int | None) -> Any:
    """Round with a scale per output channel or group, in the layout of w; scales broadcast along sums."""
    shape, w = w.shape, w.astype(jnp.float32)
    if group is not None:
        (axis,) = sums
        w = w.reshape(*shape[:axis], shape[axis] // group, group, *shape[axis + 1 :])
        sums = (axis + 1,)
    low, high = (f(w, axis=sums, keepdims=True, initial=0.0) for f in (jnp.min, jnp.max))
    # Formats broadcast numbers per block along the last axis: an axis of one element behind all others stands for it.
    aux = fmt.from_range(low[..., None], high[..., None])
    return fmt.decode(fmt.encode(w[..., None], aux), aux)[..., 0].reshape(shape)
