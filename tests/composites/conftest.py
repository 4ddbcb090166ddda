"""An oracle for matches: recompute each composite from what the match says, and compare with what the program did.

The flat level is evaluated equation by equation, which gives every value in it; a match is right if its own
description, applied in NumPy to the values of its operands, gives the value of its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from qjax import _compat
from qjax.composites import (
    Activation,
    Attention,
    Composite,
    Level,
    Norm,
    Operand,
    Softmax,
    Value,
    constants,
    find_composites,
    inlined,
)
from qjax.composites.find import composites_of


def evaluate(level: Level, args: list[Any]) -> Callable[[Value], np.ndarray]:
    """Run a level in float64, half-precision parts too; return a reader of its values."""
    known: dict[Value, np.ndarray] = {}
    free = iter(args)
    for value in level.inputs:
        known[value] = _wide(value.const if value.const is not None else next(free))

    def read(value: Value) -> np.ndarray:
        return _wide(value.const) if value.const is not None else known[value]

    for node in level.nodes:
        operands = [read(v) for v in node.inputs]
        results = _step(node, operands)
        known.update(zip(node.outputs, results, strict=True))
    return read


def _wide(x: Any) -> Any:
    if jax.dtypes.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.extended):
        return x
    array = np.asarray(x)
    return array.astype(np.float64) if jax.dtypes.issubdtype(array.dtype, np.floating) else array


def _step(node: Any, operands: list[np.ndarray]) -> list[Any]:
    name, params = node.name, node.params
    if name in constants.ELEMENTWISE:
        # Constants keep their rounding: the match reports them as they are.
        return [np.asarray(constants.apply(name, params, operands, keep_floats=not node.output.fixed))]
    axes = tuple(int(d) for d in params.get("axes", ()))
    if name == "reduce_sum":
        return [operands[0].sum(axes)]
    if name == "reduce_max":
        return [operands[0].max(axes)]
    if name == "transpose":
        return [operands[0].transpose(params["permutation"])]
    if name in ("reshape", "squeeze"):
        return [operands[0].reshape(node.output.shape)]
    if name == "broadcast_in_dim":
        dims = [int(d) for d in params["broadcast_dimensions"]]
        shape = [operands[0].shape[dims.index(d)] if d in dims else 1 for d in range(node.output.ndim)]
        return [np.broadcast_to(operands[0].reshape(shape), node.output.shape)]
    if name == "dot_general":
        return [_dot(params["dimension_numbers"], *operands)]
    typed = zip(operands, node.inputs, strict=True)
    raw = [x if x.dtype == v.dtype else jax.numpy.asarray(x, v.dtype) for x, v in typed]
    return [_wide(x) for x in _compat.bind(node.eqn, raw)]


def _dot(numbers: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    (ac, bc), (ab, bb) = numbers
    left, right = list(range(a.ndim)), [100 + d for d in range(b.ndim)]
    for i, j in (*zip(ac, bc, strict=True), *zip(ab, bb, strict=True)):
        right[j] = left[i]
    out = [left[i] for i in ab]
    out += [x for d, x in enumerate(left) if d not in ac and d not in ab]
    out += [x for d, x in enumerate(right) if d not in bc and d not in bb]
    number = {x: i for i, x in enumerate(dict.fromkeys(left + right))}
    return np.einsum(a, [number[x] for x in left], b, [number[x] for x in right], [number[x] for x in out])


def expand(match: Attention, array: np.ndarray, dims: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Lay an array out with one dimension per axis of the attention, of size one where it does not vary."""
    order = [a for dim in dims for a in dim]
    array = array.reshape([match.axes[a][1] for a in order])
    assert len(set(order)) == len(order)
    array = array.transpose(np.argsort(order))
    return array.reshape([n if a in order else 1 for a, (_, n) in enumerate(match.axes)])


def attention(match: Attention, read: Callable[[Value], np.ndarray]) -> np.ndarray:
    def value(operand: Operand) -> np.ndarray:
        return expand(match, read(operand.value), operand.dims)

    def axes(role: str) -> tuple[int, ...]:
        return tuple(a for a, (name, _) in enumerate(match.axes) if name == role)

    z = (value(match.q) * value(match.k)).sum(axes("feature"), keepdims=True) * match.scale
    for gain in match.gains:
        z = z * value(gain.operand) ** gain.factor
    if match.softcap is not None:
        z = match.softcap * np.tanh(z / match.softcap)
    for bias in match.biases:
        z = z + bias.factor * value(bias.operand)
    for mask in match.masks:
        found = value(mask.operand)
        if mask.factor is not None:
            z = z + mask.factor * found
        else:
            z = np.where((found != 0) == mask.keep, z, max(mask.fill, -1e30))
    z = np.broadcast_to(z, [1 if role in ("feature", "value") else n for role, n in match.axes])
    p = np.exp(z - z.max(axes("key"), keepdims=True))
    p = p / p.sum(axes("key"), keepdims=True)
    if match.probabilities is not None:
        close(expand(match, read(match.probabilities.value), match.probabilities.dims), p, match)
    out = (p * value(match.v)).sum(axes("key"), keepdims=True)
    close(expand(match, read(match.output), match.output_dims), out, match)
    if match.causal is not None:
        _check_causal(match, p, axes("query"), axes("key"))
    return out


def _check_causal(match: Attention, p: np.ndarray, query: tuple[int, ...], key: tuple[int, ...]) -> None:
    p = np.moveaxis(p, (*query, *key), range(-len(query + key), 0))
    p = p.reshape(-1, math.prod(match.axes[a][1] for a in query), math.prod(match.axes[a][1] for a in key))
    t, s = np.indices(p.shape[1:])
    seen = s <= t + match.causal.offset
    if match.causal.window is not None:
        seen &= s > t + match.causal.offset - match.causal.window
    assert not p[:, ~seen].any()


def softmax(match: Softmax, read: Callable[[Value], np.ndarray]) -> None:
    z = read(match.logits)
    assert all(read(match.output).shape[d] == z.shape[d] for d in match.axes)
    p = np.exp(z - z.max(match.axes, keepdims=True))
    close(read(match.output), p / p.sum(match.axes, keepdims=True), match)


def norm(match: Norm, read: Callable[[Value], np.ndarray]) -> None:
    x = read(match.input)
    if match.kind == "layer_norm":
        x = x - x.mean(match.axes, keepdims=True)
    y = x / np.sqrt((x**2).mean(match.axes, keepdims=True) + match.eps)

    def along(value: Value) -> np.ndarray:
        sizes = [n if d in match.axes else 1 for d, n in enumerate(x.shape)]
        parameter = read(value)
        if parameter.size == math.prod(sizes):
            return parameter.reshape(sizes)
        return parameter.reshape([n if n == parameter.shape[-1] else 1 for n in sizes])

    if match.scale is not None:
        y = y * along(match.scale)
    if match.bias is not None:
        y = y + along(match.bias)
    close(read(match.output), y, match)


def activation(match: Activation, read: Callable[[Value], np.ndarray]) -> None:
    x = read(match.input)
    if match.kind == "gelu" and match.approximate:
        y = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    elif match.kind == "gelu":
        y = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    elif match.kind == "relu":
        y = np.maximum(x, 0)
    else:
        y = x / (1 + np.exp(-x * (1.702 if match.kind == "quick_gelu" else 1.0)))
    close(read(match.output), y, match)


def close(found: np.ndarray, expected: np.ndarray, match: Composite) -> None:
    assert found.shape == np.broadcast_shapes(found.shape, expected.shape)
    # Constants in half precision are rounded, which only activations do not report as they are.
    half = match.op == "activation" and any(v.dtype.itemsize < 4 for n in match.nodes for v in n.outputs)
    tolerance = 2e-2 if half else 1e-5
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=tolerance, atol=tolerance)


_ORACLES = {"attention": attention, "softmax": softmax, "norm": norm, "activation": activation}


@pytest.fixture(scope="session")
def find() -> Callable[..., list[Composite]]:
    """``find(fn, *args, op="attention")``: the matches in ``fn(*args)``, each proven by the oracle."""

    def _find(fn: Callable[..., Any], *args: Any, op: str | None = None) -> list[Any]:
        closed = jax.make_jaxpr(fn)(*args)
        level = inlined(closed)
        read = evaluate(level, jax.tree.leaves(args))
        found = composites_of(level)
        assert [c.output_path for c in found] == [c.output_path for c in find_composites(closed)]
        for match in found:
            _ORACLES[match.op](match, read)
        return [c for c in found if op is None or c.op == op]

    return _find


@pytest.fixture(scope="session")
def find_deep() -> Callable[..., list[Composite]]:
    """Matches in ``fn(*args)`` and in the bodies of its control flow (not proven)."""

    def walk(jaxpr: Any) -> list[Composite]:
        found = list(find_composites(jaxpr))
        for node in inlined(jaxpr).nodes:
            if node.name != "custom_vjp_call":
                for _, sub in _compat.sub_jaxprs(node.params):
                    found += walk(sub)
        return found

    return lambda fn, *args: walk(jax.make_jaxpr(fn)(*args))


@pytest.fixture
def variables(rand) -> Callable[..., Any]:
    """``variables(init, *args)``: a tree as ``init(key, *args)`` makes it, without compiling the initialisers."""

    def make(init: Callable[..., Any], *args: Any) -> Any:
        shapes = jax.eval_shape(init, jax.random.key(0), *args)
        return jax.tree.map(lambda s: rand(*s.shape).astype(s.dtype), shapes)

    return make


@pytest.fixture
def rand() -> Callable[..., jax.Array]:
    """``rand(*shape)``: normal numbers, new ones at each call."""
    rng = np.random.default_rng(0)
    return lambda *shape: jax.numpy.asarray(rng.normal(size=shape), jax.numpy.float32)
