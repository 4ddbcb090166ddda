"""Low-rank adapters on frozen weights, packed or float: LoRA and QLoRA.

    t = qjax.lora(fn, {"**/attn/**": 16}, key=key)
    state = t.init(params, *args)                    # {site: {"a": [K, r], "b": [r, N]}}, float32
    out, state = t.apply(params, state, *args)       # jax.grad and optax with respect to the state alone
    params = t.merge(params, state, *args)           # W + (alpha / r) A B, in the format that W is stored in

Each adapted product gives ``x W + (alpha / r) (x A) B``; W is multiplied as it is stored and never written to, and a
backward pass keeps its codes. A is drawn from a normal distribution of variance 1/K and B is zero, so the function
starts as it is.

Sources: LoRA, Hu et al. 2021 (arXiv:2106.09685), section 4.1; over a packed base, QLoRA, Dettmers et al. 2023
(arXiv:2305.14314), section 3 (without its second quantization of the scales and its paged optimizers).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from qjax.applying.low_rank import Slot, Targets, merged_leaf, plan_adapters
from qjax.applying.planning import plan_program
from qjax.applying.reporting import build_report
from qjax.errors import DataError, QjaxError, RecipeError
from qjax.formats import is_quantized
from qjax.program import Program, Signature, trace_flat
from qjax.recipe import Recipe, resolve_recipe
from qjax.rewriting.low_rank import Adapted, LowRankRewriter
from qjax.rewriting.selection import dense
from qjax.transforms import Model, Rewritten, quantize
from qjax.trees import replace_arrays

Adapters = dict[str, dict[str, Any]]
"""Site -> ``a`` [*batch, K, r] and ``b`` [*batch, r, N]: K numbers are summed over, N are kept, batch axes are those of
independent matrices (experts). Layers of a scan are sites of their own, as in a Python loop."""


class LoRA:
    """A function whose products have low-rank adapters. Made by `qjax.lora`.

    Attributes:
        fn: the function ``fn(params, *args, **kwargs)``.
        targets: which sites have adapters, and of which rank.
        alpha: adapters are scaled by alpha / rank; None scales them by 1.
        key: PRNG key of A.
        base: what runs the frozen function, if it is a model; it says how activations are quantized.
    """

    def __init__(
        self, fn: Callable[..., Any], targets: Targets, alpha: float | None, key: jax.Array, base: Rewritten | None
    ):
        self.fn, self.targets, self.alpha, self.key, self.base = fn, targets, alpha, key, base

    def __repr__(self) -> str:
        """Name the function and the targets."""
        name = getattr(self.fn, "__qualname__", type(self.fn).__name__)
        given = self.targets.everywhere if self.targets.everywhere is not None else dict(self.targets.patterns)
        return f"LoRA({name}, {given!r})"

    def init(self, params: Any, *args: Any, **kwargs: Any) -> Adapters:
        """New adapters: A normal with variance 1/K, B zero, float32.

        What is drawn for a site depends on the key, its name and its shape, and on nothing else: unrolled and scanned
        layers begin alike.

        Args:
            params, *args, **kwargs: as for the function; abstract arrays are enough.

        Raises:
            RecipeError: the targets do not fit the program.
        """
        _, _, slots = self._traced(params, args, kwargs)
        return {slot.site: self._new(slot) for slot in slots}

    def _new(self, slot: Slot) -> dict[str, Any]:
        shapes = slot.shapes
        key = jax.random.fold_in(self.key, zlib.crc32(slot.site.encode()))
        std = 1 / math.sqrt(max(shapes["a"][-2], 1))
        return {"a": std * jax.random.normal(key, shapes["a"]), "b": jnp.zeros(shapes["b"])}

    def apply(self, params: Any, state: Adapters, *args: Any, **kwargs: Any) -> tuple[Any, Adapters]:
        """Call the function with its adapters.

        Args:
            params: frozen, float or packed.
            state: what is trained: from `init`, or after optimizer steps.
            *args, **kwargs: arguments of the function.

        Returns:
            Its result, and the state as it was.

        Raises:
            DataError: the state is that of another function or other targets; the message names the first site.
        """
        program, arrays, slots = self._traced(params, args, kwargs)
        _check(state, slots)
        acts = self.base.rewriter(program).inputs if self.base is not None else {}
        inputs = {site: Adapted(None, act) for site, act in acts.items()}
        factors = {}
        for slot in slots:
            for site, adapter in slot.readers:
                inputs[site] = Adapted(adapter, acts.get(site))
                factors[site] = {"a": state[slot.site]["a"], "b": state[slot.site]["b"]}
        implementation = self.base.implementation if self.base is not None else None
        outs = LowRankRewriter(program, inputs, factors, implementation=implementation)(arrays)
        return jax.tree.unflatten(program.out_tree, outs), state

    def merge(self, params: Any, state: Adapters, *args: Any, **kwargs: Any) -> Any:
        """The parameters with the adapters in them, for the function (or the model) without adapters.

        A float weight becomes W + (alpha / r) A B, computed in float32. A packed one is dequantized, and the sum is
        rounded to nearest in the format that it had; matrices whose A B is zero keep their codes. Works under jit.

        Args:
            params: as for `apply`.
            state: the trained adapters.
            *args, **kwargs: example arguments; abstract ones are enough.

        Returns:
            A tree of the same structure, formats and dtypes.

        Raises:
            DataError: as for `apply`, or NaN or infinity among the factors of a site (not looked for under jit).
        """
        program, arrays, slots = self._traced(params, args, kwargs)
        return replace_arrays(params, self._merged(program, arrays, slots, state))

    def _merged(self, program: Program, arrays: list[Any], slots: tuple[Slot, ...], state: Adapters) -> list[Any]:
        _check(state, slots)
        out = list(arrays[: program.signature.n_params])
        deltas: dict[int, Any] = {}
        for slot in slots:
            delta = slot.delta(state[slot.site])
            if not isinstance(delta, Tracer) and not jnp.isfinite(delta).all():
                raise DataError(f"{slot.site}: its adapter holds NaN or infinity (or overflows) and cannot be merged")
            if slot.leaf not in deltas:
                deltas[slot.leaf] = jnp.zeros(program.leaf_avals[slot.leaf].shape, jnp.float32)
            deltas[slot.leaf] = deltas[slot.leaf].at[slot.index].add(delta)
        for leaf in list(deltas):
            out[leaf] = merged_leaf(out[leaf], deltas.pop(leaf))
        return out

    def convert(
        self, params: Any, state: Adapters, *args: Any, recipe: Recipe | str | None = None, **kwargs: Any
    ) -> Model:
        """The model without adapters: they are merged, and it runs as any quantized model.

        Args:
            params: as for `apply`.
            state: the trained adapters.
            *args, **kwargs: example arguments; abstract ones are enough.
            recipe: quantizes the merged weights anew, all of them from float; None keeps the formats of the base, which
                has to be a model then (``qjax.lora(model, ...)``), and rounds adapted weights to nearest.

        Raises:
            RecipeError: no recipe, and the base is no model; `merge` gives the parameters alone.
            DataError: as for `merge`.
        """
        if recipe is None and self.base is None:
            raise RecipeError(
                "convert makes a model by a recipe: give recipe=, or make the adapters of a model, "
                "qjax.lora(model, ...); merge gives the parameters alone"
            )
        program, arrays, slots = self._traced(params, args, kwargs)
        if recipe is not None:  # rounded once: the sums stay float until then
            floats = self._merged(program, [dense(a) for a in arrays], slots, state)
            return quantize(self.fn, replace_arrays(params, floats), *args, recipe=resolve_recipe(recipe), **kwargs)
        assert self.base is not None
        stored = self._merged(program, arrays, slots, state)
        planned = plan_program(program, self.base.recipe)
        replayed = self.base.recorded(program, stored)
        report = build_report(program, planned, stored, {}, replayed, name="", recipe=self.base.recipe.name)
        report = report.with_notes(
            f"{len(slots)} adapters are merged; SQNR was not measured against the merged weights"
        )
        return Model(self.fn, replace_arrays(params, stored), self.base.recipe, report, self.base)

    def _traced(self, params: Any, args: Any, kwargs: Any) -> tuple[Program, list[Any], tuple[Slot, ...]]:
        signature, arrays = Signature.of(params, args, kwargs)
        program = trace_flat(self.fn, signature, arrays)
        return program, arrays, plan_adapters(program, self.targets, self.alpha)


def _check(state: Any, slots: tuple[Slot, ...]) -> None:
    """Refuse a state that is not of these adapters."""
    wanted = {slot.site: slot for slot in slots}
    if not isinstance(state, Mapping):
        raise DataError(
            f"the state of adapters is a dictionary by site, as init returns it, not {type(state).__name__}"
        )
    if missing := [site for site in wanted if site not in state]:
        raise DataError(
            f"the state has no adapter for {missing[0]} ({len(missing)} of {len(wanted)} sites are missing); "
            "make it with init of the same function and targets"
        )
    if more := sorted(set(state) - set(wanted)):
        raise DataError(
            f"the state has an adapter for {more[0]!r}, which is no site of these targets ({len(more)} too many); "
            "make it with init of the same function and targets"
        )
    for site, slot in wanted.items():
        fields = state[site]
        if not isinstance(fields, Mapping) or set(fields) != {"a", "b"}:
            raise DataError(f"{site}: an adapter has the arrays 'a' and 'b', and this one is {fields!r:.80}")
        for name, shape in slot.shapes.items():
            array = fields[name]
            if not hasattr(array, "shape") or is_quantized(array) or not jnp.issubdtype(array.dtype, jnp.floating):
                raise DataError(f"{site}: {name!r} is a float array of shape {shape}, not {array!r:.80}")
            if tuple(array.shape) != shape:
                raise DataError(
                    f"{site}: {name!r} has shape {tuple(array.shape)}, and an adapter of rank {slot.adapter.rank} of "
                    f"this weight has {shape}"
                )


def lora(
    fn: Callable[..., Any],
    targets: Mapping[str, int | None] | int,
    *,
    alpha: float | None = None,
    key: jax.Array | None = None,
) -> LoRA:
    """Low-rank adapters on frozen weights.

    Args:
        fn: any JAX function ``fn(params, *args, **kwargs)``, whose params may hold packed leaves; or a `Model`, whose
            recipe then says how activations are quantized, and which `LoRA.convert` gives back.
        targets: pattern for site names -> rank, or None to leave those sites alone; the first pattern that matches
            decides, as in a recipe. A bare rank adapts every product that can be, except for ``lm_head`` and for tables
            of embeddings and heads tied to them. Dot and ragged_dot sites of a parameter can be adapted.
        alpha: adapters are scaled by alpha / rank; None scales them by 1.
        key: PRNG key from which A is drawn; None is ``jax.random.key(0)``.

    Raises:
        RecipeError: a rank or alpha that cannot be.
    """
    if not callable(fn):
        raise QjaxError(f"lora needs a function of (params, *args) or a model, not {type(fn).__name__}")
    if alpha is not None and not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha > 0):
        raise RecipeError(f"lora: alpha is a number above 0, or None to scale by 1; not {alpha!r}")
    base = fn.rewritten if isinstance(fn, Model) else fn if isinstance(fn, Rewritten) else None
    key = jax.random.key(0) if key is None else key
    return LoRA(base.fn if base is not None else fn, Targets.of(targets), alpha, key, base)
