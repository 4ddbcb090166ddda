"""One assignment's evaluation, spread over a population: a loop in one program, a part of it on each device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from qjax.errors import SearchError


def over_population(
    one: Callable[..., Any], *, at_once: int = 1, mesh: Mesh | None = None, axis: str = "population"
) -> Callable[..., Any]:
    """Make a function of many genomes out of a function of one.

    Args:
        one: ``one(genome, *shared) -> pytree of arrays``, for a genome int32 [genes] or any pytree of arrays.
        at_once: how many are evaluated side by side by vmap; 1 is one after the other, which is faster on CPU wherever
            a single evaluation fills the machine (convolutions with batched weights take ten times as long there).
        mesh: devices that share the population; None is the one at hand. What is shared is whole on each of them.
        axis: the mesh axis that the population is spread over.

    Returns:
        ``many(genomes, *shared)``, genomes [any, ...] -> results [any, ...]. A number that the devices do not divide
        is filled up with copies of the last, and their results are dropped.

    Raises:
        SearchError: the mesh has no such axis, or ``at_once`` is not a positive number.
    """
    if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
        raise SearchError(f"at_once={at_once!r}; a positive whole number is needed")
    if mesh is not None and axis not in mesh.shape:
        raise SearchError(
            f"the mesh has the axes {', '.join(mesh.shape)} and not {axis!r}; name one of them with axis="
        )

    def local(genomes: Any, *shared: Any) -> Any:
        return lax.map(lambda g: one(g, *shared), genomes, batch_size=at_once if at_once > 1 else None)

    if mesh is None or mesh.shape[axis] == 1:
        return local
    devices, spec = mesh.shape[axis], PartitionSpec(axis)

    def many(genomes: Any, *shared: Any) -> Any:
        size = len(jax.tree.leaves(genomes)[0])
        lack = -size % devices
        full = jax.tree.map(lambda g: jnp.concatenate([g, jnp.repeat(g[-1:], lack, axis=0)]) if lack else g, genomes)
        places = (spec, *(PartitionSpec() for _ in shared))
        run = jax.shard_map(local, mesh=mesh, in_specs=places, out_specs=spec, check_vma=False)
        return jax.tree.map(lambda y: y[:size], run(full, *shared))

    return many
