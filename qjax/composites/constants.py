"""Evaluating the parts of a level that depend on none of its inputs: scalars, masks.

Masks are often as large as the scores, so they are never evaluated whole: :func:`at` pulls the elements at given
coordinates through the graph, and everything upstream of a fixed value maps coordinates to coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from qjax.composites.graph import Value

_erf = np.vectorize(math.erf, otypes=[float])
_erfc = np.vectorize(math.erfc, otypes=[float])


def _select(which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    if len(cases) == 2:
        return np.where(which, cases[1], cases[0])
    return np.choose(which, cases)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if np.issubdtype(np.result_type(a, b), np.integer):  # XLA truncates towards zero, NumPy rounds down
        return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))
    return np.true_divide(a, b)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmod(a, b)


# primitive name -> NumPy function; those that need parameters stand in _WITH_PARAMS.
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": np.bitwise_and,
    "ceil": np.ceil,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "convert_element_type": lambda x: x,
    "copy": lambda x: x,
    "copy_p": lambda x: x,
    "cos": np.cos,
    "div": _divide,
    "eq": np.equal,
    "erf": _erf,
    "erfc": _erfc,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "integer_pow": lambda x, y: np.power(np.asarray(x, float), y) if y < 0 else np.power(x, y),
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "log": np.log,
    "log1p": np.log1p,
    "logistic": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "pow": np.power,
    "reduce_precision": lambda x: x,
    "rem": _remainder,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "select_n": _select,
    "sign": np.sign,
    "sin": np.sin,
    "sqrt": np.sqrt,
    "square": np.square,
    "stop_gradient": lambda x: x,
    "sub": np.subtract,
    "tanh": np.tanh,
    "xor": np.bitwise_xor,
}

# Shardings, names for remat policies, marks of shard_map: the value stays what it is.
ELEMENTWISE |= dict.fromkeys(
    ("mesh_cast", "name", "pbroadcast", "pcast", "pvary", "reshard", "sharding_constraint"), lambda x: x
)

# Each output element is one input element: how the coordinates map is in :func:`at`.
STRUCTURAL = frozenset({"broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "rev"})

EVALUABLE = frozenset(ELEMENTWISE) | STRUCTURAL | {"iota"}


def apply(name: str, params: dict[str, Any], operands: Sequence[Any], keep_floats: bool = False) -> Any:
    """Return what the elementwise primitive ``name`` computes, in NumPy.

    Args:
        name: a key of :data:`ELEMENTWISE`.
        params: the equation's parameters.
        operands: arrays or scalars that broadcast.
        keep_floats: ignore conversions between float types, so that everything stays in the operands' precision.
    """
    if name == "integer_pow":
        return ELEMENTWISE[name](operands[0], params["y"])
    if name == "convert_element_type":
        target = np.dtype(params["new_dtype"])
        return _cast(np.asarray(operands[0]), np.dtype(float) if keep_floats and target.kind not in "biu" else target)
    with np.errstate(all="ignore"):
        return ELEMENTWISE[name](*operands)


def _cast(x: np.ndarray, target: np.dtype) -> np.ndarray:
    if target.kind in "iu" and x.dtype.kind not in "biu":  # XLA saturates and turns NaN into zero, NumPy wraps
        limits = np.iinfo(target)
        x = np.nan_to_num(x.astype(np.float64), nan=0.0)
        whole = np.trunc(np.clip(x, float(limits.min), float(limits.max)))
        return np.where(x >= float(limits.max), limits.max, whole.astype(np.int64)).astype(target)
    return x.astype(target)


def uniform(value: Value) -> float | None:
    """Return the number that every element of ``value`` equals, if it follows from literals and constants alone."""
    if not value.fixed:
        return None
    try:
        cached = value._uniform
    except AttributeError:
        cached = value._uniform = _uniform(value)
    return cached


def _uniform(value: Value) -> float | None:
    if value.source is not None:
        return uniform(value.source)
    if value.node is None:
        if any(n != 1 for n in value.shape):
            return None
        array = np.asarray(value.const).reshape(())
        return float(array) if array.dtype.kind not in "cOUS" else None
    node = value.node
    if node.name in STRUCTURAL:
        return uniform(node.inputs[0])
    if node.name == "select_n":  # jnp.var guards a constant divisor: only the chosen case has to be known
        which = uniform(node.inputs[0])
        return None if which is None else uniform(node.inputs[1 + int(which)])
    if node.name not in ELEMENTWISE:
        return None
    operands = [uniform(v) for v in node.inputs]
    if any(x is None for x in operands):
        return None
    if node.output.dtype == bool and node.name in ("not", "and", "or", "xor"):
        operands = [np.bool_(x) for x in operands]
    result = apply(node.name, node.params, [np.asarray(x) for x in operands])
    return float(result) if np.ndim(result) == 0 else None


def at(value: Value, index: Sequence[np.ndarray]) -> np.ndarray:
    """Return the elements of a fixed value at the given coordinates.

    Args:
        value: a value with ``fixed`` set.
        index: one integer array per dimension, all of one shape (or broadcasting to it).

    Returns:
        Their elements, of a shape that broadcasts to the coordinates' common shape.
    """
    node = value.node
    if value.source is not None:
        return at(value.source, index)
    if node is None:
        array = value.const = np.asarray(value.const)  # one transfer from the device
        return array[tuple(index)] if array.ndim else array
    name, params = node.name, node.params
    if name == "iota":
        return np.asarray(index[params["dimension"]]).astype(params["dtype"])
    if name not in STRUCTURAL:
        operands = [at(v, _shared(v, index)) for v in node.inputs]
        if name == "convert_element_type":
            return _cast(operands[0], np.dtype(params["new_dtype"]))
        return np.asarray(apply(name, params, operands))
    source = node.inputs[0]
    return at(source, _source_index(name, params, source.shape, value.shape, index))


def _shared(value: Value, index: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Coordinates into an operand of an elementwise op: size-1 dimensions and scalars are shared."""
    if not value.shape:
        return []
    return [i if size != 1 else np.zeros_like(i) for size, i in zip(value.shape, index, strict=True)]


def _source_index(
    name: str, params: dict[str, Any], source: tuple[int, ...], shape: tuple[int, ...], index: Sequence[np.ndarray]
) -> list[np.ndarray]:
    if name == "broadcast_in_dim":
        dims = params["broadcast_dimensions"]
        return [index[d] if n != 1 else np.zeros_like(index[d]) for n, d in zip(source, dims, strict=True)]
    if name == "transpose":
        result = [index[0]] * len(source)
        for position, d in enumerate(params["permutation"]):
            result[d] = index[position]
        return result
    if name == "squeeze":
        rest = iter(index)
        zero = np.zeros(1, int) if not index else np.zeros_like(index[0])
        return [zero if d in params["dimensions"] else next(rest) for d in range(len(source))]
    if name == "slice":
        strides = params["strides"] or (1,) * len(source)
        return [s + i * k for s, i, k in zip(params["start_indices"], index, strides, strict=True)]
    if name == "rev":
        flipped = params["dimensions"]
        return [n - 1 - i if d in flipped else i for d, (n, i) in enumerate(zip(source, index, strict=True))]
    flat = np.zeros(1, int)  # reshape: both sides are row-major
    for n, i in zip(shape, index, strict=True):
        flat = flat * n + i
    return list(np.unravel_index(flat, source)) if source else []
