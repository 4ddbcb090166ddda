"""Training a function as it will be stored.

    t = qjax.fake_quant(fn, recipe)
    state = t.init(params, *args)                    # {site: {field: array}}
    out, state = t.apply(params, state, *args)       # in a loss: jax.grad, optax, remat, scan as always
    model = t.convert(params, state, *args)          # the packed model with the same outputs

Weights and activations are rounded to their formats in every call, and derivatives pass straight through. Where ranges
are those of the moment (a bare format, ``dynamic``) a site carries nothing. Learned scales (``weight.scale``,
``input.scale``) are trained: differentiate in the state as in the parameters. Averaged and constant ranges
(``input.low``, ``input.high``) have derivative zero; `apply` returns the averages of the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax.analysis.naming import LINEAR
from qjax.applying.planning import plan_program
from qjax.applying.static import observer_of
from qjax.applying.storage import LeafPlan, reads_slice
from qjax.errors import DataError, RecipeError
from qjax.formats.numerics import SMALLEST_SCALE
from qjax.passes import RTN
from qjax.program import Program, Signature, trace_flat
from qjax.recipe import Recipe, resolve_recipe
from qjax.rewriting.fake import (
    INPUT_HIGH,
    INPUT_LOW,
    INPUT_SCALE,
    REACHED,
    WEIGHT_SCALE,
    Faked,
    FakeRewriter,
    averaged,
)
from qjax.rewriting.taps import NONFINITE
from qjax.sources import Ema, Learned, Static
from qjax.transforms import Model, quantize_with

State = dict[str, dict[str, Any]]
"""Site name -> field -> array; empty with formats whose ranges are those of the moment."""


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

    def init(self, params: Any, *args: Any, observed: Mapping[str, Any] | None = None, **kwargs: Any) -> State:
        """The state before training.

        Args:
            params: float parameters: learned scales of weights start from their values.
            *args, **kwargs: arguments of the function. Ranges of activations start from what these show, so they are
                a real batch where the recipe has static, averaged or learned inputs.
            observed: what `qjax.calibrate` returned for this recipe: ranges of activations start from it instead.

        Returns:
            Site -> fields; empty where every range is that of the moment. Works under `jax.eval_shape`.

        Raises:
            RecipeError: the recipe does not fit the program, or asks for what cannot be trained.
            DataError: NaN or infinity among the activations, or no batch reached a site.
        """
        signature, arrays = Signature.of(params, args, kwargs)
        program = trace_flat(self.fn, signature, arrays)
        faked, owners = self._sites(program)
        if not any(f.carries for f in faked.values()):
            return {}
        replay = jax.jit(lambda arrays: FakeRewriter(program, faked, start=True).observe(arrays)[1])
        found = replay(arrays)
        return {
            name: _first_state(name, faked[name], owners[name], found.get(name), observed)
            for name in sorted(faked)
            if faked[name].carries and _keeps(faked[name], owners[name], name)
        }

    def apply(self, params: Any, state: State, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        """Call the function with rounded operands.

        Args:
            params: float parameters; what is trained.
            state: from `init`, or as the last step left it.
            *args, **kwargs: arguments of the function.

        Returns:
            Its result, and the state with the averages of this step.

        Raises:
            DataError: a state that is not this transform's.
        """
        signature, arrays = Signature.of(params, args, kwargs)
        program = trace_flat(self.fn, signature, arrays)
        faked, owners = self._sites(program)
        fields = _fields(faked, owners, state)
        rewriter = FakeRewriter(program, faked, fields)
        outs, seen = rewriter.observe(arrays)
        after = {name: _next(faked[name], state[name], seen.get(name)) for name in state}
        return jax.tree.unflatten(program.out_tree, outs), after

    def convert(self, params: Any, state: State, *args: Any, **kwargs: Any) -> Model:
        """The packed model.

        Args:
            params: the trained parameters.
            state: as `apply` returned it.
            *args, **kwargs: example arguments, abstract ones are enough.
        """
        signature, arrays = Signature.of(params, args, kwargs)
        program = trace_flat(self.fn, signature, arrays)
        faked, owners = self._sites(program)
        fields = _fields(faked, owners, state)
        constants, scales = {}, {}
        for name, site in faked.items():
            if isinstance(site.inputs, Static):
                constants[name] = _constants(site.inputs, fields[name])
            if site.learned and owners[name] == name:
                scales[name] = {"scale": jnp.maximum(fields[name][WEIGHT_SCALE], SMALLEST_SCALE)}
        return quantize_with(self.fn, params, *args, recipe=self.recipe, constants=constants, scales=scales, **kwargs)

    def _sites(self, program: Program) -> tuple[dict[str, Faked], dict[str, str]]:
        """What is rounded at each site, and the first site that reads the same weight, which keeps its scales.

        Storage belongs to the weight: one that any reader keeps in float, or that cannot be stored, is not rounded.
        """
        if self.recipe.prepare:
            raise RecipeError("fake_quant does not run prepare passes; run them first, and train what they return")
        if self.recipe.finish:
            raise RecipeError(
                "fake_quant does not run finishing passes: biases are trained with the rest; leave it out"
            )
        planned = plan_program(program, self.recipe)
        rounded = [name for name, d in planned.decisions.items() if d.operands and not d.skip]
        if rounded or self.recipe.settle is not None:
            what = f"the operands of {rounded[0]}" if rounded else f"what {type(self.recipe.settle).__name__} searches"
            raise RecipeError(
                f"fake_quant does not train {what}: it rounds weights and inputs of products; leave that rule out"
            )
        stored = {leaf.name: leaf for leaf in planned.leaves.values()}
        out: dict[str, Faked] = {}
        owners: dict[str, str] = {}
        first: dict[Any, str] = {}
        for site in program.sites:
            d = planned.decisions[site.name]
            if d.skip or d.rule is None:
                continue
            if site.op not in LINEAR:
                raise RecipeError(
                    f"{site.name}: rule {d.rule} quantizes an {site.op}, which fake_quant cannot round yet; skip it"
                )
            if d.rounding not in (None, RTN()):
                raise RecipeError(
                    f"{site.name}: rule {d.rule} rounds with {d.rounding!r}; fake_quant rounds to nearest"
                )
            if isinstance(d.inputs, Static) and d.inputs.smooth is not None:
                raise RecipeError(
                    f"{site.name}: rule {d.rule} smooths its inputs, whose constants follow from finished weights; "
                    "train with static inputs without smooth, and quantize what was trained with it"
                )
            if isinstance(d.inputs, Static) and d.inputs.fmt.shares_constant:
                raise RecipeError(
                    f"{site.name}: rule {d.rule} has static {d.inputs.fmt.name} inputs, which fake_quant does not "
                    f"train; train with dynamic({d.inputs.fmt!r}), and quantize what was trained with the static ones"
                )
            leaf = stored.get(site.leaf or "")
            keys = [] if leaf is None else [k for k in leaf.slices if reads_slice(site.slice, _at(leaf, k))]
            kinds = {(leaf.slices[k].fmt, leaf.slices[k].observer) for k in keys} if leaf is not None else set()
            if len(kinds) > 1:
                raise RecipeError(f"{site.name}: the slices that it reads have several formats; give them one to train")
            fmt, observer = next(iter(kinds), (None, None))
            if isinstance(d.inputs, Static) and fmt is None:
                raise RecipeError(
                    f"{site.name}: rule {d.rule} asks for {type(d.inputs).__name__.lower()} inputs, whose scale is "
                    "kept with the quantized weight, and the weight stays in float here; use dynamic(...) for them"
                )
            learned = d.weight_learned and fmt is not None
            if learned and (len(keys) > 1 or {axis for axis, _ in site.slice} != set(leaf.key_axes if leaf else ())):
                raise RecipeError(
                    f"{site.name}: it and other sites read different slices of {site.leaf}, of which each would have "
                    "scales of its own; leave out learned(...) for its weights"
                )
            out[site.name] = Faked(fmt, observer, learned, d.inputs)
            owners[site.name] = first.setdefault((site.leaf, *keys), site.name) if learned else site.name
        return out, owners


def _at(leaf: LeafPlan, key: tuple[int, ...]) -> dict[int, int]:
    return dict(zip(leaf.key_axes, key, strict=True))


def _keeps(faked: Faked, owner: str, name: str) -> bool:
    return isinstance(faked.inputs, Static) or owner == name


def _first_state(
    name: str, faked: Faked, owner: str, found: Mapping[str, Any] | None, observed: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A site's fields before training."""
    fields = {}
    if found is None:
        raise DataError(f"{name}: the given arguments do not run it, so its scales have nowhere to start; give others")
    concrete = not any(isinstance(a, Tracer) for a in found.values())
    if concrete and not float(found[REACHED]):
        raise DataError(f"{name}: the given arguments do not run it, so its scales have nowhere to start; give others")
    if faked.learned and owner == name:
        fields[WEIGHT_SCALE] = found[WEIGHT_SCALE]
    if isinstance(faked.inputs, Static):
        low, high = found[INPUT_LOW], found[INPUT_HIGH]
        if observed is not None:
            fmt, observer = faked.inputs.fmt, observer_of(faked.inputs)
            if name not in observed:
                raise DataError(f"{name}: observed has no state for it; calibrate with the same recipe and function")
            low, high = observer.range({k: v for k, v in observed[name].items() if k != NONFINITE}, fmt)
        elif concrete and float(found[NONFINITE]):
            raise DataError(f"{name}: NaN or infinity among its inputs; look at the batch, or at what comes before it")
        if isinstance(faked.inputs, Learned):
            fields[INPUT_SCALE] = faked.inputs.fmt.from_range(*_from_zero(faked.inputs, low, high))["scale"]
        else:
            fields |= {INPUT_LOW: jnp.asarray(low), INPUT_HIGH: jnp.asarray(high)}
    return fields


def _from_zero(source: Learned, low: Any, high: Any) -> tuple[Any, Any]:
    """The range that a learned scale describes; PACT's begins at 0."""
    return (jnp.zeros_like(low), high) if source.method == "pact" else (low, high)


def _next(faked: Faked, fields: Mapping[str, Any], seen: Mapping[str, Any] | None) -> dict[str, Any]:
    """A site's fields after a step."""
    if seen is None or not isinstance(faked.inputs, Ema):
        return dict(fields)
    ran = seen[REACHED] > 0
    return {
        **fields,
        **{
            k: jnp.where(ran, averaged(fields[k], seen[k], faked.inputs.decay), fields[k])
            for k in (INPUT_LOW, INPUT_HIGH)
        },
    }


def _fields(faked: Mapping[str, Faked], owners: Mapping[str, str], state: State) -> dict[str, dict[str, Any]]:
    """The fields that each site is given, checked."""
    wanted = {n: _names(f, owners[n] == n) for n, f in faked.items() if f.carries and _keeps(f, owners[n], n)}
    for name in [*wanted, *state]:
        has = set(state[name]) if name in state else set()
        if has != wanted.get(name, set()):
            raise DataError(
                f"the state does not belong to this recipe and function: {name} has {', '.join(sorted(has)) or 'none'} "
                f"and needs {', '.join(sorted(wanted.get(name, set()))) or 'none'}; make it with init"
            )
    out = {}
    for name, site in faked.items():
        if site.carries:
            own = dict(state.get(name, {}))
            if site.learned:
                own[WEIGHT_SCALE] = state[owners[name]][WEIGHT_SCALE]
            out[name] = own
    return out


def _names(faked: Faked, owner: bool) -> set[str]:
    names = {WEIGHT_SCALE} if faked.learned and owner else set()
    if isinstance(faked.inputs, Learned):
        names |= {INPUT_SCALE}
    elif isinstance(faked.inputs, Static):
        names |= {INPUT_LOW, INPUT_HIGH}
    return names


def _constants(source: Static, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The constant arrays of a site's activations, [1, 1] each."""
    if not isinstance(source, Learned):
        aux = source.fmt.from_range(fields[INPUT_LOW], fields[INPUT_HIGH])
    else:
        aux = {"scale": jnp.maximum(fields[INPUT_SCALE], SMALLEST_SCALE)}
        if not source.fmt.symmetric:
            aux["zero"] = jnp.zeros((1, 1), jnp.uint8)
    return {name: np.asarray(a) for name, a in aux.items()}


def fake_quant(fn: Callable[..., Any], recipe: Recipe | str) -> FakeQuant:
    """Round weights and activations as they will be stored, with derivatives that pass straight through.

    Args:
        fn: any JAX function ``fn(params, *args, **kwargs)``.
        recipe: a recipe, or the name of a preset.
    """
    return FakeQuant(fn, resolve_recipe(recipe))
