"""Roundings that are trained on the outputs of a block: the block as a function of its weights.

A rounding with ``tunes = True`` has ``tune(outputs, weights, formats, inputs, targets)``; see `qjax.passes.AutoRound`.
What it returns for each weight is handed to its ``round`` as statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from qjax.applying.storage import LeafPlan
from qjax.blockwise.emit import emit_block
from qjax.blockwise.placing import where
from qjax.blockwise.schedule import Block
from qjax.errors import DataError
from qjax.formats import canonical_matrix
from qjax.formats.layout import weight_layout
from qjax.program import Program
from qjax.rewrite import Rewriter

if TYPE_CHECKING:
    from qjax.blockwise.run import BlockQuantizer

Key = tuple[int, ...]
Name = tuple[int, Key]
"""(position of a leaf, positions along its key axes)."""


def tuned_slices(plans: Mapping[int, LeafPlan], due: Sequence[Name]) -> dict[Any, list[Name]]:
    """The slices whose rounding is trained, by that rounding."""
    out: dict[Any, list[Name]] = {}
    for position, key in due:
        rounding = plans[position].slices[key].rounding
        if getattr(rounding, "tunes", False):
            out.setdefault(rounding, []).append((position, key))
    return out


def own_outputs(block: Block, trained: Collection[int]) -> tuple[int, ...]:
    """Which outputs of a block the trained weights change by a path that leads through no other output.

    What belongs to no later block's weights runs in this one, such as the sum of squares of the next layer's norm. It
    follows from the residual, which is handed on as well; held against its float value beside it, it would outweigh it
    by orders of magnitude.

    Args:
        block: the block.
        trained: positions of leaves.

    Returns:
        Positions in ``block.gives``, in order; all of them where no output depends on the weights.
    """
    touched, given, own = set(trained), set(block.gives), set()
    for item in block.items:
        if any(use.value in touched for use in item.uses):
            own.update(set(item.results) & given)
            touched.update(set(item.results) - given)
    return tuple(i for i, value in enumerate(block.gives) if value in own) or tuple(range(len(block.gives)))


def canonical_slice(plan: LeafPlan, value: Any) -> Any:
    """A slice of a leaf, its key axes kept with size 1, as [*stack, N, K]."""
    return canonical_matrix(jnp.asarray(value), plan.in_axes, plan.stack_axes)


def from_canonical(matrix: Any, plan: LeafPlan, shape: Sequence[int]) -> Any:
    """The inverse of `canonical_slice`, for a slice of this shape."""
    layout = weight_layout(len(shape), plan.in_axes, plan.stack_axes)
    order = [axis for kind in "soi" for axis in layout.axes(kind)]
    stored = matrix.reshape([shape[axis] for axis in order])
    return jnp.transpose(stored, [order.index(axis) for axis in range(len(shape))])


def with_weights(
    plan: LeafPlan, value: Any, index: int | None, weights: Mapping[Key, Any], shapes: Mapping[Key, Sequence[int]]
) -> Any:
    """A parameter as a block reads it, with other weights in the place of some of its slices.

    Args:
        plan: of the leaf.
        value: the leaf, or slice ``index`` of its leading axis.
        index: which slice, or None.
        weights: canonical matrices by key.
        shapes: of the slices, key axes kept with size 1.
    """
    for key, matrix in weights.items():
        slice_ = from_canonical(matrix, plan, shapes[key]).astype(value.dtype)
        if index is None:
            value = value.at[where(plan, key, value.ndim)].set(slice_) if key else slice_
            continue
        at = dict(zip(plan.key_axes, key, strict=True))
        if at.get(0, index) != index:
            continue
        part = slice_[0] if 0 in at else slice_[index]
        if set(at) <= {0}:
            value = part
        else:
            place = tuple(slice(at[a], at[a] + 1) if a in at else slice(None) for a in range(1, len(slice_.shape)))
            value = value.at[place].set(part)
    return value


def block_outputs(
    emit: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]],
    reads: Sequence[Any],
    plans: Mapping[int, LeafPlan],
    shapes: Mapping[Name, Sequence[int]],
    smooth: Mapping[Name, Any],
) -> Callable[[Mapping[Name, Any], Any], Sequence[Any]]:
    """The outputs of a block as a function of its weights and of the inputs of one batch.

    Args:
        emit: runs the block on what it reads and takes.
        reads: what it reads, as `Use`.
        plans: position -> plan.
        shapes: of the slices that are trained.
        smooth: factors [K] that slices were multiplied with, beside which they are stored.
    """

    def outputs(weights: Mapping[Name, Any], batch: tuple[Sequence[Any], Sequence[Any]]) -> Sequence[Any]:
        values, takes = batch
        own = []
        for use, value in zip(reads, values, strict=True):
            here = {
                name[1]: w / smooth[name] if name in smooth else w
                for name, w in weights.items()
                if name[0] == use.value
            }
            if here:
                sizes = {key: shapes[use.value, key] for key in here}
                value = with_weights(plans[use.value], value, use.index, here, sizes)
            own.append(value)
        return emit(own, takes)

    return outputs


def tune_block(
    job: BlockQuantizer, number: int, live: list[dict[int, Any]], targets: Sequence[Sequence[Any]]
) -> dict[Name, Any]:
    """Train the roundings of a block that are trained: what each found for its weights.

    Args:
        job: the job.
        number: of the block.
        live: what it takes, by batch.
        targets: what it gives in a model that is float throughout, by batch.
    """
    plans = job.plan.leaves
    found: dict[Name, Any] = {}
    for rounding, names in tuned_slices(plans, job.due[number]).items():
        if len(job.shaped) > 1:
            raise DataError(
                f"{rounding!r} trains on batches of one shape, and these have {len(job.shaped)}; give batches of one "
                "shape (on the command line --protocol B does)"
            )
        slices = {(p, key): job.float_slice(p, plans[p], key) for p, key in names}
        weights = {(p, key): canonical_slice(plans[p], value) for (p, key), value in slices.items()}
        shapes = {name: value.shape for name, value in slices.items()}
        formats = {(p, key): plans[p].slices[key].fmt for p, key in names}
        smooth = {name: jnp.asarray(job.smooth[name]) for name in names if name in job.smooth}
        weights |= {name: weights[name] * factors for name, factors in smooth.items()}
        shaped, _ = job.shaped_for(job.first)
        block = shaped.schedule.blocks[number]
        own = own_outputs(block, {p for p, _ in names})
        cache: dict[Any, Any] = {}

        def inputs_of(at: int, batch: Any, block: Block = block, cache: dict[Any, Any] = cache) -> Callable[[], Any]:
            def inputs() -> Any:
                return job.reads(block, job.shaped_for(batch)[1], cache), [live[at][v] for v in block.takes]

            return inputs

        def emit(
            values: Sequence[Any],
            takes: Sequence[Any],
            program: Program = shaped.program,
            block: Block = block,
            own: Sequence[int] = own,
        ) -> Sequence[Any]:
            outs = emit_block(Rewriter(program, {}, max_runs=1 << 30), block, values, takes)
            return [outs[i] for i in own]

        batches = [inputs_of(at, batch) for at, batch in enumerate(job.batches())]
        outputs = block_outputs(emit, block.reads, plans, shapes, smooth)
        wanted = [[target[i] for i in own] for target in targets]
        found |= rounding.tune(outputs, weights, formats, batches, wanted)
    return found
