"""From sensitivities and a budget to a recipe: which choice each group gets, and what else could be had."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import SearchError
from qjax.hardware import Accelerator, Device, Efficiency, cost, device
from qjax.recipe import Recipe, Rule
from qjax.search.groups import rules_of
from qjax.search.knapsack import Solution, solve, sweep
from qjax.search.sensitivity import Sensitivities

_UNITS: dict[str, tuple[str, float]] = {
    "bit": ("bits", 1.0),
    "bits": ("bits", 1.0),
    "b": ("bytes", 1.0),
    "byte": ("bytes", 1.0),
    "bytes": ("bytes", 1.0),
    "kb": ("bytes", 1e3),
    "mb": ("bytes", 1e6),
    "gb": ("bytes", 1e9),
    "kib": ("bytes", 2.0**10),
    "mib": ("bytes", 2.0**20),
    "gib": ("bytes", 2.0**30),
    "s": ("seconds", 1.0),
    "ms": ("seconds", 1e-3),
    "us": ("seconds", 1e-6),
    "µs": ("seconds", 1e-6),
    "j": ("joules", 1.0),
    "mj": ("joules", 1e-3),
    "uj": ("joules", 1e-6),
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What an assignment may cost.

    Attributes:
        kind: "bits", the average of the weights that are searched over, scales included; "bytes", of all parameters as
            stored; "seconds" or "joules" of the products of those weights, by `qjax.hardware.cost`.
        amount: in these units.
    """

    kind: str
    amount: float

    def __post_init__(self) -> None:
        if self.kind not in ("bits", "bytes", "seconds", "joules"):
            raise SearchError(f"a budget of {self.kind!r}; bits, bytes, seconds or joules")
        if isinstance(self.amount, bool) or not 0 < self.amount < math.inf:
            raise SearchError(f"a budget of {self.amount!r} {self.kind}; a positive number is needed")

    @staticmethod
    def of(given: str | Budget) -> Budget:
        """Read ``"6 bits"``, ``"10 MB"``, ``"2 ms"``, ``"5 mJ"``.

        Raises:
            SearchError: anything else.
        """
        if isinstance(given, Budget):
            return given
        found = re.fullmatch(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-zµ]+)\s*", str(given))
        if found is None or found.group(2).lower() not in _UNITS or found.group(1).count(".") > 1:
            raise SearchError(f"a budget of {given!r}; say '6 bits', '10 MB', '2 ms' or '5 mJ'")
        kind, unit = _UNITS[found.group(2).lower()]
        return Budget(kind, float(found.group(1)) * unit)

    def __str__(self) -> str:
        return amount(self.kind, self.amount)


def amount(kind: str, value: float) -> str:
    """A cost as people read it."""
    if kind == "bits":
        return f"{value:.4g} bits"
    scales = {"bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")), "seconds": ((1e-3, "ms"), (1e-6, "µs"))}
    for scale, name in scales.get(kind, ((1e-3, "mJ"), (1e-6, "µJ"))):
        if value >= scale:
            return f"{value / scale:.4g} {name}"
    return f"{value:.4g} {kind}"


@dataclasses.dataclass(frozen=True)
class Point:
    """One assignment: what it costs in the budget's units, its loss, and how many groups have each choice."""

    cost: float
    loss: float
    counts: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Which choice each group gets. Printed, it is a table.

    Attributes:
        choices: group name -> choice.
        cost, loss: in the budget's units; the sum of the groups' losses.
        bound: no assignment within the budget has less loss.
        exact: whether this is known to be the best.
        budget: what was asked.
        by: the measure that losses are of.
        bits: the average of the weights that are searched over. stored_bytes: of all parameters.
        front: the lower convex hull of what can be had, by rising cost; between its points lie others.
        sensitivities: where it comes from.
        whole: the loss of the assignment as a whole, where that was measured (`qjax.search.refine`): KL to float.
        curves: fronts whose losses were measured so, by name.
    """

    choices: Mapping[str, str]
    cost: float
    loss: float
    bound: float
    exact: bool
    budget: Budget
    by: str
    bits: float
    stored_bytes: int
    front: tuple[Point, ...]
    sensitivities: Sensitivities = dataclasses.field(repr=False)
    whole: float | None = None
    curves: Mapping[str, tuple[Point, ...]] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} × {c}" for c, n in self.counts.items())
        loss = f"loss {self.loss:.3g}" if self.whole is None else f"loss {self.whole:.3g} as a whole"
        spent = amount(self.budget.kind, self.cost)
        return f"Assignment({spent} of {self.budget}: {counts}; {loss}, {self.bits:.3f} bits per weight)"

    def __str__(self) -> str:
        wide = max((len(name) for name in self.choices), default=0)
        return "\n".join([repr(self), *(f"{name:{wide}}  {choice}" for name, choice in self.choices.items())])

    @property
    def counts(self) -> dict[str, int]:
        """How many groups have each choice."""
        return {c: n for c in self.sensitivities.choices if (n := list(self.choices.values()).count(c))}

    def recipe(self, name: str = "") -> Recipe:
        """The recipe that makes it: a rule for every site by its name, everything else in float."""
        recipes = {c: Recipe.from_dict(r) for c, r in self.sensitivities.recipes.items()}
        rules = []
        for row in self.sensitivities.rows:
            choice = self.choices[row.name]
            rules += rules_of(row.sites, row.ops, recipes.get(choice))
        return Recipe(
            [*rules, Rule("**", skip=True, optional=True)], name=name or f"searched-{self.budget}".replace(" ", "")
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without the sensitivities."""
        names = ("cost", "loss", "bound", "exact", "by", "bits", "stored_bytes", "whole")
        return {
            "budget": {"kind": self.budget.kind, "amount": self.budget.amount},
            **{name: getattr(self, name) for name in names},
            "counts": self.counts,
            "choices": dict(self.choices),
            "front": [dataclasses.asdict(p) for p in self.front],
            "curves": {name: [dataclasses.asdict(p) for p in curve] for name, curve in self.curves.items()},
        }


def assign(
    sensitivities: Sensitivities,
    budget: str | Budget,
    *,
    by: str | None = None,
    on: str | Device | Accelerator | None = None,
    rows: float | None = None,
    efficiency: Efficiency | None = None,
    costs: Mapping[str, Mapping[str, float]] | None = None,
) -> Assignment:
    """Choose for each group, so that the sum of losses is least within a budget. The result is exact.

    Losses are taken as additive: errors of different groups are small and independent of one another. Of equal losses
    the cheaper assignment is taken, then the choice that stands earlier.

    Args:
        sensitivities: from `qjax.search.sensitivities`.
        budget: "6 bits", "10 MB", "2 ms", "5 mJ", or a `Budget`.
        by: which measure to minimise; None takes the first that was measured.
        on: the device or accelerator of budgets in seconds and joules.
        rows: rows of activations of each product there; None takes those of the batches that were measured on.
        efficiency: what is reached of the device's peaks.
        costs: group -> choice -> cost of your own, in the budget's units, in place of those.

    Raises:
        SearchError: a budget below the least possible cost (the message says what is possible), or a cost that is not
            known.
    """
    budget = Budget.of(budget)
    by = by or sensitivities.measures[0]
    losses = sensitivities.loss(by)
    names = sensitivities.choices
    cost_of, fixed = cost_table(sensitivities, budget, on, rows, efficiency, costs)
    loss_of = np.array([[of.get(name, math.inf) for name in names] for of in losses])
    found = solve(cost_of, loss_of, budget.amount - fixed)
    front = tuple(_point(p, names, fixed) for p in sweep(cost_of, loss_of))
    chosen = {row.name: names[c] for row, c in zip(sensitivities.rows, found.choice, strict=True)}
    stored = sum(row.bytes[chosen[row.name]] for row in sensitivities.rows)
    return Assignment(
        chosen,
        found.cost + fixed,
        found.loss,
        found.bound,
        found.exact,
        budget,
        by,
        stored * 8 / sensitivities.elements,
        stored + sensitivities.other_bytes,
        front,
        sensitivities,
    )


def check_budget(
    sensitivities: Sensitivities,
    budget: str | Budget,
    *,
    on: str | Device | Accelerator | None = None,
    rows: float | None = None,
) -> None:
    """Refuse a budget that nothing meets; sensitivities without losses (``by=()``) suffice, which take no time.

    Args:
        sensitivities, budget, on, rows: as for `assign`.

    Raises:
        SearchError: it is below the least possible cost, or a cost is not known.
    """
    cost_table(sensitivities, Budget.of(budget), on, rows)


def cost_table(
    sensitivities: Sensitivities,
    budget: Budget,
    on: Any = None,
    rows: float | None = None,
    efficiency: Efficiency | None = None,
    costs: Mapping[str, Mapping[str, float]] | None = None,
) -> tuple[np.ndarray, float]:
    """Costs [groups, choices], infinite where a group lacks the choice, and what is spent in any case.

    Raises:
        SearchError: the budget is below the least possible cost, or a cost is not known.
    """
    of_groups = costs or group_costs(sensitivities, budget.kind, on=on, rows=rows, efficiency=efficiency)
    names, all_rows = sensitivities.choices, sensitivities.rows
    cost_of = np.array([[of_groups[r.name][c] if c in r.bytes else math.inf for c in names] for r in all_rows])
    fixed = 0.0 if costs is not None or budget.kind != "bytes" else float(sensitivities.other_bytes)
    least = float(cost_of.min(axis=1).sum()) + fixed
    if budget.amount < least * (1 - 1e-12):
        at_least = " and ".join(_cheapest(sensitivities, cost_of))
        raise SearchError(
            f"a budget of {budget} is below the smallest possible {amount(budget.kind, least)}, which is {at_least}; "
            "give more, or add choices of fewer bits"
        )
    return cost_of, fixed


def group_costs(
    sensitivities: Sensitivities,
    kind: str,
    *,
    on: str | Device | Accelerator | None = None,
    rows: float | None = None,
    efficiency: Efficiency | None = None,
) -> dict[str, dict[str, float]]:
    """Return group -> choice -> cost. Bits are a group's share of the average, so that sums are averages.

    Raises:
        SearchError: seconds or joules without a device, or joules on one whose power is not known.
    """
    if kind == "bytes":
        return {row.name: {c: float(b) for c, b in row.bytes.items()} for row in sensitivities.rows}
    if kind == "bits":
        share = 8 / sensitivities.elements
        return {row.name: {c: b * share for c, b in row.bytes.items()} for row in sensitivities.rows}
    if on is None:
        raise SearchError(f"a budget of {kind} needs the device: on='h200', or an Accelerator")
    where = on if isinstance(on, Accelerator) else device(on)
    out: dict[str, dict[str, float]] = {}
    for row in sensitivities.rows:
        out[row.name] = {}
        for choice in row.bytes:
            weights, act = row.formats_of(choice)
            total = 0.0
            for part in row.parts:
                made = cost((part.n, part.k), rows or part.rows, weights, act, on=where, efficiency=efficiency)
                if made[kind] is None:
                    raise SearchError(f"the power of {where.name} is not known, so there are no joules; give tdp_w")
                total += made[kind]
            out[row.name][choice] = total
    return out


def _cheapest(sensitivities: Sensitivities, cost_of: np.ndarray) -> list[str]:
    taken = [sensitivities.choices[c] for c in cost_of.argmin(axis=1)]
    return [f"{taken.count(c)} groups in {c}" for c in sensitivities.choices if c in taken]


def _point(found: Solution, names: tuple[str, ...], fixed: float) -> Point:
    taken = [names[c] for c in found.choice]
    return Point(found.cost + fixed, found.loss, {c: taken.count(c) for c in names if c in taken})


def save_front(found: Assignment, path: str | Path) -> None:
    """Write the front and the assignment as JSON."""
    Path(path).write_text(json.dumps(found.to_dict(), indent=1) + "\n")
