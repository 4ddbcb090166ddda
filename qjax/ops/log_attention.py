"""log_attention: softmax, logarithmic codes of the probabilities, and their product with the values, as one op."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qjax import _compat
from qjax.errors import FormatError, LayoutError
from qjax.formats import Format
from qjax.formats.log import Log, decode_unit
from qjax.kernels import Act, Problem, select
from qjax.kernels.devices import cuda_capability, platform_here
from qjax.kernels.log_attention.reference import codes_of, probabilities, product
from qjax.kernels.registry import on_new_platform
from qjax.ops.base import PLATFORMS, single_platform


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of the op."""

    fmt: Log
    act: Format | None
    names: tuple[str, ...]
    """Of the arrays of ``act``, in the order of the operands behind scores and values."""
    out_dtype: np.dtype
    precision: Any
    implementation: str | None

    def values(self, aux: Sequence[Array]) -> Act | None:
        """Return format and aux of the values, or None."""
        return None if self.act is None else (self.act, dict(zip(self.names, aux, strict=True)))


def log_attention(
    scores: Array,
    v: Array,
    fmt: Log,
    *,
    values: tuple[Format, Mapping[str, Array]] | None = None,
    out_dtype: Any = None,
    precision: Any = None,
    implementation: str | None = None,
    site: str = "",
) -> Array:
    """Return the product of softmax(scores), as logarithmic codes under scale 1, and the values.

    Scale, masks and biases are in the scores already. All is computed in float32, whatever the dtype of the scores;
    a row that is wholly -inf gives zeros. The equations stand in `qjax.kernels.log_attention.reference`; the derivative
    passes straight through the rounding of both operands, to scores and values. AdaLog, arXiv:2407.12951.

    Args:
        scores: float [*batch, M, N]: a row for each query.
        v: float [*batch, N, D]: a row for each key.
        fmt: of the probabilities: ``Log(bits, q, zero=...)``, one scale for all, no shift.
        values: format and aux of the values, such as ``(Int(4, per="tensor", symmetric=False), {"scale", "zero"})``;
            each array is [*batch, 1, 1], with 1 in the place of a batch axis that shares a number. None: they stay
            float.
        out_dtype: of the result; None for that of v.
        precision: of float products, as `jax.lax.Precision`.
        implementation: name of a lowering (`qjax.ops.lowering_table("log_attention")`), or None to choose.
        site: name for messages.

    Returns:
        [*batch, M, D].

    Raises:
        FormatError: another format of the probabilities.
        LayoutError: if shapes do not fit.
        LoweringError: if the named implementation cannot run, with the reason.
    """
    at = f"{site}: " if site else ""
    if not isinstance(fmt, Log) or fmt.shift or fmt.group is not None or fmt.per != "tensor":
        raise FormatError(f"{at}log_attention to {fmt.name}; it takes Log(bits, q) without shift, one scale for all")
    shapes = f"scores {tuple(scores.shape)} and values {tuple(v.shape)}"
    if scores.ndim < 2 or v.ndim != scores.ndim or scores.shape[:-2] != v.shape[:-2] or scores.shape[-1] != v.shape[-2]:
        raise LayoutError(f"{at}log_attention of {shapes}; give [*batch, M, N] and [*batch, N, D]")
    if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in (scores, v)):
        raise LayoutError(f"{at}log_attention of {scores.dtype} scores and {v.dtype} values; floats are multiplied")
    aux = dict(values[1]) if values is not None else {}
    for name, a in aux.items():
        near = len(a.shape) == v.ndim and tuple(a.shape[-2:]) == (1, 1)
        if not near or any(n not in (1, m) for n, m in zip(a.shape, v.shape, strict=True)):
            raise LayoutError(f"{at}the {name} of values {tuple(v.shape)} is {tuple(a.shape)}; give [*batch, 1, 1]")
    call = _Call(
        fmt,
        None if values is None else values[0],
        tuple(aux),
        np.dtype(v.dtype if out_dtype is None else out_dtype),
        precision,
        implementation,
    )
    if implementation is not None:
        select(_problem(call, scores, v, platform_here(), 1), implementation)
    return log_attention_p.bind(*_compat.vary_together([scores, v, *aux.values()]), call=call)


log_attention_p = Primitive("log_attention")


def _problem(call: _Call, scores: Any, v: Any, platform: str, devices: int) -> Problem:
    *batch, rows, keys = scores.shape
    return Problem(
        op="log_attention",
        platform=platform,
        weight=call.fmt,
        act=call.act,
        rows=rows if isinstance(rows, int) else None,
        n=v.shape[-1],
        k=keys,
        stack=tuple(batch),
        x_dtype=np.dtype(scores.dtype),
        out_dtype=call.out_dtype,
        devices=devices,
        settings=call.precision,
        capability=cuda_capability() if platform == "cuda" else None,
    )


def _with(lowering: Any, problem: Problem, call: _Call, operands: Sequence[Array]) -> Array:
    scores, v, *aux = operands
    return lowering(problem, scores, v, call.values(aux))


@functools.lru_cache(maxsize=1024)
def _jitted(call: _Call) -> Any:
    return jax.jit(functools.partial(log_attention_p.bind, call=call))


log_attention_p.def_impl(lambda *operands, call: _jitted(call)(*operands))


@functools.lru_cache(maxsize=1024)
def _type(call: _Call, avals: tuple[Any, ...], mesh: Any) -> Any:
    """The oracle's abstract result: with sharding and varying axes."""
    problem = _problem(call, avals[0], avals[1], "any", 1)
    oracle = select(problem, "xla").function
    return jax.make_jaxpr(lambda *operands: _with(oracle, problem, call, operands))(*avals).out_avals[0]


@log_attention_p.def_abstract_eval
def _abstract_eval(*avals: Any, call: _Call) -> Any:
    if all(_compat.is_plain(a) for a in avals):
        return ShapedArray((*avals[0].shape[:-1], avals[1].shape[-1]), call.out_dtype)
    return _type(call, avals, jax.sharding.get_abstract_mesh())


def _straight(call: _Call, scores: Array, v: Array, aux: Sequence[Array]) -> Array:
    """The float function whose derivative is taken: the values are the rounded ones."""
    p, near = probabilities(scores), v.astype(jnp.float32)
    p = p + lax.stop_gradient(decode_unit(codes_of(scores, call.fmt), call.fmt) - p)
    values = call.values(aux)
    if values is not None:
        fmt, its = values
        near = near + lax.stop_gradient(fmt.decode(fmt.encode(near, its), its) - near)
    return product(p, near, call.precision).astype(call.out_dtype)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: _Call) -> tuple[Any, Any]:
    y = log_attention_p.bind(*primals, call=call)
    moving = [i for i, t in enumerate(tangents[:2]) if not isinstance(t, ad.Zero)]
    if not moving:
        return y, _compat.zero_tangent(y)

    def value(*moved: Any) -> Array:
        scores, v, *aux = [dict(zip(moving, moved, strict=True)).get(i, a) for i, a in enumerate(primals)]
        return _straight(call, scores, v, aux)

    return y, jax.jvp(value, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving))[1]


ad.primitive_jvps[log_attention_p] = _jvp


def _batch(operands: Sequence[Any], dims: Sequence[Any], *, call: _Call) -> tuple[Any, Any]:
    size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
    whole = [size, size, *[1] * len(call.names)]  # numbers of the values may be shared, scores and values may not
    fronts = [
        jnp.moveaxis(a, d, 0) if d is not None else jnp.broadcast_to(a, (n, *a.shape))
        for a, d, n in zip(operands, dims, whole, strict=True)
    ]
    return log_attention_p.bind(*fronts, call=call), 0


batching.primitive_batchers[log_attention_p] = _batch


def _lower(platform: str | None, ctx: Any, *operands: Any, call: _Call) -> Any:
    where = platform or single_platform(ctx)
    scores, v = ctx.avals_in[:2]
    problem = _problem(call, scores, v, where, _compat.partitioned_devices(ctx))
    problem = dataclasses.replace(problem, exported=_compat.for_export(ctx))
    lowering = select(problem, call.implementation).function
    return mlir.lower_fun(lambda *a: _with(lowering, problem, call, a), multiple_results=False)(ctx, *operands)


def _install(platform: str) -> None:
    try:
        mlir.register_lowering(log_attention_p, functools.partial(_lower, platform), platform=platform)
    except NotImplementedError:
        pass  # jax has never heard of the platform, and will not compile for it either


mlir.register_lowering(log_attention_p, functools.partial(_lower, None))
for _platform in PLATFORMS:
    _install(_platform)
on_new_platform(_install)
