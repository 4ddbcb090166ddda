"""What the walk of `qjax.analysis.gauge` knows of one value, of one reading of a leaf, and of one obstacle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.analysis import layout
from qjax.analysis.naming import SliceKey
from qjax.analysis.reads import Path


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where in which leaf a parameter value lies.

    Attributes:
        leaf: number of the leaf.
        keys: the slices that it may be (several where only the run knows).
        axes: leaf axes that are not sliced away, in order; the dimensions of a slice.
        sizes: of the whole leaf along those axes.
        dims: for each dimension of the value the atoms of the leaf behind it (`Ref.dims`).
        ranges: ``(axis, start, size)`` where only part of an axis is read.
    """

    leaf: int
    keys: tuple[SliceKey, ...]
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    dims: tuple[Any, ...]
    ranges: tuple[tuple[int, int, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Param:
    """What a value that depends on parameters alone is computed from.

    Attributes:
        leaves: numbers of the leaves.
        place: the view of one leaf that it is, or None.
        eqn, ins: else the equation that computes it, and its operands.
    """

    leaves: frozenset[int]
    place: Place | None = None
    eqn: Any = None
    ins: tuple[Flow, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """What the walk knows of one value.

    Attributes:
        shape: of the value.
        codes: its unknowns, compact; none for parameters, which take any.
        same: along which dimensions all elements are equal.
        why: for a value without unknowns, number of the reason.
        number: the number that all elements are, if known.
        param: for a value that depends on parameters alone.
        data: whether arguments or random numbers enter.
        square: for rotations: it is the square of what the codes say, good for being summed up.
        scale: for rotations: a parameter that it was multiplied by, which is to be folded away.
    """

    shape: tuple[int, ...]
    codes: np.ndarray
    same: tuple[bool, ...]
    why: int = 0
    number: float | None = None
    param: Param | None = None
    data: bool = True
    square: bool = False
    scale: Flow | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Reason:
    """Why something is fixed: what kind of obstacle, and at which equation."""

    kind: str
    what: str = ""
    path: Path = ()
    steps: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One reading of a leaf slice: the codes that its elements are multiplied by, as summands.

    Attributes:
        terms: compact arrays of the rank of the slice; the exponents add up.
        ranges: the part of the leaf.
        offset: the leaf is read plus this number, and the sum is what is multiplied.
        path: address of the equation.
    """

    terms: tuple[np.ndarray, ...]
    ranges: tuple[tuple[int, int, int], ...]
    offset: float
    path: Path


def plain(shape: tuple[int, ...], same: tuple[bool, ...] | None = None, why: int = 0) -> Flow:
    """A value without unknowns."""
    same = tuple(n == 1 for n in shape) if same is None else same
    return Flow(shape, layout.none(len(shape)), same, why)


def step_of(flow: Flow, position: int) -> Flow:
    """One step of what is scanned."""
    codes = flow.codes[position if flow.codes.shape[0] > 1 else 0]
    param = Param(flow.param.leaves) if flow.param is not None else None
    return dataclasses.replace(flow, shape=flow.shape[1:], codes=codes, same=flow.same[1:], param=param)


def same_entry(one: Entry, two: Entry) -> bool:
    """Whether a reading says nothing new."""
    return (
        one.ranges == two.ranges
        and len(one.terms) == len(two.terms)
        and all(np.array_equal(a, b) for a, b in zip(one.terms, two.terms, strict=True))
    )


def by_support(terms: Sequence[np.ndarray]) -> dict[frozenset[int], np.ndarray]:
    """Terms by the dimensions in which they vary."""
    return {frozenset(d for d, n in enumerate(t.shape) if n > 1): t for t in terms if t.any()}


def literal(atom: Any) -> Flow:
    """The flow of a number written into the program."""
    shape = np.shape(atom.val)
    number = number_of(atom.val)
    return Flow(shape, layout.none(len(shape)), (number is not None,) * len(shape), number=number, data=False)


def captured(const: Any) -> Flow:
    """The flow of an array that the function closes over."""
    shape = tuple(getattr(const, "shape", np.shape(const)))
    number = number_of(const)
    same = (True,) * len(shape) if number is not None else tuple(n == 1 for n in shape)
    return Flow(shape, layout.none(len(shape)), same, number=number, data=False)


def number_of(value: Any) -> float | None:
    """The number that all elements of an array are, if it is short enough to look."""
    try:
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype.kind == "V" else array  # bfloat16 and its like
        if array.dtype.kind in "biuf" and 0 < array.size <= 4096 and bool((array == array.flat[0]).all()):
            return float(array.flat[0])
    except Exception:  # noqa: BLE001  (a tracer, a key, an abstract value: not a number)
        pass
    return None
