"""A bias and a residual that follow a product are part of it, where its kernel adds them, and nowhere else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun

import qjax
from qjax import ops
from qjax._compat import open_jaxpr, sub_jaxprs
from qjax.formats import Int
from qjax.models import LanguageModel
from qjax.models.llama import LlamaConfig

K, N = 128, 256
G128 = qjax.Recipe([qjax.Rule("**", weights=Int(4, group=128))])
H200 = "NVIDIA H200"


def draw(*shape, seed=0, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def products(jaxpr):
    """What each quantized product adds, and how many additions of arrays are left; bodies of calls and loops too."""
    found, left = [], 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "q_dot":
            found.append(str(eqn.params["call"]).partition(" + ")[2].partition(" ->")[0])
        left += eqn.primitive.name == "add" and eqn.outvars[0].aval.ndim > 1
        for _, inner in sub_jaxprs(eqn.params):
            more, others = products(open_jaxpr(inner))
            found, left = found + more, left + others
    return sorted(found), left


def traced(model, *args, gpu=H200):
    """The rewritten program for a GPU, or for this machine."""
    params = ops.pack_tree(model.params)
    fn = lambda p, *args: model.bind(model.fn)(p, *args)  # noqa: E731
    if gpu is None:
        return jax.make_jaxpr(fn)(params, *args)
    with mosaic.described_gpu(gpu):
        return jax.make_jaxpr(fn)(params, *args)


W = {"w": draw(K, N) / 8, "b": draw(N, seed=1), "w2": draw(N, K, seed=2) / 8}

CASES = {
    "bias": (lambda p, x: x @ p["w"] + p["b"], ["bias"], 0),
    "bias in front": (lambda p, x: p["b"] + x @ p["w"], ["bias"], 0),
    "bias and residual": (lambda p, x: x + (x @ p["w"] + p["b"]) @ p["w2"], ["bias", "residual"], 0),
    "both to one": (lambda p, x: x @ p["w"] + p["b"] + jnp.tile(x, 2), ["bias + residual"], 0),
    "what is computed in between": (
        lambda p, x: x @ p["w"] + jnp.tanh(jnp.tile(x, 2) @ p["w2"] @ p["w"]),
        ["", "", "residual"],
        0,
    ),
    "two products": (lambda p, x: x @ p["w"] + (2 * x) @ p["w"], ["", "residual"], 0),
    "twice itself": (lambda p, x: (lambda y: y + y)(x @ p["w"]), [""], 1),
    "read twice": (lambda p, x: (lambda y: y * (y + p["b"]))(x @ p["w"]), [""], 1),
    "three": (lambda p, x: x @ p["w"] + p["b"] + jnp.tile(x, 2) + jnp.sin(jnp.tile(x, 2)), ["bias + residual"], 1),
    "a number": (lambda p, x: x @ p["w"] + 1.0, [""], 1),
    "another dtype": (lambda p, x: (x @ p["w"]).astype(jnp.float32) + jnp.tile(x, 2), [""], 1),
    "one row for all": (lambda p, x: x @ p["w"] + jnp.tile(x, 2)[:1], ["bias"], 0),
    "a column": (lambda p, x: x @ p["w"] + x[..., :1], [""], 1),
    "rotated": (lambda p, x: (p["w"].T @ x.T) + p["b"][:, None], [""], 1),
}


@pytest.mark.parametrize("case", CASES)
def test_what_follows_a_product(case):
    fn, terms, left = CASES[case]
    x = draw(5, K, seed=3)
    model = qjax.quantize(fn, W, x, recipe=G128)
    closed = traced(model, x)
    assert products(closed.jaxpr) == (terms, left)
    got = jaxpr_as_fun(closed)(*jax.tree.leaves(ops.pack_tree(model.params)), x)[0]
    want = jax.jit(fn)(jax.tree.map(lambda a: a.dequantize() if hasattr(a, "dequantize") else a, model.params,
                                    is_leaf=lambda a: hasattr(a, "dequantize")), x)  # fmt: skip
    scale = float(jnp.abs(want.astype(jnp.float32)).max())
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=0, atol=0.02 * scale)


@pytest.mark.parametrize("gpu", [None, "NVIDIA B200"])
def test_where_no_kernel_adds_programs_stay_as_they_are(gpu):
    fn, *_ = CASES["both to one"]
    x = draw(5, K)
    assert products(traced(qjax.quantize(fn, W, x, recipe=G128), x, gpu=gpu).jaxpr) == ([""], 2)


def test_inside_a_scan_with_rows_of_any_rank_and_under_grad():
    def fn(p, x):
        step = lambda h, w: (h + (jnp.tanh(h) @ w["w"] + w["b"]) @ w["w2"], None)  # noqa: E731
        return jax.lax.scan(step, x, p)[0]

    params, x = jax.tree.map(lambda a: jnp.stack([a, a]), W), draw(2, 3, K)
    model = qjax.quantize(fn, params, x, recipe=G128)
    closed = traced(model, x)
    assert products(closed.jaxpr) == (["bias", "residual"], 0) and " scan[" in str(closed)
    leaves = jax.tree.leaves(ops.pack_tree(model.params))
    here = traced(model, x, gpu=None)
    slope = lambda j: jax.grad(lambda x: jaxpr_as_fun(j)(*leaves, x)[0].astype(jnp.float32).sum())(x)  # noqa: E731
    one, other = (np.asarray(a.astype(jnp.float32)) for a in map(slope, (closed, here)))
    np.testing.assert_allclose(one, other, atol=0.05 * np.abs(other).max())


def test_a_decode_step_of_a_llama_adds_in_its_kernels():
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    fn = LanguageModel(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), fn.abstract_params(jnp.bfloat16))
    model = qjax.quantize(fn, zeros, jnp.zeros((1, 4), jnp.int32), recipe=G128)
    args = (ops.pack_tree(model.params), jnp.zeros(3, jnp.int32), fn.init_cache(3, 32, jnp.bfloat16))
    with mosaic.described_gpu():
        found, _ = products(jax.make_jaxpr(model.bind(fn.decode_step))(*args).jaxpr)
    assert found.count("residual") == 4  # what attention and MLP give to the stream, in two layers
