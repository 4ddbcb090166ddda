"""Which lowering each quantized product, or attention over a cache, of a whole function takes, without compiling it.

`qjax.ops.choose` answers for one product; this one traces a function, such as a decode step of packed weights, and asks
for each of its products as the compiler will: by format, shapes, dtype, platform and device. Products are called by the
parameter that their weight is, which is followed through control flow and views.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from qjax import _compat
from qjax.formats import QArray
from qjax.kernels import Problem, select
from qjax.kernels.devices import described, platform_here
from qjax.kernels.registry import refusal
from qjax.ops.attention import problem_of, q_attention_p
from qjax.ops.base import LinearOp, op_of


@dataclasses.dataclass(frozen=True)
class Taken:
    """A product and the lowering that it takes.

    Attributes:
        name: path of the weight in the first argument, or of a later one with its number in front (that of the keys for
            attention over a cache); empty if unknown.
        problem: what is computed.
        lowering: name of the lowering.
        repeats: how often: more than once inside a scan.
        instead: why a kernel that the weight is packed for does not compute it; empty if it does, or there is none.
    """

    name: str
    problem: Problem
    lowering: str
    repeats: int = 1
    instead: str = ""

    def __str__(self) -> str:
        """Say it in a line."""
        times = f" ({self.repeats} times)" if self.repeats > 1 else ""
        why = f", because {self.instead}" if self.instead else ""
        return f"{self.name or 'a product'}{times}: {self.lowering}{why}"


class TakenList(tuple[Taken, ...]):
    """The products of a function, in program order; printed as a line each."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no quantized products"


def lowerings(
    fn: Callable[..., Any], *args: Any, device: str | None = None, platform: str | None = None, devices: int = 1
) -> TakenList:
    """Return what computes each quantized product of a function, in program order; ``print`` shows a line for each.

    Args:
        fn: a model, or what `Model.bind` returns.
        *args: its arguments, arrays or `jax.ShapeDtypeStruct`, packed weights among them.
        device: a GPU that need not be there: "a100", "a10", "l4", "l40s", "rtx4090", "h100", "h200", "b200". None: the
            device that is compiled for here, which a `jax.sharding.AbstractDevice` of the mesh may describe as well.
        platform: "cuda", "cpu", ...; None: that of the device.
        devices: over which the compiler may partition products.

    Raises:
        DeviceError: for another device, with those that there are.
    """
    with described(device) if device else contextlib.nullcontext():
        return _lowerings(fn, args, platform or platform_here(), devices)


def _lowerings(fn: Callable[..., Any], args: tuple[Any, ...], platform: str, devices: int) -> TakenList:
    paths = jax.tree_util.tree_leaves_with_path(args, is_leaf=lambda a: isinstance(a, QArray))
    names = [_path(path) for path, leaf in paths for _ in jax.tree.leaves(leaf)]
    leaves, tree = jax.tree.flatten(args)
    closed = jax.make_jaxpr(lambda *leaves: fn(*jax.tree.unflatten(tree, leaves)))(*leaves)
    out: list[Taken] = []
    _walk(closed.jaxpr, names, 1, platform, devices, out)
    return TakenList(out)


def _path(path: Sequence[Any]) -> str:
    (first, *rest) = path
    name = jax.tree_util.keystr(tuple(rest), simple=True, separator="/")
    return name if first.idx == 0 else f"{first.idx}/{name}".rstrip("/")


def _walk(jaxpr: Any, names: Sequence[str], repeats: int, platform: str, devices: int, out: list[Taken]) -> None:
    """Go through the equations; ``names`` has what each input was read from, or ""."""
    known = dict(zip(reversed(jaxpr.invars), reversed(names), strict=False))
    of = lambda v: "" if hasattr(v, "val") else known.get(v, "")  # noqa: E731 (literals have no name)
    for eqn in jaxpr.eqns:
        op = op_of(eqn.primitive)
        if op is not None:
            out.append(_taken(op, eqn, of, repeats, platform, devices))
            continue
        if eqn.primitive is q_attention_p:
            problem, named = problem_of(eqn.params["call"], [v.aval for v in eqn.invars], platform, devices)
            cache = next(filter(None, map(of, eqn.invars[4:])), "") or "attention"
            out.append(Taken(cache, problem, select(problem, named).name, repeats))
            continue
        inner = _compat.sub_jaxprs(eqn.params)
        times = repeats * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else repeats
        for _, sub in inner:
            # What a cond chooses by, and what a while loop gives to its condition, stands in front: ends are aligned.
            _walk(_compat.open_jaxpr(sub), [of(v) for v in eqn.invars], times, platform, devices, out)
        if not inner and eqn.invars and len(eqn.outvars) == 1:
            known[eqn.outvars[0]] = of(eqn.invars[0])


def _taken(op: LinearOp, eqn: Any, of: Callable[[Any], str], repeats: int, platform: str, devices: int) -> Taken:
    call = eqn.params["call"]
    problem = op.definition.problem(call.spec, call.operands([v.aval for v in eqn.invars]).shapes(), platform, devices)
    weight = jax.tree.leaves(call.operands([of(v) for v in eqn.invars]).w)
    lowering = select(problem, call.spec.implementation).name
    kernel = platform == "cuda" and lowering in ("dequantize", "reference")
    instead = (refusal(problem, "mosaic") or "") if kernel else ""
    return Taken(next((n for n in weight if n), ""), problem, lowering, repeats, instead)
