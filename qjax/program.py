"""`trace`: from any JAX function to a program whose sites are known by name.

A `Program` is immutable and holds no parameter values: the jaxpr of ``fn(params, *args, **kwargs)``, the trees of its
arguments and results, and the sites found by `qjax.analysis.sites` and named by `qjax.analysis.naming`. Printing it
gives the table of sites.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax

from qjax._compat import abstract, collector_paused
from qjax.analysis.naming import Site, Slices, name_sites
from qjax.analysis.reads import Analysis, Path
from qjax.analysis.sites import analyze
from qjax.errors import TraceError, near
from qjax.formats import is_quantized
from qjax.trees import is_array


@dataclasses.dataclass(frozen=True)
class Signature:
    """The shape of a call: the trees of params, args and kwargs, with what is static in them.

    Attributes:
        treedef: of ``(params, args, kwargs)`` with quantized leaves as leaves.
        static: ``(position, value)`` of the leaves that are not arrays.
        n_params: how many of the array leaves belong to params.
    """

    treedef: Any
    static: tuple[tuple[int, Any], ...]
    n_params: int
    names: tuple[str, ...] = dataclasses.field(compare=False)

    @staticmethod
    def of(params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Signature, list[Any]]:
        """Split a call into its signature and its array leaves."""
        flat, treedef = jax.tree_util.tree_flatten_with_path((params, args, kwargs), is_leaf=is_quantized)
        arrays, static, names, n_params = [], [], [], 0
        for position, (path, leaf) in enumerate(flat):
            if is_array(leaf):
                arrays.append(leaf)
                if path[0].idx == 0:
                    n_params += 1
                    names.append(leaf_name(path[1:]))
            else:
                static.append((position, leaf))
        return Signature(treedef, tuple(static), n_params, tuple(names)), arrays

    def rebuild(self, arrays: Sequence[Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Inverse of `of`."""
        leaves: list[Any] = []
        it, static = iter(arrays), dict(self.static)
        for position in range(self.treedef.num_leaves):
            leaves.append(static[position] if position in static else next(it))
        return jax.tree_util.tree_unflatten(self.treedef, leaves)


def leaf_name(path: Sequence[Any]) -> str:
    """Name of a parameter leaf: its pytree path with slashes, without a trailing ``/value``."""
    name = jax.tree_util.keystr(tuple(path), simple=True, separator="/")
    return name.removesuffix("/value") or "params"


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced function and its sites.

    Attributes:
        jaxpr: the closed jaxpr over the array leaves of params, then those of the arguments.
        signature: how to flatten a call.
        out_tree: the tree of the result.
        leaf_names, leaf_avals: of the parameter leaves that are arrays.
        sites: every site, in program order.
        slices: for each read of the analysis, which slice it takes at which loop step.
        analysis: the reads, loops and other uses.
    """

    jaxpr: Any
    signature: Signature
    out_tree: Any
    leaf_names: tuple[str, ...]
    leaf_avals: tuple[jax.ShapeDtypeStruct, ...]
    sites: tuple[Site, ...]
    slices: tuple[Slices, ...]
    analysis: Analysis

    @cached_property
    def by_name(self) -> dict[str, Site]:
        """Sites by name."""
        return {s.name: s for s in self.sites}

    @cached_property
    def read_at(self) -> dict[Path, int]:
        """Number of the read at each address, composites aside."""
        return {r.path: n for n, r in enumerate(self.analysis.reads) if r.composite is None}

    @cached_property
    def loop_at(self) -> dict[Path, int]:
        """Loop id of each scan and while equation."""
        return {loop.path: n for n, loop in self.analysis.loops.items()}

    def site(self, name: str) -> Site:
        """The site of that name.

        Raises:
            TraceError: there is none; the message offers the nearest names.
        """
        if name not in self.by_name:
            raise TraceError(f"no site is named {name!r}{near(name, self.by_name)}")
        return self.by_name[name]

    def __str__(self) -> str:
        from qjax.program_table import program_table

        return program_table(self)

    def __repr__(self) -> str:
        return f"Program({len(self.sites)} sites, {len(self.leaf_names)} parameter leaves)"


def trace(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Program:
    """Trace ``fn(params, *args, **kwargs)`` abstractly and find its sites.

    Args:
        fn: any JAX function of a parameter tree.
        params: a pytree of arrays or `jax.ShapeDtypeStruct`; leaves that are neither are static. Quantized leaves
            stand for the float leaves they replace.
        *args, **kwargs: arrays or `jax.ShapeDtypeStruct`; anything else (strings, flags, Python numbers) is static.

    Returns:
        The program; nothing is computed.

    Raises:
        TraceError: fn is not callable, or cannot be traced with these arguments.
    """
    if not callable(fn):
        raise TraceError(f"qjax.trace needs a function of (params, *args), not {type(fn).__name__}")
    signature, arrays = Signature.of(params, args, kwargs)
    return trace_flat(fn, signature, arrays)


def trace_flat(fn: Callable[..., Any], signature: Signature, arrays: Sequence[Any]) -> Program:
    """`trace` on an already flattened call (tracers allowed)."""

    def flat(*leaves: Any) -> Any:
        params, args, kwargs = signature.rebuild(leaves)
        return fn(params, *args, **kwargs)

    avals = [abstract(a) for a in arrays]
    try:
        closed, out_shape = jax.make_jaxpr(flat, return_shape=True)(*avals)
    except TypeError as error:
        said = _lacking(fn, signature, error)
        if not said:
            raise
        raise TraceError(said) from error
    leaf_avals = tuple(avals[: signature.n_params])
    shapes = [tuple(a.shape) for a in leaf_avals]
    names = _distinct(signature.names)
    with collector_paused():
        analysis = analyze(closed, list(names), shapes, len(shapes))
        sites, slices = name_sites(analysis, list(names), shapes, [_itemsize(a.dtype) for a in leaf_avals])
    return Program(
        jaxpr=closed,
        signature=signature,
        out_tree=jax.tree.structure(out_shape),
        leaf_names=names,
        leaf_avals=leaf_avals,
        sites=tuple(sites),
        slices=tuple(slices),
        analysis=analysis,
    )


def _lacking(fn: Callable[..., Any], signature: Signature, error: TypeError) -> str:
    """What is wrong with a call that lacks arguments; "" where a TypeError has another cause."""
    treedef = signature.treedef
    params, args, kwargs = jax.tree.unflatten(treedef, [None] * treedef.num_leaves)
    why = str(error)
    try:
        takes = inspect.signature(fn)
    except ValueError:  # a function that does not tell
        takes = None
    try:
        if takes is not None:
            takes.bind(params, *args, **kwargs)
    except TypeError as mismatch:
        why = str(mismatch)
    else:
        passes_on = takes is None or any(p.kind is p.VAR_POSITIONAL for p in takes.parameters.values())
        if args or kwargs or not passes_on:
            return ""
    name = getattr(fn, "__qualname__", type(fn).__name__)
    count = len(args) + len(kwargs)
    given = "no example arguments" if not count else "1 argument" if count == 1 else f"{count} arguments"
    return (
        f"{name} cannot be traced with params and {given}: {why}. qjax follows one call of the function to find its "
        "products: give what the function takes behind params, as arrays or jax.ShapeDtypeStruct of any batch size and "
        "length, as in (fn, params, tokens)"
    )


def _itemsize(dtype: Any) -> int:
    return getattr(dtype, "itemsize", 4)


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Leaf names are paths, hence distinct; stripping ``/value`` could make two equal."""
    if len(set(names)) == len(names):
        return tuple(names)
    counts: dict[str, int] = {}
    out = []
    for n in names:
        counts[n] = counts.get(n, -1) + 1
        out.append(n if not counts[n] else f"{n}~{counts[n]}")
    return tuple(out)
