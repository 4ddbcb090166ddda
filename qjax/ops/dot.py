"""q_dot: the product of activations and a packed weight, and the scales of dynamically quantized activations."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from qjax import _compat
from qjax.errors import LayoutError, warn
from qjax.formats import Aux, Format, Int, QArray
from qjax.formats.numerics import finite_part
from qjax.formats.rotation import check_prepared
from qjax.formats.tiles import Tiled
from qjax.kernels import Act, Lowering, Problem, select
from qjax.kernels.act.reference import by_magnitude, largest_magnitudes, row_scales
from qjax.kernels.devices import cuda_capability, platform_here
from qjax.kernels.dot.reference import CODES, dot_reference
from qjax.kernels.dot.terms import TERMS, dtype_of_sum, terms_after, with_terms
from qjax.kernels.order import SMALL_ELEMENTS
from qjax.kernels.registry import refusal
from qjax.ops.base import NO_AXIS, LinearOp, Operands, QuantizedOp, Spec, quantized_linear
from qjax.ops.partition import Roles, dot_roles


@dataclasses.dataclass(frozen=True)
class _Dot(QuantizedOp):
    """y[*stack, *rows, N] from x [*stack, *rows, K] and W [*stack, N, K]; transposed: K and N change places.

    Terms, which the transposed one has none of: bias [*stack, N] and residual [*stack, *rows, N].
    """

    transpose: bool = False

    @property
    def name(self) -> str:
        return "q_dot_transposed" if self.transpose else "q_dot"

    def roles(self, spec: Spec, operands: Operands, avals: Sequence[Any]) -> Roles | None:
        return None if self.transpose else dot_roles(operands, avals)

    def problem(self, spec: Spec, operands: Operands, platform: str, devices: int) -> Problem:
        x, w = operands.x, operands.w
        stacks = w.codes.ndim - 2
        rows = math.prod(x.shape[stacks:-1])
        return Problem(
            op="dot_transposed" if self.transpose else "dot",
            platform=platform,
            weight=w.fmt,
            act=spec.act,
            rows=rows if isinstance(rows, int) else None,
            n=w.codes.shape[-2],
            k=w.length,
            stack=tuple(w.codes.shape[:-2]),
            x_dtype=np.dtype(x.dtype),
            out_dtype=spec.out_dtype,
            devices=devices,
            settings=spec,
            capability=cuda_capability() if platform == "cuda" else None,
            terms=tuple(name for name in TERMS if name in operands.terms),
        )

    def chosen(self, problem: Problem, lowering: Lowering) -> None:
        if not self.transpose:
            warn_of_dequantized(problem, lowering)

    def out_shape(self, spec: Spec, operands: Operands) -> tuple[int, ...]:
        w = operands.w
        return (*operands.x.shape[:-1], w.length if self.transpose else w.codes.shape[-2])

    def reference(self, spec: Spec, operands: Operands) -> Array:
        problem = self.problem(spec, operands, "any", 1)
        return terms_after(dot_reference, problem, operands.x, operands.w, operands.act(spec), terms=operands.terms)

    def batch(
        self, op: LinearOp, spec: Spec, operands: Operands, dims: Operands, size: int
    ) -> tuple[Array, int] | None:
        weights = jax.tree.leaves(dims.w)
        stacks = operands.w.codes.ndim - 2 - len(operands.layer)
        if all(d is NO_AXIS for d in weights):  # one more dimension of rows; each example keeps its own scales
            if operands.terms and not _terms_fit(dims):
                return self._terms_apart(op, spec, operands, dims, size), stacks
            x = _with_axis(operands.x, dims.x, size, stacks)
            aux = jax.tree.map(lambda a, d: _with_axis(a, d, size, stacks, share=True), operands.aux, dims.aux)
            sharding = _sharding_with_axis(spec.out_sharding, stacks)
            spec = dataclasses.replace(spec, out_sharding=sharding)
            terms = dict(operands.terms)  # a bias is the same for all examples
            if "residual" in terms:
                terms["residual"] = _with_axis(terms["residual"], dims.terms["residual"], size, stacks)
            return op.bind(spec, dataclasses.replace(operands, x=x, aux=aux, terms=terms)), stacks
        front = lambda a, d: _with_axis(a, d, size, 0)  # noqa: E731
        batched = Operands(
            front(operands.x, dims.x),
            jax.tree.map(front, operands.aux, dims.aux),
            jax.tree.map(front, operands.w, dims.w),
            terms={name: front(a, dims.terms[name]) for name, a in operands.terms.items()},
        )
        spec = dataclasses.replace(spec, out_sharding=_sharding_with_axis(spec.out_sharding, 0))
        return op.bind(spec, batched), 0

    def _terms_apart(self, op: LinearOp, spec: Spec, operands: Operands, dims: Operands, size: int) -> Array:
        """The result for a batch of which one weight is multiplied: a product, and terms added to it.

        The batch is the first axis of the rows.
        """
        stacks = operands.w.codes.ndim - 2 - len(operands.layer)
        own = operands.without_terms()
        problem = self.problem(spec, operands.shapes(), "any", 1)
        wide = dataclasses.replace(spec, out_dtype=dtype_of_sum(problem))
        if all(d is NO_AXIS for d in jax.tree.leaves((dims.x, dims.aux))):
            total = jnp.expand_dims(op.bind(wide, own), stacks)
        else:
            batched = self.batch(op, wide, own, dataclasses.replace(dims, terms={}), size)
            assert batched is not None
            total = batched[0]
        place = functools.partial(_with_axis, size=size, place=stacks, share=True)
        return with_terms(total, {n: place(a, dims.terms[n]) for n, a in operands.terms.items()}, spec.out_dtype)

    def transposed(self, spec: Spec, operands: Operands, x_aval: Any) -> tuple[LinearOp, Spec] | None:
        other = q_dot_op if self.transpose else q_dot_transposed_op
        sharding = None if x_aval.sharding.mesh.empty else x_aval.sharding
        return other, dataclasses.replace(spec, out_dtype=np.dtype(x_aval.dtype), out_sharding=sharding)


def _terms_fit(dims: Operands) -> bool:
    """Whether terms of a batch over one weight are those of one product with more rows, and nothing is repeated."""
    core = any(d is not NO_AXIS for d in jax.tree.leaves((dims.x, dims.aux)))
    return core and dims.terms.get("bias", NO_AXIS) is NO_AXIS and dims.terms.get("residual", 0) is not NO_AXIS


q_dot_op = quantized_linear(_Dot())
q_dot_transposed_op = quantized_linear(_Dot(transpose=True))


def _with_axis(a: Any, dim: Any, size: int, place: int, share: bool = False) -> Any:
    """Move a batch axis to ``place``, or make one: broadcast, or of size 1 if it may be shared."""
    if dim is not NO_AXIS:
        return jnp.moveaxis(a, dim, place)
    a = jnp.expand_dims(a, place)
    return a if share else jnp.broadcast_to(a, (*a.shape[:place], size, *a.shape[place + 1 :]))


def _sharding_with_axis(sharding: Any, place: int) -> Any:
    """Insert an unsharded axis into the sharding of a result."""
    if sharding is None:
        return None
    spec = list(sharding.spec)
    spec.insert(place, None)
    return jax.NamedSharding(sharding.mesh, jax.P(*spec))


def q_dot(
    x: Array | QArray,
    w: QArray,
    *,
    act: Act | Format | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    out_dtype: DTypeLike | None = None,
    precision: Any = None,
    implementation: str | None = None,
    out_sharding: Any = None,
    streamed: bool = False,
    layer: Any = None,
    site: str = "",
) -> Array:
    """Multiply activations by a quantized weight: y[.., n] = sum over k of x[.., k] * W[n, k].

    Weight-only, the result is that of `jax.lax.dot_general` on the dequantized weight in the dtype of x, up to the
    order of summation. With ``act``, x is encoded first: integer codes on both sides become a real int8 x int8 ->
    int32 product, float8 codes a float8 product, both scaled in float32 afterwards; other pairs are dequantized.
    The derivative in x is that of the weight-only product (straight-through); float scales have theirs; residuals
    of a backward pass are the packed codes and, for derivatives of scales, x. A jaxpr shows one ``q_dot`` equation;
    `qjax.ops.remat_policy` makes policies that save dots treat it as one.

    Args:
        x: float [*stack, *rows, K]; stack as in w, any number of row axes. Or what `quantize_rows` made of it, in
            place of ``act``: then no derivative reaches the floats that it was made of.
        w: viewed canonically, [*stack, N, K].
        act: ``(format, aux)``; aux as calibration made it, [*stack, *rows or 1, groups]. Or a format alone: with scales
            as `activation_aux` fits them to x, which a kernel may do itself where there is one a row.
        bias: float [N] or [*stack, N], added in float32 before the result is rounded (`qjax.kernels.dot.terms`), in
            the kernel where it can.
        residual: float [*stack, *rows, N], likewise, after the bias.
        out_dtype: dtype of the result, by default that of x.
        precision: of float products, as in `jax.lax.dot_general`.
        implementation: name of a lowering (`qjax.ops.lowering_table`), or None to choose.
        out_sharding: as in `jax.lax.dot_general`, on explicit meshes.
        streamed: whether w is what a running loop slices from a stack of weights at its step.
        layer: int32 scalar: w is [layers, *stack, N, K], and the product is with ``w[layer]`` (clamped: the first for
            negative numbers), which the kernels for CPUs read where it lies. A slice would be copied.
        site: name for messages.

    Returns:
        [*stack, *rows, N].

    Raises:
        LayoutError: if x does not fit w, or bias or residual the result, with the shapes; or w is kept smoothed or
            rotated.
        LoweringError: if the named implementation cannot run, with the reason.
    """
    if isinstance(x, QArray):
        x, act = _with_codes(x, act, f"{site}: " if site else "")
    check_prepared(w, f"{site}: " if site else "")
    w = w if _is_canonical(w) else w.canonical()
    layers = layer_of(w, layer, 3, site or "q_dot")
    stacks = w.codes.ndim - 2 - len(layers)
    stack = w.codes.shape[len(layers) : len(layers) + stacks]
    at = f"{site}: " if site else ""
    if x.ndim < stacks + 1 or tuple(x.shape[:stacks]) != tuple(stack) or x.shape[-1] != w.length:
        raise LayoutError(
            f"{at}q_dot of activations {tuple(x.shape)} with a weight of stack {tuple(stack)}, "
            f"{w.codes.shape[-2]} outputs and {w.length} inputs; the activations have to be [*stack, *rows, inputs]"
        )
    fitted = False
    if isinstance(act, Format):
        fitted = by_magnitude(act) and act.per in ("token", "channel")
        act = (act, activation_aux(x, act, stack_ndim=stacks, streamed=streamed))
    spec = Spec(
        out_dtype=np.dtype(x.dtype if out_dtype is None else out_dtype),
        act=act[0] if act else None,
        precision=precision,
        implementation=implementation,
        out_sharding=out_sharding,
        streamed=streamed,
        fitted=fitted,
    )
    terms = _terms(bias, residual, tuple(stack), (*x.shape[:-1], w.codes.shape[-2]), at)
    operands = Operands(x, dict(act[1]) if act else {}, w, terms=terms, layer=layers)
    vector = x.ndim == stacks + 1
    if vector:
        if residual is not None:
            terms["residual"] = jnp.expand_dims(residual, stacks)
        operands = dataclasses.replace(operands, x=jnp.expand_dims(x, stacks))
    if implementation is not None or act is not None:
        _check_choice(q_dot_op.definition.problem(spec, operands.shapes(), platform_here(), 1), implementation, at)
    y = q_dot_op.bind(spec, operands)
    return lax.squeeze(y, (stacks,)) if vector else y


def layer_of(w: QArray, layer: Any, least: int, at: str) -> tuple[Any, ...]:
    """Return `Operands.layer` for the argument ``layer`` of an op, with which a weight has ``least`` axes or more.

    Raises:
        LayoutError: if the number is no scalar, or w has fewer.
    """
    layers = () if layer is None else (jnp.asarray(layer, jnp.int32),)
    if layers and (layers[0].ndim or w.codes.ndim < least):
        raise LayoutError(f"{at}: layer has to be a scalar, and w {w.shape} to have an axis of layers")
    return layers


def _terms(bias: Any, residual: Any, stack: tuple[int, ...], shape: tuple[int, ...], at: str) -> dict[str, Array]:
    """Return what is added to a product of this shape, a bias for each matrix of the stack."""
    terms = {}
    for name, a, fits in (("bias", bias, ((shape[-1],), (*stack, shape[-1]))), ("residual", residual, (shape,))):
        if a is None:
            continue
        if tuple(a.shape) not in fits or not jnp.issubdtype(a.dtype, jnp.floating):
            allowed = " or ".join(str(list(s)) for s in dict.fromkeys(fits))
            raise LayoutError(f"{at}q_dot with a {name} of {a.dtype} {list(a.shape)}; floats of {allowed} fit this one")
        terms[name] = a if name == "residual" or a.ndim > len(stack) else jnp.broadcast_to(a, (*stack, shape[-1]))
    return terms


def _with_codes(x: QArray, act: Act | Format | None, at: str) -> tuple[Array, Act]:
    """Return quantized activations as floats, which no product of codes reads, and their codes as part of their aux."""
    if act is not None:
        raise LayoutError(f"{at}q_dot of activations that are quantized already, to {x.fmt.name}; leave act out")
    if x.in_axes != (x.ndim - 1,) or x.layout.order != tuple(sorted(x.layout.order, key=lambda label: label[0] == "i")):
        raise LayoutError(
            f"{at}q_dot of activations quantized along axes {x.in_axes} of {x.shape}; it takes what quantize_rows "
            "returns, quantized along the last axis"
        )
    codes = x.fmt.packing.unpack(x.codes, x.length)
    return x.dequantize(), (x.fmt, {**x.aux, CODES: codes})


def _is_canonical(w: QArray) -> bool:
    layout = w.layout
    return (
        not layout.in_tail
        and len(layout.order) == w.codes.ndim
        and layout.order[-2:] == (("o", 0), ("i", 0))
        and all(label == ("s", k) for k, label in enumerate(layout.order[:-2]))
    )


_warned: set[tuple[str, str]] = set()


def _check_choice(problem: Problem, implementation: str | None, at: str) -> None:
    """Refuse a named implementation that cannot run now, and say once where quantized activations gain nothing."""
    lowering = select(problem, implementation)
    if implementation is not None or problem.act is None:
        return
    if isinstance(problem.weight, Tiled) and not problem.weight.for_codes:
        return _warn_once(
            at,
            "tiles",
            f"{problem} is computed in float: the weight is packed for the kernel of 16-bit activations; give "
            "qjax.ops.neutral(w), whose codes can be multiplied as integers",
        )
    kinds = [jnp.issubdtype(f.code_dtype, jnp.integer) for f in (problem.act, problem.weight)]
    same = kinds[0] == kinds[1] and problem.act.affine and (problem.weight.affine or problem.weight.int8_rows)
    if same and lowering.name in ("dequantize", "dequantize_blocks", "reference"):
        wanted = "int_dot" if kinds[0] else "float8_dot"
        _warn_once(at, wanted, f"{problem} is computed in float: {refusal(problem, wanted) or 'no kernel fits'}")


def warn_of_dequantized(problem: Problem, lowering: Lowering) -> None:
    """Say once, when a product is compiled for CUDA, why a packed weight is not read by its kernel."""
    if isinstance(problem.weight, Tiled) and problem.platform == "cuda" and lowering.name == "dequantize":
        if reason := refusal(problem, "mosaic"):
            about = f"{problem.op} {problem.weight}"
            _warn_once("", about, f"{problem}: the packed weight is dequantized, because {reason}")


def _warn_once(at: str, about: str, message: str) -> None:
    if (at, about) not in _warned:
        _warned.add((at, about))
        warn(f"{at}{message}")


def activation_aux(x: Array, fmt: Format, *, stack_ndim: int = 0, streamed: bool = False) -> Aux:
    """Fit the scales of activations to themselves: what ``dynamic`` means.

    Plain jnp under `stop_gradient`. A scale per tensor covers the logical tensor: under `vmap` each example has its
    own; on a mesh it is the maximum over all shards, inside shard_map too (a `pmax` over the axes over which x is
    known to vary, which needs ``check_vma=True``).

    NaN and infinity in a token make its scale infinite or NaN, and so its row of the product, as in the float product:
    nothing is hidden, and other tokens are left alone. A scale per tensor or group is taken over finite elements,
    because one padded row must not spoil the others; NaN then counts as 0 and infinity as the largest code.

    Args:
        x: float [*stack, *rows, K].
        fmt: the format; per "tensor" means all rows of one element of the stack.
        stack_ndim: how many leading axes are stack axes.
        streamed: whether this is inside a loop over layers, which XLA compiles once: the same numbers, by fewer loops.

    Returns:
        aux of the rank of x, [*stack, *rows or 1, groups or 1].
    """
    return _activation_aux(lax.stop_gradient(x), fmt, stack_ndim, streamed)


# One jitted function, because a model fits hundreds of activations of a few shapes: it is traced once for each.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _activation_aux(x: Array, fmt: Format, stack_ndim: int, streamed: bool) -> Aux:
    x = x.astype(jnp.float32)
    if x.size == 0:
        return fmt.fit(x)
    # Formats that are fitted to the largest magnitude alone need one reduction in place of two.
    if by_magnitude(fmt) and fmt.per in ("token", "channel"):
        short = streamed and isinstance(x.size, int) and x.size <= SMALL_ELEMENTS
        return {"scale": row_scales(x, fmt, _largest_in_rows if short else jnp.max)}
    if fmt.per in ("token", "channel") and isinstance(fmt, Int):
        low, high = (fmt.reduce(x, lambda a, f=f, **k: f(a, initial=0.0, **k)) for f in (jnp.min, jnp.max))
        aux = dict(fmt.from_range(low, high))
        good = lax.is_finite(largest_magnitudes(x, fmt))
        return {**aux, "scale": lax.select(good, aux["scale"], lax.full_like(aux["scale"], jnp.nan))}
    if fmt.per != "tensor":
        return fmt.fit(x)
    axes = tuple(range(stack_ndim, x.ndim))
    shards = _compat.varying_axes(x, jax.sharding.get_abstract_mesh().manual_axes)
    if by_magnitude(fmt):
        top = jnp.max(finite_part(jnp.abs(x)), axis=axes, keepdims=True)
        top = lax.pmax(top, shards) if shards else top
        return fmt.from_range(-top, top)
    low = jnp.min(finite_part(x), axis=axes, keepdims=True, initial=0.0)
    high = jnp.max(finite_part(x), axis=axes, keepdims=True, initial=0.0)
    if shards:
        low, high = lax.pmin(low, shards), lax.pmax(high, shards)
    return fmt.from_range(low, high)


def _largest_in_rows(x: Array, *, axis: int, keepdims: bool) -> Array:
    """Return `jnp.max` over the last axis, in two steps where XLA on CPU compiles them faster than one.

    Short rows would be unrolled whole, and longer ones cut in windows by three loops. Two reductions of at most 32
    elements are neither; the second is a minimum, because two of a kind are merged again. NaN stays NaN. It pays in a
    small program, such as a scan over layers; where layers are unrolled it was measured to cost more.
    """
    length = x.shape[-1]
    parts: list[int] = []
    if axis in (-1, x.ndim - 1) and jax.sharding.get_abstract_mesh().empty:
        parts = [d for d in range(2, 33) if length % d == 0 and 1 < length // d <= 32]
    if not parts:
        return jnp.max(x, axis=axis, keepdims=keepdims)
    part = min(parts, key=lambda d: abs(d - length // d))
    first = jnp.max(x.reshape(*x.shape[:-1], length // part, part), axis=-2)
    return -jnp.min(-first, axis=-1, keepdims=keepdims)
