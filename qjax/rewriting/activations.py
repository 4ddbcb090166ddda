"""The activations of a product as matrices [*stack, rows, K]: what statistics and roundings look at."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.calibration import State
from qjax.errors import RecipeError
from qjax.rewriting.emit import operand_axes
from qjax.statistics import Statistic


def activation_matrix(eqn: Any, x: Any, side: int) -> Any:
    """The activations of a product as [rows, K], K being what one output element is summed from.

    Axes that the product runs over in parallel count as rows: one scale serves them all.

    Args:
        eqn: dot_general, conv_general_dilated or ragged_dot_general.
        x: the operand that is no parameter.
        side: which operand it is.
    """
    sums, _ = operand_axes(eqn, side)
    rows = tuple(d for d in range(x.ndim) if d not in sums)
    return lax.transpose(x, (*rows, *sums)).reshape(*(math.prod(x.shape[d] for d in axes) for axes in (rows, sums)))


class Rows:
    """The activations of one product, as statistics want them.

    K stands in the order in which the weight is stored, stack axes in that of the product: [*stack, rows, K]. A
    convolution's rows are the patches under its kernel; those of a ragged product belong to the group that they are
    multiplied with.

    Args:
        eqn: dot_general, conv_general_dilated or ragged_dot_general.
        values: its operands; the activations as an array.
        program: the trace.
        number: of the read.
        side: which operand the activations are.

    Raises:
        RecipeError: a convolution with groups, whose patches differ from output to output.
    """

    def __init__(self, eqn: Any, values: list[Any], program: Any, number: int, side: int):
        self.eqn, self.values, self.x, self.side = eqn, values, values[side], side
        name = eqn.primitive.name
        self.ragged = name == "ragged_dot_general"
        if name == "dot_general":
            self.matrix = _dot_rows(eqn, self.x, program.analysis.reads[number], side)
        elif self.ragged:
            self.matrix = self.x
        else:
            self.matrix = _patches(eqn, self.x, next(iter(program.slices[number].name_of.values())))
        self._check_length(program, number)
        groups = (eqn.invars[1].aval.shape[0],) if self.ragged else ()
        self.shape = (*groups, *self.matrix.shape)

    def _check_length(self, program: Any, number: int) -> None:
        """Refuse a part of the channels: what other devices see of a product is not known here."""
        read = program.analysis.reads[number]
        if read.ref is None:
            return
        whole = math.prod(program.leaf_avals[read.ref.leaf].shape[a] for a in read.in_axes)
        if self.matrix.shape[-1] != whole:
            raise RecipeError(
                f"{next(iter(program.slices[number].name_of.values()))}: inside shard_map each device sees "
                f"{self.matrix.shape[-1]} of its {whole} input channels, and statistics per channel need all of them; "
                "gather them on the unsharded function, or shard another axis of the weight"
            )

    def seen(self, part: Statistic, before: State | None = None) -> State:
        """The state of one statistic, with what was seen before."""
        if not (part.stacked and self.ragged):
            rows = self.matrix if part.stacked else self.matrix.reshape(-1, self.matrix.shape[-1])
            return part.see(rows) if before is None else part.add(before, rows)
        if before is not None:
            return part.merge(before, self.seen(part))
        sizes = self.values[2]
        ends = jnp.cumsum(sizes)
        at = jnp.arange(self.matrix.shape[0])

        def of_group(bounds: tuple[Any, Any]) -> State:  # one group at a time: its rows, and zeros for all others
            inside = (at >= bounds[0]) & (at < bounds[1])
            return part.see(jnp.where(inside[:, None], self.matrix, 0))

        return lax.map(of_group, (ends - sizes, ends))


def _dot_rows(eqn: Any, x: Any, read: Any, side: int) -> Any:
    """[*batch, rows, K] of a dot_general; K in the order of the leaf's in axes."""
    contract, batch = eqn.params["dimension_numbers"]
    mine, other = tuple(contract[side]), tuple(contract[1 - side])
    if read.ref is not None and len(other) > 1:

        def place(d: int) -> tuple[int, int]:  # a dimension may be part of an axis that was split: the outer one first
            axis, stride, _ = read.ref.dims[d][0]
            return (read.in_axes.index(axis) if axis in read.in_axes else len(read.in_axes), -stride)

        mine = tuple(m for _, m in sorted(zip(other, mine, strict=True), key=lambda pair: place(pair[0])))
    stack = tuple(batch[side])
    rows = tuple(d for d in range(x.ndim) if d not in mine and d not in stack)
    sizes = [math.prod(x.shape[d] for d in axes) for axes in (rows, mine)]
    return lax.transpose(x, (*stack, *rows, *mine)).reshape(*(x.shape[d] for d in stack), *sizes)


def _patches(eqn: Any, x: Any, where: str) -> Any:
    """[rows, H·W·I] of a convolution: what its kernel meets at each place of the result."""
    p = eqn.params
    if p["feature_group_count"] != 1 or p["batch_group_count"] != 1:
        raise RecipeError(
            f"{where}: a convolution with groups has other inputs for each group of outputs, and statistics of them "
            "are not gathered yet; give it a rule of its own with round-to-nearest weights"
        )
    numbers = p["dimension_numbers"]
    kernel = eqn.invars[1].aval.shape
    window = tuple(kernel[d] for d in numbers.rhs_spec[2:])
    channels = x.shape[numbers.lhs_spec[1]]
    # NCHW in, N(I·H·W)HW out, whatever the layout of the model
    image = lax.transpose(x, (numbers.lhs_spec[0], numbers.lhs_spec[1], *numbers.lhs_spec[2:]))
    found = lax.conv_general_dilated_patches(
        image,
        window,
        p["window_strides"],
        p["padding"],
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["rhs_dilation"],
        precision=jax.lax.Precision.HIGHEST,
    )
    found = found.reshape(found.shape[0], channels, math.prod(window), -1)  # [N, I, H·W, places]
    return found.transpose(0, 3, 2, 1).reshape(-1, math.prod(window) * channels)
