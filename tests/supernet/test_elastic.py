"""Supernets from traced functions: values, derivatives, scans, one program for all choices, conversion."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from constructs import CASES, batch, params
from jax import lax
from safetensors.numpy import load_file

import qjax
from qjax.errors import CheckpointError, DataError, RecipeError, SearchError
from qjax.supernet import At, Space, init_steps, lsq_plus, sample_choice
from qjax.supernet.export import write
from qjax.supernet.rewriter import elastic_input
from qjax.supernet.tables import CHOICE, INPUT_SIGNED, Forms

SPACE = Space((2, 4, 8), (0, 3, 8), ends=None)


def network(p, x):
    """A convolution, two scanned layers and a head."""
    y = lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = jax.nn.relu(y).mean((1, 2))
    y, _ = lax.scan(lambda y, w: (y + jnp.tanh(y @ w), None), y, p["layers"])
    return y @ p["head"].T


def given(seed=0):
    k = jax.random.split(jax.random.key(seed), 4)
    p = {
        "conv": jax.random.normal(k[0], (3, 3, 2, 8)) * 0.4,
        "layers": jax.random.normal(k[1], (2, 8, 8)) * 0.4 + 0.1,
        "head": jax.random.normal(k[2], (5, 8)),
    }
    return p, jax.random.normal(k[3], (6, 5, 5, 2))


def rounded(a, table, row, axis, kind, signed=True):
    """One operand by the tables of its site and the pieces of `qjax.supernet`, an oracle for the wiring."""
    if kind == "input":
        if row[1] == 0:
            return a
        bits, offset = row[1], None if row[4] else table["input.offset"][0, row[1] - 2]
        scale = table["input.scale" if row[4] else "input.scale.asymmetric"][0, bits - 2]
        return lsq_plus(a, scale, offset, bits, signed=signed)
    where = "channel" if row[2] else "tensor"
    scale = table[f"weight.scale.{where}" + ("" if row[3] else ".asymmetric")][:, row[0] - 2]
    offset = None if row[3] else table[f"weight.offset.{where}"][:, row[0] - 2]
    shape = [-1 if d == axis else 1 for d in range(a.ndim)]
    return lsq_plus(a, scale.reshape(shape), None if offset is None else offset.reshape(shape), row[0])


def by_hand(p, state, choice, x):
    rows = dict(zip(("conv", "layers/0", "layers/1", "head"), np.asarray(choice), strict=True))
    s = state
    y = lax.conv_general_dilated(
        rounded(x, s["conv"], rows["conv"], 0, "input"),
        rounded(p["conv"], s["conv"], rows["conv"], 3, "weight"),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = jax.nn.relu(y).mean((1, 2))
    for i in range(2):
        n = f"layers/{i}"
        a = rounded(y, s[n], rows[n], 0, "input", signed=i > 0)
        y = y + jnp.tanh(a @ rounded(p["layers"][i], s[n], rows[n], 1, "weight"))
    return rounded(y, s["head"], rows["head"], 0, "input") @ rounded(p["head"], s["head"], rows["head"], 0, "weight").T


@pytest.fixture(scope="module")
def net():
    p, x = given()
    t = qjax.elastic(network, SPACE)
    return t, p, x, t.init(p, x), t.domain(p, x)


def test_a_supernet_is_its_pieces_at_every_choice_in_one_program(net):
    t, p, x, state, domain = net
    assert domain.sites == ("conv", "layers/0", "layers/1", "head")
    assert state["conv"]["weight.scale.channel"].shape == (8, 7) and state["head"]["weight.offset.tensor"].shape == (
        1,
        7,
    )
    want = init_steps(p["layers"][1], symmetric=False, channel_axis=1)
    np.testing.assert_allclose(state["layers/1"]["weight.scale.channel.asymmetric"], want[0], rtol=1e-5)
    np.testing.assert_allclose(state["layers/1"]["weight.offset.channel"], want[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state["conv"]["input.scale"], init_steps(x, symmetric=True)[0], rtol=1e-5)
    assert [float(state[n]["input.signed"][0]) for n in domain.sites] == [1, 0, 1, 1]

    traced = []

    @jax.jit
    def run(p, state, choice):
        traced.append(1)
        return t.apply(p, state, choice, x)[0]

    choices = [sample_choice(jax.random.key(n), domain) for n in range(4)]
    choices += [domain.uniform(2, 3, (False, False, False)), domain.uniform(8, 0)]
    for choice in choices:
        np.testing.assert_allclose(run(p, state, choice), by_hand(p, state, choice, x), rtol=1e-4, atol=1e-4)
    assert len(traced) == 1
    population = jnp.stack(choices)
    mapped = jax.jit(lambda c: lax.map(lambda c: t.apply(p, state, c, x)[0], c))(population)
    together = jax.jit(jax.vmap(lambda c: t.apply(p, state, c, x)[0]))(population)
    np.testing.assert_allclose(mapped, together, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(mapped[2], run(p, state, choices[2]), rtol=1e-3, atol=1e-3)


def test_derivatives_reach_the_chosen_columns_and_no_others(net):
    t, p, x, state, domain = net
    choice = domain.uniform(4, 3, (True, False, True))
    choice[1, 2:] = (0, 1, 0)
    dp, ds = jax.jit(jax.grad(lambda p, s: jnp.sum(t.apply(p, s, choice, x)[0] ** 2), (0, 1)))(p, state)
    hand = jax.jit(jax.grad(lambda p: jnp.sum(by_hand(p, state, choice, x) ** 2)))(p)
    for a, b in zip(jax.tree.leaves(dp), jax.tree.leaves(hand), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    for n, name in enumerate(domain.sites):
        used = (
            {"weight.scale.tensor": 2} if n == 1 else {"weight.scale.channel.asymmetric": 2, "weight.offset.channel": 2}
        )
        used |= {"input.scale.asymmetric": 1, "input.offset": 1} if n == 1 else {"input.scale": 1}
        for field, g in ds[name].items():
            columns = np.flatnonzero(np.abs(np.asarray(g)).reshape(-1, g.shape[-1]).sum(0)).tolist()
            assert columns in ([used[field]], []) if field in used else columns == [], (name, field, columns)
        assert np.abs(ds[name][next(iter(used))]).sum() > 0


def test_a_subnet_becomes_a_model_with_the_same_outputs(net):
    t, p, x, state, domain = net
    # unsigned activations, float ones, and layers of one scan in several formats
    choice = np.array([[4, 8, 1, 0, 1], [4, 8, 1, 1, 1], [8, 3, 0, 1, 0], [2, 0, 0, 0, 1]], np.int32)
    model = t.convert(p, state, choice, x)
    np.testing.assert_allclose(model(model.params, x), t.apply(p, state, choice, x)[0], rtol=1e-4, atol=1e-4)
    assert model.params["conv"].fmt == qjax.formats.Affine(4)
    assert model.params["head"].fmt == qjax.formats.Affine(2, per="tensor")
    assert model.params["head"].nbytes == 5 * 8 * 2 // 8 + 8
    assert t.recipe(p, state, choice, x) == model.recipe


def read_codes(entry, codes):
    """Codes [N, K] of a layer by the words of the manifest."""
    if entry["codes"] == "int8":
        return codes.astype(np.int64)
    bits = int(entry["codes"].split()[1])
    stream = np.unpackbits(codes, axis=-1, bitorder="little")[..., : entry["k"] * bits]
    numbers = stream.reshape(*codes.shape[:-1], entry["k"], bits) @ (1 << np.arange(bits))
    return np.where(numbers >= 1 << (bits - 1), numbers - (1 << bits), numbers)


def test_a_subnet_is_exported_as_codes_that_a_reader_with_numpy_multiplies(net, tmp_path):
    t, p, x, state, domain = net
    choice = np.array([[4, 8, 1, 0, 1], [4, 8, 1, 1, 1], [8, 3, 0, 1, 0], [2, 8, 0, 0, 0]], np.int32)
    write(tmp_path / "subnet", {}, {}, {}, {})
    folder = t.export(tmp_path / "subnet", p, state, choice, x)  # in the place of another
    assert sorted(f.name for f in folder.iterdir()) == ["subnet.json", "subnet.safetensors", "tables.safetensors"]
    said = json.loads((folder / "subnet.json").read_text())
    assert said["version"] == 1 and Space.from_dict(said["space"]) == SPACE
    for name, digest in said["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    found = load_file(folder / "subnet.safetensors")
    matrices = {"conv": p["conv"].reshape(18, 8).T, "layers/0": p["layers"][0].T, "layers/1": p["layers"][1].T,
                "head": p["head"]}  # fmt: skip
    for (name, entry), row in zip(said["sites"].items(), choice, strict=True):
        bits, a_bits, channel, symmetric, act_symmetric = (int(v) for v in row)
        assert [entry[k] for k in ("weight_bits", "act_bits", "per_channel", "weight_symmetric", "act_symmetric")] == [
            *map(int, row)
        ]
        where = "channel" if channel else "tensor"
        table = state[name]["weight.scale." + where + ("" if symmetric else ".asymmetric")]
        step = np.abs(np.asarray(table, np.float64)[:, bits - 2]) + 1e-6
        beta = np.zeros(1) if symmetric else np.asarray(state[name][f"weight.offset.{where}"], np.float64)[:, bits - 2]
        w = np.asarray(matrices[name], np.float64)
        exact = (w - beta[:, None]) / step[:, None]
        codes = read_codes(entry, found[f"{name}/weight.codes"])
        assert found[f"{name}/weight.codes"].dtype == (np.int8 if bits == 8 else np.uint8)
        clipped = np.clip(exact, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert codes.shape == w.shape and (np.abs(codes - clipped) < 0.5 + 1e-3).all()
        np.testing.assert_allclose(found[f"{name}/weight.scale"], step, rtol=1e-6)
        assert (f"{name}/weight.offset" in found) == (not symmetric)
        assert (f"{name}/weight.code_sums" in found) == (not symmetric or not act_symmetric)
        if f"{name}/weight.code_sums" in found:
            np.testing.assert_array_equal(found[f"{name}/weight.code_sums"], codes.sum(1))
    entry = said["sites"]["conv"]
    assert (entry["in_axes"], entry["out_axes"], entry["n"], entry["k"]) == ([0, 1, 2], [3], 8, 18)
    assert [said["sites"][n]["input_signed"] for n in said["sites"]] == [True, False, True, True]
    # the product of the last layer as section 4 of the specification has it, on what the supernet gives it
    head = {k.removeprefix("head/"): v.astype(np.float64) for k, v in found.items() if k.startswith("head/")}
    c_w = read_codes(said["sites"]["head"], found["head/weight.codes"])
    a = np.asarray(jax.random.normal(jax.random.key(5), (4, 8)), np.float64)
    s_x, b_x, s_w, b_w = (head[k] for k in ("input.scale", "input.offset", "weight.scale", "weight.offset"))
    c_x = np.clip(np.rint((a - b_x) / s_x), -128, 127)
    y = s_w * s_x * (c_x @ c_w.T) + s_w * b_x * head["weight.code_sums"]
    y = y + s_x * b_w * c_x.sum(1, keepdims=True) + 8 * b_w * b_x
    row = dict(zip(domain.sites, choice, strict=True))["head"]
    want = rounded(a, state["head"], row, 0, "input") @ rounded(p["head"], state["head"], row, 0, "weight").T
    np.testing.assert_allclose(y, want, atol=2e-5)
    tables = load_file(folder / "tables.safetensors")
    assert set(tables) == {f"{n}/{k}" for n in domain.sites for k in state[n]}
    np.testing.assert_allclose(
        tables["head/weight.scale.channel"], np.abs(state["head"]["weight.scale.channel"]) + 1e-6
    )
    np.testing.assert_array_equal(tables["head/weight.offset.tensor"], state["head"]["weight.offset.tensor"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").touch()
    with pytest.raises(CheckpointError, match="other things and no exported subnet"):
        t.export(tmp_path / "other", p, state, choice, x)


@pytest.mark.slow
def test_what_reads_one_weight_is_tied_and_what_an_embedding_reads_is_left():
    def fn(p, ids):
        y = p["table"][ids]
        y = jnp.tanh(y @ p["w"]) @ p["w"].T
        return y @ p["out"] + y @ p["table"].T @ p["last"]

    shapes = {"table": (9, 6), "w": (6, 6), "out": (6, 3), "last": (9, 3)}
    p = {name: jax.random.normal(jax.random.key(n), shape) for n, (name, shape) in enumerate(shapes.items())}
    ids = jnp.arange(5)
    t = qjax.elastic(fn, Space((2, 8), (0,), ends=None))
    domain = t.domain(p, ids)
    assert domain.sites == ("w", "w#1", "out", "last") and domain.leaders == (0, 0, 2, 3)
    state = t.init(p, ids)
    assert state["w#1"] == {} and set(t.weights(p, ids)) == {"out", "last"}
    choice = sample_choice(jax.random.key(2), domain)
    assert (choice[0] == choice[1]).all()
    jax.eval_shape(t.init, p, ids)
    with pytest.raises(RecipeError, match="no site matches 'outt' in at .did you mean 'out'"):
        qjax.elastic(fn, Space(at=(At("outt", skip=True),))).domain(p, ids)
    assert "out" not in qjax.elastic(fn, Space(at=(At("out", skip=True),))).domain(p, ids).sites
    for name in ("fused_split", "shard_map_psum"):
        with pytest.raises(RecipeError, match=r"w.*: it reads 32 of the 64 numbers of w"):
            qjax.elastic(CASES[name]).domain(params(), batch())
    tied = t.convert(p, state, domain.uniform(2), ids)  # a weight is rounded by its first reader's channels everywhere
    np.testing.assert_allclose(
        tied(tied.params, ids), t.apply(p, state, domain.uniform(2), ids)[0], rtol=1e-4, atol=1e-4
    )


def test_a_weight_that_something_else_reads_in_float_is_not_packed():
    def fn(p, x):
        return x @ p["a"] @ p["b"] + jnp.tanh(p["b"]).sum()

    p = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 3))}
    x = jnp.ones((2, 4))
    for skip, refused in ((), True), ((At("b", skip=True),), False):
        t = qjax.elastic(fn, Space((4, 8), (0,), (True,), (True,), (True,), ends=None, at=skip))
        choice = t.domain(p, x).uniform(4)
        state = {name: {"weight.scale.channel": jnp.full((n, 7), 0.2)} for name, n in (("a", 4), ("b", 3))}
        state = {name: state[name] for name in t.domain(p, x).sites}
        if refused:
            with pytest.raises(RecipeError, match=r"b: b is read outside of products too \(by tanh\)"):
                t.convert(p, state, choice, x)
        else:
            model = t.convert(p, state, choice, x)
            np.testing.assert_allclose(model(model.params, x), t.apply(p, state, choice, x)[0], rtol=1e-5)


def test_weight_decay_leaves_the_sign_of_activations():
    forms = Forms((), (True, False))
    x = jnp.linspace(-1.0, 2.0, 7)
    tables = {"input.scale": jnp.full((1, 7), 0.3), "input.scale.asymmetric": jnp.full((1, 7), 0.4),
              "input.offset": jnp.full((1, 7), 0.1)}  # fmt: skip
    decay = optax.adamw(0.1, weight_decay=1.0)
    for signed in (0.0, 1.0):
        flag = {INPUT_SIGNED: jnp.full((1,), signed)}
        moments = decay.init(flag)
        for _ in range(30):
            updates, moments = decay.update({INPUT_SIGNED: jnp.zeros(1)}, moments, flag)
            flag = optax.apply_updates(flag, updates)
        assert float(flag[INPUT_SIGNED][0]) < 0.1
        for row in ([8, 3, 1, 1, 1], [8, 3, 1, 1, 0]):
            own = {**tables, CHOICE: jnp.asarray(row)}
            got = elastic_input(x, {**own, **flag}, forms)
            np.testing.assert_array_equal(got, elastic_input(x, {**own, INPUT_SIGNED: jnp.full((1,), signed)}, forms))
            assert bool((got < -0.2).any()) == bool(signed)


def test_what_does_not_belong_is_refused(net):
    t, p, x, state, domain = net
    choice = domain.uniform(4)
    with pytest.raises(DataError, match=r"a choice for these 4 sites is int32 \[4, 5\], not \[3, 5\]"):
        t.apply(p, state, choice[:3], x)
    with pytest.raises(DataError, match="the state does not belong"):
        t.apply(p, {**state, "head": {}}, choice, x)
    with pytest.raises(SearchError, match="head: the choice says weight_bits = 5, and the space allows 2, 4, 8"):
        t.convert(p, state, np.where(np.arange(4)[:, None] == 3, 5, choice), x)
    small = qjax.elastic(lambda p, x: x @ p["w"], Space((4, 8), (8,), (True,), (True,), (True,), ends=None))
    with pytest.raises(DataError, match="w: NaN or infinity among its inputs"):
        small.init({"w": p["head"].T}, jnp.full((2, 8), jnp.nan))


@pytest.mark.every(8)
@pytest.mark.parametrize("name", ["scan_const", "cond", "expert_einsum", "scan_reversed", "fori", "shard_map_rows",
                                  "reshaped_weight", "scan_of_scan", "jit_shared", "while"])  # fmt: skip
def test_every_construct(name):
    fn, p, x = CASES[name], params(), batch()
    t = qjax.elastic(fn, Space((3, 8), (0, 8), (False, True), (True,), (False,), ends=None))
    domain, state = t.domain(p, x), t.init(p, x)
    run = jax.jit(t.apply)
    outs = [jax.tree.leaves(run(p, state, domain.uniform(8, a), x)[0]) for a in (0, 8)]
    for out in outs:
        for a, b in zip(out, jax.tree.leaves(fn(p, x)), strict=True):
            # 8 bits err by at most 0.0124 an element here. Two scans give sums of their carry [4, 8] besides, whose
            # errors share a sign where one step and one offset serve all of it: 0.057 in all, 0.0018 an element.
            each, count = (0.015, 1) if a.ndim > 1 else (0.002, x.size)
            np.testing.assert_allclose(a / count, b / count, rtol=0, atol=each)
            assert (np.asarray(a) != b).any() or name == "cond"  # whose other branch runs
    model = t.convert(p, state, domain.uniform(8), x)
    for a, b in zip(outs[1], jax.tree.leaves(model(model.params, x)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
