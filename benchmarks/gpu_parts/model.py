"""Whole models through the rewritten graph: a Llama of random weights, quantized leaf by leaf, checked and timed.

Not a part of ``python -m benchmarks.gpu`` (it compiles for minutes) but of ``python -m benchmarks.gpu_model``.

A leaf is drawn on the device in bfloat16, rounded and packed before the next one is drawn, so that neither host nor
device holds the float model beside the packed one. What is timed is what a user calls: `qjax.quantize`, `pack_tree`
and `Model.bind`, jitted with the cache donated. A decode step is one of greedy generation: the token that it finds is
given to the next one, and the host waits at the end alone.

The model is one with fused projections (q, k and v, and gate and up), as inference engines have them: XLA merges those
of the float model by itself, and cannot merge kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax import ops
from qjax.formats import DualGrained, Int, QArray
from qjax.kernels.devices import cuda_capability
from qjax.models import LanguageModel, LlamaConfig
from qjax.transforms import Rewritten

SIZES: dict[str, LlamaConfig] = {
    "8B": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, rope_theta=5e5),
    "1B": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 8192, rope_theta=5e5),
    "tiny": LlamaConfig(512, 256, 512, 3, 4, 2, 64, 512),
}
"""Llama-3-8B; Llama-3.2-1B with a head of its own; one to try the command with."""

TOKEN = qjax.dynamic(Int(8, per="token"))
HEAD = qjax.Rule("lm_head/**", weights=Int(8))


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a model is quantized, and for which kernel its layers are packed (None: they stay in neutral order).

    Attributes:
        layers: the rule of the layers; the head is int8 with 16-bit activations in all of them.
        target: of `qjax.ops.pack_tree`.
        close: largest difference from the oracle, as a share of the norm of the logits. One bfloat16 rounding moves a
            number by 0.2 %, and where activations are rounded to 8 bits it may move them by a whole step.
    """

    layers: qjax.Rule
    target: str | None
    close: float

    @property
    def recipe(self) -> qjax.Recipe:
        """Layers and head; embeddings and norms stay in float."""
        return qjax.Recipe([self.layers, HEAD])


SCHEMES: dict[str, Scheme] = {
    "W4A16": Scheme(qjax.Rule("layers/**", weights=Int(4, group=128)), "mosaic", 0.02),
    "W8A8": Scheme(qjax.Rule("layers/**", weights=Int(8), inputs=TOKEN), None, 0.05),
    "W4A8": Scheme(qjax.Rule("layers/**", weights=DualGrained(group=128), inputs=TOKEN), "mosaic_int8", 0.05),
}
"""int4 g128; int8 with int8 activations; dual-grained (DGQ) with int8 activations."""

OPTIONS: dict[str, dict[str, str]] = {
    "": {},
    "concurrent graphs": {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"},
    "no graphs": {"xla_gpu_enable_command_buffer": ""},
}
"""Options of XLA by name. Graphs are its default; in concurrent ones, kernels that need not wait may overlap."""


@functools.partial(jax.jit, static_argnums=(0, 2))
def _drawn(shape: tuple[int, ...], seed: Any, dtype: Any) -> Any:
    wide = jax.random.normal(jax.random.key(seed), shape) / np.sqrt(shape[-2])
    return wide.astype(dtype)


def parameters(fn: LanguageModel, lazily: bool, dtype: Any = jnp.bfloat16) -> Any:
    """Random parameters on the device; lazily: drawn when they are read, the same numbers.

    Projections keep the variance of what they are given, so that logits mean something; norms are ones.
    """
    first = 0

    def leaf(path: Any, a: jax.ShapeDtypeStruct) -> Any:
        nonlocal first
        begin, name = first, jax.tree_util.keystr(path, simple=True, separator="/")
        stack = fn.config.num_hidden_layers if fn.scan_layers and name.startswith("layers/") else 0
        first += max(stack, 1)
        if name.endswith("/scale"):
            return jnp.ones(a.shape, a.dtype)
        if not stack:
            whole, one = lambda: _drawn(a.shape, begin, a.dtype), None
        else:
            one = lambda i: _drawn(a.shape[1:], begin + i, dtype)  # noqa: E731
            whole = lambda: jnp.stack([one(i) for i in range(stack)])  # noqa: E731
        return qjax.Lazy(a.shape, a.dtype, whole, one) if lazily else whole()

    return jax.tree_util.tree_map_with_path(leaf, fn.abstract_params(dtype))


def quantized(fn: LanguageModel, scheme: Scheme) -> qjax.Model:
    """The model, its weights in neutral order."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    return qjax.quantize(fn, parameters(fn, lazily=True), tokens, recipe=scheme.recipe)


def packed(params: Any, scheme: Scheme) -> Any:
    """The same parameters in the orders of the kernels."""
    layers = ops.pack_tree(params["layers"], scheme.target) if scheme.target else params["layers"]
    return {**params, "layers": layers, "lm_head": ops.pack_tree(params["lm_head"])}


def nbytes(params: Any) -> int:
    """Bytes that a step reads: all parameters but the embedding, of which it reads a few rows."""
    leaves = jax.tree.leaves({k: v for k, v in params.items() if k != "embed"}, is_leaf=_is_weight)
    return sum(leaf.nbytes for leaf in leaves)


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, QArray)


# Whether it is right.


def cut(fn: LanguageModel, params: Any, layers: int) -> tuple[LanguageModel, Any]:
    """The first layers of a model, with its embedding and head."""
    config = dataclasses.replace(fn.config, num_hidden_layers=layers)
    take = (lambda a: jax.tree.map(lambda b: b[:layers], a)) if fn.scan_layers else lambda a: a[:layers]
    return dataclasses.replace(fn, config=config), {**params, "layers": take(params["layers"])}


def checks(fn: LanguageModel, model: qjax.Model, scheme: Scheme, batch: int = 3) -> list[dict[str, Any]]:
    """Logits of the packed model beside those of the oracle on the same codes: a prefill and the step behind it.

    Of two layers, which have all shapes: more would only add roundings of activations between them.
    """
    small, params = cut(fn, model.params, 2)
    ours, tokens = packed(params, scheme), jax.random.randint(jax.random.key(1), (batch, 17), 0, fn.config.vocab_size)
    results = []
    for given, how in ((ours, None), (params, "reference")):
        prefill, step = (
            jax.jit(Rewritten(f, model.recipe, implementation=how)) for f in (small.prefill, small.decode_step)
        )
        cache = small.init_cache(batch, 32, jnp.bfloat16)
        first, cache = prefill(given, tokens[:, :16], cache)
        results.append((first, step(given, tokens[:, 16], cache)[0]))
    rows = []
    for case, got, want in zip(("prefill", "decode"), *results, strict=True):
        got, want = (np.asarray(a, np.float64) for a in (got, want))
        error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        same = float(np.mean(got.argmax(-1) == want.argmax(-1)))
        rows.append({"case": case, "error": error, "same_first": same, "right": bool(error < scheme.close)})
    return rows


def taken(decode: Callable[..., Any], params: Any, tokens: Any, cache: Any) -> tuple[ops.Taken, ...]:
    """Which lowering each product takes on the GPU at hand, or on an H200 where there is none."""
    if cuda_capability() is not None:
        return ops.lowerings(decode, params, tokens, cache)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return ops.lowerings(decode, params, tokens, cache)


# How long it takes.


def greedy(decode: Callable[..., Any]) -> Callable[..., Any]:
    """A step that gives the next tokens in place of logits."""

    def step(params: Any, tokens: Any, cache: Any) -> Any:
        logits, cache = decode(params, tokens, cache)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    return step


def compiled(function: Callable[..., Any], params: Any, *args: Any, donate: Any = (), options: Any = None) -> Any:
    """A program of the leaves of the parameters, which are told apart once and not at each call; and its seconds."""
    leaves, tree = jax.tree.flatten(params)
    flat = jax.jit(lambda leaves, *args: function(jax.tree.unflatten(tree, leaves), *args), donate_argnums=donate)
    begun = time.perf_counter()
    program = flat.lower(leaves, *args).compile(compiler_options=options or None)
    return functools.partial(program, leaves), time.perf_counter() - begun


def decode_times(
    fn: LanguageModel,
    decode: Callable[..., Any],
    params: Any,
    batch: int,
    context: int,
    options: dict[str, str],
    steps: int = 24,
    trials: int = 5,
) -> dict[str, float]:
    """Milliseconds of a greedy step, the median of trials of many steps; how long the host takes to hand it over.

    Returns:
        ``ms``; ``host_ms``, which has to be less than that, or the host is what is timed; ``compile_s``;
        ``cache_bytes``, which a step reads whole.
    """
    cache = fn.init_cache(batch, context, jnp.bfloat16)
    kept = sum(a.nbytes for a in jax.tree.leaves(cache["layers"]))
    cache["length"] = jnp.int32(max(context - steps * (trials + 1), 0))
    tokens = jnp.zeros(batch, jnp.int32)
    # What is donated comes back at the same addresses, so that a CUDA graph stays as it was recorded.
    run, seconds = compiled(greedy(decode), params, tokens, cache, donate=(1, 2), options=options)
    times, handed = [], []
    for _ in range(trials + 1):  # the first warms up
        jax.block_until_ready((tokens, cache))
        begun = time.perf_counter()
        for _ in range(steps):
            tokens, cache = run(tokens, cache)
        handed.append((time.perf_counter() - begun) / steps * 1e3)
        jax.block_until_ready((tokens, cache))
        times.append((time.perf_counter() - begun) / steps * 1e3)
    ms, host = statistics.median(times[1:]), statistics.median(handed[1:])
    return {"ms": ms, "host_ms": host, "compile_s": seconds, "cache_bytes": kept}


def prefill_times(
    fn: LanguageModel, prefill: Callable[..., Any], params: Any, length: int, trials: int = 5
) -> dict[str, float]:
    """Milliseconds of reading a prompt into an empty cache, the median, with the logits of all its tokens."""
    tokens = jax.random.randint(jax.random.key(2), (1, length), 0, fn.config.vocab_size)
    cache = fn.init_cache(1, length, jnp.bfloat16)
    run, seconds = compiled(prefill, params, tokens, cache)
    times = []
    for _ in range(trials + 1):
        begun = time.perf_counter()
        jax.block_until_ready(run(tokens, cache))
        times.append((time.perf_counter() - begun) * 1e3)
    return {"ms": statistics.median(times[1:]), "compile_s": seconds}
