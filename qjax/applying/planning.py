"""What a recipe does to a program, before any number is touched: decisions, storage, bytes, shardings."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from qjax._compat import explicit_sharding
from qjax.applying.static import abstract_inputs
from qjax.applying.storage import LeafPlan, Slices, alike, assignment, check_decisions, plan_leaves
from qjax.errors import RecipeError
from qjax.formats import QStack, is_quantized, quantize_array
from qjax.program import Program
from qjax.recipe import Decision, Recipe
from qjax.rewriting.sharding import quantized_specs


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A recipe applied to a program, abstractly.

    Attributes:
        program: the trace.
        recipe: the recipe.
        decisions: site name -> what the recipe says.
        leaves: leaf position -> how it is stored, for leaves that are quantized.
        cost: peak memory and work of the job, from `qjax.plan` (`qjax.blockwise.Cost`).
    """

    program: Program
    recipe: Recipe
    decisions: Mapping[str, Decision]
    leaves: Mapping[int, LeafPlan]
    cost: Any = None

    @cached_property
    def arrays(self) -> list[Any]:
        """The parameter leaves as they will be stored, abstractly."""
        return [
            _abstract(self.leaves[i]) if i in self.leaves else aval for i, aval in enumerate(self.program.leaf_avals)
        ]

    @property
    def params(self) -> Any:
        """The parameter tree as it will be stored, abstractly."""
        return self.tree(self.arrays)

    @cached_property
    def float_bytes(self) -> int:
        """Bytes of the float parameters."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in self.program.leaf_avals)

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of the parameters as stored."""
        return sum(a.nbytes if is_quantized(a) else math.prod(a.shape) * a.dtype.itemsize for a in self.arrays)

    def tree(self, arrays: list[Any]) -> Any:
        """Put leaves (in program order) back into the parameter tree."""
        n = len(arrays)
        filler = [None] * (self.program.signature.treedef.num_leaves - len(self.program.signature.static) - n)
        params, _, _ = self.program.signature.rebuild([*arrays, *filler])
        return params

    def shardings(self, specs: Any, mesh: Any = None) -> Any:
        """Partition specs of the quantized tree from those of the float tree.

        Args:
            specs: the parameter tree with a `PartitionSpec` or `NamedSharding` at each array leaf.
            mesh: the mesh, where ``specs`` are bare PartitionSpecs; it tells how many shards an axis has.

        Returns:
            The same tree; a quantized leaf has specs (or shardings) for each of its children. Where shards of an in
            axis would cut a byte or a group, `LayoutError` names the leaf and into how many shards it can be cut.
        """
        is_spec = lambda x: isinstance(x, (jax.sharding.PartitionSpec, jax.sharding.NamedSharding)) or x is None  # noqa: E731
        flat = [s for s in jax.tree.leaves(specs, is_leaf=is_spec) if is_spec(s)]
        if len(flat) != len(self.arrays):
            raise RecipeError(f"specs has {len(flat)} leaves and params {len(self.arrays)}; give one spec per leaf")
        out = []
        for array, spec, where in zip(self.arrays, flat, self.program.leaf_names, strict=True):
            if not is_quantized(array) or spec is None:
                out.append(spec)
                continue
            named = isinstance(spec, jax.sharding.NamedSharding)
            on = spec.mesh if named else mesh
            if on is None:
                raise RecipeError("plan.shardings needs mesh= (or NamedShardings) to see how many shards an axis has")
            made = _specs(array, spec.spec if named else spec, on, where)
            if named:
                place = functools.partial(jax.sharding.NamedSharding, on)
                made = jax.tree.map(place, made, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
            out.append(made)
        return self.tree(out)

    def __str__(self) -> str:
        """A summary: bytes before and after, sites by format."""
        by_format: dict[str, int] = {}
        for leaf in self.leaves.values():
            for stored in leaf.slices.values():
                key = stored.fmt.name if stored.fmt is not None else "float"
                by_format[key] = by_format.get(key, 0) + 1
        formats = ", ".join(f"{n} × {name}" for name, n in by_format.items()) or "nothing quantized"
        cost = f"\n{self.cost}" if self.cost is not None else ""
        return f"{self.float_bytes:,} -> {self.stored_bytes:,} bytes; {formats}{cost}"


def plan_program(program: Program, recipe: Recipe) -> Plan:
    """Apply a recipe to a program, abstractly.

    Raises:
        RecipeError: the recipe does not fit.
        LayoutError: a weight is split on an explicit mesh so that a byte or a group would be cut.
    """
    decisions = recipe.decide(program.sites)
    check_decisions(program, decisions, settles=recipe.settle is not None)
    leaves = plan_leaves(program, decisions)
    for leaf in leaves.values():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise RecipeError(
                f"{leaf.name} has dtype {leaf.dtype}: only floating-point weights can be quantized; "
                "add a rule with skip=True for it"
            )
    planned = Plan(program, recipe, decisions, leaves)
    for position, leaf in leaves.items():
        _check_shards(planned.arrays[position], program.leaf_avals[position], leaf.name)
    return planned


def _check_shards(array: Any, aval: Any, where: str) -> None:
    """Refuse a weight that is split on an explicit mesh so that a byte or a group would be cut."""
    sharding = explicit_sharding(aval)
    if sharding is not None and is_quantized(array):
        _specs(array, sharding.spec, sharding.mesh, where)


def _specs(array: Any, spec: Any, mesh: Any, where: str) -> Any:
    if isinstance(array, QStack):
        return dataclasses.replace(
            array, parts=tuple(_specs(p, spec, mesh, where) if is_quantized(p) else spec for p in array.parts)
        )
    return quantized_specs(array, spec, mesh, where)


def _abstract(leaf: LeafPlan) -> Any:
    """The stored leaf, abstractly."""
    return _abstract_part(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), leaf, leaf.slices, leaf.key_axes)


def _abstract_part(aval: Any, leaf: LeafPlan, slices: Slices, key_axes: tuple[int, ...]) -> Any:
    distinct = list(dict.fromkeys(slices.values()))
    if len(distinct) == 1:
        fmt = distinct[0].fmt
        if fmt is None:
            return aval
        q = jax.eval_shape(lambda w: quantize_array(w, fmt, in_axes=leaf.in_axes, stack_axes=leaf.stack_axes), aval)
        return abstract_inputs(q, distinct[0].inputs, distinct[0].rounding)
    axis, groups = key_axes[0], alike(slices)
    parts = []
    for inner, where in groups:
        shape = tuple(len(where) if a == axis else n for a, n in enumerate(aval.shape))
        parts.append(_abstract_part(jax.ShapeDtypeStruct(shape, aval.dtype), leaf, inner, key_axes[1:]))
    return QStack(tuple(parts), axis=axis, assign=assignment(groups))
