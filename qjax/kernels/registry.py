"""The table of lowerings: which function computes which quantized op, where, and when.

A lowering is a plain traceable function ``function(problem, x, w, act) -> array`` (ragged_dot adds ``group_sizes``)
that is registered for an op, a number format and a platform, with a condition on the problem:

    @register_lowering("dot", Int, "cpu", when=lambda p: p.weight.code_bits == 4 or "codes of 4 bits only")
    def my_dot(problem, x, w, act): ...

An op asks `select` when it is compiled. Candidates are tried by priority, then platform-specific before general, then
latest registered first, and the first whose condition holds is taken; the oracle is always last. A lowering that the
user names either runs or raises the reason why it cannot.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from qjax import plugins
from qjax.errors import LoweringError, near
from qjax.formats import Aux, Format
from qjax.kernels.figures import describe

Act = tuple[Format, Aux]
"""A format of activations and the aux that was fitted to them."""

Formats = type[Format] | str | tuple[type[Format] | str, ...]
"""Classes of formats, or the keys that they are registered under."""

Function = Callable[..., Any]
When = Callable[["Problem"], "bool | str"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a lowering may look at when it says whether it can run. Everything here is static.

    Attributes:
        op: "dot", "dot_transposed" (y = x @ W[N, K], summed over N: the gradient of dot), "conv", "ragged_dot" or
            "attention" (`qjax.kernels.attention` says what the others then are).
        platform: "cpu", "cuda", "rocm", "tpu", ...
        weight: format of the weight.
        act: format of the activations if they are quantized too, else None.
        rows: rows of x in one matrix product, all row dimensions together; None if it is not known when compiling.
        n: output elements of one row. For a convolution: output channels.
        k: elements that are summed over.
        stack: sizes of the stack axes (batched weights), () for one matrix.
        x_dtype: dtype of x.
        out_dtype: dtype of the result.
        devices: devices over which the compiler may still partition the op: 1 on one device and inside shard_map.
        settings: further static settings of the op, such as the strides of a convolution.
        capability: compute capability of the CUDA device, such as (9, 0); None elsewhere or where it is not known.
        terms: what is added to the product before it is rounded: "bias", "residual" (`qjax.kernels.dot.terms`).
        exported: whether it is lowered by `jax.export`, for a program that runs where kernels of ours may not be.
    """

    op: str
    platform: str
    weight: Format
    act: Format | None
    rows: int | None
    n: int
    k: int
    stack: tuple[int, ...] = ()
    x_dtype: np.dtype = np.dtype(np.float32)
    out_dtype: np.dtype = np.dtype(np.float32)
    devices: int = 1
    settings: Any = None
    capability: tuple[int, int] | None = None
    terms: tuple[str, ...] = ()
    exported: bool = False

    @property
    def matrices(self) -> int:
        """Number of matrices in the stack, 1 without a stack."""
        return math.prod(self.stack)

    def __str__(self) -> str:
        """Say the problem in words."""
        if self.op == "quantize_rows":
            size = f"{self.rows or 'any'} rows of {self.k}"
            return f"quantize_rows to {self.weight.name}{self.settings or ''}, {size}, on {self.platform}"
        if self.op == "log_attention":
            values = f" x {self.act.name} values" if self.act else ""
            size = f"{self.rows or 'any'} queries, {self.k} keys, {self.n} channels"
            return f"log_attention of {self.weight.name} probabilities{values}, {size}, on {self.platform}"
        if self.op == "attention":
            kinds = f"{self.weight.name} keys and {self.settings.values.name} values"
            size = f"{self.matrices} x {self.k} positions, {self.rows or 'any'} rows of queries each"
            return f"attention over {kinds}, {size}, on {self.platform}"
        act = f" x {self.act.name} activations" if self.act else ""
        stack = f" x {self.matrices}" if self.stack else ""
        weight = f"{self.weight.name} weights [{self.n}, {self.k}]"
        terms = f" + {' + '.join(self.terms)}" if self.terms else ""
        return f"{self.op} of {weight}{stack}{act}{terms}, {self.rows or 'any'} rows, on {self.platform}"


@dataclasses.dataclass(frozen=True)
class Lowering:
    """One entry of the table. See `register_lowering`."""

    name: str
    op: str
    function: Function
    format: Formats | None = None
    platform: str | None = None
    when: When | None = None
    worth: When | None = None
    priority: int = 0
    about: str = ""
    order: int = 0
    adds: bool | When = False
    picks: bool = False

    def reads(self, fmt: Format) -> bool:
        """Whether weights of this format are among those that it was registered for."""
        return self.format is None or any(_reads(kind, fmt) for kind in _kinds(self.format))

    def refuses(self, problem: Problem) -> str | None:
        """Return why this lowering cannot run, or None if it can."""
        if problem.op != self.op:
            return f"it is a lowering of {self.op}"
        if self.platform is not None and problem.platform != self.platform:
            return f"it runs on {self.platform}"
        if not self.reads(problem.weight):
            assert self.format is not None
            return f"it reads {' or '.join(_format_names(self.format))} weights"
        return _reason(self.when, problem)

    def declines(self, problem: Problem) -> str | None:
        """Return why this lowering is not taken unless it is named, or None if it is."""
        return self.refuses(problem) or _reason(self.worth, problem)

    def adds_terms(self, problem: Problem) -> bool:
        """Whether the function adds the terms of this problem itself."""
        return bool(problem.terms) and (self.adds(problem) is True if callable(self.adds) else self.adds)


def _reason(condition: When | None, problem: Problem) -> str | None:
    verdict = True if condition is None else condition(problem)
    if verdict is True:
        return None
    return verdict if isinstance(verdict, str) else "its condition on shapes and formats does not hold"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `choose` answers.

    Attributes:
        name: the lowering that would run.
        note: one sentence on its speed against float and why, from measured figures; empty if none is known.
        slower: whether it is expected to be slower than the float op.
    """

    name: str
    note: str = ""
    slower: bool = False


_TABLE: dict[str, list[Lowering]] = {}
_platform_hooks: list[Callable[[str], None]] = []
_counter = 0


def register_lowering(
    op: str,
    format: Formats | None = None,
    platform: str | None = None,
    when: When | None = None,
    *,
    worth: When | None = None,
    name: str | None = None,
    priority: int = 10,
    about: str = "",
    adds: bool | When = False,
    picks: bool = False,
) -> Callable[[Function], Function]:
    """Register a traceable function as a lowering of a quantized op; used as a decorator.

    Register at import. A function that was already compiled keeps the lowering that it was compiled with
    (``jax.clear_caches()`` forgets it).

    Args:
        op: "dot", "dot_transposed", "conv" or "ragged_dot".
        format: the weight formats it reads, by class or key, several in a tuple, or None for all.
        platform: "cpu", "cuda", "rocm", "tpu", or None for all.
        when: ``when(problem)`` returns True if it can run, else False or, better, the reason as a sentence.
        worth: like ``when``, for the question whether it is the better choice; asked only if no lowering is named.
        name: how `implementation=` calls it; by default the function's name. Functions for other formats may share a
            name; one for the same platform and formats takes the place of the former.
        priority: higher is tried first. The lowerings of qjax stand at 0 to 9, the oracle at -1.
        about: one line for the printed table.
        adds: whether the function adds terms itself, or a condition on the problem. It is then called with those that
            there are as further keywords, ``bias`` [*stack, N] and ``residual`` [*stack, *rows, N], adds them in
            float32 at least, and rounds once. Without it, it is asked for the product in float32, and the op adds.
        picks: whether the function reads one of a stack of weights where it lies. It is then called with a further
            keyword ``layer``, an int32 scalar, where w has the layers in front; without it, the layer is cut out first.

    The function is called as ``function(problem, x, w, act)``: x float [*stack, *rows, K]; w a QArray in its
    canonical view [*stack, N, K] (of a convolution: as the user sees it); act None or ``(format, aux)``. It returns
    [*stack, *rows, N] in ``problem.out_dtype``. `qjax.testing.check_lowering` compares it with the oracle.
    """

    def register(function: Function) -> Function:
        global _counter
        _counter += 1
        entry = Lowering(
            name or function.__name__,
            op,
            function,
            format,
            platform,
            when,
            worth,
            priority,
            about,
            _counter,
            adds,
            picks,
        )
        rows = _TABLE.setdefault(op, [])
        place = (entry.name, platform, _kinds(format or ()))
        rows[:] = [e for e in rows if (e.name, e.platform, _kinds(e.format or ())) != place]
        rows.append(entry)
        rows.sort(key=lambda e: (-e.priority, e.platform is None, -e.order))
        if platform is not None:
            for hook in _platform_hooks:
                hook(platform)
        return function

    return register


def on_new_platform(hook: Callable[[str], None]) -> None:
    """Call ``hook(platform)`` whenever a lowering for a platform is registered (the ops listen)."""
    _platform_hooks.append(hook)


def select(problem: Problem, implementation: str | None = None) -> Lowering:
    """Return the lowering that computes a problem.

    Args:
        problem: what is to be computed.
        implementation: the name of a lowering, or None to choose.

    Raises:
        LoweringError: if the named one does not exist or cannot run, with the reason.
    """
    rows = _TABLE.get(problem.op, [])
    if implementation is None:
        plugins.load()
        for entry in rows:
            if entry.declines(problem) is None:
                return entry
        raise LoweringError(f"no lowering for {problem}; register one with qjax.register_lowering({problem.op!r}, ...)")
    named = [e for e in rows if e.name == implementation]
    if not named:
        plugins.load()
        named = [e for e in rows if e.name == implementation]
    if not named:
        known = [e.name for e in rows]
        raise LoweringError(
            f"implementation={implementation!r} of {problem.op}{near(implementation, known)}; "
            f"there are {', '.join(dict.fromkeys(known))}, or None to choose"
        )
    entry = next((e for e in named if e.refuses(problem) is None), None)
    if entry is None:
        raise LoweringError(
            f"implementation={implementation!r} cannot compute the {problem}: {refusal(problem, implementation)}. "
            "Leave implementation=None to choose one that can"
        )
    return entry


def refusal(problem: Problem, name: str) -> str | None:
    """Return why no lowering of this name can compute a problem, or None if one can.

    Where several share the name, those that were registered for the format of the weight are asked.
    """
    named = [e for e in _TABLE.get(problem.op, []) if e.name == name]
    asked = [e for e in named if e.reads(problem.weight)] or named
    reasons = [e.refuses(problem) for e in asked]
    if None in reasons:
        return None
    return "; ".join(dict.fromkeys(filter(None, reasons))) or f"there is no {name} of {problem.op}"


def choose(
    op: str,
    w_fmt: Format,
    act_fmt: Format | None,
    shapes: tuple[int, ...],
    platform: str,
    *,
    x_dtype: Any = np.float32,
    devices: int = 1,
    settings: Any = None,
    capability: tuple[int, int] | None = None,
    implementation: str | None = None,
) -> Choice:
    """Say which lowering would run, and in words how fast it is beside the float op.

    Args:
        op: as in `Problem`.
        w_fmt: format of the weight.
        act_fmt: format of the activations, or None.
        shapes: ``(*stack, rows, N, K)``.
        platform: "cpu", "cuda", ...
        x_dtype: dtype of the activations.
        devices: devices over which the compiler may partition the op.
        settings: further static settings (a convolution's `ConvSpec`).
        capability: compute capability of a CUDA device, such as (9, 0).
        implementation: the name of a lowering, or None to choose.

    Raises:
        LoweringError: as `select` does.
    """
    *stack, rows, n, k = shapes
    dtype = np.dtype(x_dtype)
    size = (rows, n, k, tuple(stack))
    problem = Problem(op, platform, w_fmt, act_fmt, *size, dtype, dtype, devices, settings, capability)
    return choice_for(problem, implementation)


def choice_for(problem: Problem, implementation: str | None = None) -> Choice:
    """Say which lowering would compute a problem, and in words how fast it is beside the float op.

    Raises:
        LoweringError: as `select` does.
    """
    entry = select(problem, implementation)
    note, slower = describe(problem.op, entry.name, problem.weight, problem.act, problem.rows, problem.platform)
    return Choice(entry.name, note, slower)


@dataclasses.dataclass(frozen=True)
class LoweringTable:
    """The lowerings in the order in which they are tried; prints as a table.

    "terms" says where a bias and a residual are added: in the lowering, in it for some problems, or after it.
    """

    rows: tuple[Lowering, ...]

    def __str__(self) -> str:
        """Return the table as text."""
        head = ("op", "name", "platform", "weights", "terms", "about")
        body = [
            (e.op, e.name, e.platform or "any", ", ".join(_format_names(e.format)) if e.format else "any", *_says(e))
            for e in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head) - 1)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]])
            for line in [head, *body]
        ]
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def _says(entry: Lowering) -> tuple[str, str]:
    """Who adds a bias and a residual, and the line about the lowering."""
    if entry.op != "dot":
        return "", entry.about
    return "some in it" if callable(entry.adds) else "in it" if entry.adds else "after it", entry.about


def _kinds(formats: Formats) -> tuple[type[Format] | str, ...]:
    return formats if isinstance(formats, tuple) else (formats,)


def _reads(kind: type[Format] | str, fmt: Format) -> bool:
    return fmt.key == kind if isinstance(kind, str) else isinstance(fmt, kind)


def _format_names(formats: Formats) -> list[str]:
    return [kind if isinstance(kind, str) else kind.__name__ for kind in _kinds(formats)]


def lowering_table(op: str | None = None, platform: str | None = None) -> LoweringTable:
    """Return the lowerings of an op (None: all) that may run on a platform (None: any), in the order of trial.

    Raises:
        LoweringError: for an op or a platform that no lowering was registered for, with those that there are.
    """
    plugins.load()
    platforms = sorted(
        {"cpu", "cuda", "rocm", "tpu"} | {e.platform for row in _TABLE.values() for e in row if e.platform}
    )
    for what, given, known in (("op", op, sorted(_TABLE)), ("platform", platform, platforms)):
        if given is not None and given not in known:
            raise LoweringError(f"lowering_table: {what} {given!r}{near(given, known)}; there is {', '.join(known)}")
    rows = [e for name in sorted(_TABLE) if op in (None, name) for e in _TABLE[name]]
    return LoweringTable(tuple(e for e in rows if platform is None or e.platform in (None, platform)))
