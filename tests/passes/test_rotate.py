"""Rotations folded into parameters: the float function stays on every family of decoders; what cannot be says so."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import models
from qjax.errors import FormatError
from qjax.formats.rotation import matrix, random_signs
from qjax.models import Gpt2Config, LanguageModel, LlamaConfig, MoeConfig
from qjax.passes import Rotate
from qjax.testing import check_pass

SIZES = {"vocab_size": 19, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
LLAMA = {"architectures": ["LlamaForCausalLM"], **SIZES, "head_dim": 8, "tie_word_embeddings": False}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    **SIZES,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
GPT2 = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 19, "n_embd": 16, "n_layer": 2, "n_head": 2}
GPT2 |= {"n_positions": 16, "tie_word_embeddings": False}
CONFIGS = {"llama": (LlamaConfig, LLAMA), "mixtral": (MoeConfig, MIXTRAL), "gpt2": (Gpt2Config, GPT2)}
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 10))


def decoder(name: str, scan: bool = False, **changes):
    cls, raw = CONFIGS[name]
    fn = LanguageModel(cls.from_hf({**raw, **changes}))
    noise = iter(jax.random.split(jax.random.key(1), 200))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), fn.init(0))
    if scan:
        fn, params = LanguageModel(fn.config, scan_layers=True), models.stack_layers(params)
    return fn, params


def notes_of(fn, params, step=None) -> str:
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8))], prepare=[step or Rotate()])
    return "\n".join(qjax.quantize(fn, params, TOKENS, recipe=recipe).report.notes)


@pytest.mark.every(5)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_function_stays(name, scan):
    """Logits to 1e-4, though every weight of the stream has become another."""
    fn, params = decoder(name, scan)
    edited = check_pass(Rotate(least=4), jax.jit(fn), params, TOKENS, rtol=1e-4, atol=2e-5)
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), b in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(edited), strict=True)
        if float(jnp.abs(a - b).max()) > 1e-3
    }
    read = {"llama": "mlp/gate/kernel", "mixtral": "mlp/experts/gate/kernel", "gpt2": "mlp/up/kernel"}[name]
    layer = "layers" if scan else "layers/1"
    assert {"embed/embedding", "lm_head/kernel", f"{layer}/{read}", f"{layer}/attn/o_proj/kernel"} <= changed
    norms = [a for path, a in jax.tree.leaves_with_path(edited) if "scale" in str(path)]
    assert norms and all((np.asarray(a) == 1).all() for a in norms)  # their scales went into what reads them


def test_what_becomes_of_a_weight():
    """By the equations in float64: norm scales into readers, R on the stream's sides, one R per head."""
    fn, params = decoder("llama")
    edited = check_pass(Rotate(), jax.jit(fn), params, TOKENS, atol=2e-5)
    r, h = matrix(random_signs(24)), np.kron(np.eye(2), matrix(random_signs(8)))
    was, now = ({k: np.asarray(v, np.float64) for k, v in p["layers"][0]["attn"].items() for v in v.values()} for p in (params, edited))  # fmt: skip  # noqa: E501
    norm = np.asarray(params["layers"][0]["attn_norm"]["scale"], np.float64)
    np.testing.assert_allclose(edited["embed"]["embedding"], np.asarray(params["embed"]["embedding"]) @ r, atol=1e-5)
    np.testing.assert_allclose(now["q_proj"], r.T @ (norm[:, None] * was["q_proj"]), atol=1e-5)
    np.testing.assert_allclose(now["v_proj"], r.T @ (norm[:, None] * was["v_proj"]) @ h, atol=1e-5)
    heads = np.kron(np.eye(4), matrix(random_signs(8)))
    np.testing.assert_allclose(now["o_proj"], heads.T @ was["o_proj"] @ r, atol=1e-5)


@pytest.mark.slow
def test_a_mean_keeps_the_vector_of_ones():
    """A LayerNorm: the table's rows keep their means, and are rotated otherwise."""
    fn, params = decoder("gpt2")
    edited = check_pass(Rotate(), jax.jit(fn), params, TOKENS, atol=2e-5)
    was, now = (np.asarray(p["embed"]["embedding"], np.float64) for p in (params, edited))
    np.testing.assert_allclose(was.mean(-1), now.mean(-1), atol=1e-6)
    np.testing.assert_allclose(was @ was.T, now @ now.T, atol=1e-4)
    assert np.abs(was - now).max() > 0.1


def test_what_is_not_folded_is_said():
    said = notes_of(*decoder("llama"))
    assert "blocks of 24 channels are rotated in" in said and "blocks of 8 channels are rotated in" in said
    assert "not folded" in said and "layers/0/mlp/down/kernel" in said
    tied = notes_of(*decoder("llama", tie_word_embeddings=True))
    assert "embed/embedding is embedding and head in one" in tied and "store it twice" in tied
    assert "blocks of 8 channels are rotated" in tied
    few = notes_of(*decoder("llama"), Rotate(least=64))
    assert "blocks of 24 channels are shorter than least=64" in few and "are rotated in" not in few
    only = notes_of(*decoder("llama"), Rotate(match="**/o_proj/**"))
    assert "blocks of 8 channels are rotated in" in only and "blocks of 24 channels" not in only
    for bad in ({"seed": "a"}, {"least": 1}, {"least": True}):
        with pytest.raises(FormatError, match="Rotate: "):
            Rotate(**bad)
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8))], prepare=[Rotate(seed=3, match="**/o_proj/**")])
    assert qjax.Recipe.from_dict(recipe.to_dict()).hash == recipe.hash


@pytest.mark.every(2)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_parameters_that_are_read_when_they_are_due(scan):
    """Lazy leaves give what leaves in memory give; a weight is read for itself and for nothing else."""
    fn, params = decoder("gpt2", scan)
    reads = {}

    def lazy(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")

        def read(i=None):
            reads[name] = reads.get(name, 0) + 1
            return np.asarray(x if i is None else x[i])

        return qjax.Lazy(x.shape, x.dtype, read, read)

    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8))], prepare=[Rotate()])
    want = qjax.quantize(fn, params, TOKENS, recipe=recipe)
    got = qjax.quantize(fn, jax.tree.map_with_path(lazy, params), TOKENS, recipe=recipe)
    for a, b in zip(jax.tree.leaves(want.params), jax.tree.leaves(got.params), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=1e-6)
    assert reads["embed/embedding"] == 1, reads


def test_a_zero_in_a_scale_beside_a_bias():
    fn, params = decoder("gpt2")
    params["norm"]["scale"] = params["norm"]["scale"].at[3].set(0.0)
    assert "has a zero where" in notes_of(fn, params)


@pytest.mark.slow
@pytest.mark.every(2)
@pytest.mark.parametrize("inner", [None, "gptq"])
def test_four_bits_with_outliers_in_the_stream(inner):
    """Planted outlier channels: W4A4 with everything rotated, folded or as it passes, beside W4A4 as it is."""
    fn, params = decoder("llama", hidden_size=64, intermediate_size=96, head_dim=16, num_hidden_layers=1)
    table = params["embed"]["embedding"]
    params["embed"]["embedding"] = table.at[:, jnp.array([5, 40])].multiply(30.0)
    want = jax.nn.log_softmax(fn(params, TOKENS))
    rounding = qjax.GPTQ() if inner else qjax.RTN()
    settings = dict(weights=qjax.Int(4, group=16), inputs=qjax.Int(4, per="token"))
    down = qjax.Rule("**/down/**", rounding=qjax.Rotated(rounding), **settings)
    plain = qjax.Rule("**", rounding=rounding, **settings)
    recipes = {
        "plain": qjax.Recipe([plain]),
        "folded": qjax.Recipe([down, plain], prepare=[Rotate()]),
        "online": qjax.Recipe([qjax.Rule("**", rounding=qjax.Rotated(rounding), **settings)]),
    }
    kl = {}
    for name, recipe in recipes.items():
        model = qjax.quantize(fn, params, TOKENS, recipe=recipe, batches=[TOKENS] if inner else None)
        got = jax.nn.log_softmax(model(model.params, TOKENS))
        kl[name] = float(jnp.mean(jnp.sum(jnp.exp(want) * (want - got), -1)))
    assert kl["folded"] < 0.6 * kl["plain"] and kl["online"] < 0.6 * kl["plain"], kl
