"""Choices drawn at random, and as numbers for a predictor."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.errors import RecipeError, SearchError, near
from qjax.supernet.space import BITS, COLUMNS, Domain

KINDS = ("random", "highest", "lowest")


def sample_choice(key: Array, domain: Domain, kind: str = "random", form: Any = None) -> Array:
    """Draw a subnet; works under jit and vmap.

    Granularity and symmetries are drawn for each site, whatever the kind, as in EQ-Net's training.

    Args:
        key: PRNG key.
        domain: from `Space.domain`, or the ``domain`` of a supernet.
        kind: "random" draws the bits of each site, "highest" and "lowest" give each its most and its fewest; float
            activations are above 8 bits.
        form: (per channel, weights symmetric, activations symmetric) for all sites in place of drawing them; sites that
            may not have a value draw it all the same. May be traced.

    Returns:
        int32 [N, 5], or [N, 6] with groups.
    """
    if kind not in KINDS:
        raise RecipeError(f"sample_choice: kind={kind!r}{near(str(kind), KINDS)}; {', '.join(KINDS)}")
    table, counts = jnp.asarray(domain.table), jnp.asarray(domain.counts)
    drawn = jax.random.randint(key, domain.shape, 0, counts)
    if kind != "random":
        order = np.where(domain.table[:, :2] == 0, 9, domain.table[:, :2])
        end = order.argmax(-1) if kind == "highest" else order.argmin(-1)
        drawn = drawn.at[:, :2].set(end)
    choice = jnp.take_along_axis(table, drawn[..., None], axis=-1)[..., 0]
    if form is not None:
        wanted = jnp.broadcast_to(jnp.asarray(form).astype(jnp.int32), (domain.shape[0], 3))
        possible = (table[:, 2:5] == wanted[..., None]).any(-1)
        choice = choice.at[:, 2:5].set(jnp.where(possible, wanted, choice[:, 2:5]))
    return choice[jnp.asarray(domain.leaders, jnp.int32)].astype(jnp.int32)


def encode_choice(choice: Any, form: Any, groups: int = 0, *, ends: bool = False) -> Array:
    """The input of an accuracy predictor, as EQ-Net's code makes it (section 4.3; CQAP).

    Six entries for the form of the whole network: per channel, per tensor, weights symmetric, 0, activations symmetric,
    0 (asymmetric has no entry of its own). Then a one-hot of 2 to 8 bits for the weights of each site, then the same
    for activations; the first and the last site (but see ``ends``) and float activations are all zero. Decided here,
    for spaces with groups: then a one-hot of the group of each site.

    Args:
        choice: int [..., N, 5 or 6].
        form: (per channel, weights symmetric, activations symmetric), [..., 3].
        groups: how many groups the space has, ``len(space.groups)``; 0 leaves them out of the code.
        ends: encode the first and the last site as the others, for spaces in which these have bits to choose
            (`Domain.free_ends`); EQ-Net's have 8 there, and nothing to say of them.

    Returns:
        float32 [..., 6 + (14 + groups) N].

    Raises:
        SearchError: groups are asked for, and choices have no column of them.
    """
    choice, form = jnp.asarray(choice), jnp.asarray(form).astype(jnp.float32)
    n = choice.shape[-2]
    inner = np.ones((n, 1), np.float32)
    inner[[0, -1]] = float(ends)
    bits = [
        (jax.nn.one_hot(choice[..., c] - BITS[0], len(BITS)) * inner).reshape(*choice.shape[:-2], -1) for c in (0, 1)
    ]
    channel, weights, acts = (form[..., i] for i in range(3))
    zero = jnp.zeros_like(channel)
    head = jnp.stack([channel, 1 - channel, weights, zero, acts, zero], axis=-1)
    head = jnp.broadcast_to(head, (*choice.shape[:-2], 6))
    if groups:
        if choice.shape[-1] != len(COLUMNS):
            raise SearchError(f"encode_choice: groups={groups}, and choices {choice.shape} have no column of groups")
        bits.append(jax.nn.one_hot(choice[..., 5], groups).reshape(*choice.shape[:-2], -1))
    return jnp.concatenate([head, *bits], axis=-1)
