"""Training a supernet: EQ-Net's step (several subnets, guidance, weight distributions), and a loop that survives.

The step is a pure function that `make_step` gives; the loop `train` adds what a long job needs: checkpoints (Orbax),
exact resume, metrics, a mesh. Batches are a function of the step's number, so a job that goes on sees what it would
have seen.

Source: EQ-Net (Xu et al. 2023, arXiv:2308.07650), section 3.3 and the authors' training code: Adam at 1e-3 with a
cosine to 0, gradients clipped by value at 1, no weight decay; highest, random and lowest subnets of one batch in this
order.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from qjax.checkpoint.parts import load_part, open_job, save_part
from qjax.errors import DataError, RecipeError
from qjax.supernet.elastic import State, Supernet
from qjax.supernet.events import FOLDER as EVENTS
from qjax.supernet.events import EventFile, require
from qjax.supernet.losses import gpg_terms, wdr_loss
from qjax.supernet.sampling import Sampler, Sandwich, described
from qjax.trees import check_trainable


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a training is made of.

    Attributes:
        steps: optimizer steps.
        sampling: which subnets a step runs, a sampler of `qjax.supernet.sampling`; `Sandwich` is EQ-Net's three: the
            highest, a random one, the lowest.
        lam: share of the teacher in `gpg_loss`; 0 trains without guidance.
        wdr: factor of `wdr_loss`; 0 trains without it.
        learning_rate: of Adam at the start, going to 0 by a cosine. steps_rate: that of steps and offsets; None is the
            same.
        clip: gradients are clipped by value.
        seed: from which subnets are drawn.
    """

    steps: int
    _: dataclasses.KW_ONLY
    sampling: Sampler = Sandwich()
    lam: float = 0.5
    wdr: float = 1.0
    learning_rate: float = 1e-3
    steps_rate: float | None = None
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise RecipeError(f"Schedule: steps={self.steps!r}; a whole number from 1 on")
        described(self.sampling)
        if not 0 <= self.lam <= 1:
            raise RecipeError(f"Schedule: lam={self.lam!r}; from 0 to 1")
        if not (self.wdr >= 0 and self.learning_rate > 0 and self.clip > 0):
            raise RecipeError("Schedule: wdr is 0 or more, learning_rate and clip are above 0")

    def optimizer(self) -> optax.GradientTransformation:
        """Adam for ``{"params", "state"}``, a group each."""

        def adam(rate: float) -> optax.GradientTransformation:
            return optax.chain(optax.clip(self.clip), optax.adam(optax.cosine_decay_schedule(rate, self.steps)))

        rates = {"params": self.learning_rate, "state": self.steps_rate or self.learning_rate}
        return optax.multi_transform(
            {name: adam(rate) for name, rate in rates.items()},
            lambda tree: {name: jax.tree.map(lambda _, name=name: name, part) for name, part in tree.items()},
        )


def split_output(out: Any, params: Any) -> tuple[Any, Any]:
    """Logits and parameters of a function that returns logits, or (logits, parameters with moved statistics)."""
    if isinstance(out, tuple) and len(out) == 2 and jax.tree.structure(out[1]) == jax.tree.structure(params):
        return out
    return out, params


def make_step(t: Supernet, schedule: Schedule, optimizer: optax.GradientTransformation | None = None) -> Any:
    """A training step as a pure function, to be jitted.

    Args:
        t: of a function that returns logits, or (logits, params) with the statistics of batch norms moved:
            every subnet moves them in turn, as in the authors' code.
        schedule: what a step is made of.
        optimizer: for ``{"params", "state"}``; None is the schedule's.

    Returns:
        ``step(params, state, moments, number, inputs, labels, taught=None) -> (params, state, moments, metrics)``;
        inputs is a tuple, taught the logits that the highest subnet learns from (`gpg_loss`'s teacher), and metrics
        are scalars by name.
    """
    optimizer = optimizer or schedule.optimizer()

    def step(params: Any, state: State, moments: Any, number: Any, inputs: Any, labels: Any, taught: Any = None) -> Any:
        domain = t.domain(params, *inputs)
        key = jax.random.fold_in(jax.random.key(schedule.seed), number)
        choices = schedule.sampling.choices(key, jnp.asarray(number) / schedule.steps, domain)

        def loss(trained: Any) -> Any:
            now, logits = trained["params"], []
            for choice in choices:
                out, _ = t.apply(now, trained["state"], choice, *inputs)
                own, now = split_output(out, now)
                logits.append(own)
            terms = gpg_terms(logits, labels, schedule.lam, teacher=taught)
            metrics = dict(zip(schedule.sampling.names, terms, strict=True))
            total = sum(terms[1:], terms[0])
            if schedule.wdr:
                metrics["wdr"] = wdr_loss(t.weights(trained["params"], *inputs))
                total = total + schedule.wdr * metrics["wdr"]
            return total, (now, {"loss": total, **metrics})

        trained = {"params": params, "state": state}
        grads, (moved, metrics) = jax.grad(loss, has_aux=True)(trained)
        updates, moments = optimizer.update(grads, moments, trained)
        after: Any = optax.apply_updates({"params": moved, "state": state}, updates)
        return after["params"], after["state"], moments, metrics

    return step


def recalibrate(t: Supernet, params: Any, state: State, choice: Any, *batches: Any) -> Any:
    """Batch-norm statistics of a subnet: forwards in training mode, without derivative.

    EQ-Net runs up to 257 batches before it evaluates any subnet, which matters most at 2 and 3 bits. After so many a
    moving average has forgotten what it began with; after few it has not. Decided here: what is left of that is taken
    out, so that the result is a mean over the batches that were given, weighted as the moving average weighs them,
    however few they are. How much a batch leaves is seen by running the first one from a second beginning too;
    sums, and whatever else keeps all of its beginning, go on from the parameters.

    The parameters that are given are not changed, so every subnet starts from the same.

    Args:
        t: of a function that returns (logits, params with moved statistics).
        params, state, choice: as for ``t.apply``; the choice may be traced.
        *batches: the arguments of the function, each with an axis of batches in front.

    Returns:
        The parameters with the subnet's statistics.

    Raises:
        DataError: the function returns no parameters, or arguments have no axis of batches.
    """
    leaves, tree = jax.tree.flatten(params)

    def moved(now: list[Any], inputs: Any) -> list[Any]:
        out, _ = t.apply(jax.tree.unflatten(tree, now), state, choice, *inputs)
        logits, after = split_output(out, params)
        if logits is out:
            raise DataError("recalibrate: the function returns no moved statistics beside its logits; nothing to do")
        return [a.astype(b.dtype) for a, b in zip(jax.tree.leaves(after), leaves, strict=True)]

    try:
        (count,) = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in jax.tree.leaves(batches)}  # all have as many
        first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a)[1:], jnp.result_type(a)), batches)
        program = jax.make_jaxpr(moved)(leaves, first).jaxpr
        at = [n for n, (a, b) in enumerate(zip(program.invars, program.outvars, strict=False)) if a is not b]
        start = [jnp.asarray(leaves[n]) for n in at]

        def one(some: list[Any], number: Any) -> tuple[list[Any], list[Any]]:
            now = list(leaves)
            for n, leaf in zip(at, some, strict=True):
                now[n] = leaf
            # The first batch is run twice: from the other beginning, then, as all behind it, from nothing.
            whole = moved(now, jax.tree.map(lambda a: jnp.asarray(a)[jnp.maximum(number - 1, 0)], batches))
            after = [whole[n] for n in at]
            return [jnp.where(number == 0, _nothing(a), b) for a, b in zip(start, after, strict=True)], after

        _, seen = lax.scan(one, [_apart(a) for a in start], jnp.arange(count + 1))
    except DataError:
        raise
    except (TypeError, ValueError) as error:
        shapes = ", ".join(str(list(np.shape(leaf))) for leaf in jax.tree.leaves(batches))
        raise DataError(
            f"recalibrate: the function does not run on parts of these arguments ({shapes}): each has the axis of "
            f"batches in front, such as images [batches, examples, ...]. {type(error).__name__}: {error}"
        ) from error
    out = list(leaves)
    for n, begun, steps in zip(at, start, seen, strict=True):
        out[n] = _without_beginning(begun, steps, count)
    return jax.tree.unflatten(tree, out)


def _nothing(start: Array) -> Array:
    """Where an average begins of which nothing is to be left: it adds up what comes in, without large differences."""
    return jnp.zeros_like(start) if jnp.issubdtype(start.dtype, jnp.floating) else start


def _apart(start: Array) -> Array:
    """Another beginning, as far from that one as numbers are large, so that rounding does not hide it."""
    return (jnp.abs(start) + 1).astype(start.dtype) if jnp.issubdtype(start.dtype, jnp.floating) else start


def _without_beginning(start: Array, steps: Array, count: int) -> Array:
    """A moving average over so many batches without what is left of its beginning.

    Args:
        start: where the parameters have it.
        steps: [1 + count, ...]: after the first batch from `_apart`, then after each batch from `_nothing`.
        count: of batches.
    """
    end = steps[-1]
    if not jnp.issubdtype(start.dtype, jnp.floating):
        return end
    left = jnp.maximum((steps[0] - steps[1]) / _apart(start), 0) ** count
    averaged = left < 0.9999  # else it is a sum or has not moved, which keep where they were
    return jnp.where(averaged, end / (1 - jnp.where(averaged, left, 0)), end + left * start).astype(start.dtype)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What `train` returns.

    Attributes:
        params, state: after the last step.
        metrics: name -> a value for each step.
    """

    params: Any
    state: State
    metrics: Mapping[str, np.ndarray]


def train(
    t: Supernet,
    params: Any,
    state: State,
    batches: Callable[[int], tuple[Any, Any]],
    schedule: Schedule,
    *,
    optimizer: optax.GradientTransformation | None = None,
    folder: str | Path | None = None,
    save_every: int = 100,
    mesh: Any = None,
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None,
    tensorboard: bool = False,
    teacher: Callable[..., Any] | None = None,
) -> Trained:
    """Train a supernet.

    Args:
        t: as for `make_step`.
        params, state: where training starts; ``state`` from ``t.init``.
        batches: number of a step -> (tuple of arguments, integer labels, of the shape of the logits without classes).
        schedule: what a step is made of.
        optimizer: as for `make_step`. Its settings are not in the job's description: resume with the same one.
        folder: where checkpoints and ``metrics.csv`` are kept. A job that was killed goes on from the last checkpoint,
            to the same result as one that was not.
        save_every: steps between checkpoints.
        mesh: examples are split over all its devices, parameters are on each.
        progress: called as ``progress(done, total, metrics)`` after each step.
        tensorboard: write metrics to event files in ``folder/events`` too (`qjax[tensorboard]`). A job that goes on
            continues them: `tensorboard --logdir` shows each step once.
        teacher: called with the arguments of each batch, for the logits that the highest subnet learns from; the float
            model's: ``functools.partial(jax.jit(fn), params)``. None has it learn from labels alone, as in EQ-Net.
            The job's description says whether there is one, not which: resume with the same.

    Returns:
        The trained parameters and state, and the metrics of all steps.

    Raises:
        CheckpointError: the folder holds another job (another space or schedule, other sites).
        DataError: batches or labels of another form; a loss that is NaN or infinite, and the message names the site.
            The last checkpoint is kept.
        ImportError: ``tensorboard`` without tensorboardX.
    """
    for tree in (params, state):
        check_trainable(tree)
    if tensorboard:
        require(folder)
    optimizer = optimizer or schedule.optimizer()
    moments = optimizer.init({"params": params, "state": state})
    if not callable(batches):
        raise DataError(
            f"train: batches is a {type(batches).__name__}; a function of the number of a step is needed, so that a "
            "job that was killed goes on exactly: lambda step: ((x[step],), y[step])"
        )
    inputs, _ = _pair(batches(0), 0)
    classes = split_output(jax.eval_shape(t.fn, params, *inputs), params)[0].shape[-1]
    sites = list(t.domain(params, *inputs).sites)
    rows: dict[str, list[float]] = {}
    first, carry = 0, (params, state, moments)
    if folder is not None:
        said = {"space": t.space.to_dict(), "sites": sites, "schedule": _plain(schedule)}
        said |= {"teacher": True} if teacher is not None else {}
        folder = open_job(folder, said, "training of a supernet")
        found = load_part(folder / "training")
        if found is not None:
            carry = jax.tree.unflatten(jax.tree.structure(carry), [found[0][str(n)] for n in range(len(found[0]))])
            first, rows = int(found[1]["step"]), dict(found[1]["metrics"])
    place = _placing(mesh)
    carry = place(carry, False)
    step = jax.jit(make_step(t, schedule, optimizer))
    with contextlib.ExitStack() as opened:
        events = None
        if tensorboard and folder is not None:
            events = opened.enter_context(contextlib.closing(EventFile(folder / EVENTS, first, rows)))
        for number in range(first, schedule.steps):
            batch = _pair(batches(number), number)
            _check_labels(batch[1], classes, number)
            inputs, labels = (place(part, True) for part in batch)
            taught = None if teacher is None else split_output(teacher(*inputs), params)[0]
            *after, metrics = step(*carry, number, inputs, labels, taught)
            metrics = {name: float(value) for name, value in metrics.items()}
            if not np.isfinite(metrics["loss"]):
                raise DataError(_blame(t, carry, inputs, number, metrics, folder))
            carry = tuple(after)
            for name, value in metrics.items():
                rows.setdefault(name, []).append(value)
            if events is not None:
                events.write(number + 1, metrics)
            if folder is not None and ((number + 1) % save_every == 0 or number + 1 == schedule.steps):
                if events is not None:
                    events.flush()  # before the checkpoint, from which on nobody writes these steps again
                _save(folder, carry, number + 1, rows)
            if progress is not None:
                progress(number + 1, schedule.steps, metrics)
    return Trained(carry[0], carry[1], {name: np.asarray(values) for name, values in rows.items()})


def _pair(batch: Any, number: int) -> tuple[tuple[Any, ...], Any]:
    """A batch, if it is a tuple of arguments and labels."""
    if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], tuple):
        return batch
    given = f"a tuple of {len(batch)}" if isinstance(batch, tuple) else f"a {type(batch).__name__}"
    if isinstance(batch, tuple) and len(batch) == 2:
        given = f"a {type(batch[0]).__name__} and labels"
    raise DataError(
        f"train: batches({number}) gave {given}; ((arguments...), labels) is needed, as ((images,), labels)"
    )


def _check_labels(labels: Any, classes: int, number: int) -> None:
    """Numbers of classes below how many there are; shapes are checked with the logits."""
    there = np.asarray(labels)
    if np.issubdtype(there.dtype, np.integer) and there.size and not 0 <= there.min() <= there.max() < classes:
        raise DataError(
            f"train: labels of batches({number}) are from {there.min()} to {there.max()}, and the function has "
            f"{classes} classes: they are numbered from 0 to {classes - 1}"
        )


def _plain(schedule: Schedule) -> dict[str, Any]:
    plain = {f.name: getattr(schedule, f.name) for f in dataclasses.fields(schedule) if f.name != "_"}
    return {**plain, "sampling": described(schedule.sampling)}


def _placing(mesh: Any) -> Callable[[Any, bool], Any]:
    """Put arrays on the devices of a mesh: examples split over all of them, others on each."""
    if mesh is None:
        return lambda tree, examples: tree
    spec = jax.sharding.PartitionSpec

    def place(tree: Any, examples: bool) -> Any:
        sharding = jax.sharding.NamedSharding(mesh, spec(mesh.axis_names) if examples else spec())
        for leaf in jax.tree.leaves(tree) if examples else []:
            if np.shape(leaf)[0] % mesh.size:
                raise DataError(f"a batch of {np.shape(leaf)[0]} examples does not split over {mesh.size} devices")
        return jax.device_put(tree, sharding)

    return place


def _save(folder: Path, carry: Any, done: int, rows: Mapping[str, list[float]]) -> None:
    """Write a checkpoint, then the metrics that it holds."""
    leaves = {str(n): np.asarray(a) for n, a in enumerate(jax.tree.leaves(carry))}
    save_part(folder / "training", leaves, {"step": done, "metrics": dict(rows)})
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["step", *rows])
    writer.writerows([n + 1, *values] for n, values in enumerate(zip(*rows.values(), strict=True)))
    partial = folder / "metrics.csv.partial"
    partial.write_text(text.getvalue(), "utf-8")
    os.replace(partial, folder / "metrics.csv")


def _blame(t: Supernet, carry: Any, inputs: Any, number: int, metrics: Mapping[str, float], folder: Any) -> str:
    """What to say of a loss that is not a number: the first site with bad numbers in its weight, tables or inputs."""
    params, state, _ = carry
    weights = t.weights(params, *inputs, first=True)
    bad = {name: "its weight" for name, w in weights.items() if not bool(jnp.isfinite(w).all())}
    bad |= {
        name: f"its {field}"
        for name, fields in state.items()
        for field, a in fields.items()
        if name not in bad and not bool(jnp.isfinite(a).all())
    }
    kept = f"the last checkpoint in {folder} is kept" if folder is not None else "nothing was kept: give folder="
    where = next((f"{name}: NaN or infinity in {bad[name]}" for name in state if name in bad), "")
    given = [leaf for leaf in jax.tree.leaves(inputs) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    advice = "lower the learning rate, or leave out the lowest bits"
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in given):
        advice = f"batches({number}) has NaN or infinity among its arguments: mend the data"
    if not where:
        try:
            t.init(params, *inputs, sample=1)
        except DataError as error:
            where = str(error).partition(";")[0]
    found = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
    return (
        f"step {number + 1}: the loss is not finite ({found}); "
        f"{where or 'weights, tables and inputs of all sites are finite, so it is in what comes after the last one'}; "
        f"{kept}; {advice}"
    )
