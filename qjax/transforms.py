"""`quantize`, `plan` and `Model`: the public way from a function and its parameters to a quantized model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.applying.leaves import quantize_leaves
from qjax.applying.planning import Plan, plan_program
from qjax.applying.readers import given_scales, seen_states
from qjax.applying.reporting import build_report, explain_row
from qjax.applying.static import constants_of, with_constants
from qjax.applying.storage import WEIGHT_OPS, input_prefix
from qjax.blockwise import BlockQuantizer, blocks_of, job_cost
from qjax.errors import QjaxError, RecipeError, TraceError, warn
from qjax.formats import is_quantized
from qjax.lazy import Lazy
from qjax.observed import argument_tuples, calibrate
from qjax.passes import run_passes
from qjax.program import Program, Signature, trace_flat
from qjax.recipe import Recipe, resolve_recipe
from qjax.report.data import Report
from qjax.rewrite import Rewriter
from qjax.rewriting.emit import Act
from qjax.rewriting.operands import operand_acts
from qjax.sources import Static
from qjax.trees import is_array, replace_arrays


@functools.cache
def _is_concrete(kind: type) -> bool:
    """Whether a type is that of concrete arrays; asked once for each, because jax's own isinstance is slow."""
    return issubclass(kind, jax.Array | np.ndarray)


class Rewritten:
    """A function of quantized parameters, made from a float function and a recipe.

    Each call with new shapes traces the float function, finds its sites and replays it with the recipe's decisions;
    the result is jitted and cached by shapes and static arguments.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        recipe: Recipe,
        *,
        max_runs: int = 4,
        implementation: str | None = None,
    ):
        self.fn, self.recipe = fn, recipe
        self.max_runs, self.implementation = max_runs, implementation
        self.has_inputs = any(rule.inputs is not None or rule.operands for rule in recipe.rules)
        self._jitted = jax.jit(self._called, static_argnums=0)

    def __repr__(self) -> str:
        """Name the function and the recipe."""
        name = getattr(self.fn, "__qualname__", type(self.fn).__name__)
        return f"Rewritten({name}, recipe={self.recipe.name or 'unnamed'!r})"

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the quantized function."""
        # The way of every call: leaves without their paths, quantized ones taken apart by jax.
        leaves, treedef = jax.tree.flatten((params, args, kwargs))
        if all(map(_is_concrete, set(map(type, leaves)))):
            return self._jitted((treedef, ()), *leaves)
        arrays, static = [], []
        for position, leaf in enumerate(leaves):
            if is_array(leaf):
                arrays.append(leaf)
            else:
                static.append((position, type(leaf), leaf))  # the type, because 1 == 1.0 == True
        return self._jitted((treedef, tuple(static)), *arrays)

    def _called(self, call: tuple[Any, tuple[tuple[int, type, Any], ...]], *arrays: Any) -> Any:
        treedef, static = call
        given, it = {position: leaf for position, _, leaf in static}, iter(arrays)
        leaves = [given[n] if n in given else next(it) for n in range(treedef.num_leaves)]
        params, args, kwargs = jax.tree.unflatten(treedef, leaves)
        return self._run(*Signature.of(params, args, kwargs))

    def _run(self, signature: Signature, arrays: Sequence[Any]) -> Any:
        if not self.has_inputs and not any(is_quantized(a) for a in arrays):
            params, args, kwargs = signature.rebuild(arrays)
            return self.fn(params, *args, **kwargs)
        program = trace_flat(self.fn, signature, arrays)
        return self.replay(program, arrays)

    def replay(self, program: Program, arrays: Sequence[Any]) -> Any:
        """Emit the quantized program on its array leaves."""
        return jax.tree.unflatten(program.out_tree, self.rewriter(program)(arrays))

    def rewriter(self, program: Program, record: bool = False) -> Rewriter:
        """What replays the program by the recipe."""
        decisions = self.recipe.decide(program.sites, strict=False)
        inputs = {
            site.name: Act(source.fmt, input_prefix(site.name) if isinstance(source, Static) else None)
            for site in program.sites
            if site.op in WEIGHT_OPS and (source := decisions[site.name].inputs) is not None
        }
        inputs |= operand_acts(program, decisions)
        return Rewriter(program, inputs, max_runs=self.max_runs, implementation=self.implementation, record=record)

    def recorded(self, program: Program, stored: Sequence[Any]) -> Rewriter:
        """Replay abstractly with the parameter leaves as stored; what is returned knows what each site became."""
        avals = [*stored, *(_struct(a) for a in program.jaxpr.in_avals[len(stored) :])]
        rewriter = self.rewriter(program, record=True)
        jax.eval_shape(lambda *arrays: rewriter(arrays), *avals)
        return rewriter

    def rewritten_jaxpr(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The closed jaxpr of the rewritten function, for reading and comparing."""
        signature, arrays = Signature.of(params, args, kwargs)
        return jax.make_jaxpr(lambda *a: self._run(signature, a))(*arrays)


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    """An argument as it was traced, with its sharding where that is part of its type."""
    explicit = jax.sharding.AxisType.Explicit in aval.sharding.mesh.axis_types
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=aval.sharding if explicit else None)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A quantized model: call it as ``model(model.params, *args)``.

    Attributes:
        fn: the float function ``fn(params, *args, **kwargs)``.
        params: the parameter tree, some leaves replaced by `QArray`s.
        recipe: what was asked for.
        report: what was done.
    """

    fn: Callable[..., Any]
    params: Any
    recipe: Recipe
    report: Report
    rewritten: Rewritten = dataclasses.field(repr=False)

    def __repr__(self) -> str:
        """Name the function and the recipe; the report is long."""
        name = self.report.model or getattr(self.fn, "__qualname__", type(self.fn).__name__)
        return f"Model({name}, recipe={self.recipe.name or 'unnamed'!r}, {len(self.report.quantized)} quantized sites)"

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the quantized function; jitted, cached by shapes, and differentiable like any JAX function."""
        return self.rewritten(params, *args, **kwargs)

    def bind(self, fn: Callable[..., Any]) -> Rewritten:
        """Another function of the same parameters, quantized by the same recipe (prefill and decode).

        Args:
            fn: ``fn(params, *args, **kwargs)`` over the same parameter tree.

        Returns:
            A function to be called with ``model.params``.
        """
        if not callable(fn):
            raise TraceError(f"bind needs a function of (params, *args), not {type(fn).__name__}")
        return Rewritten(
            fn, self.recipe, max_runs=self.rewritten.max_runs, implementation=self.rewritten.implementation
        )

    def explain(self, site: str) -> str:
        """Everything known of one site: format, bits and bytes, SQNR, lowering, or why it was left in float.

        Raises:
            DataError: no site has that name.
        """
        return explain_row(self.report.row(site))


def plan(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    recipe: Recipe | str,
    batches: int = 1,
    blocks: str | None = None,
    resume: bool = False,
    **kwargs: Any,
) -> Plan:
    """What `quantize` would do, without doing it.

    Args:
        fn, params, *args, **kwargs: as for `qjax.trace`; abstract arrays are enough. Where the recipe needs data, the
            arguments are those of one batch.
        recipe: a recipe or the name of a preset.
        batches: how many batches of that shape there will be.
        blocks, resume: whether `quantize` will be given these, which make it go block by block.

    Returns:
        Sites, decisions, shapes and bytes of the quantized tree, shardings for it, and ``cost``: peak memory and work.

    Raises:
        RecipeError: the recipe does not fit the program.
    """
    recipe = resolve_recipe(recipe)
    signature, arrays = Signature.of(params, args, kwargs)
    planned = plan_program(trace_flat(fn, signature, arrays), recipe)
    lazy = [isinstance(a, Lazy) for a in arrays[: signature.n_params]]
    parts = bool(recipe.needs_batches) and _by_blocks(recipe, params, blocks, resume or None)
    count = batches if recipe.needs_batches else 0
    cost = job_cost(planned, blocks_of(planned.program, blocks), count, lazy, parts)
    return dataclasses.replace(planned, cost=cost)


def quantize(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    recipe: Recipe | str,
    batches: Iterable[Any] | None = None,
    state: Mapping[str, Any] | None = None,
    name: str = "",
    donate: bool = False,
    max_runs: int = 4,
    implementation: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    blocks: str | None = None,
    resume: str | Path | None = None,
    **kwargs: Any,
) -> Model:
    """Quantize a model.

    Args:
        fn: any JAX function ``fn(params, *args, **kwargs)``.
        params: its parameter tree, float arrays.
        *args, **kwargs: example arguments (or `jax.ShapeDtypeStruct`) of any batch size and length.
        recipe: a recipe, or the name of a preset (`qjax.recipes()`).
        batches: calibration data for recipes with static inputs: argument tuples, as `qjax.calibrate` takes them. Where
            no example arguments are given, the first batch is the example.
        state: what `qjax.calibrate` returned for this recipe, in place of batches.
        name: the model's name in the report.
        donate: free each float leaf once it is packed (the float tree cannot be used afterwards).
        max_runs: how many scans one scan may be split into where its layers have different formats.
        implementation: name of the lowering to use for every quantized op; None chooses.
        progress: called as ``progress(done, total, leaf name)`` after each leaf, or block.
        blocks: go block by block, and this pattern says what a block is, by the beginning of site names
            (``encoder/*/layer_*``). Without it a block is a step of a scan over layers, or what stands under the first
            number of a path (``layers/3``). A job goes block by block where a rounding looks at activations, where
            leaves are `qjax.Lazy`, and where ``blocks`` or ``resume`` is given; else calibration runs the whole
            function.
        resume: a folder in which finished blocks are kept: a job that was killed goes on from there, to the same
            result. The folder stays, and can be removed once the model is saved.

    Returns:
        The model; ``model.params`` is the same tree with packed leaves.

    Raises:
        RecipeError: the recipe does not fit the program, or needs calibration data.
        CheckpointError: ``resume`` is the folder of another job, or damaged.
        DataError: batches that cannot be used, or a state that belongs to something else.
        QjaxError: a weight holds NaN or infinity.
    """
    recipe = resolve_recipe(recipe)
    if recipe.needs_batches and batches is None and state is None:
        raise RecipeError(
            f"{recipe.needs_batches}: pass calibration data as batches=, or choose a recipe that needs none"
        )
    if recipe.settle is not None and state is not None:
        raise RecipeError(f"{type(recipe.settle).__name__} looks at the data itself: give batches=, and no state")
    if batches is not None:
        if kwargs:
            raise QjaxError("batches are tuples of positional arguments; give the function without keyword arguments")
        if state is not None:
            raise QjaxError("batches and state are two sources of the same scales; give one of them")
        args = args or next(argument_tuples(batches), ())
        if not recipe.needs_batches:
            warn("the recipe needs no calibration data: batches are not looked at")
        elif recipe.settle is not None:
            return _settled(fn, params, args, recipe, batches, name, max_runs, implementation, progress, resume)
        elif _by_blocks(recipe, params, blocks, resume):
            return _quantize_by_blocks(
                fn, params, recipe, batches, name, donate, max_runs, implementation, progress, blocks, resume
            )
        else:
            state = calibrate(fn, params, batches, recipe=recipe)
    return quantize_with(
        fn,
        params,
        *args,
        recipe=recipe,
        constants=lambda decisions: constants_of(decisions, state or {}),
        state=state,
        name=name,
        donate=donate,
        max_runs=max_runs,
        implementation=implementation,
        progress=progress,
        **kwargs,
    )


def _settled(
    fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    recipe: Recipe,
    batches: Iterable[Any],
    name: str,
    max_runs: int,
    implementation: str | None,
    progress: Callable[[int, int, str], None] | None,
    resume: str | Path | None,
) -> Model:
    """A model from a recipe whose formats and scales a search finds."""
    from qjax.settling import settle

    _refuse_bad_leaves(params)
    if any(is_quantized(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_quantized)):
        raise QjaxError("these parameters are quantized already; pass the float parameters")
    found = settle(fn, params, argument_tuples(batches), recipe=recipe, resume=resume, progress=progress)
    model = quantize_with(
        fn,
        replace_arrays(params, found.leaves),
        *args,
        recipe=found.recipe,
        constants=found.constants,
        scales=found.scales,
        name=name,
        max_runs=max_runs,
        implementation=implementation,
    )
    return dataclasses.replace(model, report=model.report.with_notes(*found.notes))


def _by_blocks(recipe: Recipe, params: Any, blocks: Any, resume: Any) -> bool:
    """Whether a job goes block by block."""
    lazy = any(isinstance(leaf, Lazy) for leaf in jax.tree.leaves(params))
    return recipe.rounds_with_data or lazy or blocks is not None or resume is not None


def _quantize_by_blocks(
    fn: Callable[..., Any],
    params: Any,
    recipe: Recipe,
    batches: Iterable[Any],
    name: str,
    donate: bool,
    max_runs: int,
    implementation: str | None,
    progress: Callable[[int, int, str], None] | None,
    blocks: str | None,
    resume: str | Path | None,
) -> Model:
    _refuse_bad_leaves(params)
    if any(is_quantized(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_quantized)):
        raise QjaxError("these parameters are quantized already; pass the float parameters")
    rewritten = Rewritten(fn, recipe, max_runs=max_runs, implementation=implementation)
    job = BlockQuantizer(
        fn,
        params,
        recipe,
        lambda: argument_tuples(batches),
        rewritten.rewriter,
        blocks=blocks,
        resume=resume,
        donate=donate,
        progress=progress,
    )
    planned, stored, figures, notes = job.run()
    replayed = rewritten.recorded(planned.program, stored)
    report = build_report(planned.program, planned, stored, figures, replayed, name=name, recipe=recipe.name)
    return Model(fn, replace_arrays(params, stored), recipe, report.with_notes(*notes), rewritten)


def quantize_with(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    recipe: Recipe,
    constants: Any,
    scales: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
    name: str = "",
    donate: bool = False,
    max_runs: int = 4,
    implementation: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    **kwargs: Any,
) -> Model:
    """`quantize` with numbers that are known already.

    Args:
        constants: site -> the arrays of its static inputs, [1, 1] each; or a function of the decisions that gives them.
        scales: site -> aux of its weight, [*stack, N, blocks] each, of those that are not fitted to the weight.
        state: site -> what was observed there, for smoothing and for roundings that look at activations.
        fn, params, args, recipe, name, donate, max_runs, implementation, progress, kwargs: as in `quantize`.
    """
    signature, arrays = Signature.of(params, args, kwargs)
    if any(is_quantized(a) for a in arrays[: signature.n_params]):
        raise QjaxError("these parameters are quantized already; pass the float parameters")
    _refuse_bad_leaves(params)
    program = trace_flat(fn, signature, arrays)
    planned = plan_program(program, recipe)
    constants = constants(planned.decisions) if callable(constants) else constants
    if recipe.finish:
        raise RecipeError(
            f"the finishing pass {recipe.finish[0]!r} works block by block: pass calibration data as batches="
        )
    chosen = [name for name, d in planned.decisions.items() if d.weights is not None and not d.skip]
    leaves, notes = run_passes(recipe.prepare, program, arrays[: signature.n_params], chosen)
    del arrays
    given = given_scales(program, planned.leaves, scales or {})
    seen = seen_states(program, planned.leaves, state or {})
    stored, finish = quantize_leaves(planned.leaves, leaves, given=given, seen=seen, donate=donate, progress=progress)
    if constants:
        for position, leaf in planned.leaves.items():
            stored[position] = with_constants(program, leaf, stored[position], constants)
    stored = [jnp.asarray(a) if isinstance(a, Lazy) else a for a in stored]  # what stays in float
    rewritten = Rewritten(fn, recipe, max_runs=max_runs, implementation=implementation)
    replayed = rewritten.recorded(program, stored)  # while the device is busy
    report = build_report(program, planned, stored, finish(), replayed, name=name, recipe=recipe.name)
    report = report.with_notes(*notes)
    return Model(fn, replace_arrays(params, stored), recipe, report, rewritten)


def _refuse_bad_leaves(params: Any) -> None:
    """Object arrays and strings are no weights; integer leaves are left alone and never quantized."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized):
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OUS":
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise QjaxError(f"{where} is a NumPy array of dtype {leaf.dtype}; parameters are numbers")
