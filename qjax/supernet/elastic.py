"""From any traced function to a supernet.

    t = qjax.elastic(fn, space)
    state = t.init(params, *args)                        # {site: {table: array}}
    choice = sample_choice(key, t.domain(params, *args))  # int32 [N, 5]
    out, state = t.apply(params, state, choice, *args)   # one compiled program for every choice
    model = t.convert(params, state, choice, *args)      # the packed model with the same outputs

Every product of a parameter gets learned-step quantizers for its weight and its activations: a table for each form that
the space allows, a column for each bit width (EQ-Net, Xu et al. 2023, arXiv:2308.07650, section 3.1). The choice is
traced. Layers of a scan stay one scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from qjax.analysis.naming import LINEAR, Site
from qjax.applying.planning import plan_program
from qjax.applying.storage import LeafPlan, reads_slice
from qjax.errors import DataError, QjaxError, RecipeError
from qjax.formats import Int
from qjax.program import Program, Signature, trace_flat
from qjax.recipe import Recipe, Rule
from qjax.rewriting.taps import NONFINITE
from qjax.supernet.converting import Converted, converted, in_effect
from qjax.supernet.export import check_destination, layers, write
from qjax.supernet.rewriter import REACHED, ElasticRewriter
from qjax.supernet.space import BITS, Domain, Space
from qjax.supernet.tables import CHANNEL, CHOICE, TENSOR, Forms, Roles
from qjax.transforms import Model, quantize_with

State = dict[str, dict[str, Any]]
"""Site -> table -> array: [*stack, N or 1, 7] of weights, or [*stack, N * groups, 7] in a space with groups; [1, 7] of
activations, and the flag ``input.signed``."""


class Supernet:
    """A function that runs in every form of a space. Made by `qjax.elastic`.

    Attributes:
        fn: the float function ``fn(params, *args, **kwargs)``.
        space: the forms.
    """

    def __init__(self, fn: Callable[..., Any], space: Space):
        self.fn, self.space = fn, space

    def __repr__(self) -> str:
        """Name the function."""
        return f"Supernet({getattr(self.fn, '__qualname__', type(self.fn).__name__)})"

    def domain(self, params: Any, *args: Any, **kwargs: Any) -> Domain:
        """The choices of this function; its rows are products of parameters, in program order.

        Sites that read the same weight are tied. A weight that an embedding reads too stays in float.

        Args:
            params, *args, **kwargs: as for the function; abstract arrays are enough.

        Raises:
            RecipeError: the space does not fit the function, or allows fewer than two choices.
        """
        program, _ = self._traced(params, args, kwargs)
        return self._sites(program)[0]

    def init(self, params: Any, *args: Any, sample: int | None = 1 << 17, **kwargs: Any) -> State:
        """The state before training: all tables, from the weights and from one batch, in one pass.

        Activations are seen as they come out of layers rounded at the highest choice (symmetric and per channel where
        the space has it; EQ-Net's text says 8 bits and no form).

        Args:
            params: float parameters.
            *args, **kwargs: a real batch (EQ-Net takes 256 images).
            sample: of tensors (per-tensor weights, activations) with more elements, that many evenly spaced ones decide
                the step; the range is always that of all. None tries every step on every element.

        Raises:
            RecipeError: the space does not fit the function.
            DataError: NaN or infinity among the activations of a site, or the batch does not run it.
        """
        program, arrays = self._traced(params, args, kwargs)
        domain, owners = self._sites(program)
        highest = dict(zip(domain.sites, jnp.asarray(domain.uniform(8)), strict=True))
        forms = self._forms(program, domain, owners, sample)
        replay = jax.jit(lambda arrays: ElasticRewriter(program, highest, forms).observe(arrays)[1])
        found = replay(arrays)
        return {
            name: _first_state(name, found.get(name), _names(forms[name], owners[name] == name))
            for name in domain.sites
        }

    def apply(self, params: Any, state: State, choice: Any, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        """Call the function as a subnet.

        Args:
            params: float parameters; what is trained, with the state.
            state: from `init`, or after optimizer steps.
            choice: int32 [N, 5], or [N, 6] with groups, may be traced: rows as in `domain`. Values that the space does
                not allow are not looked for; `Domain.check` does.
            *args, **kwargs: arguments of the function.

        Returns:
            Its result, and the state as it was.

        Raises:
            DataError: a state or a choice of another function or space.
        """
        program, arrays = self._traced(params, args, kwargs)
        domain, owners = self._sites(program)
        forms = self._forms(program, domain, owners)
        choice = jnp.asarray(choice)
        if choice.shape != domain.shape:
            raise DataError(
                f"a choice for these {len(domain.sites)} sites is int32 {list(domain.shape)}, not "
                f"{list(choice.shape)}; under vmap or lax.map, map over the choices"
            )
        if not jnp.issubdtype(choice.dtype, jnp.integer):
            raise DataError(f"a choice is int32 {list(domain.shape)}, not {choice.dtype}; cast it: choice.astype(int)")
        fields = _fields(domain, owners, forms, state)
        for n, name in enumerate(domain.sites):
            fields[name][CHOICE] = choice[n]
        outs, _ = ElasticRewriter(program, fields, forms, fields).observe(arrays)
        return jax.tree.unflatten(program.out_tree, outs), state

    def convert(self, params: Any, state: State, choice: Any, *args: Any, **kwargs: Any) -> Model:
        """The packed model of a subnet, with the supernet's outputs at that choice.

        Symmetric weights and activations are `Int`, asymmetric ones `qjax.formats.Affine`. Dots run on integer codes
        where both operands have them, convolutions where both are symmetric; others are formed in float.

        Args:
            params: the trained parameters.
            state: as trained.
            choice: int [N, 5 or 6], concrete.
            *args, **kwargs: example arguments; abstract ones are enough.

        Raises:
            SearchError: a choice that the space does not allow.
            DataError: a state of another function or space.
            RecipeError: something other than products reads the weight of a site, and would see it rounded.
        """
        program, _ = self._traced(params, args, kwargs)
        domain, owners = self._sites(program)
        _check_alone(program, domain)
        forms = self._forms(program, domain, owners)
        fields = _fields(domain, owners, forms, state)
        found: Converted = converted(domain, owners, forms, fields, domain.check(choice))
        return quantize_with(
            self.fn, params, *args, recipe=found.recipe, constants=found.constants, scales=found.scales, **kwargs
        )

    def recipe(self, params: Any, state: State, choice: Any, *args: Any, **kwargs: Any) -> Recipe:
        """The formats of a subnet as an ordinary recipe; `qjax.quantize` fits its scales anew.

        Args:
            params, state, choice, *args, **kwargs: as for `convert`.
        """
        return self.recipes(params, state, [choice], *args, **kwargs)[0]

    def recipes(self, params: Any, state: State, choices: Any, *args: Any, **kwargs: Any) -> list[Recipe]:
        """The recipes of several subnets, by one trace.

        Args:
            choices: int [any, N, 5 or 6]. params, state, *args, **kwargs: as for `convert`.
        """
        program, _ = self._traced(params, args, kwargs)
        domain, owners = self._sites(program)
        forms = self._forms(program, domain, owners)
        fields = _fields(domain, owners, forms, state)
        return [converted(domain, owners, forms, fields, domain.check(choice)).recipe for choice in choices]

    def export(self, folder: str | Path, params: Any, state: State, choice: Any, *args: Any, **kwargs: Any) -> Path:
        """Write a subnet's codes, steps and offsets, and the tables of all forms, for runtimes other than this one.

        `qjax.supernet.export` says what the files hold. They are there together or not at all.

        Args:
            folder: where to; an older export in it is replaced.
            params, state, choice, *args, **kwargs: as for `convert`.

        Returns:
            The folder, absolute.

        Raises:
            SearchError: a choice that the space does not allow.
            DataError: a state of another function or space.
            CheckpointError: the folder holds something else.
        """
        check_destination(folder)
        model = self.convert(params, state, choice, *args, **kwargs)
        program, _ = self._traced(params, args, kwargs)
        domain, owners = self._sites(program)
        forms, choice = self._forms(program, domain, owners), domain.check(choice)
        found = converted(domain, owners, forms, _fields(domain, owners, forms, state), choice)
        stored = dict(zip(program.leaf_names, Signature.of(model.params, (), {})[1], strict=False))
        parts = layers(program.by_name, domain, owners, choice, stored, found.constants, state)
        tables = {f"{n}/{k}": a for n in domain.sites for k, a in in_effect(state[n], forms[n]).items()}
        return write(folder, *parts, tables, {"space": self.space.to_dict(), "columns": list(BITS)})

    def weights(self, params: Any, *args: Any, first: bool = False, **kwargs: Any) -> dict[str, Any]:
        """The weights of the sites, a layer each, for `wdr_loss`.

        Args:
            params, *args, **kwargs: as for the function.
            first: with the first site, which EQ-Net leaves out.
        """
        program, arrays = self._traced(params, args, kwargs)
        domain, owners = self._sites(program)
        positions = {name: n for n, name in enumerate(program.leaf_names)}
        out = {}
        for name in domain.sites[0 if first else 1 :]:
            site = program.by_name[name]
            if owners[name] == name and site.leaf is not None:
                leaf = arrays[positions[site.leaf]]
                for axis, at in sorted(site.slice, reverse=True):
                    leaf = lax.index_in_dim(leaf, at, axis, keepdims=False)
                out[name] = leaf
        return out

    def _traced(self, params: Any, args: Any, kwargs: Any) -> tuple[Program, list[Any]]:
        signature, arrays = Signature.of(params, args, kwargs)
        return trace_flat(self.fn, signature, arrays), arrays

    def _forms(
        self, program: Program, domain: Domain, owners: Mapping[str, str], sample: int | None = None
    ) -> dict[str, Forms]:
        """What tables each site has: all that some site may ask for, so that layers of a scan stack.

        Of groups, those that divide the contracted axis of the weight, which are the same for the layers of a scan.
        """
        space = self.space
        acts = {bool(s) for row in domain.allowed if any(row[1]) for s in row[4]}
        flags = tuple(sorted(acts, reverse=True))
        if space.groups:
            grains = [(space.groups[g], bool(s)) for row in domain.allowed for g in row[5] for s in row[3]]
        else:
            grains = [(CHANNEL if c else TENSOR, bool(s)) for row in domain.allowed for c in row[2] for s in row[3]]
        grains = sorted(set(grains), key=lambda g: (str(g[0]), not g[1]))
        out = {}
        for n, name in enumerate(domain.sites):
            own, first = (_roles(program.by_name[site]) for site in (name, owners[name]))
            length = _contracted(program, owners[name])
            for g in domain.allowed[n][5] if space.groups else ():
                if length % space.groups[g]:
                    raise RecipeError(
                        f"{name}: groups of {space.groups[g]} do not divide the {length} numbers that each output "
                        f"sums over; say which lengths it may have: At({name!r}, groups=...), or leave it out: "
                        f"At({name!r}, skip=True)"
                    )
            fitting = tuple((g, s) for g, s in grains if isinstance(g, str) or length % g == 0)
            roles = None if own == first else first
            out[name] = Forms(fitting, flags, space.abs_offset, sample, space.groups, length, roles)
        return out

    def _sites(self, program: Program) -> tuple[Domain, dict[str, str]]:
        """The domain, and for each site the first one that reads the same weight, which keeps its tables."""
        candidates = [s for s in program.sites if s.op in LINEAR and s.leaf is not None and not s.reason]
        names = {s.name for s in candidates if not self.space.skips(s.name)}
        skipped = [Rule(s.name, op=s.op, skip=True) for s in program.sites if s.op in LINEAR and s.name not in names]
        probe = Recipe(
            [*skipped, Rule("**", op="embedding", skip=True, optional=True), Rule("**", weights=Int(8), optional=True)]
        )
        stored = {leaf.name: leaf for leaf in plan_program(program, probe).leaves.values()}
        owners: dict[str, str] = {}
        first: dict[Any, str] = {}
        usable: list[Site] = []
        for site in candidates:
            leaf = stored.get(site.leaf or "")
            keys = [] if leaf is None else [k for k in leaf.slices if reads_slice(site.slice, _at(leaf, k))]
            if site.name not in names:
                usable.append(site)  # its name counts for the patterns of the space, which skips it
                continue
            if leaf is None or not keys or any(leaf.slices[k].fmt is None for k in keys):
                continue
            if len(keys) > 1 or {axis for axis, _ in site.slice} != set(leaf.key_axes):
                raise RecipeError(
                    f"{site.name}: it and other sites read different slices of {site.leaf}, of which each would have "
                    f"steps of its own; leave it out: At({site.name!r}, skip=True)"
                )
            _check_whole(program, site, leaf)
            usable.append(site)
            owners[site.name] = first.setdefault((site.leaf, *keys), site.name)
        if not usable:
            raise RecipeError("no product of this function reads a parameter; qjax.trace shows its sites and why")
        return self.space.domain([s.name for s in usable], owners), owners


def _at(leaf: LeafPlan, key: tuple[int, ...]) -> dict[int, int]:
    return dict(zip(leaf.key_axes, key, strict=True))


def _check_whole(program: Program, site: Site, leaf: LeafPlan) -> None:
    """Refuse a product of a part of a weight: rows of tables are those of all of it."""
    read = program.analysis.reads[site.read]
    seen = math.prod(read.shapes[read.side if read.side is not None else 1])
    sliced = {axis for axis, _ in site.slice}
    whole = math.prod(n for axis, n in enumerate(leaf.shape) if axis not in sliced)
    if seen != whole:
        raise RecipeError(
            f"{site.name}: it reads {seen} of the {whole} numbers of {site.leaf} (a range of it, or a shard inside "
            f"shard_map), whose steps belong to all of them; split what comes out in place of the weight, shard with "
            f"jit, or leave it out: At({site.name!r}, skip=True)"
        )


def _check_alone(program: Program, domain: Domain) -> None:
    """Refuse to pack a weight that something reads in float in the supernet: the packed model has it no more."""
    for name in domain.sites:
        leaf = program.by_name[name].leaf
        uses = program.analysis.other_uses.get(program.leaf_names.index(leaf or ""))
        if uses:
            raise RecipeError(
                f"{name}: {leaf} is read outside of products too (by {', '.join(sorted(uses))}), in float in the "
                "supernet and decoded from its codes in a packed model, so the two would differ; leave it out: "
                f"At({name!r}, skip=True), or give that reader a parameter of its own"
            )


def _names(forms: Forms, owner: bool) -> list[str]:
    return [*(forms.weight_fields() if owner else []), *forms.input_fields()]


def _first_state(name: str, found: Mapping[str, Any] | None, names: list[str]) -> dict[str, Any]:
    concrete = found is not None and not any(isinstance(a, Tracer) for a in found.values())
    if found is None or (concrete and not float(found[REACHED])):
        raise DataError(f"{name}: the given arguments do not run it, so its steps have nowhere to start; give others")
    if concrete and NONFINITE in found and float(found[NONFINITE]):
        raise DataError(f"{name}: NaN or infinity among its inputs; look at the batch, or at what comes before it")
    return {field: found[field] for field in names}


def _roles(site: Site) -> Roles:
    """How a product uses the axes of the leaf that it reads."""
    return tuple(sorted(site.batch_axes)), tuple(sorted(site.out_axes)), tuple(sorted(site.in_axes))


def _contracted(program: Program, name: str) -> int:
    """How many numbers each output of a site sums over."""
    site = program.by_name[name]
    shape = dict(zip(program.leaf_names, program.leaf_avals, strict=True))[site.leaf or ""].shape
    return math.prod(shape[axis] for axis in site.in_axes)


def _fields(
    domain: Domain, owners: Mapping[str, str], forms: Mapping[str, Forms], state: State
) -> dict[str, dict[str, Any]]:
    """The tables that each site is given, checked."""
    wanted = {name: set(_names(forms[name], owners[name] == name)) for name in domain.sites}
    for name in [*wanted, *state]:
        has = set(state[name]) if name in state else set()
        if has != wanted.get(name, set()):
            raise DataError(
                f"the state does not belong to this space and function: {name} has {', '.join(sorted(has)) or 'none'} "
                f"and needs {', '.join(sorted(wanted.get(name, set()))) or 'none'}; make it with init"
            )
    return {
        name: {**state[name], **{k: state[owners[name]][k] for k in forms[name].weight_fields()}}
        for name in domain.sites
    }


def elastic(fn: Callable[..., Any], space: Space | None = None) -> Supernet:
    """A supernet of a function: one set of weights that runs at any bits, granularity and symmetry of a space.

    Args:
        fn: any JAX function ``fn(params, *args, **kwargs)``.
        space: the forms; None is EQ-Net's: 2 to 8 bits, both granularities, both symmetries, first and last at 8 bits.

    Returns:
        A `Supernet` with ``init``, ``apply``, ``convert``.
    """
    if not callable(fn):
        raise QjaxError(f"elastic needs a function of (params, *args), not {type(fn).__name__}")
    return Supernet(fn, Space() if space is None else space)
