"""Linear maps kept whole: one equation that saves its operands and computes only when it runs.

Written out in jnp, the derivative of a quantized product with respect to its scales would leave the unpacked codes, as
floats, among the residuals of a training step, and its transpose would dequantize every layer's weight before the
backward pass starts. A deferred equation holds a function that is linear in its first operands, and the rest, which
for us are packed codes and scales. It is transposed, batched and compiled as a whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qjax import _compat
from qjax.kernels.order import apart


class Deferred:
    """A hashable function ``f(linear, residuals) -> outputs`` over lists of arrays, linear in the first list."""

    def __call__(self, linear: Sequence[Any], residuals: Sequence[Any]) -> list[Any]:
        """Return the outputs."""
        raise NotImplementedError


deferred_p = Primitive("deferred_linear")
deferred_p.multiple_results = True


def deferred(function: Deferred, linear: Sequence[Any], residuals: Sequence[Any]) -> list[Any]:
    """Apply a linear function as one equation."""
    return deferred_p.bind(*linear, *residuals, function=function, count=len(linear))


def _apply(*operands: Any, function: Deferred, count: int) -> list[Any]:
    return function(list(operands[:count]), list(operands[count:]))


@functools.lru_cache(maxsize=1024)
def _jitted(function: Deferred, count: int) -> Callable[..., Any]:
    return jax.jit(functools.partial(_apply, function=function, count=count))


deferred_p.def_impl(lambda *operands, function, count: _jitted(function, count)(*operands))


@functools.lru_cache(maxsize=4096)
def _types(function: Deferred, count: int, avals: tuple[Any, ...], mesh: Any) -> list[Any]:
    return list(jax.make_jaxpr(functools.partial(_apply, function=function, count=count))(*avals).out_avals)


@deferred_p.def_abstract_eval
def _abstract_eval(*avals: Any, function: Deferred, count: int) -> list[Any]:
    return _types(function, count, avals, jax.sharding.get_abstract_mesh())


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, function: Deferred, count: int) -> tuple[Any, Any]:
    outs = deferred_p.bind(*primals, function=function, count=count)
    linear, residuals = list(primals[:count]), list(primals[count:])
    totals: list[Any] = [_compat.zero_tangent(y) for y in outs]
    if any(not isinstance(t, ad.Zero) for t in tangents[:count]):
        slopes = [ad.instantiate_zeros(t) for t in tangents[:count]]
        totals = deferred(function, slopes, residuals)
    moving = [i for i, t in enumerate(tangents[count:]) if not isinstance(t, ad.Zero)]
    if moving:

        def value(*moved: Any) -> list[Any]:
            full = list(residuals)
            for i, a in zip(moving, moved, strict=True):
                full[i] = a
            return function(linear, full)

        slopes = [tangents[count + i] for i in moving]
        _, more = jax.jvp(value, tuple(residuals[i] for i in moving), tuple(slopes))
        totals = [m if isinstance(t, ad.Zero) else ad.add_jaxvals(t, m) for t, m in zip(totals, more, strict=True)]
    return outs, totals


ad.primitive_jvps[deferred_p] = _jvp


@dataclasses.dataclass(frozen=True)
class Transposed(Deferred):
    """The transpose of a deferred function: from cotangents of its outputs to those of its linear operands."""

    function: Deferred
    linear: tuple[Any, ...]

    def __call__(self, linear: Sequence[Any], residuals: Sequence[Any]) -> list[Any]:
        """Return the cotangents of the linear operands."""
        forward = lambda *args: self.function(list(args), list(residuals))  # noqa: E731
        return list(jax.linear_transpose(forward, *self.linear)(list(linear)))


def _transpose(cts: Sequence[Any], *operands: Any, function: Deferred, count: int) -> list[Any]:
    linear, residuals = operands[:count], operands[count:]
    if not all(ad.is_undefined_primal(a) for a in linear) or any(ad.is_undefined_primal(a) for a in residuals):
        raise NotImplementedError("a deferred equation is transposed in all of its linear operands and in nothing else")
    nothing = [None] * len(residuals)
    if all(isinstance(ct, ad.Zero) for ct in cts):
        return [*(ad.Zero(a.aval) for a in linear), *nothing]
    types = tuple(_compat.strip_type(a.aval) for a in linear)
    full = [ad.instantiate_zeros(ct) for ct in cts]
    return [*deferred(Transposed(function, types), full, residuals), *nothing]


ad.primitive_transposes[deferred_p] = _transpose


@dataclasses.dataclass(frozen=True)
class Batched(Deferred):
    """A deferred function over a batch: operands have the batch axis in front, or none."""

    function: Deferred
    linear: tuple[bool, ...]
    residuals: tuple[bool, ...]

    def __call__(self, linear: Sequence[Any], residuals: Sequence[Any]) -> list[Any]:
        """Return the outputs, batch axis in front; one example after the other: one weight is alive at a time."""
        flags = (*self.linear, *self.residuals)
        operands = (*linear, *residuals)
        mapped = [a for a, f in zip(operands, flags, strict=True) if f]

        def one(parts: list[Any]) -> list[Any]:
            rest = iter(parts)
            full = [next(rest) if f else a for a, f in zip(operands, flags, strict=True)]
            return self.function(full[: len(linear)], full[len(linear) :])

        return lax.map(one, mapped)


def _batch(operands: Sequence[Any], dims: Sequence[Any], *, function: Deferred, count: int) -> tuple[Any, Any]:
    moved = [a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(operands, dims, strict=True)]
    flags = tuple(d is not None for d in dims)
    outs = deferred(Batched(function, flags[:count], flags[count:]), moved[:count], moved[count:])
    return outs, [0] * len(outs)


batching.primitive_batchers[deferred_p] = _batch


def _apply_whole(what: tuple[Deferred, int], *operands: Any) -> list[Any]:
    function, count = what
    return _apply(*operands, function=function, count=count)


_apply_apart = apart(_apply_whole)


def _lower(ctx: Any, *args: Any, function: Deferred, count: int) -> Any:
    whole = _compat.partitioned_devices(ctx) > 1

    def run(*operands: Any) -> list[Any]:
        # On one device weights are unpacked only when the cotangent is there: see `qjax.kernels.order`.
        return (_apply_whole if whole else _apply_apart)((function, count), *operands)

    return mlir.lower_fun(run, multiple_results=True)(ctx, *args)


mlir.register_lowering(deferred_p, _lower)
