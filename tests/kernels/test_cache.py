"""Quantized caches in the decoders: what is written is rounded once, and attention is over what was rounded."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import FormatError, LayoutError, ModelError
from qjax.formats import KV4, Int
from qjax.kernels.cpu import library
from qjax.models import LanguageModel, LlamaConfig
from qjax.models.decoder import OwnCache
from qjax.ops import KVCache, quantize_cache

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    windows=(None, 6),
)


INT8 = Int(8, per="token", scale="qmax")
"""With the scale "half" the largest number of a vector is 127.5 steps, between two codes: of two programs that agree
but for the last bit, one rounds it to -127 and one to -128."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("k", "v"), meta_fields=("fmt",))
@dataclasses.dataclass(frozen=True)
class Rounded:
    """A float cache that rounds what it is given, and attends by jax's own attention."""

    k: jax.Array
    v: jax.Array
    fmt: object

    @property
    def room(self):
        return self.k.shape[-2]

    def written(self, k, v, start, layer=None):
        def put(into, x):
            x = jnp.swapaxes(x, 1, 2)
            near = self.fmt.decode(self.fmt.encode(x, self.fmt.fit(x)), self.fmt.fit(x))
            return jax.lax.dynamic_update_slice(into, near[None], (layer, 0, 0, start, 0))

        return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))

    def attend(self, q, length, *, window, layer, scale):
        at = length - q.shape[1] + jnp.arange(q.shape[1])[:, None] - jnp.arange(self.room)
        k, v = (jnp.swapaxes(a[layer], 1, 2) for a in (self.k, self.v))
        return jax.nn.dot_product_attention(q, k, v, mask=((at >= 0) & (at < window))[None, None], scale=scale)


@pytest.mark.parametrize("fmt", [KV4(), pytest.param(INT8, marks=pytest.mark.slow)])
def test_decoding_is_over_rounded_keys_and_values(native, fmt):
    """A prompt and two steps, layers scanned, one of them with a window; the compiled kernel is in the program."""
    fn = LanguageModel(CONFIG, scan_layers=True)
    params, text = fn.init(), jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)), jnp.int32)
    empty = fn.init_cache(2, 16)
    cache = quantize_cache(empty, fmt, implementation="native")
    assert isinstance(cache["layers"], OwnCache) and cache["layers"].room == 16
    other = {**empty, "layers": Rounded(empty["layers"]["k"], empty["layers"]["v"], fmt)}
    prefill, step = jax.jit(fn.prefill), jax.jit(fn.decode_step)
    assert library.ATTENTION in step.lower(params, text[:, 0], cache).as_text()
    (got, cache), (want, other) = (prefill(params, text[:, :10], c) for c in (cache, other))
    np.testing.assert_allclose(got, want, atol=2e-5)
    for i in range(10, 12):
        (got, cache), (want, other) = (step(params, text[:, i], c) for c in (cache, other))
        np.testing.assert_allclose(got, want, atol=2e-5)
    held = cache["layers"].k.dequantize()[:, :, :, :12]
    np.testing.assert_allclose(held, other["layers"].k[:, :, :, :12], atol=1e-5)


@pytest.mark.slow
def test_a_quantized_model_with_a_quantized_cache(native):
    """Through `Model.bind`, by both lowerings."""
    fn = LanguageModel(CONFIG)
    params, prompt = fn.init(), jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32)
    model = qjax.quantize(fn, params, prompt, recipe="W8A16")
    prefill, step = model.bind(fn.prefill), model.bind(fn.decode_step)
    found = []
    for implementation in ("native", "reference"):
        cache = quantize_cache(fn.init_cache(1, 12), INT8, KV4(), implementation=implementation)
        _, cache = prefill(model.params, prompt, cache)
        found.append(step(model.params, jnp.asarray([9], jnp.int32), cache))
    (got, one), (want, other) = found
    jax.tree.map(np.testing.assert_array_equal, one["layers"][0].k.codes, other["layers"][0].k.codes)
    jax.tree.map(np.testing.assert_array_equal, one["layers"][0].v.codes, other["layers"][0].v.codes)
    np.testing.assert_allclose(got, want, atol=2e-5)
    out = qjax.models.generate(
        model.params, prompt, 4, prefill=prefill, decode_step=step, cache=quantize_cache(fn.init_cache(1, 12), KV4())
    )
    assert out.shape == (1, 9)


def test_which_lowering_and_how_much_room():
    """`lowerings` says it for each layer; generating with a cache that is too small is an error."""
    fn = LanguageModel(CONFIG)
    params, token = fn.abstract_params(), jax.ShapeDtypeStruct((1,), jnp.int32)
    cache = quantize_cache(fn.init_cache(1, 8), KV4())
    taken = qjax.ops.lowerings(fn.decode_step, params, token, cache)
    assert str(taken).splitlines() == [f"2/layers/{i}/k: reference" for i in range(2)]
    with pytest.raises(ModelError, match="room for 8 tokens"):
        fn.generate(params, np.asarray([[3, 1, 4, 1, 5]], np.int32), 6, cache=cache)


def test_what_cannot_be_a_cache():
    cache = LanguageModel(CONFIG).init_cache(1, 4)
    with pytest.raises(FormatError, match="shared by positions"):
        quantize_cache(cache, Int(8, per="tensor"))
    with pytest.raises(LayoutError, match="init_cache"):
        quantize_cache({"layers": []}, KV4())
    quantized = quantize_cache(cache, KV4())
    with pytest.raises(LayoutError, match="init_cache"):
        quantize_cache(quantized, KV4())
    layer = quantized["layers"][0]
    assert isinstance(layer, KVCache)
    with pytest.raises(LayoutError, match="layer=0"):
        layer.written(jnp.zeros((1, 1, 2, 8)), jnp.zeros((1, 1, 2, 8)), 0, layer=0)
