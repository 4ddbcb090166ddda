"""quantize_rows: activations quantized row by row, alone or with the norm or the gate in front of them."""

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
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qjax import _compat
from qjax.errors import FormatError, LayoutError, warn
from qjax.formats import Format, QArray, assemble
from qjax.kernels import Problem, select
from qjax.kernels.act.mosaic import LONGEST
from qjax.kernels.act.reference import Before, by_magnitude, quantize_rows_reference
from qjax.kernels.devices import cuda_capability, platform_here
from qjax.kernels.registry import on_new_platform
from qjax.ops.base import PLATFORMS, single_platform


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight",), meta_fields=("eps",))
@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """``x * rsqrt(mean(x**2) + eps) * weight`` over the last axis (Zhang and Sennrich, arXiv:1910.07467, eq. 4).

    Args:
        weight: float [K], or None. Models that store it less 1 give ``1 + weight``.
        eps: added to the mean square.
    """

    weight: Any = None
    eps: float = 1e-6


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight", "bias"), meta_fields=("eps",))
@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """``(x - mean(x)) * rsqrt(var(x) + eps) * weight + bias`` over the last axis (Ba et al., arXiv:1607.06450).

    Args:
        weight: float [K], or None.
        bias: float [K], or None.
        eps: added to the variance.
    """

    weight: Any = None
    bias: Any = None
    eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of the op."""

    fmt: Format
    before: Before
    implementation: str | None


def quantize_rows(
    x: Array,
    fmt: Format,
    *,
    norm: RMSNorm | LayerNorm | None = None,
    gate: Array | None = None,
    implementation: str | None = None,
    site: str = "",
) -> QArray:
    """Quantize activations with one scale a row, as `activation_aux` and the format's encode do, in one op.

    What it returns goes into `q_dot` in the place of activations, any number of times: a norm and its rounding are then
    computed once for q, k and v. It is computed in float32; the result of a norm or gate is not rounded to the dtype
    of x before it is quantized. NaN or infinity in a row makes every product with that row NaN, and no other.

    It has no derivative, since rounding has none: where gradients pass through activations, give `q_dot` the floats
    and ``act=`` instead.

    Args:
        x: float [*rows, K].
        fmt: ``Int(bits, per="token")``, symmetric, or ``Float8(per="token")``.
        norm: what x passes first.
        gate: float [*rows, K]: what is quantized is ``silu(gate) * x``. Not together with ``norm``.
        implementation: name of a lowering (`qjax.ops.lowering_table("quantize_rows")`), or None to choose.
        site: name for messages.

    Returns:
        The quantized activations: ``codes`` [*rows, K], ``aux["scale"]`` float32 [*rows, 1], the shape and dtype of x.

    Raises:
        FormatError: if the format has other scales than one a row, or an asymmetric range.
        LayoutError: if shapes do not fit.
        LoweringError: if the named implementation cannot run, with the reason.
    """
    at = f"{site}: " if site else ""
    if not by_magnitude(fmt) or fmt.per not in ("token", "channel"):
        raise FormatError(
            f"{at}quantize_rows to {fmt.name}; it takes symmetric Int and Float8 with one scale a row, such as "
            'Int(8, per="token"). Others have q_dot(..., act=(fmt, activation_aux(x, fmt)))'
        )
    before, extra = _before(x, norm, gate, at)
    call = _Call(fmt, before, implementation)
    if implementation is not None:
        select(_problem(call, x.shape, x.dtype, platform_here(), 1), implementation)
    flat = x[None] if x.ndim == 1 else x
    extra = [a[None] if x.ndim == 1 and before.kind == "gate" else a for a in extra]
    codes, scale = quantize_rows_p.bind(*_compat.vary_together([flat, *extra]), call=call)
    lead = tuple(range(x.ndim - 1))
    codes, scale = (a if x.ndim == 1 else jnp.expand_dims(a, -2) for a in (codes, scale))
    return assemble(codes, {"scale": scale}, fmt, shape=x.shape, in_axes=len(lead), stack_axes=lead, dtype=x.dtype)


def _before(x: Array, norm: Any, gate: Any, at: str) -> tuple[Before, list[Any]]:
    """Return what comes before, and its operands."""
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise LayoutError(f"{at}quantize_rows of {x.dtype} {tuple(x.shape)}; floats [*rows, K] are quantized")
    if gate is not None:
        if norm is not None:
            raise LayoutError(f"{at}quantize_rows with a norm and a gate; a row passes one of them")
        if gate.shape != x.shape:
            raise LayoutError(f"{at}quantize_rows of {tuple(x.shape)} with a gate {tuple(gate.shape)}; give both alike")
        return Before("gate"), [gate.astype(x.dtype)]
    if norm is None:
        return Before(), []
    if not isinstance(norm, RMSNorm | LayerNorm):
        raise LayoutError(f"{at}quantize_rows with norm={norm!r}; RMSNorm(weight, eps) or LayerNorm(weight, bias, eps)")
    weight, bias = norm.weight, getattr(norm, "bias", None)
    for name, a in (("weight", weight), ("bias", bias)):
        if a is not None and tuple(a.shape) != tuple(x.shape[-1:]):
            raise LayoutError(f"{at}the norm's {name} is {tuple(a.shape)}, for rows of {x.shape[-1]} elements")
    kind = "rms_norm" if isinstance(norm, RMSNorm) else "layer_norm"
    before = Before(kind, float(norm.eps), weight is not None, bias is not None)
    return before, [a for a in (weight, bias) if a is not None]


quantize_rows_p = Primitive("quantize_rows")
quantize_rows_p.multiple_results = True


def _problem(call: _Call, shape: Sequence[int], dtype: Any, platform: str, devices: int) -> Problem:
    rows = math.prod(shape[:-1])
    return Problem(
        op="quantize_rows",
        platform=platform,
        weight=call.fmt,
        act=None,
        rows=rows if isinstance(rows, int) else None,
        n=shape[-1],
        k=shape[-1],
        x_dtype=np.dtype(dtype),
        out_dtype=call.fmt.code_dtype,
        devices=devices,
        settings=call.before,
        capability=cuda_capability() if platform == "cuda" else None,
    )


def _reference(*operands: Any, call: _Call) -> tuple[Array, Array]:
    x, *extra = operands
    return quantize_rows_reference(_problem(call, x.shape, x.dtype, "any", 1), x, extra)


@functools.lru_cache(maxsize=1024)
def _jitted(call: _Call) -> Any:
    return jax.jit(functools.partial(quantize_rows_p.bind, call=call))


quantize_rows_p.def_impl(lambda *operands, call: _jitted(call)(*operands))


@functools.lru_cache(maxsize=1024)
def _types(call: _Call, avals: tuple[Any, ...], mesh: Any) -> list[Any]:
    """The oracle's abstract results: with shardings and varying axes."""
    return list(jax.make_jaxpr(functools.partial(_reference, call=call))(*avals).out_avals)


@quantize_rows_p.def_abstract_eval
def _abstract_eval(*avals: Any, call: _Call) -> list[Any]:
    if all(_compat.is_plain(a) for a in avals):
        x = avals[0]
        return [ShapedArray(x.shape, call.fmt.code_dtype), ShapedArray((*x.shape[:-1], 1), jnp.float32)]
    return _types(call, avals, jax.sharding.get_abstract_mesh())


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: _Call) -> tuple[Any, Any]:
    if not all(isinstance(t, ad.Zero) for t in tangents):
        raise NotImplementedError(
            "quantize_rows has no derivative. Where gradients pass through activations give q_dot the floats, "
            "act=(fmt, activation_aux(x, fmt)); where none is wanted, quantize_rows(lax.stop_gradient(x), ...)"
        )
    out = quantize_rows_p.bind(*primals, call=call)
    return out, [_compat.zero_tangent(y) for y in out]


ad.primitive_jvps[quantize_rows_p] = _jvp


def _batch(operands: Sequence[Any], dims: Sequence[Any], *, call: _Call) -> tuple[Any, Any]:
    size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
    rows = 2 if call.before.kind == "gate" else 1  # operands that have rows; the rest is [K]
    if any(d is not None for d in dims[rows:]):
        mapped = [jnp.moveaxis(a, d, 0) for a, d in zip(operands, dims, strict=True) if d is not None]

        def one(parts: list[Any]) -> Any:
            rest = iter(parts)
            full = [a if d is None else next(rest) for a, d in zip(operands, dims, strict=True)]
            return tuple(quantize_rows_p.bind(*full, call=call))

        return lax.map(one, mapped), (0, 0)
    fronts = [
        jnp.moveaxis(a, d, 0) if d is not None else jnp.broadcast_to(a, (size, *a.shape))
        for a, d in zip(operands[:rows], dims[:rows], strict=True)
    ]
    return quantize_rows_p.bind(*fronts, *operands[rows:], call=call), (0, 0)


batching.primitive_batchers[quantize_rows_p] = _batch


def _lower(platform: str | None, ctx: Any, *operands: Any, call: _Call) -> Any:
    where = platform or single_platform(ctx)
    x = ctx.avals_in[0]
    problem = _problem(call, x.shape, x.dtype, where, _compat.partitioned_devices(ctx))
    lowering = select(problem, call.implementation)
    if where == "cuda" and problem.k > LONGEST:
        _warn_of_length(problem.k)

    def run(*operands: Any) -> Any:
        x, *extra = operands
        return lowering.function(problem, x, extra)

    return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)


@functools.cache
def _warn_of_length(length: int) -> None:
    warn(f"quantize_rows of rows of {length} elements, more than the {LONGEST} of the kernel, is left to XLA")


def _install(platform: str) -> None:
    try:
        mlir.register_lowering(quantize_rows_p, functools.partial(_lower, platform), platform=platform)
    except NotImplementedError:
        pass  # jax has never heard of the platform, and will not compile for it either


mlir.register_lowering(quantize_rows_p, functools.partial(_lower, None))
for _platform in PLATFORMS:
    _install(_platform)
on_new_platform(_install)
