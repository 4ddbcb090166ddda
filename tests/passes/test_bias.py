"""Biases found on the program, and corrected by the mean error of what stands before them."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.analysis.biases import Bias, bias_of
from qjax.errors import RecipeError
from qjax.statistics import Mean

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((2, 5, 8)) + 1, jnp.float32)  # [batch, tokens, K], mean 1
KEYS = jax.random.split(jax.random.key(0), 8)


def normal(i, *shape):
    return jax.random.normal(KEYS[i], shape)


def scanned(p, x):
    return jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer[0] + layer[1]), None), x, (p["w"], p["b"]))[0]


def unrolled(p, x):
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i] + p["b"][i])
    return x


def image(p, x):
    y = x.reshape(2, 5, 8, 1) * jnp.ones((1, 1, 1, 3))
    y = jax.lax.conv_general_dilated(y, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NCHW"))
    return y + p["b"][None, :, None, None]


STACK = {"w": normal(0, 3, 8, 8) / 3, "b": normal(1, 3, 8)}
DENSE = {"w": normal(0, 8, 6), "b": normal(1, 6)}
HEADS = {"w": normal(0, 8, 2, 3), "b": normal(1, 2, 3)}
EXPERTS = {"w": normal(0, 4, 8, 6), "b": normal(1, 4, 6)}
IMAGE = {"w": normal(0, 3, 3, 3, 4), "b": normal(1, 4)}

FOUND = {
    "dense": (DENSE, lambda p, x: x @ p["w"] + p["b"], [Bias("b", (), (1,))]),
    "bias first": (DENSE, lambda p, x: p["b"].reshape(1, 1, 6) + x @ p["w"], [Bias("b", (), (1,))]),
    "weight first": (DENSE, lambda p, x: jnp.einsum("kn,btk->tbn", p["w"], x) + p["b"], [Bias("b", (), (1,))]),
    "cast": (
        DENSE,
        lambda p, x: (x @ p["w"]).astype(jnp.bfloat16) + p["b"].astype(jnp.bfloat16),
        [Bias("b", (), (1,))],
    ),
    "jitted": (DENSE, lambda p, x: jax.jit(jnp.dot)(x, p["w"]) + p["b"], [Bias("b", (), (1,))]),
    "reshaped": (DENSE, lambda p, x: (x @ p["w"]).reshape(10, 6) + p["b"], [Bias("b", (), (1,))]),
    "heads": (HEADS, lambda p, x: jnp.einsum("btk,khd->bhtd", x, p["w"]) + p["b"][:, None], [Bias("b", (), (1, 2))]),
    "experts": (
        EXPERTS,
        lambda p, x: jnp.einsum("btk,ekn->etbn", x, p["w"]) + p["b"][:, None, None],
        [Bias("b", (), (0, 2))],
    ),
    "image": (IMAGE, image, [Bias("b", (), (3,))]),
    "scanned": (STACK, scanned, [Bias("b", ((0, i),), (2,)) for i in range(3)]),
    "unrolled": (STACK, unrolled, [Bias("b", ((0, i),), (2,)) for i in range(3)]),
}


@pytest.mark.parametrize("case", FOUND)
def test_biases_are_found(case):
    params, fn, want = FOUND[case]
    program = qjax.trace(fn, params, X)
    sites = [s for s in program.sites if s.op in ("dot", "conv") and s.leaf == "w"]
    assert [bias_of(program, s.name) for s in sites] == want


def test_biases_of_flax_modules():
    from flax import nnx

    for module, want in (
        (nnx.Linear(8, 4, rngs=nnx.Rngs(0)), [Bias("bias", (), (1,))]),
        (nnx.Conv(8, 4, (3,), rngs=nnx.Rngs(0)), [Bias("bias", (), (2,))]),
        (nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0)), [Bias("query/bias", (), (1, 2))]),
    ):
        fn, params = qjax.from_nnx(module)
        program = qjax.trace(fn, params, X)
        found = [bias_of(program, s.name) for s in program.sites if s.op in ("dot", "conv")]
        assert found[: len(want)] == want and all(isinstance(b, Bias) for b in found)


REFUSED = {
    "none": (DENSE, lambda p, x: jax.nn.relu(x @ p["w"]), "used in several places|stands between|goes into a function"),
    "residual": (DENSE, lambda p, x: x @ p["w"] + x[..., :6] + p["b"], "no parameter"),
    "scalar": ({**DENSE, "b": normal(1, 1)}, lambda p, x: x @ p["w"] + p["b"], "shared by output channels"),
    "positions": ({**DENSE, "b": normal(1, 5, 6)}, lambda p, x: x @ p["w"] + p["b"], "more than the output channels"),
    "used twice": (DENSE, lambda p, x: (x @ p["w"] + p["b"], p["b"] * 2), "read in other places"),
    "part": ({**DENSE, "b": normal(1, 9)}, lambda p, x: x @ p["w"] + p["b"][3:], "only a part"),
    "shared": (
        {**STACK, "b": normal(1, 8)},
        lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w + p["b"]), None), x, p["w"])[0],
        "shared by several weights",
    ),
    "several": (
        {"w": normal(0, 8, 8) / 3, "b": normal(1, 3, 8)},
        lambda p, x: jax.lax.scan(lambda h, b: (jnp.tanh(h @ p["w"] + b), None), x, p["b"])[0],
        "several slices for one weight",
    ),
    "result": (DENSE, lambda p, x: x @ p["w"], "leaves a loop or the function"),
    "also used": (DENSE, lambda p, x: (lambda y: (y, y + p["b"]))(x @ p["w"]), "several places"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_bias_is_named(case):
    params, fn, words = REFUSED[case]
    program = qjax.trace(fn, params, X)
    for site in (s for s in program.sites if s.leaf == "w"):
        why = bias_of(program, site.name)
        assert isinstance(why, str) and re.search(words, why), why


def quantized(fn, params, batches, finish=None, **settings):
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(3))], finish=finish or [qjax.BiasCorrection()])
    return qjax.quantize(fn, params, recipe=recipe, batches=batches, **settings)


@pytest.mark.every(2)
@pytest.mark.parametrize("case", ["dense", "heads", "experts", "image"])
def test_the_mean_error_of_each_channel_is_gone(case):
    params, fn, _ = FOUND[case]
    batches = [(X,), (2 * X,)]
    model = quantized(fn, params, batches)

    def shift(p):
        error = jnp.concatenate([fn(p, x) - fn(params, x) for (x,) in batches], axis=0 if case != "experts" else 2)
        axes = {"dense": (0, 1), "heads": (0, 2), "experts": (1, 2), "image": (0, 2, 3)}[case]
        return float(jnp.abs(jnp.mean(error, axis=axes)).max())

    corrected = jax.tree.map(lambda a: a.dequantize() if isinstance(a, qjax.QArray) else a, model.params,
                             is_leaf=lambda a: isinstance(a, qjax.QArray))  # fmt: skip
    assert shift(corrected) < 1e-4
    assert shift({**corrected, "b": params["b"]}) > 0.01
    assert "BiasCorrection: 1 sites" in model.report.text()


def test_layers_of_a_scan_see_what_earlier_ones_became(tmp_path):
    """By the definition, layer by layer in float64; and the same when a job goes on."""
    batches = [(X,), (X - 0.5,)]
    model = quantized(scanned, STACK, batches, resume=tmp_path)
    q, b = np.asarray(model.params["w"].dequantize(), np.float64), np.asarray(model.params["b"])
    w, live = np.asarray(STACK["w"], np.float64), [np.asarray(x, np.float64).reshape(-1, 8) for (x,) in batches]
    for i in range(3):
        want = np.asarray(STACK["b"][i]) + np.concatenate(live).mean(0) @ (w[i] - q[i])
        np.testing.assert_allclose(b[i], want, atol=1e-5)
        live = [np.tanh(x @ q[i] + b[i]) for x in live]
    again = quantized(scanned, STACK, batches, resume=tmp_path)
    np.testing.assert_array_equal(again.params["b"], b)


def test_sites_without_a_bias_are_in_the_report():
    def fn(p, x):
        return jnp.tanh(x @ p["first"]) @ p["w"] + p["b"]

    params = {"first": normal(2, 8, 8), **DENSE}
    model = quantized(fn, params, [(X,)])
    said = model.report.text()
    assert "BiasCorrection: left alone, because" in said and "first" in said
    assert not np.array_equal(model.params["b"], params["b"])


def test_recipes_with_finishing_passes():
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4))], finish=[qjax.BiasCorrection()])
    assert qjax.Recipe.from_toml(recipe.to_toml()) == recipe and "[[finish]]" in recipe.to_toml()
    assert recipe.hash != qjax.Recipe(recipe.rules).hash and recipe.sequential
    with pytest.raises(RecipeError, match="batches"):
        qjax.quantize(FOUND["dense"][1], DENSE, X, recipe=recipe)
    with pytest.raises(RecipeError, match="finishing pass"):
        quantized(FOUND["dense"][1], DENSE, [(X,)], finish=[qjax.GPTQ()])
    with pytest.raises(RecipeError, match="finishing passes"):
        qjax.fake_quant(FOUND["dense"][1], recipe).init(DENSE, X)


def test_means_add_up():
    x = RNG.standard_normal((10, 4)).astype(np.float32)
    mean = Mean()
    whole = mean.see(x)
    np.testing.assert_allclose(whole["mean_sum"] / whole["mean_rows"], x.mean(0), rtol=1e-6)
    parts = mean.add(mean.see(x[:3]), x[3:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), parts, whole)
    experts = np.stack([x, x])
    experts[1, 4:] = 0  # places that no token took
    state = mean.see(experts)
    np.testing.assert_array_equal(state["mean_rows"], [10, 4])
    np.testing.assert_allclose(state["mean_sum"][1] / 4, x[:4].mean(0), rtol=1e-5)
    factor = np.float32([[1, 2, 3, 4]])
    np.testing.assert_allclose(mean.scaled(whole, factor)["mean_sum"], (x * factor).sum(0), rtol=1e-5)
