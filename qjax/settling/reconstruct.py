"""Block reconstruction: weights rounded up or down, and scales of activations, trained to keep what a block puts out.

The second stage of AdaLog (the columns "Retrain" of its tables), after AdaRound (Nagel et al. 2020, arXiv:2004.10568)
and BRECQ (Li et al. 2021, arXiv:2102.05426). A weight becomes

    W^ = (clip(floor(W / s) + h(v) + z, 0, n - 1) - z) s,    h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1),

and v starts where h is the fraction that floor takes off, so that W^ is W. For every block by itself, with float inputs
and float outputs as the target,

    mean of (sum over axis 1 of squared errors) / 10  +  0.01 sum (1 - |2 h - 1|^beta)

is minimised by Adam, at 1e-3 for v and at 4e-5, falling to 0 by a cosine, for the scales of activations; the logits of
the last block are compared by KL divergence. The second term pushes every h to 0 or 1; it is off for the first fifth,
and then beta falls from 20 to 2. Logarithmic quantizers use the power itself here, and not its fraction, and rounding
has the derivative 1. Then what a code stands for does not change with the scale, s B**(log_B(x / s)) = x, so that their
scales learn from what is clipped alone, to s or to the last level. Bases, zero points and shifts stay. So does the
scale 1 of logarithmic probabilities, which the authors train too: nothing but zeros is clipped there, so that its
derivative is noise, which Adam blows up to steps of full size; and 1 is what `qjax.ops.log_attention` takes.

These rates are those of the authors' 20,000 steps. In N steps v moves by no more than about N times its rate, so that
in a few hundred hardly a weight would come to be rounded the other way: of fewer steps both rates are
sqrt(20,000 / N) times as high.

With ``block_inputs="quantized"`` a block is trained on what the trained blocks before it put out, and not on what the
float model has there, so that it also learns to undo what they do wrong (as in BRECQ and in QDrop, Wei et al. 2022,
arXiv:2203.05740). The target stays what the float model puts out.

What is learned is written back as the weight that its codes stand for, so rounding to nearest gives these codes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from qjax._compat import consts_of
from qjax.composites import Level, Node, Value
from qjax.errors import DataError, RecipeError
from qjax.formats import Log
from qjax.passes.adalog import Found, bits_of
from qjax.passes.leaves import Leaves
from qjax.passes.units import AttentionUnit, LinearUnit
from qjax.program import Program
from qjax.rewriting.operands import heads_of
from qjax.settling.cuts import Block, Unit, evaluated
from qjax.settling.results import placed

STRETCH = (-0.1, 1.1)
RATE_WEIGHTS, RATE_SCALES = 1e-3, 4e-5
RATES_OF = 20_000
PUSH, WARM_UP, BETA = 0.01, 0.2, (20.0, 2.0)
STEPS_A_CALL = 50


def reconstructed(
    program: Program,
    level: Level,
    block: Block,
    units: Sequence[Unit],
    found: Sequence[Found],
    leaves: Leaves,
    data: tuple[Sequence[Array], Sequence[Array]],
    examples: int,
    settings: Any,
) -> tuple[dict[str, np.ndarray], list[Found], tuple[float, float]]:
    """Train one block.

    Args:
        program, level: the trace at the shapes of a step, and its flat view.
        block: which part of it.
        units, found: of the block, and what the search has found for them.
        leaves: parameters, scales of channels moved already.
        data: what enters the block, and what leaves it, of all examples [n m, ..]: m rows for each, those of an example
            next to each other.
        examples: in a step.
        settings: `qjax.passes.AdaLog`: ``reconstruct`` steps, ``seed``, ``zero``.

    Returns:
        New weights by leaf, what was found with new scales, and the loss of outputs before and after.

    Raises:
        DataError: a value that enters or leaves the block does not begin with examples.
    """
    data = (_by_example(block.inputs, data[0], examples, block), _by_example(block.outputs, data[1], examples, block))
    count = len(data[0][0])
    part, trained, fixed = _prepared(program, level, block, units, found, leaves, settings)
    last = block.stop == len(level.nodes)

    def loss_of(trained: Any, fixed: Any, inputs: Any, targets: Any, hard: bool = False) -> Array:
        got = part.outputs(trained, fixed, inputs, hard)
        return sum((distance(a, b, last) for a, b in zip(got, targets, strict=True)), jnp.float32(0))

    total = settings.reconstruct
    for_weights, for_scales = rates_of(total)
    rates = {
        "rounding": optax.adam(for_weights),
        "scales": optax.adam(optax.cosine_decay_schedule(for_scales, max(total, 1))),
    }

    def step(carry: Any, at: Array, fixed: Any, inputs: Any, targets: Any, key: Array) -> Any:
        trained, states = carry
        rows = jax.random.choice(jax.random.fold_in(key, at), count, (examples,), replace=False)

        def whole(trained: Any) -> Array:
            loss = loss_of(trained, fixed, _taken(inputs, rows), _taken(targets, rows))
            return loss + push(trained["rounding"].values(), at, total)

        slopes = jax.grad(whole)(trained)
        new, now = {}, {}
        for name, rate in rates.items():
            moves, now[name] = rate.update(slopes[name], states[name])
            new[name] = optax.apply_updates(trained[name], moves)
        return (new, now), None

    @functools.partial(jax.jit, static_argnames="steps")
    def run(carry: Any, first: Array, fixed: Any, inputs: Any, targets: Any, key: Array, steps: int) -> Any:
        body = lambda carry, at: step(carry, at, fixed, inputs, targets, key)  # noqa: E731
        return lax.scan(body, carry, first + jnp.arange(steps))[0]

    key = jax.random.key(settings.seed)
    loss_at = jax.jit(loss_of, static_argnames="hard")

    def measured(trained: Any) -> float:
        parts = _in_turn(count, examples)
        losses = [loss_at(trained, fixed, *(_taken(side, rows) for side in data), hard=True) for rows in parts]
        return float(np.mean([float(loss) for loss in losses]))

    before = measured(trained)  # each weight rounded to the nearest
    carry = (trained, {name: rate.init(trained[name]) for name, rate in rates.items()})
    for first in range(0, total, STEPS_A_CALL):
        steps = min(STEPS_A_CALL, total - first)
        carry = run(carry, jnp.int32(first), fixed, *data, key, steps=steps)
    trained = carry[0]
    after = measured(trained)
    if not after < before:  # few steps may end worse than they began: then nothing is taken
        return {}, list(found), (before, before)
    new = {
        program.by_name[name].leaf or "": np.asarray(rounded_weight(w, trained["rounding"][name], True))
        for name, w in fixed[0].items()
    }
    out = [dict(f) for f in found]
    for f, scales in zip(out, trained["scales"], strict=True):
        f.update({key: np.asarray(np.maximum(value, 1e-8), np.float32) for key, value in scales.items()})
    return new, out, (before, after)


def passed_on(
    program: Program,
    level: Level,
    block: Block,
    units: Sequence[Unit],
    found: Sequence[Found],
    leaves: Leaves,
    inputs: Sequence[Array],
    examples: int,
    settings: Any,
) -> list[Array]:
    """Return what a block puts out with rounded weights and operands, for all examples.

    Args as of `reconstructed`, but for the inputs, which are those that the blocks before have passed on; ``leaves``
    and ``found`` are as the training has left them.
    """
    data = _by_example(block.inputs, inputs, examples, block)
    count = len(data[0])
    part, trained, fixed = _prepared(program, level, block, units, found, leaves, settings)
    run = jax.jit(functools.partial(part.outputs, hard=True))
    parts = [run(trained, fixed, _taken(data, rows)) for rows in _in_turn(count, examples)]
    whole = [jnp.concatenate(values) for values in zip(*parts, strict=True)]
    return [a[: count * (v.shape[0] // examples)] for v, a in zip(block.outputs, whole, strict=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Rounded:
    """A block with rounded weights and operands, as a function of what is trained."""

    program: Program
    level: Level
    block: Block
    units: Sequence[Unit]
    settings: Any
    numbers: Mapping[str, int]

    def outputs(
        self, trained: Any, fixed: tuple[Any, Any, Any], inputs: Sequence[Array], hard: bool = False
    ) -> list[Any]:
        weights, constants, values = fixed
        arrays = list(values)
        for name, weight in weights.items():
            at = self.numbers[name]
            arrays[at] = rounded_weight(weight, trained["rounding"][name], hard).astype(arrays[at].dtype)
        env = dict(zip(self.level.inputs, [*consts_of(self.program.jaxpr), *arrays], strict=False))
        products = _products(self.units, trained["scales"], constants, self.settings)
        return evaluated(self.level, self.block, env | dict(zip(self.block.inputs, inputs, strict=True)), products)


def _prepared(
    program: Program,
    level: Level,
    block: Block,
    units: Sequence[Unit],
    found: Sequence[Found],
    leaves: Leaves,
    settings: Any,
) -> tuple[_Rounded, dict[str, Any], tuple[Any, Any, Any]]:
    """A block as a function, where its training starts, and what stays: weights, what was found, parameters."""
    weights = {name: _start(program, leaves, unit, name, f) for unit, f in zip(units, found, strict=True)
               if isinstance(unit, LinearUnit) for name in unit.sites}  # fmt: skip
    trained = {
        "rounding": {name: fixed.pop("v") for name, fixed in weights.items()},
        "scales": [_scales(unit, f) for unit, f in zip(units, found, strict=True)],
    }
    constants = [{k: jnp.asarray(v) for k, v in f.items()} for f in found]
    values = [jnp.asarray(leaves.at(n)) for n in range(len(program.leaf_names))]
    numbers = {name: leaves.number[program.by_name[name].leaf] for name in weights}  # type: ignore[index]
    return _Rounded(program, level, block, units, settings, numbers), trained, (weights, constants, values)


def _in_turn(count: int, examples: int) -> list[np.ndarray]:
    """All examples, so many at a time as in a step; the last of them begin again at the first."""
    return [np.arange(at, at + examples) % count for at in range(0, count, examples)]


def check_examples(block: Block, values: Sequence[Value], examples: int) -> None:
    """Check that values that enter or leave a block begin with the examples of a step."""
    for value in values:
        if not value.shape or value.shape[0] % examples:
            raise DataError(
                f"{block.name}: a value of shape {tuple(value.shape)} enters or leaves it, whose first axis is not "
                f"that of the {examples} examples of a step; put examples first, or leave out reconstruct"
            )


def _by_example(values: Sequence[Value], arrays: Sequence[Array], examples: int, block: Block) -> list[Array]:
    """Arrays [n m, ..] as [n, m, ..], m what one example has of a value that is traced with so many examples."""
    check_examples(block, values, examples)
    return [a.reshape(-1, v.shape[0] // examples, *a.shape[1:]) for v, a in zip(values, arrays, strict=True)]


def _taken(arrays: Sequence[Array], rows: Array | np.ndarray) -> list[Array]:
    """Some examples of arrays [n, m, ..], as [rows m, ..]."""
    return [a[rows].reshape(-1, *a.shape[2:]) for a in arrays]


def rates_of(steps: int) -> tuple[float, float]:
    """Return the rates of weights and of scales for so many steps: see the top of this module."""
    more = max(1.0, RATES_OF / max(steps, 1)) ** 0.5
    return RATE_WEIGHTS * more, RATE_SCALES * more


def _start(program: Program, leaves: Leaves, unit: LinearUnit, name: str, found: Found) -> dict[str, Any]:
    """What of a weight is constant, in the axes of its leaf, and where its rounding starts."""
    site = program.by_name[name]
    if site.slice:
        raise RecipeError(f"{name}: its weight is one of a stack; reconstruction trains whole leaves: unstack it")
    value = np.asarray(leaves.at(leaves.number[site.leaf]), np.float32)  # type: ignore[index]
    rows = _rows_before(program, unit, name)
    count = _outputs(program, name)
    length = value.size // count
    wide = lambda a: placed(site, np.repeat(a[rows : rows + count, None], length, 1), leaves)  # noqa: E731
    scale, zero = wide(found["scale"]), wide(found["zero"])
    steps = value / scale
    low, high = STRETCH
    part = np.clip(steps - np.floor(steps), 1e-3, 1 - 1e-3)
    decision = unit.decisions[unit.sites.index(name)]
    return {
        "scale": jnp.asarray(scale),
        "zero": jnp.asarray(zero),
        "floor": jnp.asarray(np.floor(steps)),
        "top": jnp.float32(2 ** bits_of(decision.weights, name) - 1),
        "v": jnp.asarray(-np.log((high - low) / (part - low) - 1), jnp.float32),
    }


def _outputs(program: Program, name: str) -> int:
    site = program.by_name[name]
    shape = program.leaf_avals[program.leaf_names.index(site.leaf)].shape  # type: ignore[arg-type]
    return int(np.prod([n for axis, n in enumerate(shape) if axis not in site.in_axes]))


def _rows_before(program: Program, unit: LinearUnit, name: str) -> int:
    return sum(_outputs(program, other) for other in unit.sites[: unit.sites.index(name)])


def _h(v: Array) -> Array:
    low, high = STRETCH
    return jnp.clip(jax.nn.sigmoid(v) * (high - low) + low, 0, 1)


def push(rounding: Iterable[Array], at: Array, total: int) -> Array:
    """The second term of what is minimised, at step ``at`` of ``total``, of all v."""
    passed = jnp.clip((at / total - WARM_UP) / (1 - WARM_UP), 0, 1)
    beta = BETA[0] + (BETA[1] - BETA[0]) * passed
    between = sum((jnp.sum(1 - jnp.abs(2 * _h(v) - 1) ** beta) for v in rounding), jnp.float32(0))
    return jnp.where(at >= WARM_UP * total, PUSH, 0.0) * between


def rounded_weight(fixed: Mapping[str, Array], v: Array, hard: bool) -> Array:
    """W^ of the equation at the top; with ``hard``, every h is 0 or 1."""
    h = (_h(v) >= 0.5).astype(jnp.float32) if hard else _h(v)
    codes = jnp.clip(fixed["floor"] + h + fixed["zero"], 0, fixed["top"])
    return (codes - fixed["zero"]) * fixed["scale"]


def _scales(unit: Unit, found: Found) -> dict[str, Array]:
    """The scales of activations of a unit."""
    if isinstance(unit, LinearUnit):
        keys = ["input_scale"]
    else:  # logarithmic probabilities keep the scale 1 of softmax
        keys = [f"{n}.scale" for n in ("q", "k", "p", "v") if f"{n}.q" not in found]
    return {key: jnp.asarray(found[key]) for key in keys if key in found}


def _products(
    units: Sequence[Unit], scales: Sequence[Mapping[str, Array]], found: Sequence[Mapping[str, Array]], settings: Any
) -> dict[Node, Callable[[Sequence[Any]], Sequence[Any]]]:
    """How operands are changed at the products of a block."""
    out: dict[Node, Callable[[Sequence[Any]], Sequence[Any]]] = {}
    for unit, s, f in zip(units, scales, found, strict=True):
        if isinstance(unit, LinearUnit):
            if "input_scale" not in s:
                continue
            bits = bits_of(unit.decisions[0].inputs.fmt, unit.name)
            if "q" in f:
                how = functools.partial(
                    soft_log, scale=s["input_scale"], q=f["q"], bits=bits, shift=unit.shift, zero=settings.zero
                )
            elif "input_zero" in f:
                how = functools.partial(soft_uniform, scale=s["input_scale"], zero=f["input_zero"], bits=bits)
            else:
                raise RecipeError(f"{unit.name}: reconstruction trains uniform and logarithmic quantizers only")
            for node, side in zip(unit.nodes, unit.sides, strict=True):
                out[node] = _changing({side: how})
            continue
        out |= _attention(unit, s, f)
    return out


def _attention(unit: AttentionUnit, s: Mapping[str, Array], f: Mapping[str, Array]) -> dict[Node, Any]:
    found, out = unit.found, {}
    assert found.probabilities is not None
    for node, pair in (
        (found.scores, (("q", found.q), ("k", found.k))),
        (found.values, (("p", found.probabilities), ("v", found.v))),
    ):
        how: dict[int, Any] = {}
        for name, operand in pair:
            scale = {**f, **s}.get(f"{name}.scale")
            if scale is None:
                continue
            fmt = unit.decision.operands[name].fmt
            side = 0 if node.inputs[0] is operand.value else 1
            if isinstance(fmt, Log) and f"{name}.q" in f:
                how[side] = functools.partial(
                    soft_log, scale=scale, q=f[f"{name}.q"], bits=fmt.bits, shift=0.0, zero=fmt.zero
                )
                continue
            shape = [1] * operand.value.ndim
            if scale.size > 1:
                for d in heads_of(found, operand):
                    shape[d] = operand.value.shape[d]
            zero = f[f"{name}.zero"].reshape(shape)
            bits = bits_of(fmt, unit.name)
            how[side] = functools.partial(soft_uniform, scale=scale.reshape(shape), zero=zero, bits=bits)
        if how:
            out[node] = _changing(how)
    return out


def _changing(how: Mapping[int, Callable[[Any], Any]]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    return lambda operands: [how[n](x) if n in how else x for n, x in enumerate(operands)]


def _round(x: Array) -> Array:
    return x + lax.stop_gradient(jnp.round(x) - x)


def _clipped(x: Array, low: float, high: float) -> Array:
    """`jnp.clip` with the derivative 1 at the ends too, where whole codes often lie; its own is 1/2 there."""
    inside = (x >= low) & (x <= high)
    return jnp.where(inside, x, jnp.clip(lax.stop_gradient(x), low, high))


def soft_uniform(x: Array, *, scale: Array, zero: Array, bits: int) -> Array:
    """Uniform quantization whose rounding has the derivative 1."""
    codes = _clipped(_round(x.astype(jnp.float32) / scale) + zero, 0, 2**bits - 1)
    return ((codes - zero) * scale).astype(x.dtype)


def soft_log(x: Array, *, scale: Array, q: Array, bits: int, shift: float, zero: str) -> Array:
    """Logarithmic quantization whose rounding has the derivative 1, by the power of the base itself."""
    u = _clipped((x.astype(jnp.float32) + shift) / scale, 1e-15, 1)
    code = _round(-jnp.log2(u) * (37 / q))
    last = 2**bits - 1 - (zero == "reserve")
    value = scale * jnp.exp2(-_clipped(code, 0, last) * (q / 37))
    kept = value if zero == "clamp" else jnp.where(code > last, 0, value)
    return (kept - shift).astype(x.dtype)


def distance(got: Array, want: Array, last: bool) -> Array:
    """The first term of what is minimised; for a matrix that the last block gives, the mean KL divergence of rows."""
    if last and got.ndim == 2:
        p = jax.nn.log_softmax(want.astype(jnp.float32))
        return jnp.mean(jnp.sum(jnp.exp(p) * (p - jax.nn.log_softmax(got.astype(jnp.float32))), axis=-1))
    squares = (got.astype(jnp.float32) - want.astype(jnp.float32)) ** 2
    return jnp.mean(jnp.sum(squares, axis=1)) / 10 if got.ndim > 1 else jnp.mean(squares) / 10
