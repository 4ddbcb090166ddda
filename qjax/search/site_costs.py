"""What each site of a supernet costs in each form: bytes as stored, seconds and joules by the cost models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qjax.errors import SearchError
from qjax.hardware import Accelerator, Device, Efficiency, cost, device
from qjax.program import trace
from qjax.search.assigning import Budget, amount
from qjax.search.genes import COSTS, COUNT, VALUES, Genes
from qjax.search.groups import Group, find_groups
from qjax.search.windows import Windows
from qjax.sources import Static
from qjax.supernet import Domain, Supernet


@dataclasses.dataclass(frozen=True)
class SiteCosts:
    """Costs of subnets, as sums over sites.

    Attributes:
        kind: "bytes", "seconds" or "joules", as of a `Budget`, or "bits".
        table: float64 [N, 8, 8]: of each site, by weights and activations of 2, 3, ..., 8 bits and float, in this order
            (4 bits are at 2, float is at 7). What the domain does not allow may be anything finite.
        fixed: what is spent in any case.
    """

    kind: str
    table: np.ndarray
    fixed: float = 0.0

    def __post_init__(self) -> None:
        table = np.asarray(self.table, np.float64)
        object.__setattr__(self, "table", table)
        if table.ndim != 3 or table.shape[1:] != (COUNT, COUNT) or not np.isfinite(table).all():
            raise SearchError(f"costs {table.shape}; finite numbers [sites, {COUNT}, {COUNT}] are needed")

    def __repr__(self) -> str:
        return f"SiteCosts({self.kind} of {len(self.table)} sites)"

    def of(self, choices: Any) -> np.ndarray:
        """Costs float64 [...] of choices int [..., N, 5 or 6]."""
        index = np.array([VALUES.index(v) if v in VALUES else -1 for v in range(9)])
        bits = index[np.asarray(choices)[..., :2]]
        return self.table[np.arange(len(self.table)), bits[..., 0], bits[..., 1]].sum(axis=-1) + self.fixed


def site_costs(
    t: Supernet,
    params: Any,
    state: Any,
    *args: Any,
    kind: str,
    form: tuple[bool, bool, bool] = (True, True, True),
    group: int | None = None,
    on: str | Device | Accelerator | None = None,
    rows: float | None = None,
    efficiency: Efficiency | None = None,
) -> SiteCosts:
    """What each site costs in each form.

    Bytes are those of the packed model that `Supernet.convert` makes, all of its parameters, to the byte. Seconds and
    joules are those of the sites' products, by `qjax.hardware.cost`.

    Args:
        t: the supernet.
        params, state: of it.
        *args: arguments of the function: as many rows of activations are counted as these have.
        kind: "bytes", "seconds" or "joules".
        form: of all sites.
        group: of all sites, where the space has groups; None is its first.
        on: the device or accelerator of seconds and joules.
        rows: rows of activations of each product, in place of those of ``args``.
        efficiency: what is reached of the device's peaks.

    Raises:
        SearchError: another kind, no device, or one whose power is not known.
    """
    if kind not in ("bytes", "seconds", "joules"):
        raise SearchError(f"costs of {kind!r}; bytes, seconds or joules (average bits need no table)")
    if kind != "bytes" and on is None:
        raise SearchError(f"a budget of {kind} needs the device: on='h200', or an Accelerator")
    domain = t.domain(params, *args)
    used = [{v for row in domain.allowed for v in row[c]} for c in (0, 1)]
    pairs = [(w, a) for w in VALUES if w in used[0] for a in VALUES if a in used[1]]
    # Formats of weights do not depend on the bits of activations, nor those of activations on the others.
    # Sites that may not have some bits have the nearest, and the fewest are never nearest to float.
    some, widest = min((a for a in used[1] if a), default=0), max(used[0])
    asked = sorted({(w, a and some) for w, a in pairs} | {(widest, a) for a in used[1]})
    made = t.recipes(params, state, [domain.uniform(w, a, form, group=group) for w, a in asked], *args)
    program = trace(t.fn, params, *args)
    names = {pair: f"{pair[0]}/{pair[1]}" for pair in asked}
    parts, decisions = find_groups(program, {names[p]: recipe for p, recipe in zip(asked, made, strict=True)})
    of_site = {name: (part, part.sites[0] == name) for part in parts for name in part.sites}
    table = np.zeros((len(domain.sites), COUNT, COUNT))
    for n, name in enumerate(domain.sites):
        part, first = of_site[name]
        for w, a in pairs:
            at = n, VALUES.index(w), VALUES.index(a)
            if kind == "bytes":
                table[at] = part.bytes_of(names[w, a and some]) if first else 0
                continue
            act = decisions[names[widest, a]][name].inputs if a else None
            act = act.fmt if isinstance(act, Static) else None
            weights = part.slices[0].stored[names[w, a and some]].fmt
            table[at] = _product(part, program.site(name), weights, act, kind, on, rows, efficiency)
    fixed = 0.0
    if kind == "bytes":
        total = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in _leaves(params))
        fixed = float(total - sum(piece.float_bytes for part in parts for piece in part.slices))
    return SiteCosts(kind, table, fixed)


def _leaves(params: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")]


def _product(
    group: Group, site: Any, weights: Any, act: Any, kind: str, on: Any, rows: float | None, efficiency: Any
) -> float:
    where = on if isinstance(on, Accelerator) else device(on)
    n, k = group.slices[0].matrix
    rows = rows or max(1.0, site.flops / max(1, 2 * n * k))
    value = cost((n, k), rows, weights, act, on=where, efficiency=efficiency)[kind]
    if value is None:
        raise SearchError(f"the power of {where.name} is not known, so there are no joules; give tdp_w")
    return value


def bit_costs(domain: Domain, weights: Sequence[float], inputs: Sequence[float]) -> SiteCosts:
    """Average bits as one cost: of weights and of activations, and the mean of both averages where there are both.

    Args:
        domain: of the supernet.
        weights, inputs: sizes of the sites [N]; the first and the last one do not count, as in EQ-Net, unless
            they have bits to choose.

    Raises:
        SearchError: other lengths, or no site that counts.
    """
    genes, tables = Genes(domain), []
    genes.windows(weights, inputs, 100.0, 1000.0)  # checks the sizes
    for column, sizes in enumerate((weights, inputs)):
        if all(row[column] == (0,) for row in domain.allowed):
            continue
        counted = np.array(sizes, np.float64)
        if not domain.free_ends:
            counted[[0, -1]] = 0
        bits = COSTS[:, None] if column == 0 else COSTS[None]
        tables.append((counted / counted.sum())[:, None, None] * np.broadcast_to(bits, (COUNT, COUNT)))
    return SiteCosts("bits", np.mean(tables, axis=0))


def budget_windows(
    genes: Genes,
    weights: Sequence[float],
    inputs: Sequence[float],
    budgets: Sequence[float | tuple[float, float] | Budget],
    width: float = 0.5,
    costs: Mapping[str, SiteCosts] | None = None,
) -> Windows:
    """What choices may cost within several budgets at once.

    Args:
        genes: what is searched.
        weights, inputs, width: as for `Genes.windows`.
        budgets: average bits (numbers, pairs of them, or budgets of bits) of weights and of activations have EQ-Net's
            window below them where they are the only budget; beside others they are upper ends, as those are, since
            what the others allow may lie below the window.
        costs: by kind, for budgets of these kinds.

    Raises:
        SearchError: a budget without costs, or one below what can be reached; the message says what can.
    """
    parts = []
    width = width if len(budgets) == 1 else float("inf")
    for budget in budgets:
        if not isinstance(budget, Budget):
            parts.append(genes.windows(weights, inputs, budget, width))
        elif budget.kind == "bits":
            parts.append(genes.windows(weights, inputs, budget.amount, width))
        else:
            parts.append(_window(genes, budget, (costs or {}).get(budget.kind)))
    return Windows(
        np.concatenate([w.costs for w in parts]),
        np.concatenate([w.low for w in parts]),
        np.concatenate([w.high for w in parts]),
        tuple(name for w in parts for name in w.names),
    )


def _window(genes: Genes, budget: Budget, costs: SiteCosts | None) -> Windows:
    if costs is None:
        raise SearchError(f"a budget of {budget} needs costs=[site_costs(..., kind={budget.kind!r})]")
    table = genes.costs(costs.table)
    least = np.where(genes.allowed, table, np.inf).min(axis=1).sum() + costs.fixed
    most = np.where(genes.allowed, table, -np.inf).max(axis=1).sum() + costs.fixed
    if budget.amount < least * (1 - 1e-12):
        raise SearchError(
            f"no choice costs as little as {budget}; {amount(budget.kind, least)} to {amount(budget.kind, most)} can "
            "be reached"
        )
    # What is spent in any case is a part of the first gene's cost, so that sums are what a subnet costs.
    table[0] += costs.fixed
    return Windows(table[None], np.array([-np.inf]), np.array([budget.amount]), (budget.kind,))


def by_kind(costs: SiteCosts | Sequence[SiteCosts], domain: Domain) -> dict[str, SiteCosts]:
    """Costs by what they are.

    Raises:
        SearchError: another number of sites, or one kind twice.
    """
    out: dict[str, SiteCosts] = {}
    for one in [costs] if isinstance(costs, SiteCosts) else costs:
        if one.kind in out or len(one.table) != len(domain.sites):
            raise SearchError(
                f"costs of {one.kind} for {len(one.table)} sites; one of a kind, for {len(domain.sites)} sites"
            )
        out[one.kind] = one
    return out
