"""Observing what passes through a function, and calibrating on batches.

    t = qjax.observe(fn, recipe)
    state = t.init(params, *args)                    # {site: {field: array}}; works under jax.eval_shape
    out, state = t.apply(params, state, *args)       # pure: works under jit and scan, inside shard_map
    model = t.convert(params, state, *args)          # the packed model with constant activation scales

`qjax.calibrate` folds `apply` over batches, and `qjax.quantize(batches=...)` calls it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax._compat import abstract
from qjax.analysis.naming import LINEAR
from qjax.applying.static import taps_of
from qjax.calibration import State
from qjax.errors import DataError, RecipeError, near
from qjax.evaluate import track
from qjax.program import Program, Signature, trace_flat
from qjax.recipe import Recipe, compile_pattern, resolve_recipe
from qjax.rewriting.taps import NONFINITE, Collector, Tap
from qjax.statistics import Statistic
from qjax.trees import is_array

if TYPE_CHECKING:
    from qjax.transforms import Model

States = dict[str, State]
"""Site name -> the arrays of its observer."""


class Observed:
    """A function that also says what it saw. Made by `qjax.observe`.

    Attributes:
        fn: the function ``fn(params, *args, **kwargs)``.
        recipe: says which sites are observed, for which format and by which observer: those with static inputs, and
            those whose rounding looks at activations. None for none.
        statistics: pattern of site names -> what else is gathered there.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        recipe: Recipe | None,
        statistics: Mapping[str, tuple[Statistic, ...]] | None = None,
    ):
        self.fn, self.recipe, self.statistics = fn, recipe, dict(statistics or {})

    def __repr__(self) -> str:
        """Name the function and the recipe."""
        name = getattr(self.fn, "__qualname__", type(self.fn).__name__)
        return f"Observed({name}, recipe={(self.recipe and self.recipe.name) or 'unnamed'!r})"

    def _traced(self, params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Program, Collector, Any]:
        signature, arrays = Signature.of(params, args, kwargs)
        return *self._of(signature, arrays), arrays

    def _of(self, signature: Signature, arrays: list[Any]) -> tuple[Program, Collector]:
        program = trace_flat(self.fn, signature, arrays)
        taps = {} if self.recipe is None else taps_of(self.recipe.decide(program.sites))
        for pattern, wanted in self.statistics.items():
            taps |= self._gathering(program, pattern, wanted, taps)
        if not taps:
            raise RecipeError(
                "the recipe observes nothing: no rule has static inputs; write inputs=qjax.static(format, observer), "
                "or say what to gather, statistics={'**': qjax.statistics.SecondMoment()}"
            )
        return program, Collector(program, taps)

    @staticmethod
    def _gathering(
        program: Program, pattern: str, wanted: tuple[Statistic, ...], taps: Mapping[str, Tap]
    ) -> dict[str, Tap]:
        """The taps of the sites that a pattern names, with these statistics too."""
        matches = compile_pattern(pattern).fullmatch
        names = [site.name for site in program.sites if site.op in LINEAR and matches(site.name + "/")]
        if not names:
            known = [site.name for site in program.sites if site.op in LINEAR]
            raise RecipeError(f"statistics: {pattern!r} names no product with a parameter{near(pattern, known)}")
        out = {}
        for name in names:
            tap = taps.get(name, Tap())
            more = tuple(s for s in wanted if s not in tap.statistics)
            out[name] = dataclasses.replace(tap, statistics=(*tap.statistics, *more))
        return out

    def init(self, params: Any, *args: Any, **kwargs: Any) -> States:
        """The state before any data.

        Args:
            params, *args, **kwargs: as for the function; abstract arrays are enough.
        """
        _, collector, arrays = self._traced(params, args, kwargs)
        if not any(tap.statistics for tap in collector.taps.values()):
            return {name: tap.init((1, 1)) for name, tap in collector.taps.items()}
        jax.eval_shape(collector.observe, [abstract(a) for a in arrays])  # it knows the shapes at each site then
        sites = collector.program.by_name
        return {name: tap.init(collector.shapes[sites[name].read]) for name, tap in collector.taps.items()}

    def merge(self, a: States, b: States, params: Any, *args: Any, **kwargs: Any) -> States:
        """The state of two streams together, such as those of two runs; `merge_processes` is for those of one job.

        Args:
            a, b: states of this recipe and function.
            params, *args, **kwargs: as for the function; abstract arrays are enough.
        """
        _, collector, _ = self._traced(params, args, kwargs)
        for state in (a, b):
            _check_sites(state, collector)
        return {name: tap.merge(a[name], b[name]) for name, tap in collector.taps.items()}

    def merge_processes(self, state: States, params: Any, *args: Any, **kwargs: Any) -> States:
        """The state of all processes of a `jax.distributed` job, each of which has observed batches of its own.

        Every process calls this, with the same recipe, function and shapes, and gets the same state. A state that was
        observed on arrays of a mesh over all processes holds what all of them have shown and is not merged.

        Args:
            state: what this process has observed; of one that had no batch, `init`.
            params, *args, **kwargs: as for the function; abstract arrays are enough.

        Raises:
            DataError: the state belongs to another recipe or function, or to all processes already.
        """
        _, collector, _ = self._traced(params, args, kwargs)
        _check_sites(state, collector)
        whole = [n for n, fields in state.items() if any(not _own(a) for a in fields.values())]
        if whole:
            raise DataError(
                f"{whole[0]}: its state lies on a mesh over several processes, so it holds what all of them have "
                "shown; use it as it is"
            )
        if jax.process_count() == 1:
            return state
        from jax.experimental import multihost_utils

        rows = multihost_utils.process_allgather(state)
        return {name: tap.merged(jax.tree.map(jnp.asarray, rows[name])) for name, tap in collector.taps.items()}

    def apply(self, params: Any, state: States, *args: Any, **kwargs: Any) -> tuple[Any, States]:
        """Call the function and observe it.

        Args:
            params: its parameters, as for the function.
            state: from `init`, or from an earlier `apply`.
            *args, **kwargs: its arguments.

        Returns:
            Its result, unchanged, and the state with what this call has shown.

        Raises:
            DataError: the state belongs to another recipe or function.
        """
        return self._apply(*Signature.of(params, args, kwargs), state)

    def _apply(self, signature: Signature, arrays: list[Any], state: States) -> tuple[Any, States]:
        program, collector = self._of(signature, arrays)
        _check_sites(state, collector)
        outs, seen = collector.observe(arrays)
        merged = {
            name: tap.merge(state[name], seen[name]) if name in seen else state[name]
            for name, tap in collector.taps.items()
        }
        return jax.tree.unflatten(program.out_tree, outs), merged

    def convert(self, params: Any, state: States, *args: Any, **kwargs: Any) -> Model:
        """The packed model, its activation scales from the state.

        Args:
            params: float parameters.
            state: what was observed.
            *args, **kwargs: example arguments, abstract ones are enough.
        """
        from qjax.transforms import quantize

        if self.recipe is None:
            raise RecipeError("these statistics belong to no recipe: give observe one to make a model of")
        program, _, _ = self._traced(params, args, kwargs)
        taps = taps_of(self.recipe.decide(program.sites))
        extra = {name: set(fields) - set(taps[name].init((1, 1))) for name, fields in state.items() if name in taps}
        state = {n: {k: v for k, v in state[n].items() if k not in more} for n, more in extra.items()}
        return quantize(self.fn, params, *args, recipe=self.recipe, state=state, **kwargs)


def _own(a: Any) -> bool:
    return getattr(a, "is_fully_addressable", True)


def _check_sites(state: States, collector: Collector) -> None:
    other = sorted(set(state) ^ set(collector.taps))
    if other:
        raise DataError(
            f"the state does not belong to this recipe and function: they differ at {other[0]} "
            f"(and {len(other) - 1} more sites); make it with init"
        )


def observe(
    fn: Callable[..., Any], recipe: Recipe | str | None = None, statistics: Mapping[str, Any] | None = None
) -> Observed:
    """Observe the activations for which a recipe wants constant scales, or whatever else there is to know of them.

    Args:
        fn: any JAX function ``fn(params, *args, **kwargs)``.
        recipe: a recipe with static inputs, or the name of a preset; None for none.
        statistics: pattern of site names -> a statistic or a tuple of them, such as
            ``{"**/mlp/**": qjax.statistics.SecondMoment()}``; gathered at the products that read a parameter.

    Raises:
        RecipeError: something that is no statistic.
    """
    wanted = {}
    for pattern, value in (statistics or {}).items():
        parts = wanted[pattern] = tuple(value) if isinstance(value, tuple | list) else (value,)
        for part in parts:
            if not isinstance(part, Statistic):
                raise RecipeError(
                    f"statistics[{pattern!r}] is {part!r}; one of qjax.statistics such as SecondMoment(), or a tuple"
                )
    return Observed(fn, None if recipe is None else resolve_recipe(recipe), wanted)


def _kept(path: str | Path, observed: Observed, params: Any) -> Any:
    """Where the state of a calibration is kept."""
    from qjax.checkpoint.folded import Folded, update_with_sample

    weights = hashlib.sha256()
    for leaf in filter(is_array, jax.tree.leaves(params)):
        update_with_sample(weights, leaf)
    recipe = observed.recipe
    said = {pattern: [repr(s) for s in parts] for pattern, parts in observed.statistics.items()}
    job = {"recipe": recipe.hash if recipe is not None else "", "statistics": said}
    return Folded(path, {**job, "parameters": weights.hexdigest()})


def calibrate(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    recipe: Recipe | str | None = None,
    statistics: Mapping[str, Any] | None = None,
    resume: str | Path | None = None,
    show: bool | None = None,
) -> States:
    """Observe a function on batches.

    Args:
        fn: any JAX function ``fn(params, *args)``.
        params: its float parameters.
        batches: something that can be iterated over again and again (a list, or an object whose ``__iter__`` starts
            anew), of argument tuples; a batch that is no tuple is the one argument. Batches may differ in shape (each
            shape is compiled once), not in structure.
        recipe: says what to observe.
        statistics: what else to gather, as for `observe`.
        resume: a folder in which the state is kept from time to time: a job that was killed goes on from there, to the
            same result. It stays, and can be removed afterwards.
        show: progress bar on stderr; None: where that is a terminal.

    Returns:
        The state, for ``quantize(state=...)`` or `Observed.convert`.

    Raises:
        DataError: batches are a one-shot iterator, none, of different structure, or lead to NaN or infinity at a site.
    """
    observed = observe(fn, recipe, statistics)
    # What is static in the trees (functions, strings, flags) stays static, as in calls of a model.
    apply = jax.jit(lambda signature, arrays, state: observed._apply(signature, arrays, state)[1], static_argnums=0)
    state: States = {}
    first: Any = None
    kept = None if resume is None else _kept(resume, observed, params)
    done = 0
    for number, args in enumerate(track(argument_tuples(batches), "calibrating", show=show)):
        structure = _structure(args)
        if first is None:
            first = structure
            state = observed.init(params, *args)
            if kept is not None:
                state, done = kept.load(state)
        elif structure != first:
            raise DataError(
                f"batch {number} is {structure[1]}, but batch 0 is {first[1]}; give batches of one structure"
            )
        if kept is not None:
            kept.passed(number, args)
        if number < done:
            continue
        try:
            state = apply(*Signature.of(params, args, {}), state)
        except Exception as error:
            error.add_note(f"qjax: this happened in calibration batch {number}")
            raise
        bad = [name for name, fields in state.items() if float(np.asarray(fields[NONFINITE]))]
        if bad:
            raise DataError(
                f"batch {number}: NaN or infinity among the inputs of {bad[0]}"
                + (f" and of {len(bad) - 1} more sites" if len(bad) > 1 else "")
                + "; look at that batch, or at what comes before the site"
            )
        if kept is not None:
            kept.save(state, number + 1)
    if first is None:
        raise DataError("there are no calibration batches; give at least one")
    if kept is not None:
        kept.save(state, number + 1, now=True)
    return state


def argument_tuples(batches: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """Batches as argument tuples.

    Raises:
        DataError: they can be iterated over only once.
    """
    if not isinstance(batches, Iterable) or hasattr(batches, "shape"):
        raise DataError(f"batches is a {type(batches).__name__}; give a list of argument tuples, such as [(x,)]")
    if isinstance(batches, Iterator):
        raise DataError(
            f"batches is a {type(batches).__name__}, which can be gone through only once, and calibration starts again "
            "from the beginning (to find the example, and wherever a method needs a second look): give a list, or an "
            "object whose __iter__ starts anew"
        )
    for number, batch in enumerate(batches):
        if isinstance(batch, list):
            raise DataError(
                f"batch {number} is a list; a batch is a tuple of arguments, (x,) for one, or that one argument itself"
            )
        yield batch if isinstance(batch, tuple) else (batch,)


def _structure(args: tuple[Any, ...]) -> tuple[Any, str]:
    leaves, treedef = jax.tree.flatten(args)
    kinds = tuple((np.ndim(x), str(getattr(x, "dtype", type(x).__name__))) for x in leaves)
    return (treedef, kinds), ", ".join(f"{kind}[{ndim}d]" for ndim, kind in kinds) or "empty"
