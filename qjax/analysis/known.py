"""Integers that analysis can compute: literals, iotas, loop counters, and the arithmetic on them.

They are what tells ``stack[i]`` inside a ``fori_loop`` from an embedding lookup.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """An integer (or boolean) value that analysis knows.

    Attributes:
        value: the value; with a leading axis over time steps when ``loop`` is set.
        loop: id of the loop over whose steps the value varies, or None.
    """

    value: np.ndarray
    loop: int | None = None


_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "sign": np.sign,
    "abs": np.abs,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "rem": np.fmod,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "select_n": lambda which, *cases: np.select([which == i for i in range(len(cases))], cases),
    "copy": lambda x: x,
    "stop_gradient": lambda x: x,
}
_MAX_KNOWN = 4096  # beyond this an array is data, not an index


def known_result(eqn: Any, ins: list[Known | None]) -> Known | None:
    """Evaluate one integer equation on known operands; None when it is not index arithmetic."""
    name = eqn.primitive.name
    aval = eqn.outvars[0].aval
    shape = getattr(aval, "shape", None)
    if shape is None or len(shape) > 1 or not all(isinstance(n, int) and n <= _MAX_KNOWN for n in shape):
        return None  # data, or of a size that only the run knows
    if name == "iota":
        return Known(np.arange(aval.shape[0])) if len(aval.shape) == 1 else None
    if any(k is None for k in ins) or not ins or not _integral(aval.dtype):
        return None
    loops = {k.loop for k in ins if k is not None and k.loop is not None}
    if len(loops) > 1:
        return None
    loop = loops.pop() if loops else None
    rank = len(aval.shape) + (loop is not None)
    # operands without the loop axis broadcast from the right
    values = [k.value for k in ins if k is not None]
    if name in _ELEMENTWISE:
        return Known(np.asarray(_ELEMENTWISE[name](*values)), loop)
    if name == "div":
        return Known((np.sign(values[0]) * np.sign(values[1])) * (abs(values[0]) // abs(values[1])), loop)
    if name == "convert_element_type":
        return Known(values[0].astype(np.int64) if np.dtype(eqn.params["new_dtype"]) != bool else values[0] != 0, loop)
    if name in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims"):
        if name == "broadcast_in_dim" and values[0].size not in (1, math.prod(aval.shape)) and loop is None:
            return None
        lead = values[0].shape[:1] if loop is not None else ()
        if math.prod(aval.shape) == 1 or values[0].size == math.prod((*lead, *aval.shape)):
            return Known(values[0].reshape((*lead, *aval.shape)), loop)
        if loop is None and values[0].size == 1:
            return Known(np.broadcast_to(values[0].reshape(()), aval.shape), loop)
        return None
    if name == "slice" and loop is None and values[0].ndim == 1:
        p = eqn.params
        return Known(values[0][p["start_indices"][0] : p["limit_indices"][0] : (p["strides"] or (1,))[0]], None)
    if (
        name in ("dynamic_slice", "gather")
        and values[0].ndim == 1
        and rank == len(aval.shape) + 1
        and ins[0] is not None
    ):
        if ins[0].loop is None and values[1].size == values[1].shape[0] and math.prod(aval.shape) == 1:
            picked = values[0][np.clip(values[1].reshape(-1), 0, len(values[0]) - 1)]
            return Known(picked.reshape((-1, *aval.shape)), loop)
    return None


def _integral(dtype: Any) -> bool:
    try:
        kind = np.dtype(dtype).kind
    except TypeError:  # an extended dtype, such as PRNG keys
        return False
    return kind in "iub"
