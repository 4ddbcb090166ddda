"""Applying channel groups to parameters and looking whether the function stays what it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.analysis.channels import ChannelGroup, Kind, Refusal, Side, channel_group, permuted, scaled
from qjax.program import leaf_name
from qjax.trees import is_array

LINEAR = ("dot", "conv", "ragged_dot")


@dataclasses.dataclass
class Case:
    """A function whose parameters are all away from their initial zeros and ones."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        self.params = jax.tree.map(lambda a: shaken(a, rng) if is_array(a) else a, self.params)
        self.program = qjax.trace(self.fn, self.params, *self.args)
        _, static = qjax.partition(self.params, is_array)
        self.run = jax.jit(
            lambda arrays, args: self.fn(qjax.combine(arrays, static), *args),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        self.want = self(self.params)

    def __call__(self, params: Any) -> Any:
        return jax.tree.map(np.asarray, self.run(qjax.partition(params, is_array)[0], self.args))

    def read(self, leaf: str, slice: Any) -> Any:
        """A leaf slice."""
        return read(self.params, leaf, slice)

    @property
    def linear(self) -> list[str]:
        """Names of the sites that multiply by a parameter."""
        return [s.name for s in self.program.sites if s.leaf is not None and s.op in LINEAR]


def shaken(a: Any, rng: np.random.Generator) -> Any:
    """Constants become random; what is random already stays."""
    values = np.asarray(a)
    if not np.issubdtype(values.dtype, np.floating) or values.size > 1 and values.std() > 1e-6:
        return a
    return jnp.asarray(values * rng.uniform(0.5, 1.5, values.shape) + 0.2 * rng.standard_normal(values.shape), a.dtype)


def located(leaf_shape: tuple[int, ...], slice_key: Any) -> tuple[Any, ...]:
    at = dict(slice_key)
    return tuple(at.get(axis, slice(None)) for axis in range(len(leaf_shape)))


def read(params: Any, leaf: str, slice_key: Any) -> Any:
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        if is_array(value) and leaf_name(path) == leaf:
            return np.asarray(value)[located(value.shape, slice_key)]
    raise KeyError(leaf)


def written(params: Any, slices: dict[tuple[str, Any], Any]) -> Any:
    """The parameters with some leaf slices replaced."""
    by_leaf: dict[str, dict] = {}
    for (leaf, key), value in slices.items():
        by_leaf.setdefault(leaf, {})[key] = value

    def put(path: Any, value: Any) -> Any:
        edits = by_leaf.get(leaf_name(path) if is_array(value) else "", {})
        value = np.array(value) if edits else value
        for key, new in edits.items():
            value[located(value.shape, key)] = new
        return jnp.asarray(value) if edits else value

    return jax.tree_util.tree_map_with_path(put, params)


def distance(got: Any, want: Any) -> float:
    """The largest relative difference of the results, in the norm of each."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)) for a, b in pairs)


def factors(size: int, seed: int = 0) -> np.ndarray:
    return np.exp(0.7 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def order(group: ChannelGroup, seed: int = 0) -> np.ndarray:
    """A random order within the blocks."""
    rng = np.random.default_rng(seed)
    out = np.arange(group.size)
    for block in np.unique(group.blocks):
        own = np.flatnonzero(group.blocks == block)
        out[own] = rng.permutation(own)
    return out


def change(group: ChannelGroup, read: Any, seed: int = 0) -> dict[tuple[str, Any], Any]:
    if group.kind == "scale":
        return scaled(group, factors(group.size, seed), read)
    return permuted(group, order(group, seed), read)


def check(case: Case, site: str, kind: Kind = "scale", of: Side = "input", tolerance: float = 2e-5) -> ChannelGroup:
    """The group exists, leaves the function as it is, and nothing in it can be left out.

    Except the bias of keys: without rotary positions it moves all scores of a query alike, which a softmax ignores.
    """
    group = channel_group(case.program, site, kind, of)
    assert not isinstance(group, Refusal), str(group)
    new = change(group, case.read)
    assert distance(case(written(case.params, new)), case.want) < tolerance
    moved = {place for place, value in new.items() if not np.array_equal(np.asarray(value), case.read(*place))}
    assert moved == set(new)
    for touch in group.touches if kind == "scale" else group.touches[:6]:
        if touch.leaf.endswith(("k_proj/bias", "qkv/bias", "key/bias")):
            continue
        part = dataclasses.replace(group, touches=tuple(t for t in group.touches if t is not touch))
        assert distance(case(written(case.params, change(part, case.read))), case.want) > 10 * tolerance, touch
    return group


def refused(case: Case, site: str, kind: Kind = "scale", of: Side = "input") -> str:
    group = channel_group(case.program, site, kind, of)
    assert isinstance(group, Refusal), group
    return str(group)


def touched(group: ChannelGroup) -> set[tuple[str, tuple[int, ...], int]]:
    """(leaf and slice, axes, power) of each touch."""
    return {(t.leaf + "".join(f"[{axis}:{p}]" for axis, p in t.slice), t.axes, t.power) for t in group.touches}
