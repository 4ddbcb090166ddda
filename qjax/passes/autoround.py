"""AutoRound: which way each weight is rounded, and how far ranges reach, trained on the outputs of a block.

Cheng et al. 2023 (arXiv:2309.05516), "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
LLMs", equations 3 to 6. A weight is stored as

    scale * (clip(round(w / scale + zero + V)) - zero)        V in [-1/2, 1/2], one for each weight
    range [low * min w, high * max w] of each group            low, high in [1/2, 1]

and V, low, high go against the sign of the derivative of the squared error of the block's outputs, for a few hundred
steps whose length falls to 0. The derivative of rounding is taken to be 1. What had the least error on all batches is
kept; the start, which is rounding to nearest, is among the candidates, so it never gets worse on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from qjax.calibration import Observer
from qjax.errors import FormatError
from qjax.formats import Aux, Format, Int
from qjax.formats.numerics import AnyArray

FIELDS = ("offset", "low", "high")
SHORTEST = 0.5
"""To what part of itself a range may be cut."""

Outputs = Callable[[Mapping[Any, Any], Any], Sequence[Any]]
"""The outputs of a block, from weights by name and the inputs of one batch."""


@dataclasses.dataclass(frozen=True)
class AutoRound:
    """Rounding trained block by block; needs calibration data. For `Int` weights.

    The block meets the activations that the quantized blocks before it give, and its outputs are held against those of
    the float model. Activations are not rounded while it trains.

    Args:
        iters: steps for each block.
        lr: length of the first step of ``V``; None is 1 / iters, as published.
        minmax_lr: the same of ``low`` and ``high``; None is lr.
        seed: draws the batches.
        per_step: batches of each step, over which the error is averaged. They are drawn without repeats until too few
            are left. The tool of the authors draws 8 rows: batches of 2 rows with ``per_step=4`` do the same.
    """

    iters: int = 200
    lr: float | None = None
    minmax_lr: float | None = None
    seed: int = 0
    per_step: int = 1

    needs_batches: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    tunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.iters, bool) or not isinstance(self.iters, int) or self.iters < 1:
            raise FormatError(f"AutoRound: iters={self.iters!r}; a number of steps, such as 200")
        if isinstance(self.per_step, bool) or not isinstance(self.per_step, int) or self.per_step < 1:
            raise FormatError(f"AutoRound: per_step={self.per_step!r}; a number of batches, 1 or more")
        for name in ("lr", "minmax_lr"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value <= 1):
                raise FormatError(f"AutoRound: {name}={value!r}; above 0 and at most 1, or None for 1 / iters")

    def check_format(self, fmt: Format) -> None:
        """Raise a FormatError if a format cannot be rounded in this way."""
        check_format(fmt)

    def round(
        self,
        w: AnyArray,
        fmt: Format,
        *,
        observer: Observer | None = None,
        weight: AnyArray | None = None,
        statistics: Mapping[str, AnyArray] | None = None,
    ) -> tuple[Array, Aux]:
        """Round a matrix as it was trained.

        Args:
            w: float32 [N, K].
            fmt: an `Int`.
            observer: not used: ranges are trained.
            weight: not used.
            statistics: {"offset": float32 [N, K], "low", "high": float32 blocked}, as `tune` found them.

        Returns:
            Codes [N, K] and aux.

        Raises:
            FormatError: no `Int`, or nothing was trained.
        """
        check_format(fmt)
        if statistics is None or not set(FIELDS) <= set(statistics):
            raise FormatError("AutoRound.round needs what its `tune` found on a block: offset, low and high")
        w = jnp.asarray(w, jnp.float32)
        aux = _ranges(w, fmt, statistics)
        scale = fmt.spread(aux["scale"], w.shape[-1])
        return fmt.encode(w + jnp.asarray(statistics["offset"], jnp.float32) * scale, aux), aux

    def tune(
        self,
        outputs: Outputs,
        weights: Mapping[Any, Any],
        formats: Mapping[Any, Format],
        inputs: Sequence[Callable[[], Any]],
        targets: Sequence[Sequence[Any]],
    ) -> dict[Any, dict[str, Any]]:
        """Train the rounding of the weights of a block.

        Args:
            outputs: of the block, from its weights and the inputs of one batch.
            weights: canonical float matrices [*stack, N, K] by name.
            formats: of each weight.
            inputs: give the inputs of each batch.
            targets: the float outputs for each batch.

        Returns:
            For each weight ``offset``, ``low`` and ``high``.
        """
        for fmt in formats.values():
            check_format(fmt)
        weights = {name: jnp.asarray(w, jnp.float32) for name, w in weights.items()}
        lr = self.lr or 1 / self.iters
        steps = {"offset": lr, "low": self.minmax_lr or lr, "high": self.minmax_lr or lr}
        optimizer = optax.partition(
            {name: optax.sign_sgd(optax.linear_schedule(size, 0.0, self.iters)) for name, size in steps.items()},
            lambda theta: {name: {field: field for field in fields} for name, fields in theta.items()},
        )

        @jax.jit
        def loss(theta: Any, drawn: Any, weights: Any) -> Array:
            rounded = {name: soft_rounded(w, formats[name], theta[name]) for name, w in weights.items()}
            errors = [squared_error(outputs(rounded, batch), target) for batch, target in drawn]
            return sum(errors, start=jnp.float32(0)) / len(errors)

        @jax.jit
        def step(theta: Any, state: Any, drawn: Any, weights: Any) -> Any:
            value, slope = jax.value_and_grad(loss)(theta, drawn, weights)
            updates, state = optimizer.update(slope, state, theta)
            return value, _within(optax.apply_updates(theta, updates)), state

        start = {name: _start(w, formats[name]) for name, w in weights.items()}
        theta, state = start, optimizer.init(start)
        best, least = start, float("inf")
        for chosen in _draws(len(inputs), self.per_step, self.iters, self.seed):
            drawn = tuple((inputs[at](), targets[at]) for at in chosen)
            value, moved, state = step(theta, state, drawn, weights)
            if float(value) < least:
                best, least = theta, float(value)
            theta = moved

        def total(theta: Any) -> float:
            pairs = zip(inputs, targets, strict=True)
            return sum(float(loss(theta, ((batch(), target),), weights)) for batch, target in pairs)

        return min((start, best, theta), key=total)


def check_format(fmt: Format) -> None:
    """Refuse what cannot be trained.

    Raises:
        FormatError: the format is no `Int`.
    """
    if not isinstance(fmt, Int):
        raise FormatError(
            f"AutoRound trains the rounding of integers, and {fmt.name} is none; use Int, or another rounding for it"
        )


def soft_rounded(w: Array, fmt: Any, theta: Mapping[str, Array]) -> Array:
    """The weight as it would be stored, with derivatives that pass straight through the rounding.

    Args:
        w: float32 [*stack, N, K].
        fmt: an `Int`.
        theta: ``offset`` [*stack, N, K], ``low`` and ``high``, blocked.
    """
    aux, length = _ranges(w, fmt, theta), w.shape[-1]
    scale = fmt.spread(aux["scale"], length)
    zero = fmt.spread(aux["zero"], length).astype(jnp.float32) if "zero" in aux else 0.0
    steps = w / scale + theta["offset"]
    steps = steps + lax.stop_gradient(jnp.round(steps) - steps)
    code, (least, most) = steps + zero, fmt.code_range
    # Not jnp.clip, which halves the derivative of what lies on a bound.
    code = jnp.where((code >= least) & (code <= most), code, lax.stop_gradient(jnp.clip(code, least, most)))
    return (code - zero) * scale


def squared_error(outs: Sequence[Any], targets: Sequence[Any]) -> Array:
    """The sum over float outputs of their mean squared errors."""
    return sum(
        (
            jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)))
            for a, b in zip(outs, targets, strict=True)
            if jnp.issubdtype(b.dtype, jnp.floating) and b.size
        ),
        start=jnp.float32(0),
    )


def _draws(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """The batches of each step: all of them in a random order, and anew when fewer are left than a step takes."""
    rng, size = np.random.default_rng(seed), min(size, count)
    out: list[list[int]] = []
    while len(out) < steps:
        order = rng.permutation(count).tolist()
        out += [order[at : at + size] for at in range(0, count - size + 1, size)]
    return out[:steps]


def _ranges(w: Array, fmt: Any, theta: Mapping[str, AnyArray]) -> Aux:
    low, high = fmt.range_of(w)
    return fmt.from_range(low * theta["low"], high * theta["high"])


def _start(w: Array, fmt: Format) -> dict[str, Array]:
    ones = jnp.ones_like(fmt.range_of(w)[0])
    return {"offset": jnp.zeros_like(w), "low": ones, "high": ones}


def _within(theta: Any) -> Any:
    bounds = {"offset": (-0.5, 0.5), "low": (SHORTEST, 1.0), "high": (SHORTEST, 1.0)}
    return {name: {f: jnp.clip(v, *bounds[f]) for f, v in fields.items()} for name, fields in theta.items()}
