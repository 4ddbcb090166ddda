"""Finding LayerNorm and RMSNorm.

Backwards from a square root: :class:`_Stat` says what a value is in terms of one operand ``x`` ("mean of x over its
last axis", "1 / sqrt(var + eps)"), built up op by op with the position of each dimension, or nothing. Forwards from
there: the product with ``x`` (or ``x - mean``), and the scale and bias that follow.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from qjax.composites import axes as ax
from qjax.composites.base import Composite, between, ordered
from qjax.composites.constants import uniform
from qjax.composites.graph import Level, Node, Value

_DEPTH = 48  # operations between a statistic and its operand

_CASTS = frozenset({"convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision"})


@dataclasses.dataclass(frozen=True)
class Norm(Composite):
    """``output = (input - mean) / sqrt(var + eps) * scale + bias``, or without the mean.

    ``kind`` is ``"layer_norm"`` (statistics of ``input - mean``) or ``"rms_norm"`` (mean square of ``input``).

    Attributes:
        input: the operand, before any upcast.
        axes: dimensions of ``input`` that are normalised together, ascending.
        eps: added to the variance or mean square; 0.0 if nothing is.
        scale: the factor, before it is moved or cast; varies along ``axes`` only. None if there is none.
        bias: the summand, likewise.
    """

    op: ClassVar[str] = "norm"
    input: Value
    axes: tuple[int, ...]
    eps: float
    scale: Value | None = None
    bias: Value | None = None


@dataclasses.dataclass(frozen=True)
class _Stat:
    """What a value is: ``kind`` of ``x`` over ``axes``.

    Attributes:
        kind: ``sum``, ``mean``, ``squared_mean``; ``sum_square``, ``mean_square`` (of x); ``sum_deviation``,
            ``variance`` (of x - mean); ``std``, ``inverse`` (of ``variance + eps`` or ``mean_square + eps``).
        centered: for std and inverse, whether of the variance.
        dims: for each dimension of the value the dimension of ``x`` it runs along, None if it is constant.
    """

    kind: str
    x: Value
    axes: frozenset[int]
    dims: tuple[int | None, ...]
    eps: float | None = None
    centered: bool = False


def find_norms(level: Level) -> list[Norm]:
    """Return the LayerNorms and RMSNorms of a level.

    Matched: Flax Linen and NNX, Equinox, and formulas by hand: two-pass or one-pass variance, ``rsqrt``, ``sqrt`` and
    a quotient, or a power, scale and bias in any order of association, statistics in float32 inside.
    Not matched: batch and group normalisation, L2 normalisation, eps outside the root, scales that vary along
    dimensions which are not normalised (modulation by data).
    """
    return _Finder(level).find()


def variance_clips(level: Level) -> set[Node]:
    """Return the ``max(0, variance)`` nodes of a level, in whatever normalisation they stand: they are no ReLU."""
    finder = _Finder(level)
    return {node for node in level.named("max") if finder.stat(node.output) is not None}


class _Finder:
    def __init__(self, level: Level):
        self.level = level
        self.outputs = set(level.outputs)
        self.stats: dict[Value, _Stat | None] = {}
        self.depth = 0

    def find(self) -> list[Norm]:
        found: dict[Value, Norm] = {}
        for anchor in self.level.named("rsqrt", "sqrt", "pow"):
            stat = self.stat(anchor.output)
            if stat is not None and stat.kind in ("std", "inverse"):
                for norm in self.products(anchor.output, stat, None):
                    found.setdefault(norm.output, norm)
        return list(found.values())

    # ------------------------------------------------------------------------------------------ backwards
    def stat(self, value: Value) -> _Stat | None:
        """Return what statistic ``value`` is, if any."""
        if value.node is None or value.fixed:
            return None
        if value not in self.stats:
            if self.depth == _DEPTH:
                return None
            self.depth += 1
            self.stats[value] = self._stat(value, value.node)
            self.depth -= 1
        return self.stats[value]

    def _stat(self, value: Value, node: Node) -> _Stat | None:
        name = node.name
        if name == "reduce_sum":
            return self._sum(node)
        if name in ax.TRANSPARENT:
            source = ax.source_of(value)
            stat = self.stat(source) if source is not None else None
            dims = _moved(node, stat) if stat is not None else None
            return dataclasses.replace(stat, dims=dims) if stat is not None and dims is not None else None
        if name in ("div", "mul"):
            return self._scaled(node)
        if name in ("square", "integer_pow"):
            return self._power(node)
        if name == "sub":
            first, second = (self.stat(v) for v in node.inputs)
            if first is None or second is None or first.kind != "mean_square" or second.kind != "squared_mean":
                return None
            same = first.x is second.x and first.axes == second.axes and first.dims == second.dims
            return dataclasses.replace(first, kind="variance") if same else None
        if name == "max":
            for v, other in (node.inputs, node.inputs[::-1]):
                if uniform(other) == 0.0 and v.shape == value.shape:
                    stat = self.stat(v)
                    return stat if stat is not None and stat.kind in ("variance", "mean_square") else None
            return None
        if name == "select_n":
            which = uniform(node.inputs[0])
            chosen = node.inputs[1 + int(which)] if which is not None else None
            return self.stat(chosen) if chosen is not None and chosen.shape == value.shape else None
        if name == "add":
            for v, other in (node.inputs, node.inputs[::-1]):
                eps = uniform(other)
                if eps is not None and v.shape == value.shape:
                    stat = self.stat(v)
                    if stat is None or stat.kind not in ("variance", "mean_square") or stat.eps is not None:
                        return None
                    return dataclasses.replace(stat, eps=eps) if eps >= 0.0 else None
            return None
        if name in ("rsqrt", "sqrt"):
            return self._root(node.inputs[0], name == "rsqrt")
        if name == "pow":
            exponent = uniform(node.inputs[1])
            return self._root(node.inputs[0], exponent < 0) if exponent in (0.5, -0.5) else None
        return None

    def _root(self, radicand: Value, inverse: bool) -> _Stat | None:
        stat = self.stat(radicand)
        if stat is None or stat.kind not in ("variance", "mean_square"):
            return None
        kind = "inverse" if inverse else "std"
        return dataclasses.replace(stat, kind=kind, centered=stat.kind == "variance", eps=stat.eps or 0.0)

    def _sum(self, node: Node) -> _Stat | None:
        operand = node.inputs[0]
        axes = frozenset(int(d) % operand.ndim for d in node.params["axes"])
        dims = tuple(d for d in range(operand.ndim) if d not in axes)
        base = _squared(_uncast(operand))
        if base is None:
            return _Stat("sum", _plain(operand), axes, dims)
        deviation = self.deviation(base)
        if deviation is None:
            return _Stat("sum_square", _plain(base), axes, dims)
        if deviation.axes != axes:
            return None
        return dataclasses.replace(deviation, kind="sum_deviation", dims=dims)

    def _scaled(self, node: Node) -> _Stat | None:
        if node.name == "mul" and node.inputs[0] is node.inputs[1]:
            return self._power(node)
        if node.name == "div" and uniform(node.inputs[0]) == 1.0:
            stat = self.stat(node.inputs[1])
            return dataclasses.replace(stat, kind="inverse") if stat is not None and stat.kind == "std" else None
        found = ax.scaled(node)
        stat = self.stat(found[0]) if found is not None else None
        if found is None or stat is None or not stat.kind.startswith("sum"):
            return None
        if not math.isclose(found[1] * math.prod(stat.x.shape[d] for d in stat.axes), 1.0, rel_tol=1e-6):
            return None
        kinds = {"sum": "mean", "sum_square": "mean_square", "sum_deviation": "variance"}
        return dataclasses.replace(stat, kind=kinds[stat.kind])

    def _power(self, node: Node) -> _Stat | None:
        stat = self.stat(node.inputs[0])
        if stat is None:
            return None
        exponent = node.params["y"] if node.name == "integer_pow" else 2
        if stat.kind == "mean" and exponent == 2:
            return dataclasses.replace(stat, kind="squared_mean")
        if stat.kind == "std" and exponent == -1:
            return dataclasses.replace(stat, kind="inverse")
        return None

    def deviation(self, value: Value) -> _Stat | None:
        """Return the mean's statistic if ``value`` is ``x - mean(x)``."""
        node = _uncast(value).node
        if node is None or node.name != "sub":
            return None
        stat = self.stat(node.inputs[1])
        if stat is None or stat.kind != "mean" or _plain(node.inputs[0]) is not stat.x:
            return None
        return stat if _aligned(stat, node.inputs[1].shape, node.inputs[0].shape) else None

    # ------------------------------------------------------------------------------------------- forwards
    def products(self, value: Value, stat: _Stat, scale: Value | None) -> list[Norm]:
        """Return the norms that use ``value``, a std or an inverse std (perhaps times the scale)."""
        found: list[Norm] = []
        for user in dict.fromkeys(value.users):
            if user.name in ax.TRANSPARENT and user.output.ndim:
                moved = self.stat(user.output) if scale is None else stat
                if moved is not None and (scale is None or user.name in _CASTS):
                    found += self.products(user.output, moved, scale)
            elif user.name == "div" and stat.kind == "std" and user.inputs[1] is value:
                if uniform(user.inputs[0]) == 1.0:
                    found += self.products(user.output, dataclasses.replace(stat, kind="inverse"), scale)
                else:
                    found += self._normed(user, user.inputs[0], value, stat, scale)
            elif user.name == "mul" and stat.kind == "inverse":
                other = user.inputs[1] if user.inputs[0] is value else user.inputs[0]
                normed = self._normed(user, other, value, stat, scale)
                if not normed and scale is None and _aligned(stat, value.shape, stat.x.shape):
                    factor = self.parameter(other, stat)
                    if factor is not None and other.ndim == stat.x.ndim:
                        normed = self.products(user.output, stat, factor)
                found += normed
        return found

    def _normed(self, node: Node, numerator: Value, by: Value, stat: _Stat, scale: Value | None) -> list[Norm]:
        shape = stat.x.shape
        if node.output.shape != shape or numerator.shape != shape:
            return []
        if scale is None and not _aligned(stat, by.shape, shape):
            return []
        if not self.is_numerator(numerator, stat):
            product = _uncast(numerator).node
            if scale is not None or product is None or product.name != "mul":
                return []
            for a, b in (product.inputs, product.inputs[::-1]):
                if self.is_numerator(a, stat) and (scale := self.parameter(b, stat)) is not None:
                    break
            else:
                return []
        norm = self.finish(node.output, stat, scale)
        return [norm] if norm is not None else []

    def is_numerator(self, value: Value, stat: _Stat) -> bool:
        """Whether ``value`` is what the statistic is to divide: ``x`` or ``x - mean(x)``."""
        if not stat.centered:
            return _plain(value) is stat.x
        deviation = self.deviation(value)
        return deviation is not None and deviation.x is stat.x and deviation.axes == stat.axes

    def finish(self, output: Value, stat: _Stat, scale: Value | None) -> Norm | None:
        """Follow the normalised value through scale, bias and casts; None where it is no layer's norm."""
        axes = tuple(sorted(stat.axes))
        if 0 in stat.axes and len(axes) < stat.x.ndim:
            return None  # over the batch
        bias: Value | None = None
        end = output
        while len(end.users) == 1 and end not in self.outputs:
            user = end.users[0]
            if user.name in _CASTS:
                end = user.output
                if end.dtype == stat.x.dtype:
                    output = end
                continue
            if user.output.shape != stat.x.shape or len(user.inputs) != 2:
                break
            other = user.inputs[1] if user.inputs[0] is end else user.inputs[0]
            parameter = self.parameter(other, stat, user.name == "add", scale)
            if parameter is None:
                break
            if user.name == "mul" and scale is None and bias is None:
                scale = parameter
            elif user.name == "add" and bias is None:
                bias = parameter
            else:
                break
            output = end = user.output
        nodes = between([output], [v for v in (stat.x, scale, bias) if v is not None])
        if nodes is None:
            return None
        return Norm(
            kind="layer_norm" if stat.centered else "rms_norm",
            output=output,
            nodes=ordered(nodes),
            exposed=self.level.exposed(nodes, output),
            input=stat.x,
            axes=axes,
            eps=stat.eps or 0.0,
            scale=scale,
            bias=bias,
        )

    def parameter(self, value: Value, stat: _Stat, add: bool = False, after: Value | None = None) -> Value | None:
        """Return the scale or bias behind ``value``: something that varies along the normalised axes only.

        With every other dimension of size one (one token), a gate or a residual looks the same. Then it counts only if
        it has no more dimensions than are normalised, or is an input that nothing else reads; a bias in that doubt
        also has to follow a scale of its own shape, in a LayerNorm.

        Args:
            value: the other operand of a product or sum.
            stat: the statistic that the normalisation divides by.
            add: whether it is added.
            after: the scale found before.
        """
        shape = stat.x.shape
        if value.fixed and uniform(value) is not None or value.ndim != len(shape):
            return None
        if any(n not in (1, m) for n, m in zip(value.shape, shape, strict=True)):
            return None
        labels = ax.fresh(shape)
        source, below = ax.strip(value, ax.shared(value, shape, labels))
        along = set(ax.leaves([labels[d] for d in stat.axes]))
        varying = ax.proper(ax.leaves(below))
        if not varying or not set(varying) <= along:
            return None
        rest = math.prod(n for d, n in enumerate(shape) if d not in stat.axes)
        if rest != 1 or source.ndim == len(stat.axes) < len(shape):
            return source
        if source.node is not None or len(source.users) != 1:
            return None
        if add and not (stat.centered and after is not None and after.shape == source.shape):
            return None
        return source


def _uncast(value: Value) -> Value:
    while value.node is not None and value.node.name in _CASTS:
        value = value.node.inputs[0]
    return value


def _plain(value: Value) -> Value:
    """Return ``value`` without casts and without adding or subtracting zero."""
    while (node := value.node) is not None:
        if node.name in _CASTS:
            value = node.inputs[0]
        elif node.name in ("sub", "add") and uniform(node.inputs[1]) == 0.0 and node.inputs[0].shape == value.shape:
            value = node.inputs[0]
        else:
            break
    return value


def _squared(value: Value) -> Value | None:
    node = value.node
    if node is None:
        return None
    if node.name == "square" or node.name == "integer_pow" and node.params["y"] == 2:
        return node.inputs[0]
    if node.name == "mul" and _uncast(node.inputs[0]) is _uncast(node.inputs[1]):
        return node.inputs[0]
    return None


def _moved(node: Node, stat: _Stat) -> tuple[int | None, ...] | None:
    """Return where the dimensions of a statistic are after a transparent node."""
    source, shape = node.inputs[0].shape, node.output.shape
    if node.name == "broadcast_in_dim":
        dims: list[int | None] = [None] * len(shape)
        for i, d in enumerate(node.params["broadcast_dimensions"]):
            dims[d] = stat.dims[i] if source[i] == shape[d] else None
        return tuple(dims)
    if node.name == "transpose":
        return tuple(stat.dims[d] for d in node.params["permutation"])
    if node.name in ("reshape", "squeeze"):
        if [n for n in source if n != 1] != [n for n in shape if n != 1]:
            return None
        rest = iter(d for n, d in zip(source, stat.dims, strict=True) if n != 1)
        return tuple(next(rest) if n != 1 else None for n in shape)
    return stat.dims


def _aligned(stat: _Stat, shape: tuple[int, ...], x: tuple[int, ...]) -> bool:
    """Whether a statistic of ``shape`` broadcasts against ``x`` dimension by dimension."""
    if not shape:
        return len(stat.axes) == len(x)
    if len(shape) != len(x):
        return False
    for d, (n, m, along) in enumerate(zip(shape, x, stat.dims, strict=True)):
        if n == 1 and m == 1:
            continue
        if n == 1 or along is None:
            if d not in stat.axes:
                return False
        elif along != d:
            return False
    return True
