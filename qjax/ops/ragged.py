"""q_ragged_dot: rows times the packed matrix of their group, as a mixture of experts computes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from qjax.errors import LayoutError
from qjax.formats import QArray
from qjax.formats.rotation import check_prepared
from qjax.kernels import Act, Lowering, Problem, select
from qjax.kernels.devices import cuda_capability, platform_here
from qjax.kernels.ragged_dot.reference import ragged_dot_reference
from qjax.ops.base import LinearOp, Operands, QuantizedOp, Spec, quantized_linear
from qjax.ops.dot import layer_of, warn_of_dequantized
from qjax.ops.partition import Roles, arrays_of, largest, units_of


@dataclasses.dataclass(frozen=True)
class _RaggedDot(QuantizedOp):
    name = "q_ragged_dot"

    def problem(self, spec: Spec, operands: Operands, platform: str, devices: int) -> Problem:
        x, w = operands.x, operands.w
        return Problem(
            op="ragged_dot",
            platform=platform,
            weight=w.fmt,
            act=spec.act,
            rows=x.shape[0],
            n=w.codes.shape[-2],
            k=w.length,
            stack=tuple(w.codes.shape[:-2]),
            x_dtype=np.dtype(x.dtype),
            out_dtype=spec.out_dtype,
            devices=devices,
            settings=spec,
            capability=cuda_capability() if platform == "cuda" else None,
        )

    def roles(self, spec: Spec, operands: Operands, avals: Sequence[Any]) -> Roles:
        return _roles(operands, avals)

    def on_device(self, op: LinearOp, spec: Any, operands: Operands, axes: Mapping[str, tuple[str, ...]]) -> Array:
        return _on_device(op, spec, operands, axes)

    def chosen(self, problem: Problem, lowering: Lowering) -> None:
        warn_of_dequantized(problem, lowering)

    def out_shape(self, spec: Spec, operands: Operands) -> tuple[int, ...]:
        return (operands.x.shape[0], operands.w.codes.shape[-2])

    def reference(self, spec: Spec, operands: Operands) -> Array:
        problem = self.problem(spec, operands, "any", 1)
        return ragged_dot_reference(problem, operands.x, operands.w, operands.act(spec), *operands.extra)


def _roles(operands: Operands, avals: Sequence[Any]) -> Roles:
    """Name the dimensions of x [M, K], W [G, N, K], sizes [G] -> y [M, N]; all devices have all sizes."""
    tokens, experts = operands.x.shape[0], operands.w.codes.shape[0]
    activations, own = arrays_of(operands, avals)
    sizes = {**units_of(operands, avals), "m": tokens, "g": experts}

    def named(names: Sequence[str], shape: Sequence[int]) -> tuple[str, ...]:
        return tuple(r if d > 1 and sizes[r] > 1 else "" for r, d in zip(names, shape, strict=True))

    of_x = [named(("m", "k"), a.shape) for a in activations]
    of_w = [named(("g", "n", "k"), a.shape) for a in own]
    result = named(("m", "n"), (tokens, operands.w.codes.shape[-2]))
    weight = len(activations) + largest(own)
    # A device has the tokens of its experts, and zeros for others: added exactly. Terms of k are rounded.
    return Roles((*of_x, *of_w, ("",)), result, sizes, weight, summed=("k", "g"), of_weight=("g", "n", "k"))


def _on_device(op: LinearOp, spec: Any, operands: Operands, axes: Mapping[str, tuple[str, ...]]) -> Array:
    """The product of a device's tokens with its experts, by the part of the sizes that both have in common.

    ``operands.extra`` has the sizes of all groups. The tokens of a device's experts stand together; they are rolled to
    the front, where a ragged product begins, and their results back. Rows of other devices' experts are 0.
    """
    if not (axes.get("m") or axes.get("g")):
        return op.bind(spec, operands)
    (sizes,) = operands.extra
    here, experts = operands.x.shape[0], operands.w.codes.shape[0]
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    starts = ends - sizes.astype(jnp.int32)
    if axes.get("g"):
        first = lax.axis_index(axes["g"]) * experts
        ends, starts = (lax.dynamic_slice_in_dim(a, first, experts) for a in (ends, starts))
    if axes.get("m"):
        before = lax.axis_index(axes["m"]) * here
        ends, starts = (jnp.clip(a - before, 0, here) for a in (ends, starts))
    own = dataclasses.replace(operands, extra=((ends - starts).astype(sizes.dtype),))
    if not axes.get("g"):
        return op.bind(spec, own)
    shift = starts[0]
    front = lambda a: jnp.roll(a, -shift, axis=0) if a.shape[0] == here else a  # noqa: E731
    own = dataclasses.replace(own, x=front(own.x), aux=jax.tree.map(front, own.aux))
    return jnp.roll(op.bind(spec, own), shift, axis=0)


q_ragged_dot_op = quantized_linear(_RaggedDot())


def q_ragged_dot(
    x: Array,
    w: QArray,
    group_sizes: Array,
    *,
    act: Act | None = None,
    out_dtype: DTypeLike | None = None,
    precision: Any = None,
    implementation: str | None = None,
    layer: Any = None,
    site: str = "",
) -> Array:
    """Multiply rows by the quantized matrix of their group: `jax.lax.ragged_dot` with a packed right-hand side.

    Args:
        x: float [M, K], rows sorted by group.
        w: [G, K, N] or any view of it with one stack axis of size G, canonically [G, N, K].
        group_sizes: integers [G]; rows behind their sum give 0.
        act: ``(format, aux)`` as in `qjax.ops.q_dot`.
        out_dtype: dtype of the result, by default that of x.
        precision: of float products.
        implementation: name of a lowering, or None to choose.
        layer: int32 scalar: w has an axis of layers in front, of which ``w[layer]`` is meant, as in `qjax.ops.q_dot`.
        site: name for messages.

    Returns:
        [M, N]. Derivatives as in `qjax.ops.q_dot`; `vmap` computes one example after the other.

    Raises:
        LayoutError: if x, w and group_sizes do not fit together; or w is kept smoothed or rotated.
        LoweringError: if the named implementation cannot run.
    """
    check_prepared(w, f"{site}: " if site else "")
    w = w.canonical()
    layers = layer_of(w, layer, 4, site or "q_ragged_dot")
    groups = w.codes.shape[len(layers) : -2]
    if x.ndim != 2 or len(groups) != 1 or x.shape[1] != w.length or group_sizes.shape != groups:
        raise LayoutError(
            f"{site}{': ' if site else ''}q_ragged_dot of activations {tuple(x.shape)} with a weight of stack "
            f"{tuple(groups)}, {w.codes.shape[-2]} outputs and {w.length} inputs, and group sizes "
            f"{tuple(group_sizes.shape)}; they have to be [rows, inputs], one stack axis [G], and [G]"
        )
    spec = Spec(
        out_dtype=np.dtype(x.dtype if out_dtype is None else out_dtype),
        act=act[0] if act else None,
        precision=precision,
        implementation=implementation,
    )
    operands = Operands(x, dict(act[1]) if act else {}, w, (group_sizes,), layer=layers)
    if implementation is not None:
        select(q_ragged_dot_op.definition.problem(spec, operands.shapes(), platform_here(), 1), implementation)
    return q_ragged_dot_op.bind(spec, operands)
