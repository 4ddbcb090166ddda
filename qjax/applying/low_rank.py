"""Which weights get low-rank adapters, and what becomes of a weight whose adapter is merged into it.

An adapter belongs to a slice of a leaf, as storage does: products that read the same slice share it, or what was
trained could not be merged into one weight. A slice that something else reads too cannot have one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from qjax._compat import open_jaxpr, sub_jaxprs
from qjax.analysis.naming import Site
from qjax.analysis.provenance import DYNAMIC, GATHERED
from qjax.errors import RecipeError
from qjax.formats import QArray, QStack, assemble, canonical_matrix
from qjax.formats.rotation import kept_as
from qjax.program import Program
from qjax.recipe import compile_pattern, nearest
from qjax.rewriting.low_rank import Adapter

ADAPTED_OPS = ("dot", "ragged_dot")
"""Ops whose weights can be adapted."""

_BORDERS = {
    "custom_vjp_call": "it is inside a function with a derivative rule of its own, which knows nothing of adapters",
    "custom_jvp_call": "it is inside a function with a derivative rule of its own, which knows nothing of adapters",
    "shard_map": "it is inside shard_map, where each device sees a part of the weight",
}


@dataclasses.dataclass(frozen=True)
class Targets:
    """Which sites get adapters of which rank.

    Attributes:
        patterns: ``(pattern, rank)`` in the order in which they are tried on a site's name; None leaves it alone.
        everywhere: the rank that was given for all products; patterns are empty then.
    """

    patterns: tuple[tuple[str, int | None], ...] = ()
    everywhere: int | None = None

    def __post_init__(self) -> None:
        for pattern, rank in (*self.patterns, *([("**", self.everywhere)] if self.everywhere is not None else [])):
            if not isinstance(pattern, str) or not pattern:
                raise RecipeError(f"lora: a key is a pattern for site names such as '**/attn/**', not {pattern!r}")
            if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
                raise RecipeError(
                    f"lora: the rank of {pattern!r} is an integer of 1 or more, or None to leave it alone; not {rank!r}"
                )
            compile_pattern(pattern)

    @staticmethod
    def of(given: Any) -> Targets:
        """Targets from a rank or a mapping of patterns to ranks."""
        if isinstance(given, Targets):
            return given
        if isinstance(given, Mapping):
            if not any(rank is not None for rank in given.values()):
                raise RecipeError("lora: no pattern has a rank; give at least one, such as {'**/attn/**': 16}")
            return Targets(tuple(given.items()))
        if given is None or isinstance(given, str):
            raise RecipeError(f"lora takes a rank, or a mapping such as {{'**/attn/**': 16}}, not {given!r}")
        return Targets(everywhere=given)


@dataclasses.dataclass(frozen=True)
class Slot:
    """One adapter.

    Attributes:
        site: its name in a state: the first site, in program order, that reads the slice.
        readers: every site that reads it, with the adapter as that site sees it.
        leaf: position of the leaf. index: the slice of the leaf, for ``leaf[index]``.
        axes: the leaf axes of ``leaf[index]``, in order.
        sizes: of those axes.
        adapter: as the first site sees it.
    """

    site: str
    readers: tuple[tuple[str, Adapter], ...]
    leaf: int
    index: tuple[Any, ...]
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    adapter: Adapter

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors: ``a`` [*batch, K, r] and ``b`` [*batch, r, N]."""
        batch, ins, outs = (self._sizes(axes) for axes in (self.adapter.batch, self.adapter.ins, self.adapter.outs))
        r = self.adapter.rank
        return {"a": (*batch, math.prod(ins), r), "b": (*batch, r, math.prod(outs))}

    def _sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.sizes[self.axes.index(a)] for a in axes)

    def delta(self, factors: Mapping[str, Any]) -> Any:
        """``scale · A B`` in the layout of ``leaf[index]``, float32."""
        groups = (*self.adapter.batch, *self.adapter.ins, *self.adapter.outs)
        a, b = (jnp.asarray(factors[k], jnp.float32) for k in "ab")
        product = jnp.matmul(a, b, precision="highest") * self.adapter.scale
        # Axes of size one may stand behind no dimension of the product: the last reshape brings them back.
        order = sorted(range(len(groups)), key=lambda i: groups[i])
        return product.reshape(self._sizes(groups)).transpose(order).reshape(self.sizes)


def plan_adapters(program: Program, targets: Targets, alpha: float | None) -> tuple[Slot, ...]:
    """Decide which slices of leaves get adapters.

    Args:
        program: the trace.
        targets: which sites, and of which rank.
        alpha: the adapter is scaled by alpha / rank; None scales by 1.

    Returns:
        The adapters, in program order.

    Raises:
        RecipeError: a pattern that decides nothing, or asks for an adapter where there cannot be one, with the site.
    """
    ranks = _everywhere(program, targets.everywhere) if targets.everywhere is not None else _ranks(program, targets)
    by_leaf: dict[str, list[Site]] = {}
    for site in program.sites:
        if site.leaf is not None:
            by_leaf.setdefault(site.leaf, []).append(site)
    slots, done = [], set()
    for site in program.sites:
        rank = ranks.get(site.name)
        if rank is None or site.name in done:
            continue
        assert site.leaf is not None
        found = _slot(program, site, rank, by_leaf[site.leaf], ranks, 1.0 if alpha is None else alpha / rank)
        if isinstance(found, str):
            if targets.everywhere is not None:
                continue
            raise RecipeError(
                f"{site.name}: lora asks for an adapter of rank {rank}, but {found}; "
                f"put {{{site.name!r}: None}} in front to leave it alone"
            )
        done.update(name for name, _ in found.readers)
        slots.append(found)
    if not slots:
        raise RecipeError("lora: no product of this function can have an adapter; qjax.trace shows its sites and why")
    return tuple(slots)


def _everywhere(program: Program, rank: int) -> dict[str, int]:
    """The same rank for every product, except for the head and for tables of embeddings and heads tied to them."""
    tables = {s.leaf for s in program.sites if s.op == "embedding"}
    left = [compile_pattern(p).fullmatch for p in ("**/lm_head/**", "**/embedding*")]
    return {
        s.name: rank
        for s in program.sites
        if s.op in ADAPTED_OPS
        and s.leaf is not None
        and s.leaf not in tables
        and not any(m(s.name + "/") for m in left)
    }


def _ranks(program: Program, targets: Targets) -> dict[str, int | None]:
    """The rank of each site that a pattern reaches; the first pattern that matches decides."""
    able = [s.name for s in program.sites if s.op in ADAPTED_OPS and s.leaf is not None]
    ranks: dict[str, int | None] = {}
    for pattern, rank in targets.patterns:
        matches = compile_pattern(pattern).fullmatch
        named = [name for name in able if matches(name + "/")]
        new = [name for name in named if name not in ranks]
        ranks.update(dict.fromkeys(new, rank))
        if new:
            continue
        if named:
            raise RecipeError(
                f"lora: {pattern!r} never decides: earlier patterns take its {len(named)} sites; move it up"
            )
        other = next((s for s in program.sites if matches(s.name + "/")), None)
        if other is not None:
            why = other.reason or f"its op is {other.op}, and products (dot, ragged_dot) of a parameter have adapters"
            raise RecipeError(f"lora: {pattern!r} matches no site that can be adapted: {other.name}: {why}")
        raise RecipeError(f"lora: {pattern!r} matches no site{nearest(pattern, able)}")
    return ranks


def _slot(
    program: Program, site: Site, rank: int, on_leaf: Sequence[Site], ranks: Mapping[str, Any], scale: float
) -> Slot | str:
    """The adapter of the slice that a site reads, or why it cannot have one."""
    adapter = Adapter(rank, scale, site.in_axes, site.out_axes, site.batch_axes)
    readers = []
    for other in on_leaf:
        if other is not site and _apart(program, site, other):
            continue
        if other is not site and _slice(program, site) != _slice(program, other):
            return f"{other.name} reads a part of the same weight that is neither the same nor apart"
        if other.op not in ADAPTED_OPS:
            return f"the same weight is read by {other.name} ({other.op}), which would not see the adapter"
        if why := _obstacle(program, other):
            return why if other is site else f"the same weight is read by {other.name}, and there {why}"
        if ranks.get(other.name) != rank:
            said = f"rank {ranks[other.name]}" if ranks.get(other.name) else "none"
            return f"the same weight is read by {other.name}, which is to have {said}; products share one adapter"
        seen = (set(other.in_axes), set(other.out_axes), set(other.batch_axes))
        ins, outs, batch = set(adapter.ins), set(adapter.outs), set(adapter.batch)
        if seen not in ((ins, outs, batch), (outs, ins, batch)):
            return f"{other.name} sums over other axes of the same weight"
        readers.append((other.name, dataclasses.replace(adapter, turned=seen != (ins, outs, batch))))
    leaf = program.leaf_names.index(site.leaf or "")
    if leaf in program.analysis.other_uses:
        used = ", ".join(sorted(program.analysis.other_uses[leaf]))
        return f"the same weight is read outside of products (by {used}), which would not see the adapter"
    shape = program.leaf_avals[leaf].shape
    at, ranges = _slice(program, site)
    index = tuple(at[a] if a in at else slice(*ranges.get(a, (0, n))) for a, n in enumerate(shape))
    axes = tuple(a for a in range(len(shape)) if a not in at)
    sizes = tuple(ranges[a][1] - ranges[a][0] if a in ranges else shape[a] for a in axes)
    return Slot(site.name, tuple(readers), leaf, index, axes, sizes, adapter)


def _slice(program: Program, site: Site) -> tuple[dict[int, int], dict[int, tuple[int, int]]]:
    """What of its leaf a site reads: axis -> position, and axis -> (start, stop) where it reads a part of an axis."""
    ref = program.analysis.reads[site.read].ref
    ranges = ref.ranges if ref is not None else ()
    return dict(site.slice), {axis: (start, start + size) for axis, start, size in ranges}


def _apart(program: Program, one: Site, other: Site) -> bool:
    """Whether two sites read different numbers of a leaf."""
    spans = []
    for site in (one, other):
        at, ranges = _slice(program, site)
        spans.append({**ranges, **{axis: (i, i + 1) for axis, i in at.items()}})
    common = set(spans[0]) & set(spans[1])
    return any(spans[0][a][1] <= spans[1][a][0] or spans[1][a][1] <= spans[0][a][0] for a in common)


def _obstacle(program: Program, site: Site) -> str:
    """Why a product cannot have an adapter, or nothing."""
    if site.reason:
        return site.reason
    ref = program.analysis.reads[site.read].ref
    assert ref is not None
    gathered = any(stride == GATHERED for dim in ref.dims for _, stride, _ in dim)
    if gathered or DYNAMIC in program.slices[site.read].loops:
        return "which of its matrices is multiplied is known at run time only"
    if site.op == "ragged_dot" and (site.in_axes, site.out_axes, site.batch_axes) != ((1,), (2,), (0,)):
        return "it is not the standard [M, K] x [G, K, N] form"
    jaxpr, eqn = program.jaxpr, None
    for part in site.path:
        if isinstance(part, int):
            eqn = open_jaxpr(jaxpr).eqns[part]
            if why := _BORDERS.get(eqn.primitive.name):
                return why
        else:
            assert eqn is not None
            jaxpr = dict(sub_jaxprs(eqn.params))[part]
    return ""


def merged_leaf(leaf: Any, delta: Any) -> Any:
    """A leaf with ``delta`` added: a float leaf exactly, a packed one requantized in its own format, to nearest.

    Matrices of a packed leaf whose delta is zero keep their codes and scales, since rounding a second time would change
    them.

    Args:
        leaf: float array, `QArray` or `QStack`.
        delta: float32, of the shape of the leaf.
    """
    if isinstance(leaf, QStack):
        rows = [[i for i, (p, _) in enumerate(leaf.assign) if p == part] for part in range(len(leaf.parts))]
        rows = [sorted(where, key=lambda i: leaf.assign[i][1]) for where in rows]
        parts = [
            merged_leaf(p, jnp.take(delta, jnp.asarray(w), leaf.axis)) for p, w in zip(leaf.parts, rows, strict=True)
        ]
        return dataclasses.replace(leaf, parts=tuple(parts))
    if not isinstance(leaf, QArray):
        leaf = jnp.asarray(leaf)
        return (leaf.astype(jnp.float32) + delta).astype(leaf.dtype)
    where: dict[str, Any] = dict(in_axes=leaf.in_axes, stack_axes=leaf.stack_axes)
    w = kept_as(canonical_matrix(leaf.dequantize(jnp.float32) + delta, **where), leaf.canonical().aux)
    scales = leaf.fmt.fit(w)
    new = assemble(leaf.fmt.encode(w, scales), scales, leaf.fmt, shape=leaf.shape, dtype=leaf.dtype, **where)
    changed = jnp.any(canonical_matrix(delta, **where) != 0, axis=(-1, -2))
    changed = changed.reshape(*changed.shape, *(1,) * (leaf.codes.ndim - leaf.stack_ndim))
    codes = jnp.where(changed, new.codes, leaf.codes)
    aux = {name: jnp.where(changed, new.aux[name], a) if name in new.aux else a for name, a in leaf.aux.items()}
    return dataclasses.replace(leaf, codes=codes, aux=aux)
