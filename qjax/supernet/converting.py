"""A subnet as an ordinary quantized model: formats from its choice, numbers from its tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.formats import Affine, Format, Int
from qjax.recipe import Recipe, Rule
from qjax.rewriting.given import Fields
from qjax.sources import static
from qjax.supernet.quantizer import steps_of
from qjax.supernet.space import Domain
from qjax.supernet.tables import CHANNEL, INPUT_SIGNED, TENSOR, Forms, by_output, input_names_of, input_steps, names_of


@dataclasses.dataclass(frozen=True)
class Converted:
    """What `qjax.transforms.quantize_with` takes.

    Attributes:
        recipe: a rule for each site.
        scales: site -> scale (and offset) of its weight, [*stack, N or 1, 1], or [*stack, N, groups].
        constants: site -> those of its activations, [1, 1].
    """

    recipe: Recipe
    scales: Mapping[str, Any]
    constants: Mapping[str, Any]


def converted(
    domain: Domain,
    owners: Mapping[str, str],
    forms: Mapping[str, Forms],
    fields: Mapping[str, Fields],
    choice: np.ndarray,
) -> Converted:
    """The formats and numbers of a subnet.

    Args:
        domain: the choices. owners: site -> the first one that reads the same weight.
        forms: what the tables hold. fields: tables; both by site, concrete.
        choice: int32 [N, 5 or 6], of the domain.
    """
    rules, scales, constants = [], {}, {}
    for name, row in zip(domain.sites, choice, strict=True):
        weights, numbers = _weights(fields[name], row, forms[name])
        inputs, constant = _inputs(fields[name], row, forms[name])
        rules.append(Rule(name, weights=weights, inputs=None if inputs is None else static(inputs)))
        if owners[name] == name:
            scales[name] = numbers
        if inputs is not None:
            constants[name] = constant
    everything_else = Rule("**", op=("dot", "conv", "ragged_dot", "embedding"), skip=True, optional=True)
    return Converted(Recipe([*rules, everything_else], name="subnet"), scales, constants)


def _weights(fields: Fields, row: np.ndarray, forms: Forms) -> tuple[Format, dict[str, Any]]:
    bits, _, channel, symmetric = (int(v) for v in row[:4])
    grain = forms.groups[int(row[5])] if forms.groups else CHANNEL if channel else TENSOR
    how: Any = {"group": grain} if forms.groups else {"per": grain}
    scale, offset = names_of(grain, bool(symmetric))
    s = jnp.asarray(fields[scale])[..., bits - 2 : bits - 1]
    beta = jnp.zeros_like(s) if offset is None else jnp.asarray(fields[offset])[..., bits - 2 : bits - 1]
    if forms.groups:
        s, beta = (by_output(a[..., 0], int(grain), forms) for a in (s, beta))
    return (Int if symmetric else Affine)(bits, **how), _numbers(s, beta, bool(symmetric), forms)


def _inputs(fields: Fields, row: np.ndarray, forms: Forms) -> tuple[Format | None, dict[str, Any]]:
    bits, symmetric = int(row[1]), bool(row[4])
    if not bits:
        return None, {}
    signed = bool(np.asarray(fields[INPUT_SIGNED]).reshape(()) > 0)
    if not symmetric:
        fmt: Format = Affine(bits, per="tensor", signed=signed)
    else:
        fmt = Int(bits, per="tensor", symmetric=signed)
    _, offset = input_names_of(symmetric)
    s, beta = (a.reshape(1, 1) for a in input_steps(fields, forms, jnp.asarray(row)))
    numbers = _numbers(s, beta if offset is not None else jnp.zeros_like(s), symmetric, forms)
    if symmetric and not signed:
        numbers["zero"] = jnp.zeros((1, 1), jnp.uint8)
    return fmt, {k: np.asarray(a) for k, a in numbers.items()}


def _numbers(scale: Any, offset: Any, symmetric: bool, forms: Forms) -> dict[str, Any]:
    step, beta = steps_of(scale.astype(jnp.float32), offset.astype(jnp.float32), forms.abs_offset)
    return {"scale": step} if symmetric else {"scale": step, "offset": beta}


def in_effect(fields: Fields, forms: Forms) -> dict[str, np.ndarray]:
    """Tables of a site as their steps and offsets act, float32: |scale| + 1e-6, and offsets or their magnitude."""
    out = {}
    for name, a in fields.items():
        a = jnp.asarray(a, jnp.float32)
        step, beta = steps_of(a, a, forms.abs_offset)
        out[name] = np.asarray(step if ".scale" in name else beta if ".offset" in name else a)
    return out
