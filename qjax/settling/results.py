"""From what was found for a unit to edits of parameters, scales and rules."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.analysis.biases import Bias
from qjax.formats import Int, Log, TwinUniform
from qjax.passes.adalog import Found, bits_of, dequantized
from qjax.passes.bias import along, mean_shift
from qjax.passes.folding import weight_matrix
from qjax.passes.fpcs import Pairs
from qjax.passes.leaves import Leaves
from qjax.passes.units import AttentionUnit, LinearUnit
from qjax.program import Program
from qjax.recipe import Rule
from qjax.sources import Fixed, Static


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What becomes of a unit.

    Attributes:
        rules: one for each site.
        edits: (number of the leaf, slice, value).
        scales: site -> aux of its weight, [N, 1] each.
        constants: site -> aux of its inputs, [1, 1] each.
    """

    rules: tuple[Rule, ...]
    edits: tuple[tuple[int, Any, Any], ...] = ()
    scales: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    constants: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)


def moved_channels(program: Program, leaves: Leaves, unit: LinearUnit, found: Found) -> str:
    """Move scales and zero points of channels into a LayerNorm and the products behind it: ``leaves`` are changed.

    Returns:
        What to say of it; "" where nothing is moved.
    """
    if "rho" not in found:
        return ""
    assert unit.norm is not None
    scale, bias = (leaves.number[name] for name in unit.norm)
    rho, beta = found["rho"], found["beta"]
    leaves.put(scale, (), _like(leaves.at(scale), np.asarray(leaves.at(scale), np.float32) / rho))
    leaves.put(bias, (), _like(leaves.at(bias), np.asarray(leaves.at(bias), np.float32) / rho - beta))
    for name in unit.sites:
        site, behind = program.by_name[name], unit.biases[name]
        assert isinstance(behind, Bias)
        value = _columns(site, leaves.slice(site.leaf, site.slice), rho)  # type: ignore[arg-type]
        leaves.put(leaves.number[site.leaf], site.slice, value)  # type: ignore[index]
        leaves.put(*_key(leaves, behind), _shifted(site, leaves, behind, value, beta))
    reach = f"{rho.min():.3g} to {rho.max():.3g}"
    return f"{', '.join(unit.sites)}: scales of channels, {reach} of their mean, are moved into {unit.norm[0]}"


def settle_linear(program: Program, leaves: Leaves, unit: LinearUnit, found: Found, zero: str) -> Outcome:
    """The outcome of a linear unit, once scales of channels are moved; ``leaves`` are read and not changed."""
    edits: dict[tuple[int, Any], Any] = {}
    rules, scales, constants = [], {}, {}
    row = 0
    for name, decision in zip(unit.sites, unit.decisions, strict=True):
        site, bits = program.by_name[name], bits_of(decision.weights, name)
        matrix = np.asarray(weight_matrix(program, leaves, name), np.float32)
        bias = unit.biases.get(name)
        end = row + len(matrix)
        pair = Pairs(found["scale"][row:end], found["zero"][row:end], np.zeros(end - row), 0)
        row = end
        scales[name] = {"scale": pair.scale[:, None], "zero": pair.other[:, None].astype(np.uint8)}
        inputs: Any = None
        if "q" in found:
            log = log_format(bits_of(decision.inputs.fmt, name), found["q"], zero=zero, shift=unit.shift)
            inputs = dataclasses.replace(log, folded=isinstance(bias, Bias))
            constants[name] = {"scale": found["input_scale"].reshape(1, 1)}
            if isinstance(bias, Bias):
                near = dequantized(matrix, pair, bits)
                edits[_key(leaves, bias)] = _shifted(
                    site, leaves, bias, placed(site, near, leaves), np.full(near.shape[1], -unit.shift, np.float32)
                )
        elif "twin" in found:
            inputs = TwinUniform(bits_of(decision.inputs.fmt, name), int(found["twin"][0]), negative=True)
            constants[name] = {"scale": found["input_scale"].reshape(1, 1)}
        elif "input_zero" in found:
            inputs = Int(bits_of(decision.inputs.fmt, name), per="tensor", symmetric=False)
            constants[name] = {
                "scale": found["input_scale"].reshape(1, 1),
                "zero": found["input_zero"].reshape(1, 1).astype(np.uint8),
            }
        source = None if inputs is None else Static(inputs)
        rules.append(Rule(_exactly(name), op=site.op, weights=Int(bits, symmetric=False), inputs=source))
    put = tuple((number, key, value) for (number, key), value in edits.items())
    return Outcome(tuple(rules), put, scales, constants)


def settle_attention(unit: AttentionUnit, found: Found) -> Outcome:
    """The outcome of an attention: a rule whose operands have fixed scales."""
    operands = {}
    for name in ("q", "k", "p", "v"):
        if f"{name}.scale" not in found:
            continue
        fmt, scale = unit.decision.operands[name].fmt, found[f"{name}.scale"]
        if f"{name}.q" in found:
            log = log_format(fmt.bits, found[f"{name}.q"], zero=fmt.zero)
            operands[name] = Fixed(log, tuple(map(float, scale)))
        elif f"{name}.twin" in found:
            twin = TwinUniform(fmt.bits, int(found[f"{name}.twin"][0]))
            operands[name] = Fixed(twin, tuple(map(float, scale)))
        else:
            uniform = Int(bits_of(fmt, unit.name), per="tensor", symmetric=False)
            operands[name] = Fixed(uniform, tuple(map(float, scale)), tuple(map(int, found[f"{name}.zero"])))
    return Outcome((Rule(_exactly(unit.name), op="attention", operands=operands),))


def log_format(bits: int, q: np.ndarray, **settings: Any) -> Log:
    """A logarithmic format of base 2**(q/37), where q may be 18.5: base sqrt 2."""
    return Log(bits, 1, r=2, **settings) if q[0] == 18.5 else Log(bits, int(q[0]), **settings)


def _key(leaves: Leaves, bias: Bias) -> tuple[int, Any]:
    return leaves.number[bias.leaf], bias.key


def _columns(site: Any, value: Any, rho: np.ndarray) -> Any:
    """A weight, in the axes of its slice, with its input channels multiplied by rho [K]."""
    axes = _below(site, site.in_axes)
    shape = [1] * value.ndim
    for axis in axes:
        shape[axis] = value.shape[axis]
    order = sorted(range(len(axes)), key=lambda n: axes[n])  # K runs in the order of in_axes, the leaf in its own
    factors = rho.reshape([value.shape[a] for a in axes]).transpose(order).reshape(shape)
    return _like(value, np.asarray(value, np.float32) * factors)


def placed(site: Any, matrix: np.ndarray, leaves: Leaves) -> np.ndarray:
    """A matrix [N, K] in the axes of the slice of its leaf."""
    shape = leaves.slice(site.leaf, site.slice).shape
    ins = _below(site, site.in_axes)
    outs = [a for a in range(len(shape)) if a not in ins]
    order = [*outs, *ins]
    return matrix.reshape([shape[a] for a in order]).transpose(np.argsort(order))


def _below(site: Any, axes: tuple[int, ...]) -> list[int]:
    gone = [axis for axis, _ in site.slice]
    return [axis - sum(g < axis for g in gone) for axis in axes]


def _shifted(site: Any, leaves: Leaves, bias: Bias, value: Any, shift: np.ndarray) -> Any:
    """The bias of a site plus what its weight makes of inputs that are shifted by [K]."""
    old = leaves.slice(bias.leaf, bias.key)
    more = mean_shift(site, value, {"mean_sum": jnp.asarray(shift), "mean_rows": jnp.ones(())})
    more = along(more, site, bias)
    return _like(old, np.asarray(old, np.float32) + np.asarray(more).reshape(old.shape))


def _like(old: Any, new: np.ndarray) -> Any:
    return jnp.asarray(new, dtype=old.dtype)


def _exactly(name: str) -> str:
    """A pattern for one name."""
    return f"re:{re.escape(name)}" if set(name) & set("*?[]{}") or name.startswith("re:") else name
