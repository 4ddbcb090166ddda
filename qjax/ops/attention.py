"""q_attention: queries over a cache of quantized keys and values, as a step of decoding computes it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

from qjax import _compat
from qjax.errors import LayoutError
from qjax.formats import QArray
from qjax.formats.rotation import check_prepared
from qjax.kernels import Problem, select
from qjax.kernels.attention import AttentionSpec, attention_reference
from qjax.kernels.devices import cuda_capability, platform_here
from qjax.kernels.registry import on_new_platform
from qjax.ops.base import PLATFORMS, single_platform

WIDEST = np.iinfo(np.int32).max
"""A window that is none."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of the op: what the products are scaled by, and the tree of the operands."""

    spec: AttentionSpec
    tree: Any

    def operands(self, leaves: Sequence[Any]) -> _Operands:
        return _Operands(*jax.tree.unflatten(self.tree, leaves))


@dataclasses.dataclass(frozen=True)
class _Operands:
    """As `qjax.kernels.attention` has them."""

    q: Any  # [B, H, T, G, D]
    lengths: Any  # [B]
    windows: Any  # [B]
    layer: Any  # []
    k: QArray  # [*layers, B, H, S, D]
    v: QArray

    def flatten(self) -> tuple[list[Any], Any]:
        return jax.tree.flatten((self.q, self.lengths, self.windows, self.layer, self.k, self.v))


def q_attention(
    q: Array,
    k: QArray,
    v: QArray,
    lengths: ArrayLike,
    *,
    window: ArrayLike | None = None,
    layer: ArrayLike | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    site: str = "",
) -> Array:
    """Attend over keys and values that are quantized: softmax(scale q K^T) V, causal, with grouped heads.

    The tokens of q are the last of what the cache holds: their own keys and values are in it. A token sees the
    positions up to its own, of them the last ``window``; what lies behind has no influence. The equations stand in
    `qjax.kernels.attention.reference`.

    Args:
        q: float [B, T, H, D].
        k: keys [B, KV, S, D] with S positions of room, ``in_axes=-1``, the first two axes stack axes; or
            [layers, B, KV, S, D].
        v: values likewise, of another format and other channels if need be.
        lengths: int [B] or []: positions that are filled, those of q among them.
        window: int, [] or [B]; None: a token sees all positions before it.
        layer: int []: which layer, where there is an axis of layers. It is read where it lies.
        scale: factor on products of queries and keys, by default ``D ** -0.5``.
        implementation: name of a lowering (`qjax.ops.lowering_table("attention")`), or None to choose.
        site: name for messages.

    Returns:
        [B, T, H, channels of v] in the dtype of q; zeros for a token that sees nothing. Computed in float32 at least.
        It has derivatives in q and in float scales; `vmap` over caches is one larger batch.

    Raises:
        LayoutError: if shapes do not fit.
        LoweringError: if the named implementation cannot run, with the reason.
    """
    at = f"{site}: " if site else ""
    k, v = _cache(k, "keys", at), _cache(v, "values", at)
    if q.ndim != 4 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise LayoutError(f"{at}q_attention of queries {q.dtype} {tuple(q.shape)}; they have to be float [B, T, H, D]")
    batch, tokens, heads, dim = q.shape
    (own, keys), stack = k.codes.shape[-4:-2], k.codes.shape[:-1]
    if v.codes.shape[:-1] != stack or own != batch or keys == 0 or heads % keys or k.length != dim:
        raise LayoutError(
            f"{at}q_attention of queries {tuple(q.shape)} over keys {tuple(k.shape)} and values {tuple(v.shape)}; they "
            "have to be [B, T, H, D], [B, KV, S, D] and [B, KV, S, any], or with an axis of layers in front of both, "
            "and KV divides H"
        )
    if (layer is not None) != (k.stack_ndim == 3):
        raise LayoutError(
            f"{at}q_attention over keys {tuple(k.shape)} with layer={layer!r}; it is for an axis of layers"
        )
    spec = AttentionSpec(float(dim**-0.5 if scale is None else scale), v.fmt, implementation)
    counts = lambda a: jnp.broadcast_to(jnp.asarray(a, jnp.int32), (batch,))  # noqa: E731
    operands = _Operands(
        jnp.transpose(q.reshape(batch, tokens, keys, heads // keys, dim), (0, 2, 1, 3, 4)),
        counts(lengths),
        counts(WIDEST if window is None else window),
        jnp.asarray(0 if layer is None else layer, jnp.int32),
        k,
        v,
    )
    if implementation is not None:
        select(_problem(spec, operands, platform_here(), 1), implementation)
    y = _bind(spec, operands)
    return jnp.transpose(y, (0, 2, 1, 3, 4)).reshape(batch, tokens, heads, v.length)


def _cache(a: QArray, name: str, at: str) -> QArray:
    """Return keys or values in their canonical view, or raise."""
    if not isinstance(a, QArray):
        raise LayoutError(f"{at}q_attention over {name} of type {type(a).__name__}; they have to be a QArray")
    check_prepared(a, at)
    view = a.canonical()
    if view.stack_ndim not in (2, 3) or view.shape != a.shape:
        raise LayoutError(
            f"{at}q_attention over {name} {tuple(a.shape)} with stack axes {a.stack_axes} and in axes {a.in_axes}; "
            "they have to be [B, KV, S, D] with stack axes (0, 1) and in axis 3, or the same behind an axis of layers"
        )
    return view


q_attention_p = Primitive("q_attention")


def _bind(spec: AttentionSpec, operands: _Operands) -> Array:
    leaves, tree = operands.flatten()
    return q_attention_p.bind(*_compat.vary_together(leaves), call=_Call(spec, tree))


def _out_shape(operands: _Operands) -> tuple[int, ...]:
    return (*operands.q.shape[:-1], operands.v.length)


def _problem(spec: AttentionSpec, operands: _Operands, platform: str, devices: int) -> Problem:
    q, k = operands.q, operands.k
    return Problem(
        op="attention",
        platform=platform,
        weight=k.fmt,
        act=None,
        rows=q.shape[2] * q.shape[3],
        n=operands.v.length,
        k=k.codes.shape[-2],
        stack=tuple(q.shape[:2]),
        x_dtype=np.dtype(q.dtype),
        out_dtype=np.dtype(q.dtype),
        devices=devices,
        settings=spec,
        capability=cuda_capability() if platform == "cuda" else None,
    )


def problem_of(call: _Call, avals: Sequence[Any], platform: str, devices: int) -> tuple[Problem, str | None]:
    """Return what an equation of the op asks, and the lowering that it names."""
    return _problem(call.spec, call.operands(avals), platform, devices), call.spec.implementation


def _reference(*leaves: Any, call: _Call) -> Array:
    o = call.operands(leaves)
    return attention_reference(_problem(call.spec, o, "any", 1), o.q, o.k, o.v, o.lengths, o.windows, o.layer)


@functools.lru_cache(maxsize=1024)
def _jitted(call: _Call) -> Any:
    return jax.jit(functools.partial(q_attention_p.bind, call=call))


q_attention_p.def_impl(lambda *leaves, call: _jitted(call)(*leaves))


@functools.lru_cache(maxsize=1024)
def _type(call: _Call, avals: tuple[Any, ...], mesh: Any) -> Any:
    """The oracle's abstract result: with sharding and varying axes."""
    return jax.make_jaxpr(functools.partial(_reference, call=call))(*avals).out_avals[0]


@q_attention_p.def_abstract_eval
def _abstract_eval(*avals: Any, call: _Call) -> Any:
    if all(_compat.is_plain(a) for a in avals):
        return ShapedArray(_out_shape(call.operands(avals)), avals[0].dtype)
    return _type(call, avals, jax.sharding.get_abstract_mesh())


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: _Call) -> tuple[Any, Any]:
    """The derivative of the oracle, in queries and in scales and zero points that are floats."""
    y = q_attention_p.bind(*primals, call=call)
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero) and t.dtype != jax.dtypes.float0]
    if not moving:
        return y, _compat.zero_tangent(y)

    def value(*moved: Any) -> Array:
        leaves = list(primals)
        for i, a in zip(moving, moved, strict=True):
            leaves[i] = a
        return _reference(*leaves, call=call)

    return y, jax.jvp(value, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving))[1]


ad.primitive_jvps[q_attention_p] = _jvp


def _batch(leaves: Sequence[Any], dims: Sequence[Any], *, call: _Call) -> tuple[Any, int]:
    """More sequences; where queries alone are mapped, more query heads; with a layer for each, one after the other."""
    size = next(a.shape[d] for a, d in zip(leaves, dims, strict=True) if d is not None)
    o = call.operands(leaves)
    if dims[3] is not None:
        mapped = [jnp.moveaxis(a, d, 0) for a, d in zip(leaves, dims, strict=True) if d is not None]

        def one(parts: list[Any]) -> Array:
            rest = iter(parts)
            full = [a if d is None else next(rest) for a, d in zip(leaves, dims, strict=True)]
            return q_attention_p.bind(*full, call=call)

        return lax.map(one, mapped), 0
    if all(d is None for d in dims[1:]):
        q = jnp.moveaxis(leaves[0], dims[0], 3)  # [B, H, T, size, G, D]
        merged = q.reshape(*q.shape[:3], size * q.shape[4], q.shape[5])
        y = q_attention_p.bind(merged, *leaves[1:], call=call)
        return y.reshape(*y.shape[:3], size, q.shape[4], y.shape[-1]), 3
    layers = 1 if o.k.codes.ndim - (dims[4] is not None) == 5 else 0

    def folded(a: Any, d: int | None, behind: int) -> Any:
        a = jnp.moveaxis(a, d, behind) if d is not None else jnp.expand_dims(a, behind)
        a = jnp.broadcast_to(a, (*a.shape[:behind], size, *a.shape[behind + 1 :]))
        return a.reshape(*a.shape[:behind], size * a.shape[behind + 1], *a.shape[behind + 2 :])

    front = [folded(a, d, 0) for a, d in zip(leaves[:3], dims[:3], strict=True)]
    caches = [folded(a, d, layers) for a, d in zip(leaves[4:], dims[4:], strict=True)]
    y = q_attention_p.bind(*front, leaves[3], *caches, call=call)
    return y.reshape(size, y.shape[0] // size, *y.shape[1:]), 0


batching.primitive_batchers[q_attention_p] = _batch


def _lower(platform: str | None, ctx: Any, *leaves: Any, call: _Call) -> Any:
    where, devices = platform or single_platform(ctx), _compat.partitioned_devices(ctx)
    problem = _problem(call.spec, call.operands(ctx.avals_in), where, devices)
    problem = dataclasses.replace(problem, exported=_compat.for_export(ctx))
    if devices > 1:
        alone = select(dataclasses.replace(problem, devices=1), call.spec.implementation)
        wider = _compat.with_mesh(ctx) if alone.refuses(problem) else None
        if wider is not None:  # a kernel, which the compiler cannot cut: each device runs it on what it holds
            return mlir.lower_fun(_partitioned(call, ctx.avals_in), multiple_results=False)(wider, *leaves)
    lowering = select(problem, call.spec.implementation)

    def run(*leaves: Any) -> Array:
        o = call.operands(leaves)
        return lowering.function(problem, o.q, o.k, o.v, o.lengths, o.windows, o.layer)

    return mlir.lower_fun(run, multiple_results=False)(ctx, *leaves)


def _partitioned(call: _Call, avals: Sequence[Any]) -> Any:
    """Return the op cut over sequences and heads of keys, as the keys lie; positions and channels are not cut."""
    o = call.operands(avals)
    lead = ("l",) if o.k.codes.ndim == 5 else ()
    names = [("b", "h"), ("b",), ("b",), (), *[(*lead, "b", "h")] * (len(avals) - 4)]

    @custom_partitioning
    def whole(*given: Array) -> Array:
        return q_attention_p.bind(*given, call=call)

    def partition(mesh: Any, arg_shapes: Any, result_shape: Any) -> Any:
        entries = [*arg_shapes[4].sharding.spec, *[None] * 5][len(lead) : len(lead) + 2]
        cut = dict(zip(("b", "h"), entries, strict=True))
        place = lambda of: jax.NamedSharding(mesh, jax.P(*(cut.get(name) for name in of)))  # noqa: E731
        return mesh, lambda *given: q_attention_p.bind(*given, call=call), place(("b", "h")), tuple(map(place, names))

    alone = itertools.count()

    def text(of: Sequence[str], rank: int) -> str:
        of = [*of, *[""] * (rank - len(of))]
        return " ".join(name if name in ("b", "h") else f"z{next(alone)}" for name in of)

    operands = [text(of, a.ndim) for of, a in zip(names, avals, strict=True)]
    rule = f"{', '.join(operands)} -> {text(('b', 'h'), 5)}"
    whole.def_partition(
        partition, sharding_rule=rule, need_replication_factors=tuple(f"z{i}" for i in range(next(alone)))
    )
    return whole


def _install(platform: str) -> None:
    try:
        mlir.register_lowering(q_attention_p, functools.partial(_lower, platform), platform=platform)
    except NotImplementedError:
        pass  # jax has never heard of the platform, and will not compile for it either


mlir.register_lowering(q_attention_p, functools.partial(_lower, None))
for _platform in PLATFORMS:
    _install(_platform)
on_new_platform(_install)
