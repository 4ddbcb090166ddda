"""Tasks: what a model is scored on, unit by unit, beside the float model that it came from.

``perplexity``, ``divergence`` and ``accuracy`` sum up what they find. A comparison of many quantized models wants the
single units (tokens, images, pairs of sentences) too, because only they give standard errors and paired tests
(`qjax.evaluate.paired`), and wants the float model to run once and not once for each.

    reference = TextTask("books", blocks).reference(fn, params)     # the float outputs, kept where they fit
    units = reference.units(model, model.params)                    # {"nll": [n], "kl": [n], "agreement": [n], ...}

Every array of units has the same order for every model; ``cluster`` numbers the pieces that units belong to.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import DataError
from qjax.evaluate.language import _compared, _compared_text, _logits_of, _nll, _tokens_per_batch
from qjax.evaluate.paired import Estimate, estimate
from qjax.evaluate.progress import track
from qjax.evaluate.text import TextBlocks
from qjax.report.data import recovery

KEPT_BYTES = 2**30
"""Float outputs of a task are kept in memory up to this size, and computed again for each model beyond it."""

Units = dict[str, np.ndarray]


class Task(Protocol):
    """What a study scores models on.

    Attributes:
        name: for tables.
        score: the metric that recovery is taken of; "" where the task has none.
        metrics: the arrays of units that are figures, the most sensitive first.
        unit: what is counted, in the plural.
    """

    @property
    def name(self) -> str: ...
    @property
    def score(self) -> str: ...
    @property
    def metrics(self) -> tuple[str, ...]: ...
    @property
    def unit(self) -> str: ...

    def digest(self) -> str:
        """SHA-256 over everything that is scored."""
        ...

    def example(self) -> tuple[Any, ...]:
        """Abstract arguments of the model."""
        ...

    def reference(self, fn: Callable[..., Any], params: Any) -> Reference:
        """The float model on this task, to compare others with."""
        ...


@dataclass(eq=False)
class Reference:
    """The float model on a task.

    Args:
        batches: inputs; the same objects each time.
        run: ``run(fn, params, batch) -> outputs`` of a batch.
        compare: ``compare(float outputs, outputs, batch) -> units`` of a batch.
        fn, params: the float model.
        bytes_of_outputs: what all float outputs together would take.
    """

    batches: Sequence[Any]
    run: Callable[[Callable[..., Any], Any, Any], Any]
    compare: Callable[[Any, Any, Any], Units]
    fn: Callable[..., Any]
    params: Any
    bytes_of_outputs: int

    def __post_init__(self) -> None:
        self._kept: dict[int, Any] = {}

    def units(self, fn: Callable[..., Any] | None = None, params: Any = None, *, show: bool | None = None) -> Units:
        """Score a model; without one, the float model itself.

        Args:
            fn: the quantized model ``fn(params, *inputs)``.
            params: its parameters.
            show: progress bar on stderr; None: where that is a terminal.
        """
        parts: list[Units] = []
        clusters = 0
        for number, batch in enumerate(track(self.batches, "comparing models", show=show)):
            before = self._float(number, batch)
            after = before if fn is None else self.run(fn, params, batch)
            found = self.compare(before, after, batch)
            found["cluster"] = found["cluster"] + clusters
            clusters = int(found["cluster"].max(initial=clusters - 1)) + 1
            parts.append(found)
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _float(self, number: int, batch: Any) -> Any:
        if number in self._kept:
            return self._kept[number]
        found = self.run(self.fn, self.params, batch)
        if self.bytes_of_outputs <= KEPT_BYTES:
            self._kept[number] = found
        return found


@dataclass(frozen=True)
class TextTask:
    """A text for a causal language model ``fn(params, tokens) -> logits``.

    Units are the scored tokens: ``nll`` and ``kl`` in nats, ``agreement`` (the same first choice); clusters the blocks.

    Args:
        name: for tables.
        blocks: as `qjax.evaluate.text_blocks` cuts them.
    """

    name: str
    blocks: TextBlocks

    score = "perplexity"
    metrics = ("kl", "agreement", "nll")
    unit = "tokens"

    def digest(self) -> str:
        """SHA-256 over the blocks."""
        return _digest([self.blocks.protocol, self.blocks.context, *self.blocks.blocks])

    def example(self) -> tuple[Any, ...]:
        """Sixteen tokens."""
        return (jax.ShapeDtypeStruct((1, 16), jnp.int32),)

    def reference(self, fn: Callable[..., Any], params: Any) -> Reference:
        """The float model on the text."""
        limit = max(1, _tokens_per_batch(fn, params, self.blocks) // 2)
        batches = self.blocks.batches(limit)
        classes = jax.eval_shape(fn, params, *self.example()).shape[-1]
        size = 4 * classes * sum(b.inputs.size for b in batches)
        return Reference(batches, lambda f, p, b: _logits_of(f)(p, b.inputs), _text_units, fn, params, size)


def _text_units(before: Any, after: Any, batch: Any) -> Units:
    if before.shape != after.shape:
        raise DataError(f"the models give logits {before.shape} and {after.shape}; compare models of one vocabulary")
    kl, same, _, nll = (np.asarray(x)[batch.mask] for x in _compared_text(before, after, batch.targets))
    row = np.broadcast_to(np.arange(len(batch.mask))[:, None], batch.mask.shape)[batch.mask]
    return {"kl": kl, "agreement": same, "nll": nll, "cluster": row.astype(np.int32)}


@dataclass(frozen=True, eq=False)
class ImageTask:
    """Labelled images for a classifier ``fn(params, images) -> logits``.

    Units are the images: ``correct``, ``nll`` and ``kl`` in nats, ``agreement``; each is a cluster of its own.

    Args:
        name: for tables.
        images: prepared, float32 [N, H, W, C].
        labels: integers [N].
        batch_size: images at a time; the last batch is padded, so one shape is compiled.
    """

    name: str
    images: Any
    labels: Any
    batch_size: int = 50

    score = "top1"
    metrics = ("kl", "agreement", "correct", "nll")
    unit = "images"

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or not len(self.labels):
            raise DataError(f"{len(self.images)} images and {len(self.labels)} labels; give one label for each image")

    def digest(self) -> str:
        """SHA-256 over pixels and labels."""
        return _digest([np.asarray(self.images), np.asarray(self.labels)])

    def example(self) -> tuple[Any, ...]:
        """One image."""
        return (jax.ShapeDtypeStruct((1, *np.shape(self.images)[1:]), jnp.float32),)

    def reference(self, fn: Callable[..., Any], params: Any) -> Reference:
        """The float model on the images."""
        size = min(self.batch_size, len(self.labels))
        batches = []
        for start in range(0, len(self.labels), size):
            x, y = np.asarray(self.images[start : start + size]), np.asarray(self.labels[start : start + size])
            pad = size - len(y)
            x = np.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1), mode="edge") if pad else x
            batches.append((x, y))
        classes = jax.eval_shape(fn, params, *self.example()).shape[-1]
        if np.max(self.labels) >= classes or np.min(self.labels) < 0:
            raise DataError(f"labels reach to {np.max(self.labels)}, but the model has {classes} classes")
        run = lambda f, p, b: _logits_of(f)(p, b[0])[: len(b[1])]  # noqa: E731
        return Reference(batches, run, _image_units, fn, params, 4 * classes * len(self.labels))


def _image_units(before: Any, after: Any, batch: Any) -> Units:
    labels = jnp.asarray(batch[1], jnp.int32)
    kl, same = (np.asarray(x) for x in _compared(before, after))
    after = jnp.asarray(after, jnp.float32)
    right = (jnp.argmax(after, axis=-1) == labels) & ~jnp.isnan(after).any(axis=-1)
    nll = np.asarray(_nll(after, labels))
    number = np.arange(len(labels), dtype=np.int32)
    return {"kl": kl, "agreement": same, "correct": np.asarray(right), "nll": nll, "cluster": number}


@dataclass(frozen=True, eq=False)
class SentenceTask:
    """Pairs of sentences for a text encoder ``fn(params, tokens, mask) -> hidden states [B, T, D]``.

    Units are the pairs: ``cosine_drift``, how far the cosine of the two sentence vectors moves; ``output_error``, the
    squared error of the hidden states over their squared size, both sentences together. There is no right answer, so
    no score.

    Args:
        name: for tables.
        pairs: ids of the two sentences of each pair, special tokens included.
        pad: id that shorter sentences are filled up with.
        batch_size: pairs at a time.
    """

    name: str
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    pad: int = 0
    batch_size: int = 32

    score = ""
    metrics = ("output_error", "cosine_drift")
    unit = "pairs of sentences"

    def digest(self) -> str:
        """SHA-256 over the pairs."""
        return _digest([np.asarray(ids, np.int32) for pair in self.pairs for ids in pair])

    def example(self) -> tuple[Any, ...]:
        """Sixteen tokens and their mask."""
        return jax.ShapeDtypeStruct((1, 16), jnp.int32), jax.ShapeDtypeStruct((1, 16), bool)

    def reference(self, fn: Callable[..., Any], params: Any) -> Reference:
        """The float encoder on the sentences."""
        batches = list(self._batches())
        width = jax.eval_shape(fn, params, *self.example()).shape[-1]
        size = 4 * width * sum(tokens.size for tokens, _, _ in batches)
        return Reference(batches, lambda f, p, b: _encoded(f)(p, *b[:2]), _sentence_units, fn, params, size)

    def _batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """First sentences and behind them second ones, padded to a multiple of 32 (few shapes are compiled); the mask;
        how many of the pairs count, since the last batch is filled up.
        """
        order = sorted(range(len(self.pairs)), key=lambda i: max(map(len, self.pairs[i])))
        for start in range(0, len(order), self.batch_size):
            pairs = [self.pairs[i] for i in order[start : start + self.batch_size]]
            count = len(pairs)
            pairs += [pairs[-1]] * (self.batch_size - count)
            rows = [p[0] for p in pairs] + [p[1] for p in pairs]
            length = 32 * math.ceil(max(map(len, rows)) / 32)
            tokens = np.full((len(rows), length), self.pad, np.int32)
            mask = np.zeros(tokens.shape, bool)
            for row, (ids, seen) in enumerate(zip(rows, mask, strict=True)):
                tokens[row, : len(ids)] = ids
                seen[: len(ids)] = True
            yield tokens, mask, count


@functools.lru_cache(maxsize=8)
def _encoded(fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(lambda params, tokens, mask: fn(params, tokens, mask))


@jax.jit
def _compared_sentences(before: jax.Array, after: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    seen = mask[..., None].astype(jnp.float32)

    def cosines(hidden: jax.Array) -> jax.Array:
        mean = jnp.sum(hidden * seen, axis=1) / jnp.sum(seen, axis=1)
        unit = mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
        first, second = jnp.split(unit, 2)
        return jnp.sum(first * second, axis=-1)

    drift = jnp.abs(cosines(after) - cosines(before))
    error, whole = (jnp.sum(jnp.square(x * seen), axis=(1, 2)) for x in (after - before, before))
    both = lambda x: jnp.sum(x.reshape(2, -1), axis=0)  # noqa: E731
    return drift, both(error) / both(whole)


def _sentence_units(before: Any, after: Any, batch: Any) -> Units:
    drift, error = (np.asarray(x)[: batch[2]] for x in _compared_sentences(before, after, batch[1]))
    return {"output_error": error, "cosine_drift": drift, "cluster": np.arange(len(drift), dtype=np.int32)}


def summary(task: Task, units: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """Means with standard errors of a task's metrics, and of its score.

    Perplexity is exp(mean nll) and its error that of the nll times the perplexity (the delta method); ``top1`` is the
    mean of ``correct``.
    """
    cluster = units.get("cluster")
    found = {key: estimate(units[key], cluster) for key in task.metrics}
    if task.score == "perplexity":
        nll = found["nll"]
        value = math.exp(nll.mean) if nll.mean < 700 else math.inf if nll.mean >= 700 else math.nan
        found["perplexity"] = Estimate(value, value * nll.stderr, nll.count, nll.clusters)
    elif task.score == "top1":
        found["top1"] = found.pop("correct")
    return found


def task_recovery(task: Task, units: Mapping[str, np.ndarray], of_float: Mapping[str, np.ndarray]) -> Estimate | None:
    """Percent of the float model's score that is kept; None for a task without a score.

    The error is that of the ratio, from both models on the same units: far smaller than the two scores' own.
    """
    cluster = units.get("cluster")
    if task.score == "perplexity":  # 100 exp(mean of float nll - nll)
        gap = estimate(of_float["nll"].astype(np.float64) - units["nll"], cluster)
        kept = 100 * math.exp(gap.mean) if gap.mean < 700 else math.nan
        return Estimate(kept, kept * gap.stderr, gap.count, gap.clusters)
    if task.score == "top1":
        a, b = (x["correct"].astype(np.float64) for x in (units, of_float))
        kept = recovery(a.mean(), b.mean())
        if math.isnan(kept):
            return Estimate(math.nan, math.nan, len(a), len(a))
        ratio = estimate((100 * a - kept * b) / b.mean(), cluster)  # linearised: its mean is 0, its error the ratio's
        return Estimate(kept, ratio.stderr, ratio.count, ratio.clusters)
    return None


def _digest(items: Sequence[Any]) -> str:
    total = hashlib.sha256()
    for item in items:
        if isinstance(item, np.ndarray):
            total.update(f"{item.dtype}{item.shape}".encode())
            total.update(np.ascontiguousarray(item).tobytes())
        else:
            total.update(repr(item).encode())
    return total.hexdigest()
