"""Language models of qjax in EleutherAI's lm-evaluation-harness (``pip install 'qjax[lm-eval]'``).

    from qjax.interop.lm_eval import evaluate
    print(evaluate("books-6m-W4A16", ["words_in_sentences"], include_path="examples/lm_eval_task")["results"])

or the harness's own command line, in which this module has made the model ``qjax`` known:

    python -m qjax.interop.lm_eval run --model qjax --model_args folder=books-6m-W4A16 --batch_size auto \
        --include_path examples/lm_eval_task --tasks words_in_sentences

What is scored is what the harness's own Hugging Face model scores: the same tokens, the same windows, truncated from
the left at the same place. Requests are padded on the right, where a causal model cannot see the padding, to lengths
16, 32, 64, …, and every batch of a length has the same number of rows, so each length is compiled once. A model whose
activations share one dynamic scale per tensor does see the padding and the other rows of its batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
        simple_parse_args_string,
    )
except ImportError as error:
    raise ImportError(
        f"qjax.interop.lm_eval needs the lm-evaluation-harness ({error}); pip install 'qjax[lm-eval]'"
    ) from error

from qjax.errors import DataError, ModelError
from qjax.evaluate import track
from qjax.folders import load_folder
from qjax.interop.rows import batches, pieces
from qjax.models import tokenizer as read_tokenizer

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Settings that say nothing new once the likeliest token is taken, whatever their value.
_ONLY_FOR_SAMPLING = ("top_p", "top_k", "min_p", "seed")


class QjaxLM(TemplateLM):
    """A causal language model, float or quantized, as the harness sees it.

    Args:
        fn: ``fn(params, tokens) -> logits``, int32 [B, T] to float [B, T, vocabulary]; a `qjax.Model` or a function.
        params: its parameters, any pytree.
        tokenizer: with ``encode(text, special=)``, ``decode(ids)``, ``bos_id`` and ``eos_id``, as
            `qjax.models.tokenizer` gives it.
        base: the float model with ``config``, ``prefill``, ``decode_step`` and ``init_cache``, as `qjax.models.load`
            gives it; None takes ``fn`` where that is one. Without it there is no ``generate_until``.
        max_length: most tokens read at once; None takes ``base.config.max_position_embeddings``.
        batch_size: rows of a batch; None or "auto" takes as many as are fast on the platform.
        add_bos_token: begin each text with the beginning-of-text token; None does what the tokenizer does by default.
        max_gen_toks: new tokens of a request that does not say how many.
        info: further facts for the ``config`` of the results.

    Raises:
        ModelError: no limit of length is known, or a setting is out of range.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Any,
        tokenizer: Any,
        *,
        base: Any = None,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        add_bos_token: bool | None = None,
        max_gen_toks: int = 256,
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.fn, self.params, self._tokenizer = fn, params, tokenizer
        self.base: Any = fn if base is None and hasattr(fn, "prefill") else base
        self.config = getattr(self.base, "config", None)
        self.max_length = int(max_length or getattr(self.config, "max_position_embeddings", 0))
        if self.max_length < 2:
            raise ModelError(f"max_length is {self.max_length}; give the most tokens that the model reads, at least 2")
        self.batch_size = _batch_size(batch_size)
        self.add_bos_token, self.max_gen_toks, self._info = add_bos_token, int(max_gen_toks), info or {}
        shape = jax.eval_shape(fn, params, jax.ShapeDtypeStruct((1, 2), jnp.int32)).shape
        if len(shape) != 3 or shape[:2] != (1, 2):
            raise ModelError(f"a language model takes tokens [1, 2] to logits [1, 2, vocabulary], this one to {shape}")
        self.vocab_size = shape[2]
        self._score = jax.jit(functools.partial(_scored, fn))

    @classmethod
    def from_folder(cls, folder: str | Path, **settings: Any) -> QjaxLM:
        """The model of a Hugging Face folder, or of one that ``qjax quantize`` wrote.

        Args:
            folder: the folder, with its tokenizer.
            **settings: ``max_length``, ``batch_size``, ``add_bos_token`` and ``max_gen_toks`` as for the class.

        Raises:
            ModelError, CheckpointError: a folder that is incomplete, damaged, or no language model's.
        """
        loaded = load_folder(Path(folder))
        if not loaded.is_language_model:
            raise ModelError(f"{folder} holds a model of kind {loaded.kind!r}; the harness needs a language model")
        info = {"model_name": loaded.name, "recipe": (loaded.manifest or {}).get("recipe", "float")}
        return cls(loaded.fn, loaded.params, read_tokenizer(folder), base=loaded.base, info=info, **settings)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> QjaxLM:
        """The model that the harness's ``--model_args folder=…,max_length=…`` ask for.

        Raises:
            ModelError: no folder, or an argument that there is not. ``--device`` is left to ``JAX_PLATFORMS``.
        """
        # The harness's device names are torch's and always given, and there is no search for a batch size to bound.
        dropped = ("device", "max_batch_size")
        given = {k: v for k, v in (additional_config or {}).items() if v is not None and k not in dropped}
        settings = {**given, **arg_dict}
        folder = settings.pop("folder", None)
        known = ("max_length", "batch_size", "add_bos_token", "max_gen_toks")
        if folder is None or not set(settings) <= set(known):
            raise ModelError(f"model_args are folder=DIR and, as you like, {', '.join(known)}; given were {arg_dict}")
        return cls.from_folder(str(folder), **settings)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> QjaxLM:
        """As `create_from_arg_obj`, from ``"folder=…,max_length=…"``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # -- tokens --------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            ModelError: the model has none.
        """
        return next(iter(self._ends())) if self._ends() else self._lacks("end")

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text that has no context: the token that begins a text, else the one that ends it.

        Raises:
            ModelError: the tokenizer has neither.
        """
        if self._tokenizer.bos_id is not None:
            return self._tokenizer.bos_id
        return self._tokenizer.eos_id if self._tokenizer.eos_id is not None else self._lacks("begin or end")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; a text that is written with the beginning-of-text token does not get another one."""
        special = add_special_tokens if add_special_tokens is not None else self.add_bos_token
        bos = self._tokenizer.bos_id
        if add_special_tokens is None and bos is not None:
            begins = string.startswith(self._tokenizer.decode([bos], special=True) or "\0")
            special = False if begins else special
        return list(self._tokenizer.encode(string, special=special is not False))

    def _ends(self) -> tuple[int, ...]:
        """Tokens that end a text, the tokenizer's first."""
        named = getattr(self.config, "eos_token_id", None)
        ends = (self._tokenizer.eos_id, *(named if isinstance(named, tuple | list) else (named,)))
        return tuple(dict.fromkeys(e for e in ends if e is not None))

    def _lacks(self, what: str) -> int:
        raise ModelError(f"this tokenizer has no token to {what} a text; name it in tokenizer_config.json")

    # -- log-likelihoods -----------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any) -> list[Any]:
        """Log-likelihood in nats and whether it is greedy, for each (text, ids of the context, ids to score).

        Raises:
            DataError: nothing to score, more than the model reads at once, or ids that the model does not know.
        """
        rows = [self._row(*request) for request in requests]
        found: list[Any] = [None] * len(rows)
        padded = list(batches(rows, self.max_length, self.vocab_size, self.batch_size))
        for members, inputs, targets in track(padded, "scoring requests", show=False if disable_tqdm else None):
            values, greedy = (np.asarray(x) for x in self._score(self.params, inputs, targets))
            for i, k in enumerate(members):
                end = len(rows[k]) - 1
                scored = slice(end - len(requests[k][2]), end)
                found[k] = float(values[i, scored].sum(dtype=np.float64)), bool(greedy[i, scored].all())
                if requests[k][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[k][0], found[k])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts, in windows of the model's length that score each token once.

        As in the harness's own model, a tokenizer that begins a text by itself has its beginning-of-text token scored
        behind the prefix token; ``add_bos_token=False`` leaves that out.
        """
        windows = [self._windows(*request.args) for request in requests]
        flat = [(None, *window) for of_one in windows for window in of_one]
        scores = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
        totals = []
        for request, of_one in zip(requests, windows, strict=True):
            totals.append(sum(next(scores)[0] for _ in of_one))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        rolled = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        return [make_disjoint_window(window) for window in rolled]

    def _row(self, texts: tuple[str, str] | None, context: list[int], wanted: list[int]) -> list[int]:
        """Tokens of a request, cut from the left to one more than the model reads: the last one is only predicted."""
        if not context or not wanted or len(wanted) > self.max_length:
            raise DataError(
                f"the request {_short(texts)} has {len(context)} tokens of context and {len(wanted)} to score; there "
                f"must be one of each, and at most {self.max_length} to score, which is what the model reads"
            )
        row = (context + wanted)[-(self.max_length + 1) :]
        if max(row) >= self.vocab_size:
            raise DataError(
                f"the request {_short(texts)} holds token id {max(row)} and the model knows {self.vocab_size} tokens; "
                "use the tokenizer of this model"
            )
        return row

    # -- generation ----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, one request at a time, up to the first stop text, end of text or ``max_gen_toks``.

        Raises:
            ModelError: the model was given without ``base``.
            DataError: a request for sampling, beams or another thing than greedy text, or without room for its context.
        """
        if self.base is None:
            raise ModelError("generate_until needs a cache; give base=, the model as qjax.models.load returns it")
        texts = []
        for request in track(list(requests), "generating", show=False if disable_tqdm else None):
            until, count = self._wanted(request)
            texts.append(self._continue(request, until, count))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _wanted(self, request: Any) -> tuple[list[str], int]:
        """Stop texts and number of new tokens of a request."""
        settings = dict(request.args[1])
        until = settings.pop("until", None) or []
        lengths = [settings.pop(name, None) for name in _LENGTH_NAMES]
        count = int(next((n for n in lengths if n is not None), self.max_gen_toks))
        sampled = settings.pop("do_sample", None)
        temperature = settings.pop("temperature", None) or 0
        if sampled or (sampled is None and temperature):
            raise DataError(f"{_named(request)} asks for sampling ({request.args[1]}); only greedy text is made here")
        left = {k: v for k, v in settings.items() if k not in _ONLY_FOR_SAMPLING and (k, v) != ("num_beams", 1)}
        if left:
            raise DataError(f"{_named(request)} sets {left}, which is not known; use until, max_gen_toks and do_sample")
        if not 0 < count < self.max_length:
            raise DataError(
                f"{_named(request)} asks for {count} new tokens, but the model reads {self.max_length} with the "
                "context; set max_gen_toks to less"
            )
        return [until] if isinstance(until, str) else list(until), count

    def _continue(self, request: Any, until: list[str], count: int) -> str:
        ids = self.tok_encode(request.args[0])[-(self.max_length - count) :]
        if not ids:
            raise DataError(f"{_named(request)} has an empty context, and this tokenizer begins texts with no token")
        prefill, step, ends = *self._cached, self._ends()
        cache = self.base.init_cache(1, self.max_length)
        logits: Any = None
        for piece in pieces(ids):
            logits, cache = prefill(self.params, jnp.asarray([piece], jnp.int32), cache)
            logits = logits[:, -1]
        new: list[int] = []
        text = ""
        while True:
            token = int(jnp.argmax(logits, axis=-1)[0])
            if token in ends:
                return text
            new.append(token)
            text = self._tokenizer.decode(new)
            places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
            if places:
                return text[: min(places)]
            if len(new) == count:
                return text
            logits, cache = step(self.params, jnp.asarray([token], jnp.int32), cache)

    @functools.cached_property
    def _cached(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        bind = getattr(self.fn, "bind", lambda fn: fn)
        return jax.jit(bind(self.base.prefill)), jax.jit(bind(self.base.decode_step), donate_argnums=(2,))

    # -- what the harness asks besides ---------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return f"qjax-{self._info.get('model_name', type(self._tokenizer).__name__)}-{self.vocab_size}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """There are none here.

        Raises:
            ModelError: always.
        """
        raise ModelError("qjax reads no chat templates; evaluate without apply_chat_template")

    def get_model_info(self) -> dict[str, Any]:
        """Facts for the ``config`` of the results."""
        return {"max_length": self.max_length, **self._info}


register_model("qjax")(QjaxLM)


def evaluate(
    model: QjaxLM | str | Path,
    tasks: Sequence[str | Path],
    *,
    include_path: str | Path | None = None,
    only_included: bool | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Run tasks of the harness on a model.

    Args:
        model: a folder, or a `QjaxLM`.
        tasks: names of tasks, or paths of their YAML files.
        include_path: a folder with tasks of your own. Only the data that a task names is read: a task whose data is
            local needs no network.
        only_included: leave the harness's own tasks out, whose listing takes seconds; None does so where
            ``include_path`` is given.
        **settings: of ``lm_eval.simple_evaluate``, such as ``limit``, ``num_fewshot`` and ``bootstrap_iters``.

    Returns:
        The harness's results: ``["results"][task]["acc,none"]`` and so on, ``["samples"]`` with each request's score.

    Raises:
        ModelError, CheckpointError: a folder that cannot be loaded, or holds no language model.
        DataError: no task, or a request that the model cannot answer.
    """
    if not tasks:
        raise DataError("there is no task; name at least one")
    lm = model if isinstance(model, QjaxLM) else QjaxLM.from_folder(model)
    alone = include_path is not None if only_included is None else only_included
    manager = TaskManager(include_path=None if include_path is None else str(include_path), include_defaults=not alone)
    run: Any = simple_evaluate
    results = run(model=lm, tasks=[str(t) for t in tasks], task_manager=manager, **settings)
    return {} if results is None else dict(results)


def main() -> None:
    """The harness's command line, with the model ``qjax`` known to it."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()


def _scored(fn: Callable[..., Any], params: Any, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, float32 [B, T], and whether it is the likeliest token, bool [B, T]."""
    logits = fn(params, tokens).astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets


def _batch_size(given: int | str | None) -> int | None:
    text = str(given)
    if given is None or text.startswith("auto"):
        return None
    if not text.isdigit() or int(text) < 1:
        raise ModelError(f"batch_size is {given!r}; give a positive number, or 'auto'")
    return int(text)


def _short(texts: tuple[str, str] | None) -> str:
    return (
        "for a window of a text" if texts is None else repr(tuple(f"…{t[-60:]}" if len(t) > 60 else t for t in texts))
    )


def _named(request: Any) -> str:
    return f"request {request.doc_id} of task {request.task_name!r}"


if __name__ == "__main__":
    main()
