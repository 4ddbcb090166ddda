"""QArray: a weight as packed codes, with the shape, dtype and slicing of the array it stands for."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from qjax.errors import FormatError, LayoutError
from qjax.formats.base import Aux, Format
from qjax.formats.layout import Layout, in_sizes, weight_layout
from qjax.formats.numerics import AnyArray
from qjax.formats.packing import row_pad
from qjax.formats.registry import format_from_dict
from qjax.formats.rotation import restored


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("codes", "aux"), meta_fields=("fmt", "layout", "dtype")
)
@dataclasses.dataclass(frozen=True, eq=False)
class QArray:
    """A quantized array.

    Attributes:
        codes: [*stack, *out, 1.., K] of ``fmt.code_dtype`` for 8-bit codes, else the uint8 bit stream
            [*stack, *out, 1.., bytes] of `qjax.formats.packing`. In axes are flattened into the last, with a size-1
            axis for each further one.
        aux: what ``fmt.fit`` returned, each array of the rank of codes: [*stack, *out or 1, 1.., groups].
        fmt: the number format.
        layout: how the user's dimensions map to the stored ones.
        dtype: the float dtype that the array stands for.

    Nothing that slicing, vmap or sharding can change is static: the shape follows from the arrays. As a pytree its
    leaves may be anything (tracers, shapes, PartitionSpecs); nothing looks at them before a method is called.
    """

    codes: Any  # arrays, or what stands for them in a tree: shapes, specs, placeholders
    aux: Any
    fmt: Format
    layout: Layout
    dtype: np.dtype

    # What it is.

    @property
    def view(self) -> Layout:
        """The layout with the stack axes that are there now."""
        return self.layout.present(self.codes.ndim)

    @property
    def length(self) -> int:
        """K, the elements of one row: the product of the in axes."""
        return self.fmt.packing.capacity(self.codes.shape[-1]) - self.layout.pad

    @property
    def shape(self) -> tuple[int, ...]:
        """The user's shape."""
        view, stored = self.view, self.codes.shape
        sizes = {"s": stored, "o": stored[self.stack_ndim :], "i": in_sizes(view, self.length), "u": (1,)}
        return tuple(sizes[kind][k] for kind, k in view.order)

    @property
    def ndim(self) -> int:
        """Number of the user's dimensions."""
        return len(self.view.order)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stack_ndim(self) -> int:
        """Number of stack axes there now."""
        return self.codes.ndim - self.layout.count("o") - self.layout.count("i")

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The user's axes that are stack axes, outermost first."""
        return self.view.axes("s")

    @property
    def out_axes(self) -> tuple[int, ...]:
        """The user's axes that are out axes, in storage order."""
        return self.view.axes("o")

    @property
    def in_axes(self) -> tuple[int, ...]:
        """The user's axes that are in axes, in flattened order."""
        return self.view.axes("i")

    @property
    def nbytes(self) -> int:
        """Bytes as stored: packed codes and every aux array."""
        return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in (self.codes, *self.aux.values()))

    @property
    def bits_per_element(self) -> float:
        """8 * nbytes / size; 0 for an empty array."""
        return 8 * self.nbytes / self.size if self.size else 0.0

    def __len__(self) -> int:
        """Size of the leading axis."""
        if not self.ndim:
            raise TypeError("len() of a quantized array without dimensions")
        return self.shape[0]

    def __repr__(self) -> str:
        """Show shape and format, or the children where they are no arrays."""
        if not hasattr(self.codes, "shape") or not isinstance(self.aux, Mapping):
            return f"QArray(codes={self.codes!r}, aux={self.aux!r}, fmt={self.fmt.name})"
        try:
            shape = self.shape
        except LayoutError:
            shape = f"codes {self.codes.shape}"
        return f"QArray({shape}, {self.dtype.name}, {self.fmt.name})"

    # What it stands for.

    def unpacked(self) -> Array:
        """Return the codes of the canonical view: ``fmt.code_dtype`` [*stack, N, K]."""
        return self.fmt.packing.unpack(self.canonical().codes, self.length)

    def decode_canonical(self) -> Array:
        """Return the numbers of the canonical view: float32 [*stack, N, K]."""
        return _decode_canonical(self)

    def dequantize(self, dtype: DTypeLike | None = None) -> Array:
        """Return the array in the user's layout, in ``dtype`` (by default the dtype that it stands for)."""
        return _dequantize(self, np.dtype(self.dtype if dtype is None else dtype))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """Dequantize for NumPy, which would otherwise take the array for a sequence of its slices."""
        return np.asarray(self.dequantize(), dtype=dtype)

    def astype(self, dtype: DTypeLike) -> Self:
        """Return the same codes and scales standing for another float dtype."""
        dtype = np.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise FormatError(
                f"a quantized array stands for floats; astype({dtype.name}) is not possible, dequantize first"
            )
        return dataclasses.replace(self, dtype=dtype)

    # Views: exact on codes, or LayoutError. See qjax.formats.views.

    def canonical(self) -> QArray:
        """Return the view [*stack, N, K] with one out axis and one in axis."""
        return views.canonical(self)

    def index_stack(self, axis: int, i: int | Array) -> QArray:
        """Return slice i (static or traced) of a stack axis, which is dropped."""
        return views.index_stack(self, axis, i)

    def slice_stack(self, axis: int, start: int | Array, size: int) -> QArray:
        """Return ``size`` slices of a stack axis from ``start`` (static or traced)."""
        return views.slice_stack(self, axis, start, size)

    def slice_axis(self, axis: int, start: int, limit: int) -> QArray:
        """Return elements start .. limit-1 of an axis; in axes only on whole bytes and groups."""
        return views.slice_axis(self, axis, start, limit)

    def __getitem__(self, item: Any) -> QArray:
        """Index or slice the leading axis, which has to be a stack or an out axis."""
        return views.getitem(self, item)

    def take(self, axis: int, indices: ArrayLike, mode: str = "clip") -> QArray:
        """Gather along a stack or out axis, which is replaced by the dimensions of ``indices``."""
        return views.take(self, axis, jnp.asarray(indices), mode)

    def transpose(self, *perm: Any) -> QArray:
        """Permute the dimensions: ``transpose()``, ``transpose(1, 0)`` or ``transpose((1, 0))``."""
        if len(perm) == 1 and not isinstance(perm[0], int):
            perm = tuple(perm[0]) if perm[0] is not None else ()
        return views.transpose(self, perm or None)

    @property
    def T(self) -> QArray:  # noqa: N802 (the name that arrays use)
        """The dimensions in reverse."""
        return views.transpose(self, None)

    def reshape(self, *shape: Any) -> QArray:
        """Merge or split axes of one kind; see `qjax.formats.views.reshape`."""
        if len(shape) == 1 and not isinstance(shape[0], int):
            shape = tuple(shape[0])
        return views.reshape(self, shape)

    def expand_dims(self, axis: int | Sequence[int]) -> QArray:
        """Insert dimensions of size 1."""
        return views.expand_dims(self, axis)

    def squeeze(self, axis: int | Sequence[int] | None = None) -> QArray:
        """Remove dimensions of size 1."""
        return views.squeeze(self, axis)

    # On disk.

    def spec(self) -> dict[str, Any]:
        """Return the static part as JSON-able data: format, layout, dtype."""
        return {"format": self.fmt.to_dict(), "layout": self.layout.to_dict(), "dtype": np.dtype(self.dtype).name}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], codes: Any, aux: Mapping[str, Any]) -> Self:
        """Rebuild from `spec` and the stored arrays (or placeholders)."""
        layout = Layout.from_dict(spec["layout"])
        return cls(codes, dict(aux), format_from_dict(spec["format"]), layout, jnp.dtype(spec["dtype"]))


from qjax.formats import views  # noqa: E402 (its functions take QArrays, and are the bodies of methods above)


@jax.jit
def _decode_canonical(q: QArray) -> Array:
    c = q.canonical()
    return restored(q.fmt.decode(c.unpacked(), c.aux).astype(jnp.float32), c.aux)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(q: QArray, dtype: np.dtype) -> Array:
    view, stacks = q.view, q.stack_ndim
    outs = q.codes.shape[stacks : stacks + view.count("o")]
    x = _decode_canonical(q).reshape(*q.codes.shape[:stacks], *outs, *in_sizes(view, q.length))
    base = {"s": 0, "o": stacks, "i": stacks + len(outs)}
    x = x.transpose([base[kind] + k for kind, k in view.order if kind != "u"])
    return x.reshape(q.shape).astype(dtype)


def canonical_matrix(w: Array, in_axes: int | Sequence[int], stack_axes: int | Sequence[int] = ()) -> Array:
    """Return a weight in the canonical order [*stack, N, K], in its own dtype.

    Args:
        w: the weight, of any rank.
        in_axes: axes that a product sums over, in the order in which they are flattened into K.
        stack_axes: stack axes, outermost first. The rest are out axes, flattened into N (1 if there are none).
    """
    layout = weight_layout(w.ndim, in_axes, stack_axes)
    stacks, outs, ins = (layout.axes(kind) for kind in "soi")
    rows, length = math.prod(w.shape[a] for a in outs), math.prod(w.shape[a] for a in ins)
    return jnp.transpose(w, stacks + outs + ins).reshape(*(w.shape[a] for a in stacks), rows, length)


def assemble(
    codes: Array,
    aux: Aux,
    fmt: Format,
    *,
    shape: Sequence[int],
    in_axes: int | Sequence[int],
    stack_axes: int | Sequence[int] = (),
    dtype: DTypeLike = jnp.float32,
) -> QArray:
    """Make a QArray from canonical codes, packing them.

    Args:
        codes: ``fmt.code_dtype`` [*stack, N, K], as ``fmt.encode`` or a rounding returns them.
        aux: as ``fmt.fit`` or a rounding returns it.
        fmt: the format.
        shape: shape of the weight that they stand for.
        in_axes: its in axes.
        stack_axes: its stack axes.
        dtype: its dtype.
    """
    layout = weight_layout(len(shape), in_axes, stack_axes)
    stacks, outs, ins = (tuple(shape[a] for a in layout.axes(kind)) for kind in "soi")
    rows, length = math.prod(outs), math.prod(ins)
    if 0 in ins[1:]:
        raise LayoutError(
            f"a weight of shape {tuple(shape)} is empty along an in axis after the first; it cannot be stored"
        )
    if tuple(codes.shape) != (*stacks, rows, length):
        raise LayoutError(
            f"codes of shape {codes.shape} do not fit a weight of shape {tuple(shape)}: {(*stacks, rows, length)}"
        )
    stored = fmt.packing.pack(codes)

    def place(name: str, a: AnyArray) -> AnyArray:
        if a.ndim != codes.ndim or a.shape[: len(stacks)] != stacks or a.shape[-2] not in (1, rows):
            raise FormatError(
                f"{fmt.name}: aux {name!r} has shape {a.shape}; it has to be [*{stacks}, 1 or {rows}, blocks]"
            )
        own = outs if a.shape[-2] == rows else (1,) * len(outs)
        return a.reshape(*stacks, *own, *(1,) * (len(ins) - 1), a.shape[-1])

    layout = dataclasses.replace(layout, in_tail=ins[1:], pad=row_pad(fmt.packing, length))
    stored = stored.reshape(*stacks, *outs, *(1,) * (len(ins) - 1), stored.shape[-1])
    return QArray(stored, {k: place(k, a) for k, a in aux.items()}, fmt, layout, jnp.dtype(dtype))


def quantize_array(
    w: ArrayLike,
    fmt: Format,
    *,
    in_axes: int | Sequence[int],
    stack_axes: int | Sequence[int] = (),
    aux: Aux | None = None,
    weight: ArrayLike | None = None,
) -> QArray:
    """Quantize a weight by rounding to nearest.

    Args:
        w: float array of any rank; computed in float32, whatever its dtype, which is remembered.
        fmt: the number format.
        in_axes: the axes that a product sums over, in the order in which they are flattened.
        stack_axes: axes of independent matrices (layers, experts), outermost first.
        aux: scales that are already known, canonical as ``fmt.fit`` returns them; None fits them to w.
        weight: importance per element, broadcastable to w, handed to ``fmt.fit``.

    Returns:
        A QArray of the shape of w. Runs jitted; works traced and under vmap.

    Raises:
        FormatError: if w is not of a float dtype, or the group does not fit.
        LayoutError: if the axes contradict each other.
    """
    w = jnp.asarray(w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise FormatError(f"only float arrays are quantized; this one is {w.dtype.name} {w.shape}")
    ins, stacks = _axes(in_axes), _axes(stack_axes)
    # The transpose is a step of its own: fused into the reductions and the rounding that follow, XLA on CPU would
    # read the weight across its rows several times over, which takes three times as long.
    x = _canonical_matrix(w, ins, stacks)
    if weight is not None:
        weight = _canonical_matrix(jnp.broadcast_to(jnp.asarray(weight), w.shape), ins, stacks)
    return _quantize(x, aux, weight, fmt, w.shape, ins, stacks)


def _axes(axes: int | Sequence[int]) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(int(a) for a in axes)


_canonical_matrix = jax.jit(canonical_matrix, static_argnums=(1, 2))


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _quantize(
    x: Array,  # [*stack, N, K]
    aux: Aux | None,
    weight: Array | None,  # [*stack, N, K]
    fmt: Format,
    shape: tuple[int, ...],
    in_axes: tuple[int, ...],
    stack_axes: tuple[int, ...],
) -> QArray:
    dtype, x = x.dtype, x.astype(jnp.float32)
    if aux is None:
        aux = fmt.fit(x, None if weight is None else weight.astype(jnp.float32))
    return assemble(fmt.encode(x, aux), aux, fmt, shape=shape, in_axes=in_axes, stack_axes=stack_axes, dtype=dtype)
