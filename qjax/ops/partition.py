"""How a product that runs by a kernel is partitioned over devices, where the compiler may.

The compiler cannot look into a kernel, and would gather what it reads. `partitioned` wraps the product in
`jax.experimental.custom_partitioning`, with a rule for the propagation of shardings (Shardy) and a function for each
device, which is the same product of what the device holds:

    weight sharded over N       each device multiplies its rows; the result is sharded over N
    weight sharded over K       partial sums in float32, added over the devices (one all-reduce), then rounded
    activations over rows       each device multiplies its tokens
    bias, residual              cut as the result is; added by each device, or once, after partial sums
    stacks                      likewise, each device its matrices

    experts                     each device computes the tokens of its experts; the others' are zeros, and all are added
    convolutions                as a weight sharded over N, channels of the result, and activations over examples

The weight lies where it lies: what it is sharded by decides, and activations are brought there. A mesh axis that the
weight does not use may cut the rows. What can be cut: weights in neutral order where shards start on bytes and groups,
and weights packed in parts (`qjax.ops.pack` with ``parts``) at their parts. A weight that is packed whole is the same
on all devices, but for its stacks.

An op says what its dimensions are by `Roles`, and what a device does beyond computing what it holds (a ragged product
counts its tokens) by `QuantizedOp.on_device`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning

from qjax.formats.parts import TiledParts
from qjax.kernels.dot.terms import with_terms

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Roles:
    """What the dimensions of operands and result are: names of factors, or "" for one that is never cut.

    Attributes:
        operands: for each flat operand, the role of each of its dimensions.
        result: of the result.
        sizes: into how many units each role can be cut at most.
        weight: position of the largest array of the weight, whose sharding decides.
        summed: roles of which each device has terms of every sum; in float32 where they are rounded, the first of them.
        of_weight: roles that the weight alone decides.
    """

    operands: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]
    sizes: dict[str, int]
    weight: int
    summed: tuple[str, ...] = ("k",)
    of_weight: tuple[str, ...] = ("n", "k")


def arrays_of(operands: Any, avals: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the abstract arrays of activations and of the weight, from the leaves of `qjax.ops.base.Operands`."""
    first = 1 + len(jax.tree.leaves(operands.aux))
    return list(avals[:first]), list(avals[first : first + len(jax.tree.leaves(operands.w))])


def units_of(operands: Any, avals: Sequence[Any]) -> dict[str, int]:
    """Return into how many units N and K of a weight in its canonical view can be cut at most."""
    w, (of_x, own) = operands.w, arrays_of(operands, avals)
    along_k = [a.shape[-1] for a in [*of_x[1:], *own] if a.shape[-1] > 1]
    if isinstance(w.fmt, TiledParts):
        return {"n": own[1].shape[-2], "k": math.gcd(w.codes.shape[-1], *along_k)}
    if w.fmt.whole_matrix or w.layout.pad:
        return {"n": 1, "k": 1}
    return {"n": w.codes.shape[-2], "k": math.gcd(operands.x.shape[-1], *along_k)}


def largest(own: Sequence[Any]) -> int:
    """Return the position of the largest of the arrays of a weight."""
    return max(range(len(own)), key=lambda i: math.prod(own[i].shape) * own[i].dtype.itemsize)


def dot_roles(operands: Any, avals: Sequence[Any]) -> Roles:
    """Return the roles of a product x [*stack, *rows, K], W [*stack, N, K] -> y [*stack, *rows, N].

    Args:
        operands: `qjax.ops.base.Operands` of shapes.
        avals: its leaves.
    """
    x, w = operands.x, operands.w
    stacks = w.codes.ndim - 2
    stack = tuple(f"s{i}" for i in range(stacks))
    rows = tuple(f"r{i}" for i in range(x.ndim - stacks - 1))
    activations, own = arrays_of(operands, avals)
    sizes = {**units_of(operands, avals), **dict(zip((*stack, *rows), x.shape[:-1], strict=True))}

    def named(names: Sequence[str], shape: Sequence[int]) -> tuple[str, ...]:
        # A dimension of 1 is shared by all, or there is one of it.
        return tuple(r if d > 1 and sizes[r] > 1 else "" for r, d in zip(names, shape, strict=True))

    of_x = [named((*stack, *rows, "k"), a.shape) for a in activations]
    of_w = [named((*stack, "n", "k"), a.shape) for a in own]
    result = named((*stack, *rows, "n"), (*x.shape[:-1], w.codes.shape[-2]))
    places = {"bias": (*stack, "n"), "residual": (*stack, *rows, "n")}
    of_terms = [named(places[name], a.shape) for name, a in sorted(operands.terms.items())]
    return Roles((*of_x, *of_w, *of_terms), result, sizes, len(activations) + largest(own))


def sharding_rule(r: Roles, shapes: Sequence[Sequence[int]], result: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """Return the rule in the notation of `custom_partitioning`, and its keywords.

    A dimension that is longer than its role has units is two factors, "(k k3)", of which the first may be cut.
    """
    apart, order = [], []
    known: dict[str, int] = {}
    alone: set[str] = set()

    def text(names: Sequence[str], shape: Sequence[int]) -> str:
        out = []
        for role, size in zip(names, shape, strict=True):
            if role and size == r.sizes[role]:
                alone.add(role)
                order.append(role)
                out.append(role)
                continue
            rest = f"z{len(apart)}"
            apart.append(rest)
            order.extend([role, rest] if role else [rest])
            out.append(f"({role} {rest})" if role else rest)
            if role:
                known.update({role: r.sizes[role], rest: size // r.sizes[role]})
        return " ".join(out)

    operands = ", ".join(text(names, shape) for names, shape in zip(r.operands, shapes, strict=True))
    rule = f"{operands} -> {text(r.result, result)}"
    seen = list(dict.fromkeys(order))
    keywords: dict[str, Any] = {name: size for name, size in known.items() if name not in alone}
    keywords["need_replication_factors"] = tuple(name for name in seen if name in apart)
    keywords["reduction_factors"] = tuple(name for name in seen if name in r.summed)
    return rule, keywords


def chosen_axes(r: Roles, specs: Sequence[Sequence[Any]], result: Sequence[Any], mesh: Any) -> dict[str, Axes]:
    """Return the mesh axes that cut each role: those of the weight, then those of the rows that are left.

    Args:
        r: the roles.
        specs: partition specs of the operands, as propagated.
        result: that of the result.
        mesh: for the sizes of axes.
    """
    out: dict[str, Axes] = {}
    used: set[str] = set()
    places = [(r.operands[r.weight], specs[r.weight]), (r.result, result), (r.operands[0], specs[0])]
    for names, spec in places:
        for role, entry in zip(names, [*spec, *[None] * (len(names) - len(spec))], strict=True):
            axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
            others = role in r.of_weight and names is not r.operands[r.weight]
            if not role or not axes or role in out or others or used & set(axes):
                continue
            if r.sizes[role] % math.prod(mesh.shape[a] for a in axes) == 0:
                out[role] = axes
                used |= set(axes)
    return out


def partitioned(op: Any, call: Any, avals: Sequence[Any]) -> Any:
    """Return a function of the flat operands that computes the product, partitioned as the module says.

    Args:
        op: the `qjax.ops.base.LinearOp`.
        call: its static part.
        avals: the abstract operands.
    """
    operands = call.operands(avals)
    r = op.definition.roles(call.spec, operands, avals)
    kept = [i for i, a in enumerate(avals) if math.prod(a.shape)]  # arrays without numbers are made again
    out_shape = op.definition.out_shape(call.spec, operands)
    r = dataclasses.replace(r, operands=tuple(r.operands[i] for i in kept), weight=kept.index(r.weight))

    def every_of(given: Sequence[Array], rows: int) -> Any:
        every: list[Any] = [None] * len(avals)
        for i, a in zip(kept, given, strict=True):
            every[i] = a
        for i, a in enumerate(avals):
            if every[i] is None:  # codes of a weight in tiles: [*stack, N, 0], of the stack that is here
                stack = given[r.weight].shape[: a.ndim - 2]
                every[i] = jnp.zeros((*stack, rows, a.shape[-1]), a.dtype)
        return call.operands(every)

    spec = dataclasses.replace(call.spec, out_sharding=None, fitted=False)  # a device may have a part of each row
    n = operands.w.codes.shape[-2] if operands.w.codes.ndim > 1 else 1

    @custom_partitioning
    def whole(*given: Array) -> Array:
        return op.definition.on_device(op, spec, every_of(given, n), {})

    def partition(mesh: Any, arg_shapes: Any, result_shape: Any) -> Any:
        axes = chosen_axes(r, [a.sharding.spec for a in arg_shapes], result_shape.sharding.spec, mesh)
        place = lambda names: jax.NamedSharding(mesh, jax.P(*(axes.get(name) for name in names)))  # noqa: E731
        summed = tuple(axis for role in r.summed for axis in axes.get(role, ()))
        rounded = r.summed[:1] and axes.get(r.summed[0]) and np.dtype(np.float64) != spec.out_dtype
        local = dataclasses.replace(spec, out_dtype=np.dtype(np.float32)) if rounded else spec
        rows = n // math.prod(mesh.shape[a] for a in axes.get("n", ()))

        def on_device(*given: Array) -> Array:
            here = every_of(given, rows)
            if not summed:
                return op.definition.on_device(op, local, here, axes)
            y = lax.psum(op.definition.on_device(op, local, here.without_terms(), axes), summed)
            return with_terms(y, here.terms, spec.out_dtype)

        return mesh, on_device, place(r.result), tuple(place(names) for names in r.operands)

    rule, keywords = sharding_rule(r, [avals[i].shape for i in kept], out_shape)
    whole.def_partition(partition, sharding_rule=rule, **keywords)
    return lambda *leaves: whole(*(leaves[i] for i in kept))
