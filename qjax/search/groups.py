"""What a search decides over: groups of sites that share a format, and the choices for each.

A choice is a recipe: what its rules say at a site is what the choice would do there. Storage belongs to the slice of
    a leaf,
so all readers of a slice are one group; further sites can be tied, such as query, key and value, which a server
multiplies in one product. "float", no quantization, is a choice everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.applying.static import abstract_inputs
from qjax.applying.storage import WEIGHT_OPS, LeafPlan, Stored, plan_leaves, reads_slice
from qjax.errors import SearchError
from qjax.formats import quantize_array
from qjax.program import Program
from qjax.recipe import Decision, Recipe, Rule, resolve_recipe

FLOAT = "float"


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice of a parameter leaf, and how each choice would store it.

    Attributes:
        leaf: position among the parameter leaves.
        key: positions along the leaf's key axes.
        plan: how the leaf is laid out, by the first choice that quantizes it.
        stored: choice -> how it stores the slice, for those that quantize it.
        sites: names of the readers.
    """

    leaf: int
    key: tuple[int, ...]
    plan: LeafPlan
    stored: Mapping[str, Stored]
    sites: tuple[str, ...]

    @property
    def elements(self) -> int:
        """Numbers in the slice."""
        keyed = math.prod(self.plan.shape[a] for a in self.plan.key_axes)
        return math.prod(self.plan.shape) // max(1, keyed)

    @property
    def matrix(self) -> tuple[int, int]:
        """(N, K) of the product: outputs (of all stacked matrices) and the contracted axes."""
        k = math.prod(self.plan.shape[a] for a in self.plan.in_axes)
        return self.elements // max(1, k), k

    @property
    def float_bytes(self) -> int:
        """Bytes in the leaf's own dtype."""
        return self.elements * np.dtype(self.plan.dtype).itemsize

    def bytes_of(self, choice: str) -> int:
        """Bytes as a choice stores it."""
        stored = self.stored.get(choice)
        if stored is None or stored.fmt is None:
            return self.float_bytes
        shape = tuple(1 if a in self.plan.key_axes else n for a, n in enumerate(self.plan.shape))
        aval = jax.ShapeDtypeStruct(shape, self.plan.dtype)
        q = jax.eval_shape(
            lambda w: quantize_array(w, stored.fmt, in_axes=self.plan.in_axes, stack_axes=self.plan.stack_axes), aval
        )
        return abstract_inputs(q, stored.inputs).nbytes

    def of(self, leaf: Any) -> Any:
        """The slice of a leaf, its key axes kept with length 1."""
        at = dict(zip(self.plan.key_axes, self.key, strict=True))
        return leaf[tuple(slice(at[a], at[a] + 1) if a in at else slice(None) for a in range(leaf.ndim))]

    def put(self, leaf: Any, part: Any) -> Any:
        """The leaf with the slice in another form."""
        if not self.key:
            return part
        at = dict(zip(self.plan.key_axes, self.key, strict=True))
        where = tuple(slice(at[a], at[a] + 1) if a in at else slice(None) for a in range(leaf.ndim))
        return jnp.asarray(leaf).at[where].set(part)


@dataclasses.dataclass(frozen=True)
class Group:
    """Slices that share a choice.

    Attributes:
        name: the first site's.
        slices: at least one.
        choices: those that quantize every slice, "float" last.
    """

    name: str
    slices: tuple[Slice, ...]
    choices: tuple[str, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of all readers."""
        return tuple(name for part in self.slices for name in part.sites)

    @property
    def elements(self) -> int:
        """Numbers in all slices."""
        return sum(part.elements for part in self.slices)

    def bytes_of(self, choice: str) -> int:
        """Bytes of all slices as a choice stores them."""
        return sum(part.bytes_of(choice) for part in self.slices)


def resolve_choices(given: Mapping[str, Any] | Sequence[Any]) -> dict[str, Recipe]:
    """Return recipes by name, from a mapping or from a list of presets and recipes.

    Raises:
        SearchError: none, two of one name, one without a name, or passes across sites.
    """
    pairs = list(given.items()) if isinstance(given, Mapping) else [(None, g) for g in given]
    out: dict[str, Recipe] = {}
    for name, value in pairs:
        recipe = resolve_recipe(value)
        label = name or recipe.name or (value if isinstance(value, str) else "")
        if not label:
            raise SearchError("a choice needs a name: give {'W4': recipe, ...}, or recipes with names")
        if label in out or label == FLOAT:
            raise SearchError(f"two choices are called {label!r} ('float' is always there)")
        if recipe.prepare or recipe.finish:
            raise SearchError(
                f"choice {label!r} has the pass {(*recipe.prepare, *recipe.finish)[0]!r}, which works across sites and "
                "cannot be chosen site by site; give choices without passes"
            )
        out[label] = recipe
    if not out:
        raise SearchError("there is nothing to choose from; give at least one preset or recipe")
    return out


def find_groups(
    program: Program, choices: Mapping[str, Recipe], tie: Sequence[Sequence[str]] = ()
) -> tuple[tuple[Group, ...], dict[str, dict[str, Decision]]]:
    """Find the groups of a program.

    Args:
        program: the trace.
        choices: recipes by name.
        tie: sets of segments of site names: sites whose names differ only in a segment of one set share a format, as
            ``[("q_proj", "k_proj", "v_proj")]``.

    Returns:
        The groups in program order, and for each choice what it says about each site.

    Raises:
        SearchError: no choice quantizes anything.
    """
    decisions = {name: recipe.decide(program.sites) for name, recipe in choices.items()}
    plans = {name: plan_leaves(program, d) for name, d in decisions.items()}
    slices: list[Slice] = []
    for position in sorted({p for made in plans.values() for p in made}):
        of_leaf = {name: made[position] for name, made in plans.items() if position in made}
        plan = next(iter(of_leaf.values()))
        for key in plan.slices:
            stored = {}
            for name, other in of_leaf.items():
                here = other.slices.get(key)
                if here is not None and here.fmt is not None:
                    stored[name] = here
            if not stored:
                continue
            at = dict(zip(plan.key_axes, key, strict=True))
            readers = [s for s in program.sites if s.leaf == plan.name and s.op in WEIGHT_OPS]
            names = tuple(s.name for s in readers if reads_slice(s.slice, at))
            slices.append(Slice(position, key, plan, stored, names))
    if not slices:
        raise SearchError(f"none of the choices {', '.join(choices)} quantizes any site of this program")
    order = {site.name: n for n, site in enumerate(program.sites)}
    together: dict[Any, list[Slice]] = {}
    for part in sorted(slices, key=lambda s: order[s.sites[0]]):
        together.setdefault(_tied_name(part.sites[0], tie), []).append(part)
    groups = []
    for parts in together.values():
        shared = tuple(name for name in choices if all(name in part.stored for part in parts))
        if shared:
            groups.append(Group(parts[0].sites[0], tuple(parts), (*shared, FLOAT)))
    return tuple(groups), decisions


def _tied_name(name: str, tie: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """A site's name with the segments of each set replaced by the set."""
    segments = name.split("/")
    for members in tie:
        segments = ["|".join(members) if s in members else s for s in segments]
    return tuple(segments)


@dataclasses.dataclass(frozen=True)
class _Named:
    """A site as far as recipes look at it."""

    name: str
    op: str
    reads_parameter: bool = True


def rules_of(names: Sequence[str], ops: Sequence[str], recipe: Recipe | None) -> list[Rule]:
    """The rules by exact names that do at some sites what a recipe would do there.

    Args:
        names, ops: of the sites.
        recipe: None for float.
    """
    sites = [_Named(name, op) for name, op in zip(names, ops, strict=True)]
    decided = {} if recipe is None else recipe.decide(sites, strict=False)
    rules = []
    for site in sites:
        d = decided.get(site.name)
        if recipe is None or d is None or d.rule is None or d.skip or d.weights is None:
            rules.append(Rule(site.name, op=site.op, skip=True))
        else:
            rules.append(dataclasses.replace(recipe.rules[d.rule], match=site.name, op=site.op, optional=False))
    return rules
