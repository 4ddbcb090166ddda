"""Everything that differs between jax 0.10.2 and 0.12, in one place.

The rest of qjax reads jaxprs only through these helpers, so that one source serves all versions
(jax 0.11 merged ``ClosedJaxpr`` into ``Jaxpr`` and turned scan's ``num_consts``/``num_carry`` into trees).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.core import eval_jaxpr as eval_jaxpr
from jax.extend import core as jex
from jax.interpreters import ad

from qjax.lazy import Lazy

JAX_VERSION: tuple[int, int] = tuple(int(p) for p in jax.__version__.split(".")[:2])  # type: ignore[assignment]
"""(major, minor) of the installed jax."""


def open_jaxpr(jaxpr: Any) -> Any:
    """Return the open ``Jaxpr`` of a ``ClosedJaxpr`` (or the jaxpr itself)."""
    return jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr


def consts_of(jaxpr: Any) -> list[Any]:
    """Return the constants a closed jaxpr carries (empty for an open one)."""
    return list(jaxpr.consts) if hasattr(jaxpr, "consts") else []


def constvars_and_invars(jaxpr: Any) -> list[Any]:
    """Return the variables that ``consts_of(jaxpr) + arguments`` bind, in that order."""
    inner = open_jaxpr(jaxpr)
    constvars = list(inner.constvars)
    invars = list(inner.invars)
    if constvars and invars[: len(constvars)] == constvars:  # jax 0.12: constvars are the first invars
        return invars
    return constvars + invars


def scan_arity(params: dict[str, Any]) -> tuple[int, int]:
    """Return ``(number of consts, number of carries)`` of a scan equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def sub_jaxprs(params: dict[str, Any]) -> list[tuple[tuple[str, int], Any]]:
    """Return ``[((parameter name, index), jaxpr)]`` for every jaxpr among an equation's parameters."""
    out = []
    for key, value in params.items():
        for i, item in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
            if isinstance(item, (jex.Jaxpr, jex.ClosedJaxpr)):
                out.append(((key, i), item))
    return out


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Re-bind an equation unchanged on new operand values; always returns a list of outputs."""
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def varying_axes(x: Any, axes: Sequence[str]) -> tuple[str, ...]:
    """Return those of the manual mesh ``axes`` over which ``x`` varies inside shard_map."""
    varying = jax.typeof(x).mat.varying
    return tuple(a for a in axes if a in varying)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Hold Python's cyclic garbage collector while many small objects are made that all live to the end.

    Analysing a program of some thousand equations makes some ten thousand objects, and each collection that they
    trigger walks everything else jax keeps alive: measured on 32 layers, it is half the time of a trace.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Return the abstract float array that ``x`` is to a trace: shape, dtype, explicit sharding, varying axes.

    Works on arrays, tracers, `jax.ShapeDtypeStruct` and quantized leaves (whose children say over which manual mesh
    axes they vary).
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if isinstance(x, Lazy):
        return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
    kwargs: dict[str, Any] = {}
    avals = [jax.typeof(c) for c in jax.tree.leaves(x) if not isinstance(c, jax.ShapeDtypeStruct)]
    varying = frozenset(a for aval in avals for a in aval.mat.varying)
    if varying:
        kwargs["manual_axis_type"] = jax.sharding.ManualAxisType(varying=varying)
        mesh = next(a.sharding.mesh for a in avals if a.mat.varying)
        kwargs["sharding"] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    if len(avals) == 1 and avals[0].shape == x.shape:
        sharding = getattr(avals[0], "sharding", None)
        if sharding is not None and _has_explicit_axes(sharding):
            kwargs["sharding"] = sharding
        if getattr(avals[0], "weak_type", False):
            kwargs["weak_type"] = True
    codes = getattr(x, "codes", None)
    if codes is not None and not varying and not isinstance(codes, jax.ShapeDtypeStruct):
        sharding = getattr(jax.typeof(codes), "sharding", None)
        if sharding is not None and _has_explicit_axes(sharding):  # codes are [*stack, *out, 1.., in]
            by_axis = dict(zip((*x.stack_axes, *x.out_axes), sharding.spec, strict=False))
            by_axis |= {axis: sharding.spec[-1] for axis in x.in_axes[:1]}
            spec = jax.sharding.PartitionSpec(*(by_axis.get(axis) for axis in range(x.ndim)))
            kwargs["sharding"] = jax.sharding.NamedSharding(sharding.mesh, spec)
    dtype = x.dtype if jax.numpy.issubdtype(x.dtype, jax.dtypes.extended) else jax.dtypes.canonicalize_dtype(x.dtype)
    return jax.ShapeDtypeStruct(x.shape, dtype, **kwargs)


def _has_explicit_axes(sharding: Any) -> bool:
    mesh = getattr(sharding, "mesh", None)
    kinds = getattr(mesh, "axis_types", None) or ()
    return any("Explicit" in str(k) for k in kinds)


def explicit_sharding(x: Any) -> Any:
    """Return the sharding that is part of the type of an array or abstract array, on an explicit mesh, or None."""
    sharding = getattr(x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x), "sharding", None)
    return sharding if _has_explicit_axes(sharding) else None


def is_plain(aval: Any) -> bool:
    """Return whether an abstract value knows of no mesh: neither an explicit sharding nor varying axes."""
    return aval.sharding.mesh.empty


def strip_type(aval: Any) -> jax.ShapeDtypeStruct:
    """Return an abstract value as a hashable shape, dtype, sharding and, inside shard_map, varying axes."""
    if aval.sharding.mesh.empty:
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=aval.sharding, manual_axis_type=aval.mat)


def partitioned_devices(ctx: Any) -> int:
    """Return the number of devices over which the compiler may still partition the op that is being lowered.

    Inside shard_map only the mesh axes that are not manual count, so a fully manual body is on one device.
    """
    context = ctx.module_context.axis_context
    mesh = getattr(context, "mesh", None)
    if mesh is not None:
        manual = getattr(context, "manual_axes", frozenset())
        count = 1
        for name, size in mesh.shape.items():
            count *= 1 if name in manual else size
        return count
    return getattr(context, "num_devices", 1)


def for_export(ctx: Any) -> bool:
    """Return whether `jax.export` is lowering, which refuses custom calls that jax gives no guarantee for."""
    return bool(getattr(ctx.module_context.lowering_parameters, "for_export", False))


def with_mesh(ctx: Any) -> Any:
    """Return the context of a lowering that the compiler may partition with a mesh in it, or None if none is known.

    `custom_partitioning` speaks of shardings by the axes of a mesh, which jax gives to a lowering only where its
    primitive asks for devices; then it could not be lowered for a mesh that is abstract. Axes are those of the mesh
    in the context of the caller, else of a cube of as many devices: every mesh of a power of two is a coarser one. The
    devices stand for their numbers; which ones will run it is not looked at.
    """
    context = ctx.module_context.axis_context
    if not hasattr(context, "device_assignment"):
        return None  # inside shard_map, with some axes left to the compiler
    if context.device_assignment is not None and context.abstract_mesh is not None:
        return ctx
    count = context.num_devices
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size != count:
        if count & (count - 1):
            return None
        bits = count.bit_length() - 1
        mesh = jax.sharding.AbstractMesh((2,) * bits, tuple(f"bit{i}" for i in range(bits)))
    there = jax.devices()
    devices = tuple(there[i % len(there)] for i in range(count))
    context = dataclasses.replace(context, device_assignment=devices, abstract_mesh=mesh)
    return ctx.replace(module_context=ctx.module_context.replace(axis_context=context))


def vary_together(arrays: Sequence[Any]) -> list[Any]:
    """Inside shard_map, let arrays vary over the same manual axes, as jax's own operations do with their operands.

    The transposed operation then sums the cotangent of an operand that was the same on all shards.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not manual:
        return list(arrays)
    varying = [varying_axes(a, manual) for a in arrays]
    union = tuple(a for a in manual if any(a in own for own in varying))
    out = []
    for array, own in zip(arrays, varying, strict=True):
        missing = tuple(a for a in union if a not in own)
        out.append(jax.lax.pcast(array, missing, to="varying") if missing else array)
    return out


def zero_tangent(primal: Any) -> Any:
    """Return the symbolic zero tangent of a value."""
    return ad.Zero.from_primal_value(primal)  # pyright: ignore[reportAttributeAccessIssue]
