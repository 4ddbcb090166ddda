"""Rounding the operands of products of activations: queries, keys, probabilities and values of attention.

A recipe names the operands of an attention; what the program has is two products. Here the decision for an attention
becomes one for each of its products, at the address of each, and tells which dimensions of an operand are its heads,
so that a scale may be one for each of them. The operands are rounded to their format and back, and the product is the
float one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.composites import Attention
from qjax.composites.attention import Operand as Seen
from qjax.errors import RecipeError
from qjax.program import Program
from qjax.sources import Fixed, Static


@dataclasses.dataclass(frozen=True)
class Operand:
    """How one operand is rounded.

    Attributes:
        fmt: the format.
        aux: scales and zero points, one or one for each head; None where the scale is that of the moment.
        heads: dimensions of the operand that are its heads.
    """

    fmt: Any
    aux: tuple[tuple[float, ...], tuple[int, ...]] | None = None
    heads: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Operands:
    """How the two operands of a product are rounded; stands where an `Act` does.

    Attributes:
        sides: of the first and of the second operand; None leaves it as it is.
    """

    sides: tuple[Operand | None, Operand | None]

    prefix: ClassVar[None] = None


def operand_acts(program: Program, decisions: Mapping[str, Any]) -> dict[str, Operands]:
    """Products of activations whose operands are rounded: site name of the product -> how.

    Args:
        program: the trace.
        decisions: of a recipe, by site name.

    Raises:
        RecipeError: an attention that is one fused kernel, or whose products run in other loops than its softmax.
    """
    out: dict[str, Operands] = {}
    for site in program.sites:
        decision = decisions[site.name]
        if not decision.operands or decision.skip:
            continue
        if site.op == "matmul":
            sides = (_operand(decision.operands.get("lhs"), ()), _operand(decision.operands.get("rhs"), ()))
            out[site.name] = _joined(out.get(site.name), Operands(sides), site.name)
        elif site.op == "attention":
            found = program.analysis.reads[site.read].composite
            assert isinstance(found, Attention)
            for path, acts in _products(found, decision.operands, site.name):
                for name in _names_at(program, site, path):
                    out[name] = _joined(out.get(name), acts, name)
    return out


def _products(found: Attention, operands: Mapping[str, Any], name: str) -> list[tuple[Any, Operands]]:
    """The two products of an attention, by address, and how their operands are rounded."""
    if found.probabilities is None:
        raise RecipeError(
            f"{name}: its attention is one fused kernel, and its operands cannot be reached; call "
            "jax.nn.dot_product_attention with implementation='xla', or skip it"
        )
    out = []
    for node, (first, one), (second, two) in (
        (found.scores, ("q", found.q), ("k", found.k)),
        (found.values, ("p", found.probabilities), ("v", found.v)),
    ):
        how = [_operand(operands.get(key), heads_of(found, seen)) for key, seen in ((first, one), (second, two))]
        swapped = node.inputs[0] is not one.value
        if any(how):
            out.append((node.path, Operands((how[1], how[0]) if swapped else (how[0], how[1]))))
    return out


def heads_of(found: Attention, operand: Seen) -> tuple[int, ...]:
    """Dimensions of an operand that are heads and nothing else."""
    labels = found.labels(operand)
    return tuple(d for d, label in enumerate(labels) if set(label.split("+")) <= {"head", "group"})


def _operand(source: Any, heads: tuple[int, ...]) -> Operand | None:
    if source is None:
        return None
    if isinstance(source, Fixed):
        return Operand(source.fmt, (source.scale, source.zero), heads)
    if isinstance(source, Static):
        raise RecipeError(
            f"an operand is to have a static scale ({source.fmt.name}), which a search has to find first: quantize "
            "with batches= and settle=, or write qjax.fixed(format, scale)"
        )
    return Operand(source.fmt)


def _joined(before: Operands | None, acts: Operands, name: str) -> Operands:
    if before is not None and before != acts:
        raise RecipeError(f"{name}: two rules ask for different formats of its operands; name it in one of them")
    return acts


def _names_at(program: Program, site: Any, path: Any) -> list[str]:
    """Names of the product at an address, at the loop steps that an attention site stands for."""
    number = program.read_at.get(path)
    if number is None:
        raise RecipeError(f"{site.name}: one of its two products reads a parameter; skip it, or quantize that product")
    mine, other = program.slices[site.read], program.slices[number]
    if mine.loops != other.loops:
        raise RecipeError(f"{site.name}: its products run in other loops than its softmax; skip it")
    steps = [step for step, key in mine.by_step.items() if mine.name_of[key] == site.name]
    return list(dict.fromkeys(other.name_of[other.by_step[step]] for step in steps))


def fixed_aux(x: Any, how: Operand, where: str) -> dict[str, Any]:
    """Return the known scales and zero points of an operand, each of its rank and 1 long where it is no head.

    Args:
        x: any float array.
        how: the format and its numbers.
        where: the site, for messages.

    Raises:
        RecipeError: there is another number of scales than of heads.
    """
    assert how.aux is not None
    scale, zero = how.aux
    sizes = [x.shape[d] for d in how.heads]
    shape = [1] * x.ndim
    if len(scale) > 1:
        if len(scale) != math.prod(sizes):
            raise RecipeError(
                f"{where}: {len(scale)} scales were found for an operand with {math.prod(sizes)} heads; this function "
                "has other heads than the one that the recipe was made for"
            )
        for d, n in zip(how.heads, sizes, strict=True):
            shape[d] = n
    aux = {"scale": jnp.asarray(np.asarray(scale, np.float32).reshape(shape))}
    if zero:
        aux["zero"] = jnp.asarray(np.asarray(zero, np.uint8).reshape(shape))
    return aux


def round_fixed(x: Any, how: Operand, where: str) -> Any:
    """Round an operand by scales that are known, and back; derivatives pass straight through.

    Args and errors are those of `fixed_aux`.
    """
    aux = fixed_aux(x, how, where)
    wide = x.astype(jnp.float32)
    near = how.fmt.decode(how.fmt.encode(wide, aux), aux).astype(x.dtype)
    return x + lax.stop_gradient(near - x)
