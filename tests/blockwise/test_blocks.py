"""Quantizing block by block: the same result as one layer after the other by hand, however the layers are written."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constructs import CASES, batch, params
from jax import lax

import qjax
from qjax.blockwise import blocks_of
from qjax.errors import CheckpointError, DataError, RecipeError
from qjax.formats import QStack, is_quantized

D, LAYERS = 16, 3
INT8 = qjax.Int(8, per="tensor")
GPTQ = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=8, scale="qmax"), rounding=qjax.GPTQ())])
STATIC = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.static(INT8))])


def stacked(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)  # noqa: E731
    return {"layers": {"up": make(LAYERS, D, 2 * D), "down": make(LAYERS, 2 * D, D)}, "head": make(D, 5)}


def listed(p: dict) -> dict:
    return {"layers": [jax.tree.map(lambda a, i=i: a[i], p["layers"]) for i in range(LAYERS)], "head": p["head"]}


def rows(n: int, seed: int = 1) -> jax.Array:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9).standard_normal((D, D))
    return jnp.asarray(rng.standard_normal((n, D)) @ mix, jnp.float32)


BATCHES = [rows(12, 1), rows(12, 2), rows(7, 3)]


def layer(h, w):
    return h + jnp.tanh(h @ w["up"]) @ w["down"]


def unrolled(p, x):
    for w in p["layers"]:
        x = layer(x, w)
    return x @ p["head"]


def scanned(p, x):
    return lax.scan(lambda h, w: (layer(h, w), None), x, p["layers"])[0] @ p["head"]


def indexed(p, x):
    for i in range(LAYERS):
        x = layer(x, jax.tree.map(lambda a, i=i: a[i], p["layers"]))
    return x @ p["head"]


def reversed_scan(p, x):
    flipped = jax.tree.map(lambda a: a[::-1], p["layers"])
    return lax.scan(lambda h, w: (layer(h, w), None), x, flipped)[0] @ p["head"]


def with_outputs(p, x):
    h, ys = lax.scan(lambda h, w: ((y := layer(h, w)), y.sum()), x, p["layers"])
    return h @ p["head"] + ys.sum() * 0


def cast(p, x):
    p = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), p)
    return scanned(p, x)


def jitted_layers(p, x):
    step = jax.jit(layer)
    for w in p["layers"]:
        x = step(x, w)
    return x @ p["head"]


FORMS = {
    "unrolled": (unrolled, listed),
    "jit around all": (jax.jit(unrolled), listed),
    "jit of each layer": (jitted_layers, listed),
    "remat of all": (jax.checkpoint(unrolled), listed),
    "scan": (scanned, lambda p: p),
    "scan in a jit": (jax.jit(scanned), lambda p: p),
    "scan with outputs": (with_outputs, lambda p: p),
    "scan over remat": (
        lambda p, x: lax.scan(lambda h, w: (jax.checkpoint(layer)(h, w), None), x, p["layers"])[0] @ p["head"],
        lambda p: p,
    ),
    "scan in reverse": (
        lambda p, x: lax.scan(lambda h, w: (layer(h, w), None), x, p["layers"], reverse=True)[0] @ p["head"],
        lambda p: p,
    ),
    "static index": (indexed, lambda p: p),
}


def by_hand(p: dict, recipe: qjax.Recipe, order=range(LAYERS)) -> dict:
    """One layer after the other: second moments of its inputs, GPTQ, and on through what it became."""
    rounding, fmt = recipe.rules[-1].rounding, recipe.rules[-1].weights

    def rounded(w, xs):
        x = jnp.concatenate(xs)
        moment = {"second_moment": x.T @ x, "rows": jnp.float32(len(x))}
        codes, aux = jax.jit(lambda w: rounding.round(w, fmt, statistics=moment))(w.T)
        return fmt.decode(codes, aux).T

    out = {"layers": {"up": [None] * LAYERS, "down": [None] * LAYERS}}
    hs = list(BATCHES)
    for i in order:
        up, down = p["layers"]["up"][i], p["layers"]["down"][i]
        # within a block all statistics are of the float block
        q_up, q_down = rounded(up, hs), rounded(down, [jnp.tanh(h @ up) for h in hs])
        out["layers"]["up"][i], out["layers"]["down"][i] = q_up, q_down
        hs = [h + jnp.tanh(h @ q_up) @ q_down for h in hs]
    out["layers"] = {k: jnp.stack(v) for k, v in out["layers"].items()}
    return {**out, "head": rounded(p["head"], hs)}


def floats(params) -> dict:
    return jax.tree.map(lambda a: a.dequantize() if is_quantized(a) else a, params, is_leaf=is_quantized)


@pytest.mark.every(8)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_the_layers_gives_what_is_done_by_hand(name):
    fn, form = FORMS[name]
    p = stacked()
    model = qjax.quantize(fn, form(p), recipe=GPTQ, batches=BATCHES)
    want = by_hand(p, GPTQ, range(LAYERS)[::-1] if name == "scan in reverse" else range(LAYERS))
    for a, b in zip(jax.tree.leaves(floats(model.params)), jax.tree.leaves(form(want)), strict=True):
        # sums in another order may move a number across the middle between two codes
        assert float(jnp.mean(jnp.abs(a - b) > 1e-3)) < 0.02, name
    names = [note for note in model.report.notes if "blocks" in note][0]
    assert "layers/0, layers/1, layers/2, after" in names or name == "scan in reverse", names
    x = BATCHES[0]
    np.testing.assert_allclose(model(model.params, x), fn(floats(model.params), x), rtol=1e-4, atol=1e-4)
    error = lambda m: float(jnp.linalg.norm(m(m.params, x) - fn(form(p), x)))  # noqa: E731
    nearest = qjax.quantize(
        fn, form(p), x, recipe=qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=8, scale="qmax"))])
    )
    assert error(model) < error(nearest)


def test_casts_of_a_stack_stay_in_their_blocks():
    """Run beforehand they would make a copy of all weights; the statistics are those of the cast weights."""
    p = stacked()
    program = qjax.trace(cast, p, BATCHES[0])
    schedule = blocks_of(program)
    assert [b.name for b in schedule.blocks] == ["layers/0", "layers/1", "layers/2", "after layers/2"]
    assert all(use.index is not None for b in schedule.blocks[:3] for use in b.reads if use.value < 3)
    model = qjax.quantize(cast, p, recipe=GPTQ, batches=BATCHES)
    assert len(model.report.quantized) == 2 * LAYERS + 1


@pytest.mark.every(6)
@pytest.mark.parametrize("name", CASES)
def test_constants_are_those_of_the_whole_function(name):
    """Every construct in blocks of its own making: static scales are those that `calibrate` finds."""
    fn, p, x = CASES[name], params(), batch()
    if name in ("cond", "switch", "associative_scan"):
        pytest.skip("a branch that no batch reaches has no range" if name != "associative_scan" else "no static recipe")
    whole = qjax.quantize(fn, p, x, recipe=STATIC, batches=[x])
    parts = qjax.quantize(fn, p, x, recipe=STATIC, batches=[x], blocks="*")
    assert jax.tree.structure(whole.params) == jax.tree.structure(parts.params)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-5)


@pytest.mark.slow
def test_layers_of_several_formats():
    """Slices that differ are stored as a stack of parts, float ones among them."""
    p = stacked()
    recipe = qjax.Recipe(
        [
            qjax.Rule("layers/1/**", weights=qjax.Int(8), rounding=qjax.GPTQ()),
            qjax.Rule("layers/2/up", skip=True),
            *GPTQ.rules,
        ]
    )
    model = qjax.quantize(scanned, p, recipe=recipe, batches=BATCHES)
    again = qjax.quantize(unrolled, listed(p), recipe=recipe, batches=BATCHES)
    assert isinstance(model.params["layers"]["up"], QStack)
    np.testing.assert_array_equal(model.params["layers"]["up"].dequantize()[2], p["layers"]["up"][2])
    want = jax.tree.map(lambda *a: jnp.stack(a), *floats(again.params)["layers"])
    for a, b in zip(jax.tree.leaves(floats(model.params)["layers"]), jax.tree.leaves(want), strict=True):
        assert float(jnp.mean(jnp.abs(a - b) > 1e-3)) < 0.02
    x = BATCHES[0]
    np.testing.assert_allclose(model(model.params, x), scanned(floats(model.params), x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_smoothed_inputs_and_gptq_together():
    p = stacked()
    loud = [x * jnp.where(jnp.arange(D) == 3, 40.0, 1.0) for x in BATCHES]
    rule = lambda smooth: qjax.Rule(  # noqa: E731
        "**", weights=qjax.Int(8), rounding=qjax.GPTQ(), inputs=qjax.static(INT8, smooth=smooth)
    )
    errors = []
    for smooth in (None, 0.6):
        model = qjax.quantize(scanned, p, recipe=qjax.Recipe([rule(smooth)]), batches=loud)
        errors.append(float(jnp.linalg.norm(model(model.params, loud[0]) - scanned(p, loud[0]))))
    assert errors[1] < errors[0]


# ------------------------------------------------------------------------------------------------------ lazy, resumed


class Counted:
    """A leaf that counts how often each slice is read."""

    def __init__(self, array):
        self.array, self.reads, self.whole = np.asarray(array), [0] * len(array), 0

    def lazy(self) -> qjax.Lazy:
        return qjax.Lazy(self.array.shape, self.array.dtype, self._all, self._one)

    def _all(self):
        self.whole += 1
        return self.array

    def _one(self, i):
        self.reads[i] += 1
        return self.array[i]


@pytest.mark.every(2)
@pytest.mark.parametrize("recipe", [GPTQ, STATIC], ids=["gptq", "static"])
def test_lazy_leaves_are_read_slice_by_slice(recipe):
    p = stacked()
    want = qjax.quantize(scanned, p, recipe=recipe, batches=BATCHES, blocks="layers/*")
    counted = {k: Counted(v) for k, v in p["layers"].items()}
    lazy = {"layers": {k: c.lazy() for k, c in counted.items()}, "head": p["head"]}
    model = qjax.quantize(scanned, lazy, recipe=recipe, batches=BATCHES)
    for a, b in zip(jax.tree.leaves(want.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)
    for c in counted.values():
        assert c.whole == 0 and max(c.reads) <= 3, (c.whole, c.reads)
    assert "Lazy(float32[3,16,32])" in repr(lazy["layers"]["up"])


def test_lazy_leaves_without_data():
    p = stacked()
    lazy = jax.tree.map(lambda a: qjax.Lazy(a.shape, a.dtype, lambda a=a: np.asarray(a)), p)
    plan = qjax.plan(scanned, lazy, BATCHES[0], recipe="W8A16")
    model = qjax.quantize(scanned, lazy, BATCHES[0], recipe="W8A16")
    want = qjax.quantize(scanned, p, BATCHES[0], recipe="W8A16")
    assert plan.stored_bytes == want.report.stored_bytes
    for a, b in zip(jax.tree.leaves(want.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.every(9)
@pytest.mark.parametrize("form", ["scan", "unrolled"])
@pytest.mark.parametrize("recipe", [GPTQ, STATIC], ids=["gptq", "static"])
def test_donated_leaves_are_freed_and_nothing_else_changes(form, recipe):
    fn, make = FORMS[form]
    want = qjax.quantize(fn, make(stacked()), recipe=recipe, batches=BATCHES, blocks="layers/*")
    given = jax.tree.map(jnp.copy, make(stacked()))
    model = qjax.quantize(fn, given, recipe=recipe, batches=BATCHES, blocks="layers/*", donate=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    for a, b in zip(jax.tree.leaves(want.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)


class Killed(Exception):
    pass


@pytest.mark.every(4)
@pytest.mark.parametrize("form", ["scan", "unrolled"])
@pytest.mark.parametrize("recipe", [GPTQ, STATIC], ids=["gptq", "static"])
def test_a_killed_job_goes_on_to_the_same_result(tmp_path, form, recipe):
    fn, make = FORMS[form]
    p = make(stacked())
    want = qjax.quantize(fn, p, recipe=recipe, batches=BATCHES, resume=tmp_path / "whole")
    for stop in range(1, LAYERS + 1):
        seen = []

        def progress(done, total, name, stop=stop, seen=seen):
            seen.append(name)
            if len(seen) == stop:
                raise Killed

        folder = tmp_path / str(stop)
        with pytest.raises(Killed):
            qjax.quantize(fn, p, recipe=recipe, batches=BATCHES, resume=folder, progress=progress)
        model = qjax.quantize(fn, p, recipe=recipe, batches=BATCHES, resume=folder)
        for a, b in zip(jax.tree.leaves(want.params), jax.tree.leaves(model.params), strict=True):
            np.testing.assert_array_equal(a, b)
        assert [r.sqnr_db for r in model.report.quantized] == [r.sqnr_db for r in want.report.quantized]


def test_a_folder_of_another_job_is_refused_and_a_damaged_one_reported(tmp_path):
    p = stacked()
    qjax.quantize(scanned, p, recipe=GPTQ, batches=BATCHES, resume=tmp_path / "job")
    with pytest.raises(CheckpointError, match="recipe differ"):
        qjax.quantize(scanned, p, recipe=STATIC, batches=BATCHES, resume=tmp_path / "job")
    other = {**p, "head": p["head"] + 1}
    with pytest.raises(CheckpointError, match="parameters differ"):
        qjax.quantize(scanned, other, recipe=GPTQ, batches=BATCHES, resume=tmp_path / "job")
    with pytest.raises(CheckpointError, match="batches differ"):
        qjax.quantize(scanned, p, recipe=GPTQ, batches=BATCHES[:2], resume=tmp_path / "job")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds other things"):
        qjax.quantize(scanned, p, recipe=GPTQ, batches=BATCHES, resume=tmp_path / "other")
    big = max((f for f in (tmp_path / "job" / "blocks").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(big.read_bytes())
    data[len(data) // 2] ^= 0xFF
    big.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="damaged|changed"):
        qjax.quantize(scanned, p, recipe=GPTQ, batches=BATCHES, resume=tmp_path / "job")


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_input():
    p = stacked()
    with pytest.raises(RecipeError, match="matches the beginning of no site name"):
        qjax.quantize(scanned, p, recipe=GPTQ, batches=BATCHES, blocks="blocks/*")
    with pytest.raises(DataError, match="gone through only once"):
        qjax.quantize(scanned, p, recipe=GPTQ, batches=iter(BATCHES))
    with pytest.raises(DataError, match="no calibration batches"):
        qjax.quantize(scanned, p, BATCHES[0], recipe=GPTQ, batches=[])
    with pytest.raises(DataError, match="batch 1: NaN or infinity among the inputs of layers/0/up"):
        qjax.quantize(scanned, p, recipe=GPTQ, batches=[BATCHES[0], BATCHES[1].at[0, 0].set(jnp.nan)])
    with pytest.raises(RecipeError, match="pass calibration data"):
        qjax.quantize(scanned, p, BATCHES[0], recipe=GPTQ)


# ------------------------------------------------------------------------------------------------------------ the plan


def test_the_cost_is_stated_before_the_job():
    p = stacked()
    plan = qjax.plan(scanned, p, BATCHES[0], recipe=GPTQ, batches=3)
    cost = plan.cost
    assert cost.block.startswith("layers/") and cost.parts["parameters"] == plan.float_bytes
    k = D * 2  # statistics of one layer: K² + 1 numbers for each of its products
    assert cost.parts["statistics"] == 4 * (D * D + 1 + k * k + 1)
    assert cost.parts["handed on"] == 3 * 4 * 12 * D
    assert cost.peak_bytes == sum(cost.parts.values()) and "GFLOP" in str(plan)
    lazy = jax.tree.map(lambda a: qjax.Lazy(a.shape, a.dtype, lambda a=a: a), p)
    less = qjax.plan(scanned, lazy, BATCHES[0], recipe=GPTQ, batches=3).cost
    assert less.parts["parameters"] == 0 and less.parts["parameters of the block"] == 4 * 2 * 2 * D * D
    nothing_runs = qjax.plan(scanned, p, BATCHES[0], recipe="W8A16").cost
    assert nothing_runs.parts["statistics"] == nothing_runs.flops == 0
    assert nothing_runs.parts["values of a batch, or a weight being rounded"] == 4 * 4 * 2 * D * D
    whole = qjax.plan(scanned, p, BATCHES[0], recipe=STATIC, batches=2).cost
    assert whole.block == "" and whole.flops == 2 * 2 * 12 * (LAYERS * 4 * D * D + D * 5)
    assert whole.seconds(1e9) == pytest.approx(whole.flops / 1e9) and whole.seconds() > 0
    assert qjax.plan(scanned, p, BATCHES[0], recipe=STATIC, resume=True).cost.block != ""


def test_sites_that_read_the_same_activations_share_their_statistics():
    p = {"layers": [{"q": jnp.eye(D), "k": 2 * jnp.eye(D), "o": jnp.eye(D)} for _ in range(2)]}

    def fn(p, x):
        for w in p["layers"]:
            x = x + jnp.tanh((x @ w["q"]) * (x @ w["k"])) @ w["o"]
        return x

    shared = qjax.plan(fn, p, BATCHES[0], recipe=GPTQ).cost.parts["statistics"]
    assert shared == 2 * 4 * (D * D + 1)
    model = qjax.quantize(fn, p, recipe=GPTQ, batches=BATCHES)
    assert len(model.report.quantized) == 6
