"""What is known of sites, by the slices of leaves that they read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from qjax.applying.storage import LeafPlan, input_prefix, reads_slice
from qjax.calibration import State
from qjax.formats import Aux
from qjax.program import Program


def given_scales(
    program: Program, plans: Mapping[int, LeafPlan], scales: Mapping[str, Aux]
) -> dict[int, dict[tuple[int, ...], Aux]]:
    """Known scales by leaf and slice.

    Args:
        program: the trace.
        plans: position -> how that leaf is stored.
        scales: site -> aux of the weight that it reads.
    """
    out: dict[int, dict[tuple[int, ...], Aux]] = {}
    for site, position, key in slices_read(program, plans, scales):
        out.setdefault(position, {})[key] = scales[site]
    return out


def seen_states(
    program: Program, plans: Mapping[int, LeafPlan], state: Mapping[str, Any]
) -> dict[int, dict[tuple[int, ...], dict[str, Any]]]:
    """Observed states by leaf and slice, then by the prefix of the reader.

    Args:
        program: the trace.
        plans: position -> how that leaf is stored.
        state: site -> what was observed there.
    """
    out: dict[int, dict[tuple[int, ...], dict[str, State]]] = {}
    for site, position, key in slices_read(program, plans, state):
        out.setdefault(position, {}).setdefault(key, {})[input_prefix(site)] = state[site]
    return out


def slices_read(
    program: Program, plans: Mapping[int, LeafPlan], sites: Collection[str]
) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Each of these sites with the leaf and the slices that it reads."""
    by_leaf = {plan.name: (position, plan) for position, plan in plans.items()}
    for site in program.sites:
        if site.name in sites and site.leaf in by_leaf:
            position, plan = by_leaf[site.leaf]
            for key in plan.slices:
                if reads_slice(site.slice, dict(zip(plan.key_axes, key, strict=True))):
                    yield site.name, position, key


def readers_of(program: Program, leaf: LeafPlan, key: tuple[int, ...]) -> list[str]:
    """Names of the sites that read a slice of a leaf."""
    at = dict(zip(leaf.key_axes, key, strict=True))
    return [site.name for site in program.sites if site.leaf == leaf.name and reads_slice(site.slice, at)]
