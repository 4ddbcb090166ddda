"""Training a function as it will be stored.

    t = qjax.fake_quant(fn, recipe)
    state = t.init(params, *args)
    out, state = t.apply(params, state, *args)       # in a loss: jax.grad, optax, remat, scan as always
    model = t.convert(params, state, *args)          # the packed model with the same outputs

Weights and activations are rounded to their formats in every call, from the ranges they have at the moment, and
derivatives pass straight through. There is nothing to carry then, and the state is empty; it is there because every
transform of qjax has the same three functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from qjax.analysis.naming import LINEAR
from qjax.applying.planning import plan_program
from qjax.applying.storage import LeafPlan, reads_slice
from qjax.errors import DataError, RecipeError
from qjax.passes import RTN
from qjax.program import Program, Signature, trace_flat
from qjax.recipe import Recipe, Static, resolve_recipe
from qjax.rewriting.fake import Faked, FakeRewriter
from qjax.transforms import Model, quantize

State = dict[str, dict[str, Any]]
"""Site name -> arrays; empty with formats whose ranges are those of the moment."""


class FakeQuant:
    """A function whose weights and activations are rounded as a recipe says. Made by `qjax.fake_quant`.

    Attributes:
        fn: the float function ``fn(params, *args, **kwargs)``.
        recipe: which sites are rounded to which formats.
    """

    def __init__(self, fn: Callable[..., Any], recipe: Recipe):
        self.fn, self.recipe = fn, recipe

    def __repr__(self) -> str:
        """Name the function and the recipe."""
        name = getattr(self.fn, "__qualname__", type(self.fn).__name__)
        return f"FakeQuant({name}, recipe={self.recipe.name or 'unnamed'!r})"

    def init(self, params: Any, *args: Any, **kwargs: Any) -> State:
        """The state before training: empty.

        Raises:
            RecipeError: the recipe does not fit the program, or asks for what cannot be trained yet.
        """
        signature, arrays = Signature.of(params, args, kwargs)
        self._sites(trace_flat(self.fn, signature, arrays))
        return {}

    def apply(self, params: Any, state: State, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        """Call the function with rounded operands.

        Args:
            params: float parameters; what is trained.
            state: from `init`.
            *args, **kwargs: arguments of the function.

        Returns:
            Its result, and the state.

        Raises:
            DataError: a state that is not this transform's.
        """
        if state:
            raise DataError(f"the state of this transform is empty, and this one has {sorted(state)[0]!r}; use init")
        signature, arrays = Signature.of(params, args, kwargs)
        program = trace_flat(self.fn, signature, arrays)
        outs = FakeRewriter(program, self._sites(program), max_runs=1 << 30)(arrays)
        return jax.tree.unflatten(program.out_tree, outs), state

    def convert(self, params: Any, state: State, *args: Any, **kwargs: Any) -> Model:
        """The packed model.

        Args:
            params: the trained parameters.
            state: as `apply` returned it.
            *args, **kwargs: example arguments, abstract ones are enough.
        """
        return quantize(self.fn, params, *args, recipe=self.recipe, **kwargs)

    def _sites(self, program: Program) -> dict[str, Faked]:
        """What is rounded at each site.

        Storage belongs to the weight: one that any reader keeps in float, or that cannot be stored, is not rounded.
        """
        if self.recipe.prepare:
            raise RecipeError("fake_quant does not run prepare passes; run them first, and train what they return")
        planned = plan_program(program, self.recipe)
        stored = {leaf.name: leaf for leaf in planned.leaves.values()}
        out = {}
        for site in program.sites:
            d = planned.decisions[site.name]
            if d.skip or d.rule is None:
                continue
            if site.op not in LINEAR:
                raise RecipeError(
                    f"{site.name}: rule {d.rule} quantizes an {site.op}, which fake_quant cannot round yet; skip it"
                )
            if isinstance(d.inputs, Static):
                raise RecipeError(
                    f"{site.name}: rule {d.rule} has static inputs, which fake_quant cannot train yet; use dynamic(...)"
                )
            if d.rounding not in (None, RTN()):
                raise RecipeError(
                    f"{site.name}: rule {d.rule} rounds with {d.rounding!r}; fake_quant rounds to nearest"
                )
            leaf = stored.get(site.leaf or "")
            keys = [] if leaf is None else [k for k in leaf.slices if reads_slice(site.slice, _at(leaf, k))]
            kinds = {(leaf.slices[k].fmt, leaf.slices[k].observer) for k in keys} if leaf is not None else set()
            if len(kinds) > 1:
                raise RecipeError(f"{site.name}: the slices that it reads have several formats; give them one to train")
            fmt, observer = next(iter(kinds), (None, None))
            out[site.name] = Faked(fmt, observer, d.inputs.fmt if d.inputs is not None else None)
        return out


def _at(leaf: LeafPlan, key: tuple[int, ...]) -> dict[int, int]:
    return dict(zip(leaf.key_axes, key, strict=True))


def fake_quant(fn: Callable[..., Any], recipe: Recipe | str) -> FakeQuant:
    """Round weights and activations as they will be stored, with derivatives that pass straight through.

    Args:
        fn: any JAX function ``fn(params, *args, **kwargs)``.
        recipe: a recipe, or the name of a preset.
    """
    return FakeQuant(fn, resolve_recipe(recipe))
