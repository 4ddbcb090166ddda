"""What is asked of a model that was not written for qjax, whatever it is written with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import qjax
from qjax.analysis.naming import LINEAR
from qjax.formats import is_quantized
from qjax.trees import is_array

STORED = ("embedding", *LINEAR)
"""Ops that read a parameter."""


def weight_only(fmt: Any) -> qjax.Recipe:
    """Every weight and every table in one format; axes shorter than a group are one group."""
    rule = {"weights": fmt, "clamp_group": True}
    return qjax.Recipe([qjax.Rule("**", **rule), qjax.Rule("**", op="embedding", optional=True, **rule)])


def int8(inputs: Any) -> qjax.Recipe:
    """Weights and what meets them in 8 bits."""
    table = qjax.Rule("**", op="embedding", weights=qjax.Int(8), optional=True)
    return qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=inputs), table])


RECIPES = {
    "W8A16": weight_only(qjax.Int(8)),
    "W4A16": weight_only(qjax.Int(4, group=32)),
    "W8A8": int8(qjax.dynamic(qjax.Int(8, per="token"))),
    "W8A8 static": int8(qjax.static(qjax.Int(8, per="tensor"))),
}


QUICK: Any = {"compiler_options": {"xla_backend_optimization_level": 0}}
"""For jit: what runs once is compiled without care."""


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A model as its user has it.

    Attributes:
        fn: ``fn(params, *args)``, one array out.
        params: its parameters.
        inputs: ``inputs(seed, batch)`` gives the arguments of one batch.
        sites: the names of all sites that read a parameter, by op.
        error: how far 8-bit activations may be from float, relative in the root of the mean square.
    """

    fn: Callable[..., Any]
    params: Any
    inputs: Callable[[int, int], tuple[Any, ...]]
    sites: dict[str, set[str]]
    error: float = 0.05

    @functools.cached_property
    def derivative(self) -> Callable[..., Any]:
        """`derivative` of the float function, compiled once for all recipes."""
        return derivative(self.fn, self.params)


def dense(tree: Any) -> Any:
    """The float parameters that packed ones stand for."""
    return jax.tree.map(lambda a: a.dequantize() if is_quantized(a) else a, tree, is_leaf=is_quantized)


def check_trace(model: Foreign) -> None:
    """All weights are sites, under these names, once each, and nothing is out of reach."""
    program = qjax.trace(model.fn, model.params, *model.inputs(0, 2))
    names = [s.name for s in program.sites]
    assert len(names) == len(set(names))
    found: dict[str, set[str]] = {}
    for site in program.sites:
        if site.leaf is not None or site.reason:
            found.setdefault(site.op, set()).add(site.name if not site.reason else f"{site.name}: {site.reason}")
    assert found == model.sites


def check_recipe(model: Foreign, name: str) -> qjax.Model:
    """What is stored, values, and derivatives or one trace per shape; the quantized model is returned."""
    args, recipe = model.inputs(0, 2), RECIPES[name]
    traced = []

    def fn(*args):
        traced.append(1)
        return model.fn(*args)

    batches = [model.inputs(seed, 2) for seed in range(3)] if "static" in name else None
    packed = qjax.quantize(fn, model.params, *args, recipe=recipe, batches=batches)
    stored = {n for op in STORED for n in model.sites.get(op, ())}
    assert {r.name for r in packed.report.quantized} == stored
    assert not packed.report.notes, packed.report.notes

    # Derivatives in the arguments, or where those are tokens in the parameters that are float in any case.
    floats = dense(packed.params)
    at = [a for a in args if jnp.issubdtype(a.dtype, jnp.floating)] or qjax.partition(packed.params)[0]
    want, d_want = model.derivative(at, floats, args)
    weights_only = "A16" in name
    traced.clear()
    if name == "W8A16":
        got = jax.jit(lambda *args: packed(packed.params, *args), **QUICK)(*args)
    elif name == "W8A8":
        got = packed(packed.params, *args)
        packed(packed.params, *model.inputs(1, 2))
        assert len(traced) == 1, "the second batch of one shape is traced again"
        jax.eval_shape(lambda args: packed(packed.params, *args), model.inputs(1, 3))
        assert len(traced) == 2
    else:  # what is compiled for derivatives is compiled for the value as well
        got, d_got = derivative(packed, packed.params)(at, packed.params, args)
        slope, slope_wanted = (jnp.concatenate([jnp.ravel(a) for a in jax.tree.leaves(d)]) for d in (d_got, d_want))
        assert slope.size and bool(jnp.isfinite(slope).all()) and bool((slope_wanted != 0).any())
        assert distance(slope, slope_wanted) < (1e-4 if weights_only else 5 * model.error)
    assert got.shape == want.shape and got.dtype == want.dtype and bool(jnp.isfinite(got).all())
    assert distance(got, want) < (1e-5 if weights_only else model.error)
    return packed


def derivative(fn: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """``(at, params, args)`` to the output and the derivative of its size, in arguments or in float parameters."""
    _, static = qjax.partition(params, is_array)  # functions and flags among the leaves are no arguments of jit

    def size(at, params, args):
        params = qjax.combine(params, static)
        if isinstance(at, list):
            it = iter(at)
            args = [next(it) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in args]
        else:
            params = qjax.combine(at, params)
        out = fn(params, *args)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    @functools.partial(jax.jit, **QUICK)
    def both(at, params, args):
        gradient, out = jax.grad(size, has_aux=True)(at, params, args)
        return out, gradient

    return lambda at, params, args: both(at, qjax.partition(params, is_array)[0], args)


def distance(got: Any, want: Any) -> float:
    """Root mean square of the difference, in that of the wanted."""
    return float(jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel()))
