"""The two losses of EQ-Net (Xu et al. 2023, arXiv:2308.07650): weight distributions, and guidance between subnets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qjax.errors import DataError

UNIFORM_KURTOSIS = 1.8
"""Kurtosis of a uniform distribution: what weights are pulled to."""


def moments(w: Any) -> tuple[Array, Array]:
    """Skewness and kurtosis of all elements, with the n-1 divisor in the deviation; 0 and 0 of constant ones."""
    w = jnp.asarray(w)
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32)).reshape(-1)
    away = w - jnp.mean(w)
    variance = jnp.sum(away**2) / max(w.size - 1, 1)
    flat = variance <= 0
    unit = away / jnp.sqrt(jnp.where(flat, 1.0, variance))
    return jnp.mean(unit**3), jnp.mean(unit**4)


def wdr_loss(
    weights: Any,
    *,
    skewness: float = 1.0,
    kurtosis: float = 0.015,
    target: float = UNIFORM_KURTOSIS,
) -> Array:
    """Weight distribution regularization: ``skewness * mean(Skew^2) + kurtosis * mean((Kurt - target)^2)``.

    Equations 4 to 6 with the factors of the authors' code (the paper gives none). Added once a step,
    whatever the number of subnets.

    Args:
        weights: a pytree of float arrays, each a layer; the caller leaves out the first one (`Supernet.weights`).
        skewness, kurtosis: factors of the two parts.
        target: the kurtosis to reach.

    Returns:
        A scalar.

    Raises:
        DataError: there are no weights.
    """
    leaves = jax.tree.leaves(weights)
    if not leaves:
        raise DataError("wdr_loss: there are no weights; a network of one layer has none beside its first")
    parts = [moments(w) for w in leaves]
    skew = jnp.stack([s for s, _ in parts])
    kurt = jnp.stack([k for _, k in parts])
    return skewness * jnp.mean(skew**2) + kurtosis * jnp.mean((kurt - target) ** 2)


def gpg_terms(
    logits: Sequence[Any], labels: Any, lam: float = 0.5, mask: Any = None, teacher: Any = None
) -> list[Array]:
    """The loss of each subnet of `gpg_loss`, in order."""
    if not len(logits):
        raise DataError("gpg_loss: there are no logits; pass those of the highest subnet first, the lowest last")
    if teacher is not None and jnp.shape(teacher) != jnp.shape(logits[0]):
        raise DataError(
            f"gpg_loss: the teacher's logits are {jnp.shape(teacher)}, and those of the subnets {jnp.shape(logits[0])}"
        )
    labels = jnp.asarray(labels)
    wanted = jnp.shape(logits[0])[:-1]
    if labels.shape != wanted or not jnp.issubdtype(labels.dtype, jnp.integer):
        given = f"{labels.dtype} {list(labels.shape)} and logits {list(jnp.shape(logits[0]))}"
        raise DataError(
            f"gpg_loss: labels are {given}; numbers of classes, of an integer type and shape {list(wanted)}, are "
            "needed (of one-hot labels: labels.argmax(-1))"
        )
    out = []
    teacher = None if teacher is None else jax.lax.stop_gradient(_log_softmax(teacher))
    for own in logits:
        logp = _log_softmax(own)
        hard = _mean(-jnp.take_along_axis(logp, labels[..., None], axis=-1)[..., 0], mask)
        if teacher is None:
            out.append(hard)
        else:
            soft = _mean(jnp.sum(jnp.exp(teacher) * (teacher - logp), axis=-1), mask)
            out.append(lam * soft + (1 - lam) * hard)
        teacher = jax.lax.stop_gradient(logp)
    return out


def gpg_loss(logits: Sequence[Any], labels: Any, lam: float = 0.5, *, mask: Any = None, teacher: Any = None) -> Array:
    """Group progressive guidance: the highest subnet learns from labels, each later one also from the one before it.

    Equations 7 and 8: ``CE(Y_H, y)``, then ``lam KL(teacher || student) + (1 - lam) CE(student, y)``, summed. The
    teacher of a subnet is the one before it (not the highest), and takes no derivative. The paper does not say lam;
    0.5 is the code's.

    With ``teacher``, the chain begins at another model, such as the float one: the highest subnet's loss becomes
    ``lam KL(teacher || H) + (1 - lam) CE(H, y)``, and the others learn as before. This is not in the paper. For a
    language model, where what is wanted is the float model's distribution, ``lam=1`` leaves the labels out.

    Args:
        logits: [highest, random..., lowest], each float [..., classes]; any number of them.
        labels: int [...], of the shape of the logits without classes: [batch], or [batch, length] of next tokens.
        lam: share of the teacher.
        mask: bool [...]: which examples count; None is all of them.
        teacher: float [..., classes], the logits that the highest subnet learns from; None has it learn from labels.

    Returns:
        A scalar.

    Raises:
        DataError: there are no logits, the teacher's have another shape, or labels have another shape or are no
            integers.
    """
    first, *others = gpg_terms(logits, labels, lam, mask, teacher)
    return sum(others, first)


def _log_softmax(logits: Any) -> Any:
    logits = jnp.asarray(logits)
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)


def _mean(values: Any, mask: Any) -> Any:
    if mask is None:
        return jnp.mean(values)
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)
