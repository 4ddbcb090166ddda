"""All matchers over one level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Jaxpr

from qjax.composites.activation import find_activations
from qjax.composites.attention import find_attention
from qjax.composites.base import Composite
from qjax.composites.graph import Level, inlined
from qjax.composites.norm import find_norms, variance_clips
from qjax.composites.softmax import find_softmax


def find_composites(jaxpr: Jaxpr, consts: Sequence[Any] = ()) -> list[Composite]:
    """Return the composites of one control-flow level, in program order of their results.

    Args:
        jaxpr: an open (or closed) jaxpr: the top level, or the body of a scan, while, cond or shard_map. Bodies of
            nested ``jit``, ``remat`` and custom-rule calls belong to the level; bodies of nested control flow do not.
        consts: values of ``jaxpr.constvars``, where known, so that captured masks can be recognised as causal.

    Returns:
        Attention, softmax (also inside attention), activations and norms.
    """
    return composites_of(inlined(jaxpr, consts))


def composites_of(level: Level) -> list[Composite]:
    """Return the composites of a flat level; see :func:`find_composites`."""
    softmaxes, norms = find_softmax(level), find_norms(level)
    taken = {node for composite in (*softmaxes, *norms) for node in composite.nodes} | variance_clips(level)
    found: list[Composite] = [*find_attention(level, softmaxes), *softmaxes, *norms]
    found += find_activations(level, taken)
    for unit in level.units:
        found += composites_of(unit)
    return sorted(found, key=lambda c: _order(c))


def _order(composite: Composite) -> tuple[int, ...]:
    return tuple(step for step in composite.output_path if isinstance(step, int))
