"""Mixed precision as an Optuna study that many workers on many machines share (``pip install 'qjax[optuna]'``).

    from qjax.interop.optuna import optimize
    best = optimize(found, losses, "3 bits", trials=200, storage="sqlite:///search.db", study="books-6m")

Each worker runs this call with the same storage (SQLite on one machine, a database URL for a team) and measures whole
assignments (`qjax.search.WholeLosses`). ``optuna-dashboard sqlite:///search.db`` shows the study. The first trials are
the exact assignment by sums and the Lagrangian front; Optuna's NSGA-II, or another sampler, goes on from there.

Trials beyond the budget are not measured: their loss is the sum of single losses, and their constraint says by how much
they are beyond it, so that no sampler takes them for good. A worker that is killed leaves a trial that nobody finishes,
and nothing else; ``trials`` counts finished ones of all workers, so a call that is repeated does what is left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

try:
    import optuna as _optuna  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(f"qjax.interop.optuna needs Optuna ({error}); pip install 'qjax[optuna]'") from error

from qjax.errors import CheckpointError, SearchError
from qjax.search import Assignment, Budget, Sensitivities
from qjax.search.refining import Within
from qjax.search.whole import Losses

optuna: Any = _optuna  # this module has its name, and type checkers would look for its functions here
ATTRIBUTE = "qjax"
"""User attribute of a study that says what is searched."""
SEEDS = 16
"""Assignments that a study begins with."""


def optimize(
    sensitivities: Sensitivities,
    losses: Losses,
    budget: str | Budget,
    *,
    trials: int,
    storage: Any = None,
    study: str = "qjax",
    sampler: Any = None,
    seed: int | None = None,
    by: str | None = None,
    on: Any = None,
    rows: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Assignment:
    """Search for the assignment that loses least as a whole within a budget, as one worker of an Optuna study.

    Args:
        sensitivities, losses, budget, by, on, rows: as for `qjax.search.refine`.
        trials: finished trials that the study is to have, those of other workers counted.
        storage: an Optuna storage or its URL, as "sqlite:///search.db"; None keeps the study in memory.
        study: its name in the storage; made where it is missing.
        sampler: of Optuna; None takes its NSGA-II.
        seed: of that; workers want different ones, None draws one.
        progress: called as ``progress(done, total, what)`` after each trial.

    Returns:
        The best of all trials of all workers; its curves are "Lagrangian" and "Optuna".

    Raises:
        SearchError: a budget that nothing meets, a number of trials that cannot be, or no loss that is a number.
        CheckpointError: the study is of something else.
    """
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise SearchError(f"trials={trials!r}; a positive whole number is needed")
    within = Within.of(sensitivities, budget, by, on, rows)
    groups = [row.name for row in sensitivities.rows]
    made = optuna.create_study(
        storage=storage,
        sampler=optuna.samplers.NSGAIISampler(seed=seed) if sampler is None else sampler,
        study_name=study,
        load_if_exists=True,
        directions=["minimize", "minimize"],
    )
    said = {
        "job": getattr(losses, "identity", None),
        "budget": [within.start.budget.kind, within.start.budget.amount],
        "groups": groups,
        "choices": list(within.names),
        "costs": hashlib.sha256(within.costs.tobytes()).hexdigest()[:16],
    }
    said = json.loads(json.dumps(said))
    there = made.user_attrs.get(ATTRIBUTE)
    if there is None:
        if made.trials:
            raise CheckpointError(
                f"the study {study!r} has {len(made.trials)} trials that are not qjax's; name another"
            )
        made.set_user_attr(ATTRIBUTE, said)
    elif there != said:
        differ = ", ".join(sorted(k for k in {**there, **said} if there.get(k) != said.get(k)))
        raise CheckpointError(f"the study {study!r} is of something else: {differ} differ; name another study")
    own, hull = within.begin(SEEDS)
    if not made.trials:
        for genome in np.concatenate([own, hull]):
            names = {group: within.names[c] for group, c in zip(groups, genome, strict=True)}
            made.enqueue_trial(names, skip_if_exists=True)
    kept = {row.name: [c for c in within.names if c in row.bytes] for row in sensitivities.rows}
    complete = (optuna.trial.TrialState.COMPLETE,)
    while (done := len(made.get_trials(deepcopy=False, states=complete))) < trials:
        trial = made.ask()
        chosen = [trial.suggest_categorical(group, kept[group]) for group in groups]
        genome = np.array([[within.names.index(name) for name in chosen]], np.int32)
        spent = float(within.cost(genome)[0])
        beyond = max(0.0, spent - within.limit) / within.limit
        trial.set_constraint("budget", beyond)
        trial.set_user_attr("measured", not beyond)
        estimate = float(within.single[np.arange(len(groups)), genome[0]].sum())
        loss = estimate if beyond else float(losses(genome)[0])
        if not np.isfinite(loss):
            made.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise SearchError(f"trial {trial.number}: the loss is {loss}; its choices are {trial.params}")
        made.tell(trial, (spent, loss))
        if progress:
            best = within.best(_known(made, within, groups))[1]
            progress(min(done + 1, trials), trials, f"trial {trial.number}, best KL {best:.3g}")
    return within.result(_known(made, within, groups), hull, "Optuna")


def _known(study: Any, within: Within, groups: list[str]) -> dict[tuple[int, ...], float]:
    """What all workers have measured."""
    out = {}
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
        if trial.user_attrs.get("measured"):
            out[tuple(within.names.index(trial.params[group]) for group in groups)] = trial.values[1]
    return out
