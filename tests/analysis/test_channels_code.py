"""Channel groups of code written in all sorts of ways, and the reasons for refusing."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gauges import Case, check, distance, refused, touched, written

import qjax
from qjax.analysis.channels import ChannelGroup, channel_group, scaled, stream_group
from qjax.analysis.turning import folded, overlaid, rotated

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((3, 5, 8)), jnp.float32)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def mlp(params, x, act=jax.nn.relu):
    return act(x @ params["up"] + params["b"]) @ params["down"]


MLP = {"up": draw(8, 12), "b": draw(12), "down": draw(12, 6)}


def rms(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


@pytest.mark.parametrize(
    "act",
    [
        jax.nn.relu,
        jax.nn.leaky_relu,
        jnp.abs,
        lambda x: jnp.where(x > 0, x, 0),
        lambda x: 3 * x,
        lambda x: x[..., ::-1],
    ],
    ids=["relu", "leaky_relu", "abs", "where", "linear", "reversed"],
)
def test_activations_that_let_positive_factors_through(act):
    group = check(Case(lambda p, x: mlp(p, x, act), MLP, (X,)), "down")
    assert touched(group) == {("up", (1,), 1), ("b", (0,), 1), ("down", (0,), -1)}


@pytest.mark.parametrize("act", ["silu", "gelu", "tanh", "elu", "softplus", "relu6", "softmax"])
def test_activations_that_do_not(act):
    model = Case(lambda p, x: mlp(p, x, getattr(jax.nn, act)), MLP, (X,))
    said = refused(model, "down")
    assert said.startswith("down: its input passes through ") and "does not let through a factor per channel" in said
    if act in ("silu", "gelu"):
        assert f"up/{act}" in said
    assert isinstance(channel_group(model.program, "down", "permute"), ChannelGroup)
    check(model, "down", "permute")


@pytest.mark.parametrize("wrap", ["jit", "remat", "custom_jvp", "custom_vjp", "cond", "scan", "vmap"])
def test_through_control_flow(wrap):
    def inner(p, x):
        return jax.nn.relu(x @ p["up"] + p["b"])

    jvp = jax.custom_jvp(inner)
    jvp.defjvp(lambda primals, tangents: jax.jvp(inner, primals, tangents))
    vjp = jax.custom_vjp(inner)
    vjp.defvjp(lambda p, x: (inner(p, x), (p, x)), lambda saved, g: jax.vjp(inner, *saved)[1](g))

    def in_scan(p, x):
        return jax.lax.scan(lambda carry, row: (carry, inner(p, row)), 0.0, x)[1]

    def in_cond(p, x):
        return jax.lax.cond(x.sum() > 0, lambda: inner(p, x), lambda: 2 * inner(p, x))

    forms = {
        "jit": jax.jit(inner),
        "remat": jax.checkpoint(inner),
        "custom_jvp": jvp,
        "custom_vjp": vjp,
        "cond": in_cond,
        "scan": in_scan,
        "vmap": jax.vmap(inner, (None, 0)),
    }
    group = check(Case(lambda p, x: forms[wrap](p, x) @ p["down"], MLP, (X,)), "down")
    assert touched(group) == {("up", (1,), 1), ("b", (0,), 1), ("down", (0,), -1)}


def test_a_while_loop_is_not_followed():
    def fn(p, x):
        h = jax.lax.while_loop(lambda s: s[1] < x[0, 0, 0], lambda s: (s[0] * 2, s[1] + 1), (x @ p["up"], 0.0))[0]
        return h @ p["down"]

    assert "a while" in refused(Case(fn, MLP, (X,)), "down")


@pytest.mark.parametrize(
    ("spec_up", "spec_down", "up", "down", "axes"),
    [
        ("btk,kn->btn", "btn,nm->btm", (8, 12), (12, 6), ((1,), (0,))),
        ("btk,nk->btn", "btn,mn->btm", (12, 8), (6, 12), ((0,), (1,))),
        ("btk,khd->bthd", "bthd,hdm->btm", (8, 3, 4), (3, 4, 6), ((1, 2), (0, 1))),
        ("btk,hkd->bhtd", "bhtd,dmh->btm", (3, 8, 4), (4, 6, 3), ((0, 2), (0, 2))),
        ("btk,dhk->htbd", "htbd,hdm->mbt", (4, 3, 8), (3, 4, 6), ((0, 1), (0, 1))),
    ],
)
def test_layouts(spec_up, spec_down, up, down, axes):
    params = {"up": draw(*up), "down": draw(*down)}
    model = Case(lambda p, x: jnp.einsum(spec_down, jnp.einsum(spec_up, x, p["up"]), p["down"]), params, (X,))
    group = check(model, "down")
    assert group.size == 12 and touched(group) == {("up", axes[0], 1), ("down", axes[1], -1)}
    check(model, "down", "permute")


def test_stacks_and_tiles():
    def fn(p, x):
        h = jnp.unstack(jnp.tile((x @ p["up"]).reshape(3, 5, 3, 4), (1, 1, 1, 2)), axis=2)
        return jnp.stack([h[2], h[0], h[1]], axis=2).reshape(3, 5, 24) @ p["down"]

    group = check(Case(fn, {"up": draw(8, 12), "down": draw(24, 6)}, (X,)), "down")
    assert group.size == 12 and np.array_equal(group.channels[:4], group.channels[4:8])


def test_reshapes_between():
    def fn(p, x):
        h = (x @ p["up"]).reshape(3, 5, 3, 4).transpose(2, 0, 1, 3)
        return jnp.concatenate([h[:2], h[2:]]).transpose(1, 2, 0, 3).reshape(15, 12) @ p["down"]

    assert check(Case(fn, {"up": MLP["up"], "down": MLP["down"]}, (X,)), "down").size == 12


def test_a_sum_over_heads_ties_them():
    """Every head meets the same matrix, so that all have to carry the same factors."""
    params = {"up": draw(8, 3, 4), "down": draw(4, 6)}
    model = Case(lambda p, x: jnp.einsum("btk,khd->bthd", x, p["up"]) @ p["down"], params, (X,))
    group = check(model, "down")
    assert group.size == 4 and group.touches[0].index.shape in ((1, 3, 4), (4, 1))


@pytest.mark.parametrize("way", ["interleaved", "halves"])
def test_rotary_positions(way):
    angle = np.arange(5)[:, None] / 10 ** np.arange(4)
    cos, sin = jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)

    def rotate(x):
        if way == "interleaved":
            a, b = x[..., 0::2], x[..., 1::2]
            return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)
        both = jnp.concatenate([-x[..., 4:], x[..., :4]], -1)
        return x * jnp.concatenate([cos, cos], -1) + both * jnp.concatenate([sin, sin], -1)

    def fn(p, x):
        scores = jnp.einsum("btd,bsd->bts", rotate(x @ p["q"]), rotate(x @ p["k"]))
        return jax.nn.softmax(scores) @ (x @ p["v"]) @ p["o"]

    model = Case(fn, {n: 0.5 * draw(8, 8) for n in "qkvo"}, (X,))
    group = check(model, "k", of="output")
    assert group.size == 4 and touched(group) == {("k", (1,), 1), ("q", (1,), -1)}
    pairs = group.channels.reshape(4, 2) if way == "interleaved" else group.channels.reshape(2, 4).T
    assert np.array_equal(pairs[:, 0], pairs[:, 1])
    untied = {("k", ()): model.read("k", ()) * (1 + np.arange(8.0, dtype=np.float32))}
    untied["q", ()] = model.read("q", ()) / (1 + np.arange(8.0, dtype=np.float32))
    assert distance(model(written(model.params, untied)), model.want) > 1e-3
    assert check(model, "o").size == 8


def test_a_norm_that_is_returned_as_well():
    params = {"scale": draw(8), "w": draw(8, 6)}

    def once(p, x):
        y = rms(x) * p["scale"]
        return y @ p["w"], y

    assert refused(Case(once, params, (X,)), "w") == "w: its input is a result of the function"


def test_a_reader_that_is_no_product():
    def fn(p, x):
        y = rms(x) * p["scale"]
        return y @ p["w"] + jnp.sum(jnp.exp(y), -1, keepdims=True)

    assert "a exp" in refused(Case(fn, {"scale": draw(8), "w": draw(8, 6)}, (X,)), "w")


def test_a_norm_of_one_plus_its_scale():
    """Gemma: the new leaf is ``(w + 1) f - 1``."""
    params = {"scale": 0.3 * draw(8), "w": draw(8, 6)}
    model = Case(lambda p, x: rms(x) * (1 + p["scale"]) @ p["w"], params, (X,))
    group = check(model, "w")
    assert {t.leaf: t.offset for t in group.touches} == {"scale": 1.0, "w": 0.0}
    f = np.arange(1.0, 9.0, dtype=np.float32)
    new = scaled(group, f, model.read)
    np.testing.assert_allclose(new["scale", ()], (1 + params["scale"]) * f - 1, rtol=1e-5)
    shifted = Case(lambda p, x: rms(x) * (2 * p["scale"] - 0.5) @ p["w"], params, (X,))
    check(shifted, "w")


def test_scales_computed_otherwise_are_refused():
    params = {"scale": draw(8), "w": draw(8, 6)}
    model = Case(lambda p, x: rms(x) * jnp.exp(p["scale"]) @ p["w"], params, (X,))
    assert "does not let through" in refused(model, "w")


def test_a_leaf_that_something_else_reads():
    def fn(p, x):
        return mlp(p, x), jnp.sum(jnp.abs(p["up"]) ** 2)

    assert isinstance(channel_group(Case(mlp, MLP, (X,)).program, "down"), ChannelGroup)
    refused(Case(fn, MLP, (X,)), "down")
    refused(Case(lambda p, x: (mlp(p, x), p["b"]), MLP, (X,)), "down")
    refused(
        Case(lambda p, x: jnp.where(p["b"] > 0, mlp(p, x) @ p["out"], 0), {**MLP, "out": draw(6, 12)}, (X,)), "down"
    )


def test_one_weight_read_twice():
    """Both reads have to want the same: the second one of a chain wants the reciprocal of what the first gives."""
    params = {"a": draw(8, 8), "b": draw(8, 8), "c": draw(8, 6)}
    twice = Case(lambda p, x: jnp.concatenate([x @ p["a"], 2 * x @ p["a"]], 1) @ p["c"], params, (X,))
    assert touched(check(twice, "c")) == {("a", (1,), 1), ("c", (0,), -1)}
    chain = Case(lambda p, x: x @ p["a"] @ p["b"] @ p["b"] @ p["c"], params, (X,))
    group = check(chain, "b")
    assert touched(group) == {("a", (1,), 1), ("b", (0,), -1), ("b", (1,), 1), ("c", (0,), -1)}
    tied = Case(lambda p, x: x @ p["a"] @ p["a"].T, {"a": draw(8, 8)}, (X,))
    assert "a is read in more ways than one" in refused(tied, "a", of="output")


def test_stacks_by_python_loop_and_by_scan_agree():
    params = {"up": draw(3, 8, 12), "down": draw(3, 12, 8), "norm": draw(3, 8)}

    def layer(x, p):
        return x + jax.nn.relu(rms(x) * p["norm"] @ p["up"]) @ p["down"], None

    def unrolled(p, x):
        for i in range(3):
            x = layer(x, jax.tree.map(lambda a, i=i: a[i], p))[0]
        return x

    def looped(p, x):
        body = lambda i, x: layer(x, jax.tree.map(lambda a: a[i], p))[0]  # noqa: E731
        return jax.lax.fori_loop(0, 3, body, x)

    found = []
    for fn in (lambda p, x: jax.lax.scan(layer, x, p)[0], unrolled, looped):
        model = Case(fn, params, (X,))
        found.append((touched(check(model, "1/down")), touched(check(model, "2/up"))))
    assert found[0] == found[1] == found[2]
    assert found[0][0] == {("up[0:1]", (2,), 1), ("down[0:1]", (1,), -1)}


def test_layers_that_share_weights():
    """The steps of a scan read one leaf: all of them carry the same factors."""
    params = {"up": draw(8, 12), "down": draw(12, 8)}
    fn = lambda p, x: jax.lax.scan(lambda c, _: (c + jax.nn.relu(c @ p["up"]) @ p["down"], None), x, length=3)[0]  # noqa: E731
    assert touched(check(Case(fn, params, (0.1 * X,)), "down")) == {("up", (1,), 1), ("down", (0,), -1)}


def test_experts_as_a_batch():
    params = {"up": draw(4, 8, 12), "down": draw(4, 12, 8), "router": draw(8, 4)}

    def fn(p, x):
        h = jax.nn.relu(jnp.einsum("btk,ekn->ebtn", x, p["up"]))
        return jnp.einsum("ebtm,bte->btm", jnp.einsum("ebtn,enm->ebtm", h, p["down"]), jax.nn.softmax(x @ p["router"]))

    group = check(Case(fn, params, (X,)), "down")
    assert group.size == 48 and group.channels.shape == (4, 12)
    assert touched(group) == {("up", (0, 2), 1), ("down", (0, 1), -1)}


def test_depthwise_convolution():
    params = {"first": draw(3, 3, 2, 6), "deep": draw(3, 3, 1, 6), "last": draw(1, 1, 6, 4)}

    def conv(x, w, groups=1):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    fn = lambda p, x: conv(jax.nn.relu(conv(jax.nn.relu(conv(x, p["first"])), p["deep"], 6)), p["last"])  # noqa: E731
    model = Case(fn, params, (draw(2, 5, 5, 2),))
    assert touched(check(model, "first", of="output")) == {("first", (3,), 1), ("deep", (3,), -1)}
    assert touched(check(model, "last")) == {("deep", (3,), 1), ("last", (2,), -1)}


def test_sizes_of_the_example_do_not_matter():
    """A batch as long as a head is wide, a text as long as the hidden size."""
    program = None
    for shape in ((8, 8, 8), (1, 1, 8), (12, 4, 8)):
        model = Case(mlp, MLP, (draw(*shape),))
        group = check(model, "down")
        program = program or touched(group)
        assert touched(group) == program


def test_two_products_of_activations_choose_the_one_that_can():
    params = {"gate": draw(8, 12), "up": draw(8, 12), "down": draw(12, 6)}
    both = Case(lambda p, x: (x @ p["gate"]) * (x @ p["up"]) @ p["down"], params, (X,))
    group = check(both, "down")
    assert len(group.touches) == 2
    swapped = Case(lambda p, x: (x @ p["up"]) * jax.nn.sigmoid(x @ p["gate"]) @ p["down"], params, (X,))
    assert touched(check(swapped, "down")) == {("up", (1,), 1), ("down", (0,), -1)}


def test_a_gate_per_head_keeps_the_heads_apart():
    params = {"v": draw(8, 3, 4), "g": draw(8, 3), "o": draw(3, 4, 6)}

    def fn(p, x):
        gate = jax.nn.sigmoid(x @ p["g"])[..., None]
        return jnp.einsum("bthd,hdm->btm", gate * jnp.einsum("btk,khd->bthd", x, p["v"]), p["o"])

    model = Case(fn, params, (X,))
    assert check(model, "o").size == 12
    assert np.bincount(check(model, "o", "permute").blocks).tolist() == [4, 4, 4]


def test_adapters_are_followed():
    """A weight that is a sum of leaves: each summand that is a leaf takes the factors, a product of two does not."""
    params = {"w": draw(8, 12), "more": draw(8, 12), "down": draw(12, 6)}
    model = Case(lambda p, x: x @ (p["w"] + p["more"]) @ p["down"], params, (X,))
    assert touched(check(model, "down")) == {("w", (1,), 1), ("more", (1,), 1), ("down", (0,), -1)}
    params = {"w": draw(8, 12), "a": draw(8, 2), "b": draw(2, 12), "down": draw(12, 6)}
    refused(Case(lambda p, x: x @ (p["w"] + p["a"] @ p["b"]) @ p["down"], params, (X,)), "down")
    beside = Case(lambda p, x: (x @ p["w"] + x @ p["a"] @ p["b"]) @ p["down"], params, (X,))
    assert touched(check(beside, "down")) == {("w", (1,), 1), ("b", (1,), 1), ("down", (0,), -1)}


def test_bfloat16_keeps_its_dtype():
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), MLP)
    program = qjax.trace(mlp, params, X.astype(jnp.bfloat16))
    group = channel_group(program, "down")
    assert isinstance(group, ChannelGroup)
    new = scaled(group, np.full(12, 2.0), lambda leaf, key: params[leaf])
    assert all(a.dtype == jnp.bfloat16 for a in new.values())
    np.testing.assert_array_equal(np.asarray(new["up", ()], np.float32), 2 * np.asarray(params["up"], np.float32))


# ------------------------------------------------------------------------------------------- models of others

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "foreign"))


def foreign(name):
    if name == "linen":
        import test_linen

        return test_linen.language_model()
    if name == "classifier":
        import test_linen

        return test_linen.classifier()
    import test_gemma

    return test_gemma.model(grouped=name == "grouped")


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("name", "site", "wanted"),
    [
        ("grouped", "layer_0/attn/q_einsum/w", {"q_einsum/w": -1, "kv_einsum/w": -1, "pre_attention_norm/scale": 1}),
        ("grouped", "layer_1/attn/attn_vec_einsum/w", {"kv_einsum/w": 1, "attn_vec_einsum/w": -1}),
        ("fused", "layer_1/attn/attn_vec_einsum/w", {"qkv_einsum/w": 1, "attn_vec_einsum/w": -1}),
        ("fused", "layer_0/mlp/linear", {"gating_einsum": 1, "linear": -1}),
        ("classifier", "params/Dense_0/kernel", {"Conv_1/kernel": 1, "Conv_1/bias": 1, "Dense_0/kernel": -1}),
        (
            "linen",
            "params/Block_0/MultiHeadDotProductAttention_0/out/kernel",
            {"value/kernel": 1, "value/bias": 1, "out/kernel": -1},
        ),
    ],
)
def test_models_of_others(name, site, wanted):
    model = foreign(name)
    case = Case(model.fn, model.params, model.inputs(0, 2))
    group = check(case, site)
    assert len(group.touches) == len(wanted)
    assert all(any(t.leaf.endswith(end) and t.power == p for t in group.touches) for end, p in wanted.items())
    check(case, site, "permute")
    if name == "grouped":
        stream = stream_group(case.program)
        assert isinstance(stream, ChannelGroup) and stream.untie == ("embedder/input_embedding",)


def test_a_gemma_whose_head_is_stored_apart_is_rotated():
    """Norms of one plus a scale: folding makes the scale zero."""
    model = foreign("grouped")
    import test_gemma

    params = {**model.params, "head": model.params["embedder"]["input_embedding"]}

    def apart(p, tokens):
        x = p["embedder"]["input_embedding"][tokens]
        for i in range(test_gemma.LAYERS):
            layer = p[f"layer_{i}"]
            x = x + test_gemma.attention(layer["attn"], test_gemma.norm(layer["pre_attention_norm"], x))
            x = x + test_gemma.feed_forward(layer["mlp"], test_gemma.norm(layer["pre_ffw_norm"], x))
        return test_gemma.norm(p["final_norm"], x) @ p["head"].T

    case = Case(apart, params, model.inputs(0, 2))
    group = stream_group(case.program)
    assert isinstance(group, ChannelGroup) and not group.untie and {f.offset for f in group.folds} == {1.0}
    new = folded(group, case.read)
    assert np.abs(new["final_norm/scale", ()]).max() == 0
    matrix = np.linalg.qr(np.random.default_rng(0).standard_normal((32, 32)))[0]
    new |= rotated(group, matrix, overlaid(new, case.read))
    assert distance(case(written(case.params, new)), case.want) < 1e-4
