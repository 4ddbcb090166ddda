"""A slice of a `QStack` whose position only the run knows, and the views that arrays and quantized values share.

The layers of one scan may have different formats. Where their runs are too many to split the scan, or a loop counter
picks the layer, the environment holds a `Selected`: all parts, and the traced index. A product emits one branch per
part under a switch; anything else gets the dequantized slice, chosen the same way.

Where a kernel can read one of a stack of weights where it lies, a loop does not slice it, which would copy a layer at
each step: the environment holds a `Layer`, the whole stack and the traced index.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax._compat import open_jaxpr, sub_jaxprs
from qjax.formats import Layout, QArray, QStack, is_quantized


class Selected:
    """The slice of ``stack`` at the traced ``index``, with views still to be applied to it.

    Args:
        stack: the layers, in parts of one format each.
        index: int32 scalar, position along ``stack.axis``.
        views: functions to apply to the chosen slice, in order.
    """

    def __init__(self, stack: QStack, index: Any, views: tuple[Callable[[Any], Any], ...] = ()):
        self.stack, self.index, self.views = stack, index, views
        aval = jax.eval_shape(lambda s: dense(self.apply(slice_of(s.parts[0], s.axis, 0))), stack)
        self.shape, self.dtype, self.ndim = aval.shape, aval.dtype, len(aval.shape)

    @property
    def n_parts(self) -> int:
        """How many formats there are to choose from."""
        return len(self.stack.parts)

    def which(self) -> tuple[Any, Any]:
        """(part, position within the part) for the running index."""
        parts = jnp.asarray([p for p, _ in self.stack.assign], jnp.int32)
        positions = jnp.asarray([i for _, i in self.stack.assign], jnp.int32)
        index = jnp.clip(self.index, 0, len(self.stack.assign) - 1)
        return parts[index], positions[index]

    def part(self, part: int, position: Any) -> Any:
        """The slice if it lies in ``part``."""
        return self.apply(slice_of(self.stack.parts[part], self.stack.axis, position))

    def apply(self, value: Any) -> Any:
        """Apply the waiting views."""
        for view in self.views:
            value = view(value)
        return value

    def map(self, view: Callable[[Any], Any]) -> Selected:
        """Add a view."""
        return Selected(self.stack, self.index, (*self.views, view))

    def dequantize(self) -> jax.Array:
        """The float slice, chosen by a switch."""
        which, position = self.which()
        branches = [lambda i, p=p: dense(self.part(p, i)) for p in range(self.n_parts)]
        return lax.switch(which, branches, position)


FREE = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim", "jit", "pjit")
"""Primitives that move no numbers, as long as none is repeated."""


class Layer(Selected):
    """A slice of the leading stack axis of one quantized weight at the traced ``index``, not cut out yet.

    Args:
        stack: the weight, whose leading axis is the leading one of its children.
        index: int32 scalar.
        views: as for `Selected`.
    """

    def __init__(self, stack: QArray, index: Any, views: tuple[Callable[[Any], Any], ...] = ()):
        self.weight, self.index, self.views = stack, index, views
        aval = jax.eval_shape(lambda s: dense(self.apply(s.index_stack(0, 0))), stack)
        self.shape, self.dtype, self.ndim = aval.shape, aval.dtype, len(aval.shape)

    def map(self, view: Callable[[Any], Any]) -> Layer:
        """Add a view."""
        return Layer(self.weight, self.index, (*self.views, view))

    def cut(self) -> Any:
        """The slice, as a quantized weight of its own."""
        return self.apply(self.weight.index_stack(0, self.index))

    def dequantize(self) -> jax.Array:
        """The float slice."""
        return dense(self.cut())

    def whole(self, view: Callable[[QArray], QArray]) -> QArray | None:
        """All slices under the views and one more, whose result is canonical: [layers, *stack, N, K].

        None where this would move codes, and not only count them otherwise.
        """
        children = (self.weight.codes, self.weight.aux)
        one = dataclasses.replace(self.weight, layout=self.weight.view.without(0))
        if len({a.shape[0] for a in jax.tree.leaves(children)}) > 1:
            return None

        def seen(codes: Any, aux: Any) -> QArray:
            return view(self.apply(dataclasses.replace(one, codes=codes, aux=aux)))

        if not _is_free(jax.make_jaxpr(jax.vmap(seen))(*children)):
            return None
        found = jax.vmap(seen)(*children)
        stacks = found.codes.ndim - 2
        layout = Layout((*(("s", k) for k in range(stacks)), ("o", 0), ("i", 0)), (), found.layout.pad)
        return dataclasses.replace(found, layout=layout)


def _is_free(jaxpr: Any) -> bool:
    return all(
        eqn.primitive.name in FREE
        and (eqn.primitive.name != "broadcast_in_dim" or eqn.outvars[0].aval.size == eqn.invars[0].aval.size)
        and all(_is_free(inner) for _, inner in sub_jaxprs(eqn.params))
        for eqn in open_jaxpr(jaxpr).eqns
    )


def cut(value: Any) -> Any:
    """A `Layer` as the quantized weight that it is; anything else as it is."""
    return value.cut() if isinstance(value, Layer) else value


def dense(value: Any) -> Any:
    """The float array behind a quantized value; arrays as they are."""
    return value.dequantize() if isinstance(value, Selected) or is_quantized(value) else value


def slice_of(value: Any, axis: int, index: Any) -> Any:
    """One slice of an axis, which goes away; ``index`` is static or traced."""
    if is_quantized(value):
        return value.index_stack(axis, index)
    if isinstance(index, int):
        return lax.index_in_dim(value, index, axis, keepdims=False)
    return lax.dynamic_index_in_dim(value, index, axis, keepdims=False)


def slice_axis(value: Any, axis: int, start: int, limit: int) -> Any:
    """A static range of an axis."""
    if isinstance(value, Selected):
        return value.map(lambda v: slice_axis(v, axis, start, limit))
    if isinstance(value, QStack):
        if axis != value.axis or limit != start + 1:
            return _no_stack_view("ranges")
        return expand_dims(slice_of(value, axis, start), (axis,))
    if isinstance(value, QArray):
        return value.slice_axis(axis, start, limit)
    return lax.slice_in_dim(value, start, limit, axis=axis)


def transpose(value: Any, permutation: tuple[int, ...]) -> Any:
    """Permute the axes."""
    if isinstance(value, Selected):
        return value.map(lambda v: transpose(v, permutation))
    if isinstance(value, QStack):
        parts = tuple(transpose(p, permutation) for p in value.parts)
        return QStack(parts, permutation.index(value.axis), value.assign)
    return value.transpose(permutation) if isinstance(value, QArray) else lax.transpose(value, permutation)


def reshape(value: Any, shape: tuple[int, ...]) -> Any:
    """Reshape."""
    if isinstance(value, Selected):
        return value.map(lambda v: reshape(v, shape))
    if isinstance(value, QStack):
        return _no_stack_view("reshapes")
    return value.reshape(shape)


def astype(value: Any, dtype: Any) -> Any:
    """Change the logical float dtype."""
    return value.map(lambda v: v.astype(dtype)) if isinstance(value, Selected) else value.astype(dtype)


def expand_dims(value: Any, axes: tuple[int, ...]) -> Any:
    """Insert unit axes at the positions ``axes`` of the result."""
    if isinstance(value, Selected):
        return value.map(lambda v: expand_dims(v, axes))
    if isinstance(value, QStack):
        return _no_stack_view("new axes")
    return value.expand_dims(axes) if isinstance(value, QArray) else jnp.expand_dims(value, axes)


def squeeze(value: Any, axes: tuple[int, ...]) -> Any:
    """Drop unit axes; a stack of one gives its only slice."""
    if isinstance(value, Selected):
        return value.map(lambda v: squeeze(v, axes))
    if not is_quantized(value):
        return lax.squeeze(value, axes)
    for axis in sorted((a % value.ndim for a in axes), reverse=True):
        value = slice_of(value, axis, 0) if is_stack_axis(value, axis) else _squeeze_one(value, axis)
    return value


def _squeeze_one(value: Any, axis: int) -> Any:
    return value.squeeze((axis,)) if isinstance(value, QArray) else _no_stack_view("squeezes")


def is_stack_axis(value: Any, axis: int) -> bool:
    """Whether ``axis`` of a quantized value counts stacked matrices."""
    if isinstance(value, QStack):
        return axis == value.axis
    return isinstance(value, QArray) and axis in value.stack_axes


def _no_stack_view(what: str) -> Any:
    from qjax.errors import LayoutError

    raise LayoutError(f"a stack with several formats has no {what}")
