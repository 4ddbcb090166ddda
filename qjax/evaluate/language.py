"""Perplexity, and the distance between two language models on the same tokens.

Numbers: each token's log-softmax is taken in float32 with the largest logit subtracted, on the device, and summed over
tokens in float64 on the host; against a float64 log-softmax the perplexity differs in the seventh figure.

KL divergence is computed as ``sum_v p (e^d - 1 - d)`` with ``d = log q - log p``. For normalised p and q that equals
``sum_v p (log p - log q)``, but every term is non-negative and a rounding error of the normalisers enters squared: a KL
of 1e-6 nats is still measured in float32, where the plain form has lost every digit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import DataError
from qjax.evaluate.progress import track
from qjax.evaluate.text import MAX_CONTEXT, TextBlocks, given_blocks, text_blocks
from qjax.report.data import recovery

LOGITS_PER_BATCH = 2**25
"""Bound on the elements of one batch of logits (128 MiB in float32)."""
TOKENS_PER_BATCH = {"cpu": 1024}
"""Tokens of one batch by platform: measured on a CPU, attention scores of larger batches leave the cache and cost twice
the time; accelerators want more rows and take the 8192 of `_tokens_per_batch`."""

LogitsFn = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        perplexity: exp(nll).
        nll: mean negative log-likelihood per scored token, in nats.
        tokens: number of scored tokens.
        blocks: number of blocks.
        context: most tokens that a block may have.
        protocol: "A", "B" or "ids".
    """

    perplexity: float
    nll: float
    tokens: int
    blocks: int
    context: int
    protocol: str

    def scores(self) -> dict[str, float]:
        """As scores of a report."""
        return {"perplexity": self.perplexity, "nll": self.nll, "tokens": float(self.tokens)}


@dataclass(frozen=True)
class Divergence:
    """How far model b (quantized) is from model a (float) on the same inputs.

    Attributes:
        kl: mean over predictions of KL(a || b), in nats.
        kl_stderr: its standard error, predictions taken as independent.
        agreement: part of the predictions, 0 to 1, whose most probable class is the same. A model that gives NaN agrees
            with nothing.
        count: number of predictions.
        nll_a, nll_b: mean negative log-likelihood of the text under each, in nats; NaN where no text was given.
    """

    kl: float
    kl_stderr: float
    agreement: float
    count: int
    nll_a: float = math.nan
    nll_b: float = math.nan

    def __str__(self) -> str:
        text = f"KL divergence {self.kl:.5f} ± {self.kl_stderr:.5f} nats, top-1 agreement {100 * self.agreement:.1f} %"
        if not math.isnan(self.nll_b):
            text += f", perplexity {_exp(self.nll_a):.2f} -> {_exp(self.nll_b):.2f}"
        return f"{text} ({self.count:,} predictions)"

    def scores(self) -> dict[str, float]:
        """As scores of a report; perplexities and recovery where there was a text."""
        out = {"kl": self.kl, "kl_stderr": self.kl_stderr, "agreement": self.agreement}
        if not (math.isnan(self.nll_a) and math.isnan(self.nll_b)):
            a, b = _exp(self.nll_a), _exp(self.nll_b)
            out = {
                "perplexity": b,
                "float_perplexity": a,
                "recovery": recovery(b, a, False),
                "nll": self.nll_b,
                "float_nll": self.nll_a,
                "tokens": float(self.count),
                **out,
            }
        return out


def perplexity(
    fn: LogitsFn,
    params: Any,
    tokenizer_or_ids: Any,
    text: str | None = None,
    protocol: str = "A",
    *,
    context: int | None = None,
    bos: int | None = None,
    config: Any = None,
    show: bool | None = None,
) -> Perplexity:
    """Perplexity of a causal language model on a text.

    Args:
        fn: ``fn(params, tokens) -> logits``, int32 [B, T] to float [B, T, vocabulary].
        params: its parameters, any pytree.
        tokenizer_or_ids: a tokenizer (see `qjax.evaluate.text_blocks`), `TextBlocks`, or blocks of ids whose first
            token is read and not scored.
        text: the text; None with ids.
        protocol: "A" (blocks between blank lines) or "B" (one long text); see `qjax.evaluate.text`.
        context: most tokens of a block; None takes ``config.max_position_embeddings`` (at most 2048), else 512.
        bos: id of the beginning-of-text token; None takes the tokenizer's.
        config: the model's configuration, where it has one.
        show: progress bar on stderr; None: where that is a terminal.

    Returns:
        The result; its perplexity is NaN where the model gives NaN.

    Raises:
        DataError: text that cannot be scored, or a tokenizer that does not belong to the model.

    Note:
        Blocks are padded to at most four lengths. A causal model cannot see the padding; a model whose activations
        share one dynamic scale per tensor can, as it also sees the other rows of its batch.
    """
    blocks = _blocks(tokenizer_or_ids, text, protocol, context, bos, config)
    limit = _tokens_per_batch(fn, params, blocks)
    score = _nll_of(fn)
    total = 0.0
    for batch in track(blocks.batches(limit), "scoring text", show=show):
        nll = np.asarray(score(params, batch.inputs, batch.targets), np.float64)
        total += float(nll[batch.mask].sum())
    mean = total / blocks.tokens
    return Perplexity(_exp(mean), mean, blocks.tokens, len(blocks.blocks), blocks.context, blocks.protocol)


def divergence(
    fn_a: LogitsFn,
    params_a: Any,
    fn_b: LogitsFn,
    params_b: Any,
    inputs: Any,
    *,
    show: bool | None = None,
) -> Divergence:
    """KL divergence and top-1 agreement of model b with model a, and both perplexities where the inputs are a text.

    Args:
        fn_a: the float model, ``fn(params, inputs) -> logits [..., classes]``.
        params_a: its parameters.
        fn_b: the quantized model.
        params_b: its parameters.
        inputs: `TextBlocks`; an integer array [N, T] or a list of id sequences (every prediction of a scored token
            counts); or an iterable of input batches of any other model (every prediction counts).
        show: progress bar on stderr; None: where that is a terminal.

    Raises:
        DataError: no input, or logits of different shapes.
    """
    if isinstance(inputs, np.ndarray | jax.Array | list | tuple) and len(inputs) and _is_ids(inputs[0]):
        inputs = given_blocks(inputs)
    kl: list[np.ndarray] = []
    same: list[np.ndarray] = []
    nll: list[tuple[float, float]] = []
    run_a, run_b = _logits_of(fn_a), _logits_of(fn_b)
    if isinstance(inputs, TextBlocks):
        limit = min(_tokens_per_batch(fn_a, params_a, inputs), _tokens_per_batch(fn_b, params_b, inputs)) // 2
        for batch in track(inputs.batches(max(limit, 1)), "comparing models", show=show):
            a, b = run_a(params_a, batch.inputs), run_b(params_b, batch.inputs)
            _same_shape(a, b)
            found = [np.asarray(x)[batch.mask] for x in _compared_text(a, b, batch.targets)]
            kl.append(found[0])
            same.append(found[1])
            nll.append((found[2].sum(dtype=np.float64), found[3].sum(dtype=np.float64)))
    else:
        for x in track(_batches(inputs), "comparing models", show=show):
            a, b = run_a(params_a, x), run_b(params_b, x)
            _same_shape(a, b)
            found = [np.asarray(v).reshape(-1) for v in _compared(a, b)]
            kl.append(found[0])
            same.append(found[1])
    return _summed(kl, same, nll)


def logit_divergence(a: Any, b: Any) -> Divergence:
    """`divergence` of logits that are at hand: a (float model) and b, both [..., classes].

    Raises:
        DataError: shapes differ, or there is no prediction.
    """
    _same_shape(a, b)
    kl, same = _compared(jnp.asarray(a), jnp.asarray(b))
    return _summed([np.asarray(kl).reshape(-1)], [np.asarray(same).reshape(-1)], [])


def _summed(kl: list[np.ndarray], same: list[np.ndarray], nll: list[tuple[float, float]]) -> Divergence:
    values = np.concatenate(kl).astype(np.float64) if kl else np.zeros(0)
    count = len(values)
    if not count:
        raise DataError("there is no prediction to compare; give at least one input")
    a, b = (sum(x) / count for x in zip(*nll, strict=True)) if nll else (math.nan, math.nan)
    stderr = float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    return Divergence(float(values.mean()), stderr, float(np.concatenate(same).mean()), count, float(a), float(b))


@jax.jit
def _compared(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL(a || b) and whether the first choices are equal, per prediction, from logits [..., classes]."""
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (a, b))
    p, q, d = jnp.exp(log_p), jnp.exp(log_q), log_q - log_p
    # Near d = 0 the difference would cancel, and the series is exact to float32.
    small = jnp.square(d) * (0.5 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d / 720))))
    kl = jnp.sum(jnp.where(jnp.abs(d) < 0.25, p * small, q - p - p * d), axis=-1)
    finite = ~(jnp.isnan(a).any(axis=-1) | jnp.isnan(b).any(axis=-1))
    return kl, (jnp.argmax(a, axis=-1) == jnp.argmax(b, axis=-1)) & finite


@jax.jit
def _compared_text(a: jax.Array, b: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    return (*_compared(a, b), _nll(a, targets), _nll(b, targets))


def _nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


@functools.lru_cache(maxsize=8)
def _jitted_nll(fn: LogitsFn) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, tokens, targets: _nll(fn(params, tokens), targets))


@functools.lru_cache(maxsize=8)
def _jitted_logits(fn: LogitsFn) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, inputs: fn(params, inputs))


def _nll_of(fn: LogitsFn) -> Callable[..., jax.Array]:
    """`_jitted_nll`, remembered where the function can be hashed, so that a second text is not compiled again."""
    return _jitted_nll(fn) if _hashable(fn) else _jitted_nll.__wrapped__(fn)


def _logits_of(fn: LogitsFn) -> Callable[..., jax.Array]:
    return _jitted_logits(fn) if _hashable(fn) else _jitted_logits.__wrapped__(fn)


def _hashable(fn: Any) -> bool:
    try:
        hash(fn)
    except TypeError:
        return False
    return True


def _blocks(
    source: Any, text: str | None, protocol: str, context: int | None, bos: int | None, config: Any
) -> TextBlocks:
    if isinstance(source, TextBlocks):
        return source
    if text is None:
        if hasattr(source, "encode") or callable(source):
            raise DataError("a tokenizer alone says nothing to score; give the text too")
        return given_blocks(source)
    longest = min(int(getattr(config, "max_position_embeddings", 512)), MAX_CONTEXT)
    return text_blocks(source, text, protocol, context=longest if context is None else context, bos=bos)


def _tokens_per_batch(fn: LogitsFn, params: Any, blocks: TextBlocks) -> int:
    """How many tokens of logits fit; checks the model's output and the tokenizer before anything compiles."""
    length = min(blocks.context, 16)
    out = jax.eval_shape(fn, params, jax.ShapeDtypeStruct((1, length), jnp.int32))
    shape = getattr(out, "shape", None)
    if shape is None or len(shape) != 3 or shape[:2] != (1, length):
        got = f"shape {shape}" if shape is not None else f"a {type(out).__name__}"
        raise DataError(
            f"a language model takes tokens [1, {length}] to logits [1, {length}, vocabulary], but this one "
            f"gave {got}; wrap it in a function that returns the logits alone"
        )
    if blocks.top >= shape[2]:
        raise DataError(
            f"the text holds token id {blocks.top} and the model knows {shape[2]} tokens; "
            "use the tokenizer of this model"
        )
    return max(1, min(TOKENS_PER_BATCH.get(jax.default_backend(), 8192), LOGITS_PER_BATCH // shape[2]))


def _batches(inputs: Any) -> Iterable[Any]:
    return (inputs,) if hasattr(inputs, "dtype") else inputs


def _is_ids(row: Any) -> bool:
    if isinstance(row, list | tuple):
        return bool(row) and all(isinstance(i, int | np.integer) for i in row)
    dtype = getattr(row, "dtype", None)
    return dtype is not None and np.issubdtype(dtype, np.integer) and row.ndim == 1


def _same_shape(a: Any, b: Any) -> None:
    if a.shape != b.shape:
        raise DataError(f"the models give logits {a.shape} and {b.shape}; compare models with the same classes")


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
