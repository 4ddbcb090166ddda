"""Parameter trees by the names of their leaves, and trees of plain containers as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from qjax.errors import CheckpointError
from qjax.formats import is_quantized
from qjax.program import leaf_name
from qjax.trees import is_array


@dataclass(frozen=True, eq=False)
class Leaves:
    """A tree with its arrays by name; leaves that are no arrays are static.

    Attributes:
        arrays: name -> leaf, in the order of the tree; quantized leaves are leaves.
        flat: all leaves.
        treedef: the tree.
        at: name -> position among all leaves.
    """

    arrays: Mapping[str, Any]
    flat: tuple[Any, ...]
    treedef: Any
    at: Mapping[str, int]

    @staticmethod
    def of(tree: Any, counts: Callable[[Any], bool] = is_array) -> Leaves:
        """Name the leaves of a tree as `qjax.trace` does.

        Args:
            tree: any pytree.
            counts: which leaves are named.
        """
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: is_quantized(x) or counts(x))
        at: dict[str, int] = {}
        for position, (path, leaf) in enumerate(flat):
            if counts(leaf):
                name = leaf_name(path)
                while name in at:  # only where keys contain slashes, or a node's attribute is called "value"
                    name += "~"
                at[name] = position
        return Leaves({n: flat[i][1] for n, i in at.items()}, tuple(leaf for _, leaf in flat), treedef, at)

    def replaced(self, values: Mapping[str, Any]) -> Any:
        """The tree with these arrays by name, and its own static leaves."""
        flat = list(self.flat)
        for name, value in values.items():
            flat[self.at[name]] = value
        return jax.tree_util.tree_unflatten(self.treedef, flat)


@dataclass(frozen=True)
class _Name:
    name: str


def containers_of(tree: Any) -> Any:
    """A tree as JSON with names in place of arrays, or None if JSON cannot say it.

    It can where all nodes are dicts (with strings or integers as keys), lists, tuples and None, and static leaves are
    strings, booleans and finite numbers.
    """
    if not _is_plain(tree):
        return None
    leaves = Leaves.of(tree)
    return _contained(leaves.replaced({name: _Name(name) for name in leaves.arrays}))


def contain(containers: Any, values: Mapping[str, Any]) -> Any:
    """Inverse of `containers_of`, with arrays by name."""
    ((kind, inside),) = containers.items()
    if kind == "array":
        return values[inside]
    if kind == "static":
        return inside
    if kind == "dict":
        return {key: contain(child, values) for key, child in inside}
    return {"list": list, "tuple": tuple}[kind](contain(child, values) for child in inside)


def nest(values: Mapping[str, Any]) -> Any:
    """Nested dicts by the segments of names.

    Raises:
        CheckpointError: one name is the beginning of another.
    """
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split("/")
        node = tree
        for segment in parents:
            node = node.setdefault(segment, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise CheckpointError(
                f"the name {name} and another one cannot both be in nested dicts; "
                "pass the float parameter tree as like= to qjax.load"
            )
        node[last] = value
    return tree


def _is_plain(tree: Any) -> bool:
    if is_array(tree) or tree is None or type(tree) in (str, bool, int):
        return True
    if type(tree) is float:
        return math.isfinite(tree)
    if type(tree) is dict:
        return all(type(key) in (str, int) for key in tree) and all(map(_is_plain, tree.values()))
    return type(tree) in (list, tuple) and all(map(_is_plain, tree))


def _contained(tree: Any) -> Any:
    if isinstance(tree, _Name):
        return {"array": tree.name}
    if isinstance(tree, dict):
        return {"dict": [[key, _contained(child)] for key, child in tree.items()]}
    if isinstance(tree, list | tuple):
        return {type(tree).__name__: [_contained(child) for child in tree]}
    return {"static": tree}
