"""AWQ against the search written out in float64 over the activations themselves."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import FormatError, RecipeError
from qjax.formats import SIGNS, SMOOTH
from qjax.passes import awq_clip, awq_scales

RNG = np.random.default_rng(0)
K, G = 64, 16
FMT = qjax.Int(3, group=G, scale="qmax")
W = (RNG.standard_t(5, (12, K)) * np.exp(0.3 * RNG.standard_normal(K))).astype(np.float32)
X = (RNG.standard_normal((300, 20)) @ RNG.standard_normal((20, K)) + 0.3 * RNG.standard_normal((300, K))) * np.where(
    RNG.random(K) < 0.1, 8.0, 1.0
)
SEEN = {
    "second_moment": jnp.asarray(X.T @ X, jnp.float32),
    "rows": jnp.float32(300),
    "magnitude": jnp.asarray(np.abs(X).sum(0), jnp.float32),
    "magnitude_rows": jnp.float32(300),
}


@functools.partial(jax.jit, static_argnums=(2, 3))
def rounded(w, seen, rounding, fmt):
    return rounding.round(w, fmt, statistics=seen)


def decoded(codes, aux, fmt):
    """What the layer computes with: the rounded weight over its factors."""
    return np.asarray(fmt.decode(codes, aux) / aux[SMOOTH])


def loss(q):
    return np.square(X @ (np.asarray(q, np.float64) - W).T).sum()


def nearest(w, shrink=1.0):
    """Symmetric codes within ±3 of groups along the rows, in float64."""
    v = w.reshape(len(w), -1, G)
    scale = np.abs(v).max(-1, keepdims=True) / 3 * shrink
    return (np.clip(np.rint(v / scale), -3, 3) * scale).reshape(w.shape)


def oracle(duo):
    """The best of the grid: its factors, and what they leave."""
    x, best = np.abs(X).mean(0), np.inf
    size = np.abs(W).reshape(len(W), -1, G)
    m = (size / size.max(-1, keepdims=True)).mean(0).reshape(-1) + 1e-4
    ratios = [(a, False) for a in np.linspace(0, 1, 20)]
    if duo is True:
        ratios = [(0.0, False)] + [(a, True) for a in np.linspace(0, 1, 19)]
    if duo == "both":
        ratios = [(a, d) for d in (False, True) for a in np.linspace(0, 1, 10)]
    for a, d in ratios:
        s = x**a / (m ** (1 - a) if d else 1)
        s /= np.sqrt(s.max() * s.min())
        here = loss(nearest(W.astype(np.float64) * s) / s)
        if here < best:
            best, kept = here, s
    return kept, best


@pytest.mark.parametrize("duo", [False, True, "both"])
def test_scales_are_the_best_of_the_grid(duo):
    want, least = oracle(duo)
    s = awq_scales([W], SEEN["magnitude"] / 300, SEEN["second_moment"], FMT, duo_scaling=duo)
    got = decoded(*rounded(W, SEEN, qjax.AWQ(duo_scaling=duo, clip=False), FMT), FMT)
    assert loss(got) < 1.01 * least  # float32 may fall to the other side of a tie
    assert np.allclose(s, want, rtol=1e-3) or loss(got) < least
    assert loss(got) < 0.9 * loss(nearest(W.astype(np.float64)))


def test_several_weights_share_their_factors():
    other = W[::-1] * np.exp(RNG.standard_normal((12, 1))).astype(np.float32)
    both = awq_scales([W, other], SEEN["magnitude"] / 300, SEEN["second_moment"], FMT)
    stacked = awq_scales([np.concatenate([W, other])], SEEN["magnitude"] / 300, SEEN["second_moment"], FMT)
    np.testing.assert_allclose(both, stacked, rtol=1e-5)
    seen = np.array(SEEN["magnitude"]) / 300
    seen[3] = 0  # a channel that no batch reached keeps its factor
    assert awq_scales([W], seen, SEEN["second_moment"], FMT, duo_scaling=True)[3] == 1


@pytest.mark.parametrize("fmt", [FMT, qjax.Int(3, scale="qmax")])
def test_clipping_takes_the_best_range_of_each_block(fmt):
    aux = awq_clip(W, SEEN["second_moment"], fmt)
    size = fmt.group or K
    got = np.asarray(fmt.decode(fmt.encode(W, aux), aux), np.float64)
    for g in range(K // size):
        at = slice(g * size, (g + 1) * size)
        v, x = W[:, at].astype(np.float64), X[:, at]
        lost = []
        for shrink in 1 - np.arange(20) / 40:
            scale = np.abs(v).max(1, keepdims=True) / 3 * shrink
            q = np.clip(np.rint(v / scale), -3, 3) * scale
            lost.append(np.square(x @ (q - v).T).sum(0))
        np.testing.assert_allclose(np.square(x @ (got[:, at] - v).T).sum(0), np.min(lost, 0), rtol=0.01)
    ratio = np.asarray(aux["scale"]) / np.asarray(fmt.fit(W)["scale"])
    assert 0.5 < ratio.min() < 1 and ratio.max() <= 1 + 1e-6


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "fmt",
    [FMT, qjax.Int(3, group=24, symmetric=False), qjax.Int(4, per="tensor"), qjax.MXFP4(), qjax.NVFP4()],
    ids=lambda f: f.name,
)
def test_helps_every_format(fmt):
    plain = loss(fmt.decode(*qjax.RTN().round(W, fmt)))
    scaled = loss(decoded(*rounded(W, SEEN, qjax.AWQ(clip=False), fmt), fmt))
    clipped = loss(decoded(*rounded(W, SEEN, qjax.AWQ(), fmt), fmt))
    assert scaled <= plain * 1.001 and clipped < 0.95 * plain


def test_gptq_inside_does_better_than_either():
    gptq = qjax.GPTQ(actorder="static")
    alone = loss(FMT.decode(*rounded(W, {k: SEEN[k] for k in ("second_moment", "rows")}, gptq, FMT)))
    awq = loss(decoded(*rounded(W, SEEN, qjax.AWQ(), FMT), FMT))
    for clip in (True, False):
        both = loss(decoded(*rounded(W, SEEN, qjax.AWQ(inner=gptq, clip=clip), FMT), FMT))
        assert both < alone and both < awq


def test_experts_and_linear_layers_of_a_model():
    """Factors are kept beside each expert, and the model computes what its weights say."""
    params = {"experts": jnp.asarray(RNG.standard_normal((3, K, 8)), jnp.float32), "out": jnp.asarray(W.T)}

    def fn(p, x):
        return jnp.einsum("erk,ekn->ern", x, p["experts"]), x @ p["out"]

    x = jnp.asarray(X[:60].reshape(3, 20, K), jnp.float32)
    recipe = qjax.Recipe([qjax.Rule("**", weights=FMT, rounding=qjax.AWQ())])
    plan = qjax.plan(fn, params, x, recipe=recipe)
    model = qjax.quantize(fn, params, recipe=recipe, batches=[x])
    assert model.params["experts"].aux[SMOOTH].shape == (3, 1, K)
    assert not np.allclose(*np.asarray(model.params["experts"].aux[SMOOTH])[:2])
    assert plan.stored_bytes == sum(q.nbytes for q in model.params.values())
    near = {name: q.dequantize() for name, q in model.params.items()}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2), model(model.params, x), fn(near, x)
    )
    plain = qjax.quantize(fn, params, x, recipe=qjax.Recipe([qjax.Rule("**", weights=FMT)]))
    want = fn(params, x)
    error = lambda m: sum(float(jnp.square(a - b).sum()) for a, b in zip(m(m.params, x), want, strict=True))  # noqa: E731
    assert error(model) < 0.8 * error(plain)


def test_rotated_inside():
    """Activations are divided by the factors and then rotated; plans know of both."""

    def fn(p, x):
        return x @ p["w"]

    params, x = {"w": jnp.asarray(W.T)}, jnp.asarray(X, jnp.float32)
    rounding = qjax.AWQ(clip=False, inner=qjax.Rotated(qjax.GPTQ()))
    recipe = qjax.Recipe([qjax.Rule("**", weights=FMT, rounding=rounding)])
    model = qjax.quantize(fn, params, recipe=recipe, batches=[x])
    shapes = lambda tree: [(a.shape, a.dtype) for a in jax.tree.leaves(tree)]  # noqa: E731
    assert {SMOOTH, SIGNS} <= set(model.params["w"].aux)
    assert shapes(qjax.plan(fn, params, x, recipe=recipe).params) == shapes(model.params)
    got = model(model.params, x)
    np.testing.assert_allclose(got, fn({"w": model.params["w"].dequantize()}, x), rtol=1e-3, atol=1e-2)
    assert float(jnp.linalg.norm(got - fn(params, x)) / jnp.linalg.norm(fn(params, x))) < 0.2


def test_convolutions_divide_the_channels_of_the_image():
    kernel = RNG.standard_normal((3, 2, 8, 6)).astype(np.float32)
    image = (RNG.standard_normal((4, 9, 8, 8)) * np.exp(1.5 * RNG.standard_normal(8))).astype(np.float32)

    def fn(p, x):
        return jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    p = {"conv": jnp.asarray(kernel)}
    rule = qjax.Rule("**", weights=qjax.Int(3, group=16), rounding=qjax.AWQ())
    model = qjax.quantize(fn, p, recipe=qjax.Recipe([rule]), batches=[jnp.asarray(image)])
    factors = np.asarray(model.params["conv"].aux[SMOOTH]).reshape(6, 8)
    np.testing.assert_array_equal(factors, np.tile(factors[0], (6, 1)))
    y = model(model.params, image)
    np.testing.assert_allclose(y, fn({"conv": model.params["conv"].dequantize()}, image), rtol=1e-3, atol=1e-2)
    plain = qjax.quantize(fn, p, image, recipe=qjax.Recipe([qjax.Rule("**", weights=qjax.Int(3, group=16))]))
    error = lambda got: float(np.linalg.norm(got - fn(p, image)))  # noqa: E731
    assert error(y) < 0.8 * error(plain(plain.params, image))


def test_settings_that_cannot_be():
    with pytest.raises(RecipeError, match="static scales are calibrated on undivided"):
        qjax.Rule("**", weights=FMT, rounding=qjax.AWQ(), inputs=qjax.static(qjax.Int(8, per="tensor")))
    for bad in ({"n_grid": 1}, {"duo_scaling": "all"}, {"clip": 1}, {"inner": qjax.MSE()}, {"inner": qjax.AWQ()}):
        with pytest.raises(FormatError, match="AWQ"):
            qjax.AWQ(**bad)
    with pytest.raises(RecipeError, match="not fitted from ranges.*AWQ\\(clip=False\\)"):
        qjax.Rule("**", weights=qjax.formats.TritPlanes(), rounding=qjax.AWQ())
    with pytest.raises(RecipeError, match="share more than a scale"):
        qjax.Rule("**", weights=qjax.NF4(), rounding=qjax.AWQ(clip=False, inner=qjax.GPTQ()))
    with pytest.raises(FormatError, match="needs statistics"):
        qjax.AWQ().round(W, FMT)
    recipe = qjax.Recipe([qjax.Rule("**", weights=FMT, rounding=qjax.AWQ(inner=qjax.GPTQ(actorder="static")))])
    assert qjax.Recipe.from_dict(recipe.to_dict()) == recipe
