"""SmoothQuant: the equation, folding into what comes before, and what cannot be folded."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.errors import QjaxWarning, RecipeError
from qjax.formats import SMOOTH, is_quantized
from qjax.models import LanguageModel, LlamaConfig, stack_layers
from qjax.passes import SmoothQuant
from qjax.passes.smoothquant import smoothing_factors

# Most tests look at folding alone, with float activations, of which a user is warned.
pytestmark = pytest.mark.filterwarnings("ignore:SmoothQuant moves range")

TINY = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
HIGH = qjax.Int(8)  # fine enough to see that the function has not changed


def tokens(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 61, (2, 12)), jnp.int32)


BATCHES = [(tokens(1),), (tokens(2),)]


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1.0])
def test_equation_4(strength):
    r = np.random.default_rng(0)
    x, w = np.abs(r.standard_normal(40)) + 0.1, np.abs(r.standard_normal(40)) + 0.1
    x[3], w[5] = 0, 0
    s = smoothing_factors(x.astype(np.float32), w.astype(np.float32), strength)
    good = (x > 0) & (w > 0)
    want = x[good] ** strength / w[good] ** (1 - strength)
    np.testing.assert_allclose(s[good] / s[good][0], want / want[0], rtol=1e-5)
    np.testing.assert_allclose(np.exp(np.log(s[good]).mean()), 1, rtol=1e-5)
    assert s[3] == s[5] == 1


def norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def layer(h, w):
    """A norm before two products, a gate, and a product whose input is the product of two."""
    x = norm(h, w["norm"])
    return h + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]


D, LAYERS = 16, 3


def weights(seed=0):
    r = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(r.standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)  # noqa: E731
    spread = np.ones(D)
    spread[[2, 9]] = 40  # the outlier channels that the method is about
    layers = {
        "norm": jnp.asarray(np.tile(spread, (LAYERS, 1)), jnp.float32),
        "gate": make(LAYERS, D, 2 * D) / spread[:, None].astype(np.float32),
        "up": make(LAYERS, D, 2 * D) / spread[:, None].astype(np.float32),
        "down": make(LAYERS, 2 * D, D),
    }
    return {"layers": layers}


def scanned(p, x):
    return lax.scan(lambda h, w: (layer(h, w), None), x, p["layers"])[0]


def unrolled(p, x):
    for w in p["layers"]:
        x = layer(x, w)
    return x


def listed(p):
    return {"layers": [jax.tree.map(lambda a, i=i: a[i], p["layers"]) for i in range(LAYERS)]}


FORMS = {"scan": (scanned, lambda p: p), "list": (unrolled, listed)}
ROWS = [(jnp.asarray(np.random.default_rng(s).standard_normal((20, D)), jnp.float32),) for s in (1, 2)]
TEST = jnp.asarray(np.random.default_rng(5).standard_normal((50, D)), jnp.float32)


def floats(model):
    return jax.tree.map(lambda a: a.dequantize() if is_quantized(a) else a, model.params, is_leaf=is_quantized)


def relative(a, b) -> float:
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.every(2)
@pytest.mark.parametrize("form", FORMS)
def test_factors_go_into_the_norm_and_into_the_projection_before(form):
    fn, shape = FORMS[form]
    recipe = qjax.Recipe([qjax.Rule("**", weights=HIGH)], prepare=[SmoothQuant(0.5)])
    model = qjax.quantize(fn, shape(weights()), recipe=recipe, batches=ROWS)
    folded = [note for note in model.report.notes if "folded into" in note]
    assert len(folded) == 2 * LAYERS, model.report.notes
    assert any("gate, layers/1/up: " in note.replace("layers/1/gate", "gate") for note in folded), folded
    assert any("down" in note.split(":")[1] and note.endswith("up") for note in folded), folded
    assert not any(SMOOTH in q.aux for q in jax.tree.leaves(model.params, is_leaf=is_quantized) if is_quantized(q))
    assert relative(model(model.params, TEST), fn(shape(weights()), TEST)) < 0.02
    # By hand, the first layer: the norm's scale over s, the products' rows times s.
    p = weights()["layers"]
    h = np.concatenate([np.asarray(b[0]) for b in ROWS]).astype(np.float64)
    x = h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) * np.asarray(p["norm"][0])
    top_w = np.maximum(np.abs(p["gate"][0]).max(1), np.abs(p["up"][0]).max(1))
    s = np.sqrt(np.abs(x).max(0) / top_w)
    s /= np.exp(np.log(s).mean())
    got = floats(model)["layers"]
    new_norm = got["norm"][0] if form == "scan" else got[0]["norm"]
    np.testing.assert_allclose(new_norm, p["norm"][0] / s, rtol=1e-4)
    new_gate = got["gate"][0] if form == "scan" else got[0]["gate"]
    want = np.asarray(p["gate"][0]) * s[:, None]
    assert np.abs(new_gate - want).max() < np.abs(want).max() / 100


@pytest.mark.parametrize("inputs", [qjax.dynamic(qjax.Int(8, per="tensor")), qjax.static(qjax.Int(8, per="tensor"))])
def test_outlier_channels_no_longer_spoil_integer_activations(inputs):
    rules = [qjax.Rule("**", weights=qjax.Int(8), inputs=inputs)]
    want = scanned(weights(), TEST)
    data = {"batches": ROWS} if qjax.Recipe(rules).needs_batches else {}
    plain = qjax.quantize(scanned, weights(), *(() if data else ROWS[0]), recipe=qjax.Recipe(rules), **data)
    smooth = qjax.quantize(scanned, weights(), recipe=qjax.Recipe(rules, prepare=[SmoothQuant()]), batches=ROWS)
    errors = [relative(m(m.params, TEST), want) for m in (plain, smooth)]
    assert errors[1] < 0.6 * errors[0], errors


def gelu(p, x):
    return jax.nn.gelu(norm(x, p["norm"]) @ p["up"]) @ p["down"]


def gelu_params():
    p = {k: v[0] for k, v in weights()["layers"].items()}
    return {k: p[k] for k in ("norm", "up", "down")}


def test_what_nothing_takes_up_is_kept_beside_the_weight_or_refused():
    rules = [qjax.Rule("**", weights=HIGH)]
    quantize = lambda **settings: qjax.quantize(  # noqa: E731
        gelu, gelu_params(), recipe=qjax.Recipe(rules, prepare=[SmoothQuant(**settings)]), batches=ROWS
    )
    model = quantize()
    assert SMOOTH in model.params["down"].aux and SMOOTH not in model.params["up"].aux
    assert any("down: factors" in note and "gelu" in note for note in model.report.notes), model.report.notes
    assert relative(model(model.params, TEST), gelu(gelu_params(), TEST)) < 0.02
    model = quantize(unfolded="skip")
    assert SMOOTH not in model.params["down"].aux
    assert any("down: not smoothed, because" in note for note in model.report.notes)
    with pytest.raises(RecipeError, match="down cannot be smoothed by folding: .*gelu"):
        quantize(unfolded="error")
    model = quantize(match="up")
    assert not any("down" in note for note in model.report.notes if "SmoothQuant" in note)


def test_a_result_of_the_function_is_not_touched():
    def fn(p, x):
        h = norm(x, p["norm"])
        return h @ p["up"], h

    p = {k: v for k, v in gelu_params().items() if k != "down"}
    recipe = qjax.Recipe([qjax.Rule("**", weights=HIGH)], prepare=[SmoothQuant(unfolded="error")])
    with pytest.raises(RecipeError, match="result of the function"):
        qjax.quantize(fn, p, recipe=recipe, batches=ROWS)


@pytest.mark.slow
@pytest.mark.every(2)
@pytest.mark.parametrize("scan", [False, True])
def test_a_llama(scan):
    config = dataclasses.replace(TINY)
    fn = LanguageModel(config, scan_layers=True) if scan else LanguageModel(config)
    params = _llama_params(config)
    params = stack_layers(params) if scan else params
    rules = [
        qjax.Rule("**/lm_head/**", skip=True, optional=True),
        qjax.Rule("**", weights=HIGH, inputs=qjax.Int(8, per="token")),
    ]
    recipe = qjax.Recipe(rules, prepare=[SmoothQuant(0.5, unfolded="error")])
    model = qjax.quantize(fn, params, recipe=recipe, batches=BATCHES)
    folded = [note for note in model.report.notes if "folded into" in note]
    assert len(folded) == 4 * config.num_hidden_layers  # q k v; o, into v; gate up; down, into up
    want, got = fn(params, tokens(9)), model(model.params, tokens(9))
    want, got = (a[0] if isinstance(a, tuple) else a for a in (want, got))
    assert relative(got, want) < 0.05


def _llama_params(config):
    fn = LanguageModel(config)
    r = np.random.default_rng(0)

    def draw(leaf):
        if len(leaf.shape) == 1:
            return jnp.asarray(1 + 0.3 * r.standard_normal(leaf.shape), leaf.dtype)
        return jnp.asarray(r.standard_normal(leaf.shape) / np.sqrt(leaf.shape[0]), leaf.dtype)

    return jax.tree.map(draw, fn.abstract_params())


@pytest.mark.parametrize(
    ("settings", "message"), [({"strength": 2}, "from 0 to 1"), ({"unfolded": "besides"}, "did you mean 'beside'")]
)
def test_bad_settings(settings, message):
    with pytest.raises(RecipeError, match=message):
        SmoothQuant(**settings)


def test_convolutions_are_smoothed_where_factors_can_be_folded():
    def fn(p, x):
        conv = lambda x, w: lax.conv_general_dilated(  # noqa: E731
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jax.nn.relu(conv(x, p["first"]) * p["scale"] + p["shift"])
        return conv(jax.nn.gelu(conv(h, p["second"])), p["third"])

    r = np.random.default_rng(4)
    draw = lambda *shape: jnp.asarray(r.standard_normal(shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)  # noqa: E731
    p = {"first": draw(3, 3, 3, 8), "second": draw(3, 3, 8, 4), "third": draw(1, 1, 4, 4)}
    p |= {"scale": jnp.ones(8).at[2].set(30), "shift": draw(8)}
    x = jnp.asarray(r.standard_normal((4, 6, 6, 3)), jnp.float32)
    recipe = qjax.Recipe([qjax.Rule("**", weights=HIGH)], prepare=[SmoothQuant()])
    model = qjax.quantize(fn, p, recipe=recipe, batches=[(x,)])
    notes = [note for note in model.report.notes if note.startswith("SmoothQuant")]
    assert any(note.startswith("SmoothQuant: second: factors") and "folded into" in note for note in notes), notes
    assert any(note.startswith("SmoothQuant: third: not smoothed, because") and "gelu" in note for note in notes), notes
    assert relative(model(model.params, x), fn(p, x)) < 0.03


def test_smoothing_for_activations_that_stay_float_is_warned_of():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    r = np.random.default_rng(5)
    p = {name: jnp.asarray(r.standard_normal((8, 8)), jnp.float32) for name in "ab"}
    batches = [jnp.asarray(r.standard_normal((16, 8)), jnp.float32)]
    both = [qjax.Rule("a", weights=HIGH, inputs=qjax.Int(8, per="token")), qjax.Rule("b", weights=HIGH)]
    with pytest.warns(QjaxWarning, match="activations of b stay float") as told:
        qjax.quantize(fn, p, recipe=qjax.Recipe(both, prepare=[SmoothQuant()]), batches=batches)
    assert len(told) == 1 and told[0].filename == __file__
    quiet = SmoothQuant(match="a").misplaced(dict(qjax.Recipe(both).decide(qjax.trace(fn, p, batches[0]).sites)))
    assert quiet == ""
