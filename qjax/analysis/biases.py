"""The bias that follows a linear site: found on the jaxpr, whatever the module library.

From the result of a product the search goes forward through casts, transposes, reshapes that keep channels apart, and
out of jitted functions, up to the first addition. What is added has to be a view of one parameter leaf that runs along
the output channels of the site (and along the axes that its product runs over in parallel, such as experts), along all
of them, and along nothing else; and nothing else may read it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qjax._compat import open_jaxpr, sub_jaxprs
from qjax.analysis.naming import Site, SliceKey
from qjax.analysis.provenance import Ref
from qjax.analysis.reads import Path
from qjax.analysis.sites import views
from qjax.formats.layout import pair_dimensions

if TYPE_CHECKING:
    from qjax.program import Program

_SAME = {"convert_element_type", "copy", "copy_p", "name", "sharding_constraint", "optimization_barrier", "pvary"}
_CALLS = {"pjit", "jit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}


@dataclasses.dataclass(frozen=True)
class Bias:
    """The bias of a site.

    Attributes:
        leaf: its leaf.
        key: which slice of the leaf.
        axes: for each axis of the slice, the axis of the site's weight leaf along which it runs; None for size 1.
    """

    leaf: str
    key: SliceKey
    axes: tuple[int | None, ...]


@dataclasses.dataclass
class _Here:
    """A value on its way: where it is, and which weight axis each of its dimensions is (None: tokens and such)."""

    path: Path
    body: Any
    var: Any
    labels: list[int | None]


def bias_of(program: Program, name: str) -> Bias | str:
    """Return the bias that is added to what a linear site gives, or why there is none.

    Args:
        program: the trace.
        name: of a dot, conv or ragged_dot site.
    """
    site = program.site(name)
    read = program.analysis.reads[site.read]
    if site.op not in ("dot", "conv") or read.ref is None or read.side is None:
        return "products of ragged groups have no bias of their own" if site.op == "ragged_dot" else "it is no product"
    body, eqn = _at(program, read.path)
    labels = _labels(eqn, read.side, read.ref)
    if isinstance(labels, str):
        return labels
    here = _Here(read.path[:-1], body, eqn.outvars[0], labels)
    while True:
        users = [e for e in here.body.eqns if any(v is here.var for v in e.invars)]
        leaves = [n for n, v in enumerate(here.body.outvars) if v is here.var]
        if len(users) + len(leaves) != 1:
            return "its result is used in several places" if users or leaves else "its result is not used"
        if leaves:
            moved = _outside(program, here, leaves[0])
            if moved is None:
                return "nothing is added to its result before it leaves a loop or the function"
            here = moved
            continue
        (user,) = users
        kind = user.primitive.name
        if kind == "add":
            return _added(program, site, here, user)
        if kind in _CALLS:
            return "its result goes into a function before anything is added"
        after = _forward(user, here.labels)
        if isinstance(after, str):
            return after
        here = dataclasses.replace(here, var=user.outvars[0], labels=after)


def _at(program: Program, path: Path) -> tuple[Any, Any]:
    """The body that an equation stands in, and the equation."""
    jaxpr, eqn = open_jaxpr(program.jaxpr), None
    for part in path:
        if isinstance(part, int):
            eqn = jaxpr.eqns[part]
        else:
            assert eqn is not None
            jaxpr = open_jaxpr(dict(sub_jaxprs(eqn.params))[part])
    return jaxpr, eqn


def _outside(program: Program, here: _Here, number: int) -> _Here | None:
    """The same value behind the call that its body belongs to."""
    if not here.path:
        return None
    path = here.path[:-1]  # of the equation that the body belongs to
    body, call = _at(program, path)
    if call.primitive.name not in _CALLS:
        return None
    return _Here(path[:-1], body, call.outvars[number], here.labels)


def _labels(eqn: Any, side: int, ref: Ref) -> list[int | None] | str:
    """The weight axis behind each dimension of a product's result."""

    def axis(d: int) -> int | None:
        atoms = [a for a in ref.dims[d] if a[2] != 1]
        if not atoms:
            return None
        if len(atoms) > 1 or atoms[0][1] != 1:
            raise _MergedError
        return atoms[0][0]

    rank = len(eqn.outvars[0].aval.shape)
    out: list[int | None] = [None] * rank
    try:
        if eqn.primitive.name == "conv_general_dilated":
            numbers = eqn.params["dimension_numbers"]
            if eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1:
                return "its convolution runs over groups of channels"
            out[numbers.out_spec[1]] = axis(numbers.rhs_spec[0])
            return out
        contract, batch = eqn.params["dimension_numbers"]
        free = [
            [d for d in range(len(v.aval.shape)) if d not in contract[k] and d not in batch[k]]
            for k, v in enumerate(eqn.invars[:2])
        ]
        for n, d in enumerate(batch[side]):
            out[n] = axis(d)
        first = len(batch[side]) + (len(free[0]) if side else 0)
        for n, d in enumerate(free[side]):
            out[first + n] = axis(d)
    except _MergedError:
        return "its weight is reshaped so that output channels are of several axes"
    return out


class _MergedError(Exception):
    """A dimension that is several axes of a leaf, or a part of one."""


def _forward(eqn: Any, labels: list[int | None]) -> list[int | None] | str:
    """Labels of the result of an equation that only moves numbers, or why it is none."""
    kind, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if kind in _SAME:
        return labels
    if kind == "transpose":
        return [labels[d] for d in eqn.params["permutation"]]
    if kind in ("reshape", "squeeze", "expand_dims"):
        return _reshaped(tuple(eqn.invars[0].aval.shape), tuple(shape), labels)
    return f"{kind} stands between it and anything that is added"


def _reshaped(old: tuple[int, ...], new: tuple[int, ...], labels: list[int | None]) -> list[int | None] | str:
    out: list[int | None] = [None] * len(new)
    for left, right in pair_dimensions(old, new):
        kept = [labels[d] for d in left if old[d] != 1]
        there = [d for d in right if new[d] != 1]
        if any(label is not None for label in kept):
            if len(kept) != 1 or len(there) != 1:
                return "its result is reshaped across output channels before anything is added"
            out[there[0]] = kept[0]
    return out


@functools.lru_cache(maxsize=8)
def _views(program: Program) -> dict[tuple[Path, Any], Ref]:
    return views(program.jaxpr, list(program.leaf_names), [tuple(a.shape) for a in program.leaf_avals])


def _added(program: Program, site: Site, here: _Here, eqn: Any) -> Bias | str:
    """The bias, from the addition of it."""
    others = [v for v in eqn.invars if v is not here.var]
    found = _source(program, here, others[0]) if len(others) == 1 and _is_value(others[0]) else None
    if found is None:
        return "what is added to its result is no parameter"
    ref, dims = found
    name = program.leaf_names[ref.leaf]
    if ref.ranges:
        return f"only a part of {name} is added to its result"
    axis_of: dict[int, int | None] = {}  # axis of the bias leaf -> axis of the weight leaf
    for d, label in enumerate(here.labels):
        atoms = [a for a in ref.dims[dims[d]] if a[2] != 1] if dims[d] is not None else []  # pyright: ignore
        if not atoms and label is None:
            continue
        if not atoms:
            return f"{name} is shared by output channels"
        if label is None:
            return f"{name} runs along more than the output channels"
        if len(atoms) > 1 or atoms[0][1] != 1:
            return f"{name} is reshaped or looked up before it is added"
        axis_of[atoms[0][0]] = label
    key = _key(program, site, ref)
    if isinstance(key, str):
        return f"{name} {key}"
    taken = {axis for axis, _ in key}
    shape = program.leaf_avals[ref.leaf].shape
    rest = [a for a in range(len(shape)) if a not in taken]
    if any(a not in axis_of and shape[a] != 1 for a in rest):
        return f"{name} runs along more than the output channels"
    if not _alone(program, ref):
        return f"{name} is read in other places too"
    return Bias(name, key, tuple(axis_of.get(a) for a in rest))


def _source(program: Program, here: _Here, var: Any) -> tuple[Ref, list[int | None]] | None:
    """The view of a leaf that a value repeats, and which of its dimensions stands behind each of the value's."""
    ref = _views(program).get((here.path, var))
    if ref is not None:
        return ref, list(range(len(ref.dims)))
    made = next((e for e in here.body.eqns if any(v is var for v in e.outvars)), None)
    if made is None or not made.invars or not _is_value(made.invars[0]):
        return None
    kind = made.primitive.name
    if kind not in (*_SAME, "broadcast_in_dim", "reshape"):
        return None
    inner = _source(program, here, made.invars[0])
    if inner is None or kind in _SAME:
        return inner
    ref, dims = inner
    old, new = tuple(made.invars[0].aval.shape), tuple(var.aval.shape)
    if kind == "reshape":
        moved = _reshaped(old, new, dims)
        return None if isinstance(moved, str) else (ref, moved)
    out: list[int | None] = [None] * len(new)
    for d, at in enumerate(made.params["broadcast_dimensions"]):
        if old[d] == new[at]:
            out[at] = dims[d]
    return ref, out


def _key(program: Program, site: Site, ref: Ref) -> SliceKey | str:
    """Which slice of the bias leaf belongs to a site, or what is wrong with it."""
    table = program.slices[site.read]
    steps = [step for step, key in table.by_step.items() if key == site.slice]
    loops = {index.loop for index in ref.index if index.loop is not None}
    if not loops <= set(table.loops):
        return "has several slices for one weight"
    if len(set(table.by_step.values())) > 1 and any(
        len({key for step, key in table.by_step.items() if _but(step, n) == _but(steps[0], n)}) > 1
        for n, loop in enumerate(table.loops)
        if loop not in loops
    ):
        return "is shared by several weights"
    key = []
    for index in ref.index:
        if index.loop is None:
            key.append((index.axis, index.values[0]))
            continue
        at = {index.values[step[table.loops.index(index.loop)]] for step in steps}
        if len(at) != 1:
            return "has several slices for one weight"
        key.append((index.axis, at.pop()))
    return tuple(sorted(key))


def _is_value(v: Any) -> bool:
    """Whether an operand is a variable and no literal."""
    return not hasattr(v, "val")


def _but(step: tuple[int, ...], n: int) -> tuple[int, ...]:
    return step[:n] + step[n + 1 :]


def _alone(program: Program, ref: Ref) -> bool:
    """Whether one place in the program reads these slices of the leaf."""
    mine = _positions(ref)
    return sum(_overlap(mine, other) for other in _ends(program).get(ref.leaf, ())) == 1


def _positions(ref: Ref) -> dict[int, frozenset[int]]:
    return {index.axis: frozenset(index.values) for index in ref.index}


def _overlap(a: dict[int, frozenset[int]], b: dict[int, frozenset[int]]) -> bool:
    return all(a[axis] & b[axis] for axis in set(a) & set(b))


@functools.lru_cache(maxsize=8)
def _ends(program: Program) -> dict[int, list[dict[int, frozenset[int]]]]:
    """Leaf -> the slices that each equation reads which makes something else of a view of the leaf."""
    table, out = _views(program), {}
    for path, eqn in _equations(open_jaxpr(program.jaxpr), ()):
        if sub_jaxprs(eqn.params) or all((path, v) in table for v in eqn.outvars):
            continue
        for ref in {table[path, v] for v in eqn.invars if _is_value(v) and (path, v) in table}:
            out.setdefault(ref.leaf, []).append(_positions(ref))
    return out


def _equations(jaxpr: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Every equation with the address of its body."""
    for n, eqn in enumerate(jaxpr.eqns):
        yield path, eqn
        for where, inner in sub_jaxprs(eqn.params):
            yield from _equations(open_jaxpr(inner), (*path, n, where))
