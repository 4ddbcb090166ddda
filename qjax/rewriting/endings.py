"""Additions that directly follow a product, which a kernel can make before it rounds: a bias, a residual.

    y = dot_general(x, W);  z = add(y, broadcast(bias));  h = add(residual, z)

becomes one quantized product with both as operands, where the lowering that will run adds them itself
(`qjax.kernels.dot.terms`); nowhere else, so that programs for other platforms stay as they are. An addition is taken in
where the sum before it has no other reader, and both have the shape and dtype of the product. The product is then
emitted where the last addition stood, because what is added may be computed in between.

Numbers: the float program rounds the product, and each sum again, to its dtype. Here the product is float32, both are
added in float32, the bias first, and the result is rounded once. For 16-bit dtypes that is at least as near to the
exact result; for float32 it is the same additions, perhaps in another order.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core as jex


@dataclasses.dataclass(frozen=True)
class Addition:
    """One addition to a product.

    Attributes:
        at: number of its equation.
        other: what is added, or what that was broadcast from.
        shape: of it with 1 where it is broadcast, of the rank of the product.
    """

    at: int
    other: Any
    shape: tuple[int, ...]


def additions(jaxpr: Any) -> dict[int, list[Addition]]:
    """Return the additions that follow each product of a jaxpr, by the number of its equation; of those that have any.

    Args:
        jaxpr: an open one, of which only this level is looked at.
    """
    uses = Counter(a for eqn in jaxpr.eqns for a in eqn.invars if not isinstance(a, jex.Literal))
    uses.update(a for a in jaxpr.outvars if not isinstance(a, jex.Literal))
    reader = {a: i for i, eqn in enumerate(jaxpr.eqns) for a in eqn.invars if not isinstance(a, jex.Literal)}
    maker = {a: eqn for eqn in jaxpr.eqns for a in eqn.outvars}
    out: dict[int, list[Addition]] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        if eqn.primitive.name != "dot_general" or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
            continue
        total, found = eqn.outvars[0], []
        while uses[total] == 1 and total in reader:
            at = reader[total]
            add = jaxpr.eqns[at]
            if add.primitive.name not in ("add", "add_any") or not _alike(add.outvars[0].aval, total.aval):
                break
            (other,) = (a for a in add.invars if a is not total)
            shape = other.aval.shape
            if isinstance(other, jex.Literal) or other.aval.dtype != total.aval.dtype or len(shape) != total.aval.ndim:
                break
            found.append(Addition(at, *_source(other, maker)))
            total = add.outvars[0]
        if found:
            out[i] = found
    return out


def _alike(a: Any, b: Any) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _source(value: Any, maker: Mapping[Any, Any]) -> tuple[Any, tuple[int, ...]]:
    """What an array was broadcast from, and its shape with 1 where it was."""
    shape = value.aval.shape
    while (eqn := maker.get(value)) is not None and eqn.primitive.name == "broadcast_in_dim":
        before = eqn.invars[0]
        if isinstance(before, jex.Literal) or len(eqn.invars) > 1:
            break
        there = dict(zip(eqn.params["broadcast_dimensions"], before.aval.shape, strict=True))
        value, shape = before, tuple(there.get(d, 1) for d in range(len(shape)))
        if before.aval.ndim != len(shape):
            break
    return value, shape


def not_taken(found: Sequence[Addition], taken: Container[int]) -> list[Addition]:
    """Return the additions in front of the first that is part of another product already."""
    return list(itertools.takewhile(lambda one: one.at not in taken, found))


def terms_of(
    found: Sequence[Addition], batch: Sequence[int], rows: Sequence[int], free: Sequence[int]
) -> dict[str, Addition]:
    """Return the first additions that one quantized product can take in, by the name of its operand.

    Args:
        found: in their order.
        batch: sizes of the axes of the result, [*batch, *rows, *free], that both operands have.
        rows: of those of the activations.
        free: of those of the weight.
    """
    nb, nr = len(batch), len(rows)
    out: dict[str, Addition] = {}
    for one in found:
        lead, middle, last = one.shape[:nb], one.shape[nb : nb + nr], one.shape[nb + nr :]
        shared = all(d == 1 for d in lead) or tuple(lead) == tuple(batch)
        if "bias" not in out and shared and all(d == 1 for d in middle) and tuple(last) == tuple(free):
            out["bias"] = one
        elif "residual" not in out and tuple(one.shape) == (*batch, *rows, *free):
            out["residual"] = one
        else:
            break
    return out


@dataclasses.dataclass
class Postponed:
    """A product that is emitted where the last of its additions stands.

    Attributes:
        emit: given the arrays that are added, by the name of the operand.
        terms: the additions.
    """

    emit: Callable[[dict[str, Any]], list[Any]]
    terms: dict[str, Addition]

    @property
    def last(self) -> int:
        """Number of the equation that it takes the place of."""
        return max(one.at for one in self.terms.values())
