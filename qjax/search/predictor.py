"""EQ-Net's accuracy predictor (CQAP): from a choice to the accuracy it will have, without running the network.

A choice is encoded as 6 + 14 N numbers (`qjax.supernet.encode_choice`); seven hidden layers of 200 with ReLU, and a
linear one without bias, give the accuracy in 0..1. It is fitted to subnets that were measured, by the smooth L1 loss;
the parameters with the least error on held-out subnets are kept.

Decided here: the paper has SGD (rate 4e-4, decay 1e-4), its code Adam (4e-4, 1e-5); Adam is taken, with decay added to
the gradient as there. Weights begin uniform within 1/sqrt(inputs), as in the code's framework. The fixed offset, 0 in
the code, is the mean accuracy: with few subnets the last layer would spend its time on that.

Source: Xu et al., "EQ-Net", ICCV 2023, equation 9, and its code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qjax.errors import DataError, SearchError

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CQAP:
    """Settings.

    Attributes:
        hidden, layers: width and number of hidden layers.
        epochs, batch: over the training part.
        rate, decay: of Adam.
        held: share of the subnets that are held out.
    """

    hidden: int = 200
    layers: int = 7
    epochs: int = 100
    batch: int = 256
    rate: float = 4e-4
    decay: float = 1e-5
    held: float = 0.2

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "epochs", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SearchError(f"{name}={value!r}; a positive whole number is needed")
        if not (self.rate > 0 and self.decay >= 0 and 0 < self.held < 1):
            raise SearchError(
                f"rate={self.rate}, decay={self.decay}, held={self.held}; positive, 0 or more, and 0 to 1"
            )


def init_predictor(key: jax.Array, inputs: int, settings: CQAP | None = None) -> Params:
    """Parameters float32: ``kernels`` [in, out] and ``biases`` of the hidden layers, ``out`` [hidden], ``offset``."""
    settings = settings or CQAP()
    widths = [inputs, *[settings.hidden] * settings.layers]
    keys = iter(jax.random.split(key, 2 * settings.layers + 1))

    def uniform(fan: int, *shape: int) -> jax.Array:
        return jax.random.uniform(next(keys), shape, minval=-(fan**-0.5), maxval=fan**-0.5)

    pairs = list(zip(widths, widths[1:], strict=False))
    return {
        "kernels": [uniform(a, a, b) for a, b in pairs],
        "biases": [uniform(a, b) for a, b in pairs],
        "out": uniform(settings.hidden, settings.hidden),
        "offset": jnp.float32(0),
    }


def predict(params: Params, encoded: Any) -> jax.Array:
    """Accuracies float32 [...] of encoded choices [..., 6 + 14 N]."""
    x = jnp.asarray(encoded, jnp.float32)
    for kernel, bias in zip(params["kernels"], params["biases"], strict=True):
        x = jax.nn.relu(x @ kernel + bias)
    return x @ params["out"] + jax.lax.stop_gradient(params["offset"])


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How predictions and measurements agree.

    Attributes:
        pearson, spearman, kendall: correlations; of kendall tau-b, in which ties count for neither side.
        rmse: root of the mean square error.
        count: of subnets.
    """

    pearson: float
    spearman: float
    kendall: float
    rmse: float
    count: int

    def __str__(self) -> str:
        return (
            f"Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f}, Kendall {self.kendall:.3f}, "
            f"RMSE {self.rmse:.4f} on {self.count} subnets"
        )


def agreement(predicted: Any, measured: Any) -> Agreement:
    """Compare predictions [n] with measurements [n]; a correlation with something constant is NaN.

    Raises:
        DataError: other shapes, or fewer than two.
    """
    a, b = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise DataError(f"predictions {a.shape} and measurements {b.shape}; two or more of both are needed")
    signs = np.sign(a[:, None] - a), np.sign(b[:, None] - b)
    both, ties = (signs[0] * signs[1]).sum(), [np.abs(s).sum() for s in signs]
    kendall = float(both / np.sqrt(ties[0] * ties[1])) if min(ties) else float("nan")
    rmse = float(np.sqrt(np.square(a - b).mean()))
    return Agreement(_pearson(a, b), _pearson(_ranked(a), _ranked(b)), kendall, rmse, len(a))


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum() / size) if size else float("nan")


def _ranked(values: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A predictor and how good it is.

    Attributes:
        params: of `predict`.
        held: agreement on the subnets that were held out.
        epoch: whose parameters these are.
        rmse: on the held-out subnets, after each epoch, float64 [epochs].
    """

    params: Params
    held: Agreement
    epoch: int
    rmse: np.ndarray

    def __repr__(self) -> str:
        return f"Fitted({self.held}; epoch {self.epoch + 1} of {len(self.rmse)})"


def fit_predictor(
    encoded: Any,
    accuracy: Any,
    settings: CQAP | None = None,
    *,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Fitted:
    """Fit a predictor.

    Args:
        encoded: [n, 6 + 14 N].
        accuracy: [n], or another score of about this size, the larger the better, such as minus cross-entropies.
        settings: None takes those of EQ-Net's code.
        seed: of the split, the first parameters and the order of subnets.
        progress: called as ``progress(done, total, what)`` after each epoch.

    Raises:
        DataError: fewer than ten subnets, other shapes, or a value that is not finite.
    """
    settings = settings or CQAP()
    x, y = np.asarray(encoded, np.float32), np.asarray(accuracy, np.float32)
    if x.ndim != 2 or y.shape != x.shape[:1] or len(y) < 10:
        raise DataError(
            f"encoded choices {x.shape} and accuracies {y.shape}; [n, inputs] and [n] from 10 on are needed"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        bad = np.flatnonzero(~np.isfinite(y) | ~np.isfinite(x).all(axis=1))
        raise DataError(f"subnet {int(bad[0])} has a value that is no number; leave it out")
    order = np.random.default_rng(seed).permutation(len(y))
    held, train = np.split(order, [max(2, round(settings.held * len(y)))])
    start, keys = jax.random.split(jax.random.key(seed))
    params = init_predictor(start, x.shape[1], settings) | {"offset": jnp.float32(y[train].mean())}
    data, rest = ((jnp.asarray(x[part]), jnp.asarray(y[part])) for part in (train, held))
    weights = {name: value for name, value in params.items() if name != "offset"}
    state = weights, _optimizer(settings).init(weights)
    errors, best, at = [], weights, 0
    for number in range(settings.epochs):
        state, error = _epoch(state, jax.random.fold_in(keys, number), params["offset"], data, rest, settings)
        errors.append(float(error))
        if errors[-1] <= min(errors):
            best, at = state[0], number
        if progress:
            progress(number + 1, settings.epochs, f"RMSE {errors[-1]:.4f}")
    fitted = best | {"offset": params["offset"]}
    return Fitted(fitted, agreement(predict(fitted, rest[0]), y[held]), at, np.array(errors))


def _optimizer(settings: CQAP) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(settings.decay), optax.adam(settings.rate))


@functools.partial(jax.jit, static_argnames="settings")
def _epoch(state: Any, key: jax.Array, offset: Any, data: Any, rest: Any, settings: CQAP) -> tuple[Any, jax.Array]:
    """One pass over the training part, and the error on the rest; compiled once for all fits of one size."""
    optimizer, count = _optimizer(settings), len(data[1])

    def loss(some: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.losses.huber_loss(predict(some | {"offset": offset}, x), y, delta=1.0).mean()

    def step(state: tuple[Any, Any], rows: jax.Array) -> tuple[tuple[Any, Any], None]:
        some, opt = state
        updates, opt = optimizer.update(jax.grad(loss)(some, *(a[rows] for a in data)), opt, some)
        return (optax.apply_updates(some, updates), opt), None

    rows = jax.random.permutation(key, count)
    batch = min(settings.batch, count)
    rows = jnp.concatenate([rows, rows[: -count % batch]]).reshape(-1, batch)  # the last is filled from the first
    state, _ = jax.lax.scan(step, state, rows)
    found = predict(state[0] | {"offset": offset}, rest[0])
    return state, jnp.sqrt(jnp.square(found - rest[1]).mean())
