"""Prepare passes that look at activations: block by block, editing slices of leaves, resumable, lazy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.errors import QjaxError, RecipeError
from qjax.formats import SMOOTH, is_quantized
from qjax.passes import Edits, Leaves
from qjax.statistics import ChannelRange

D, LAYERS = 8, 3


@dataclasses.dataclass(frozen=True)
class Level:
    """Bring the channels in front of ``down`` to one range, by a factor that ``up`` takes up (a ReLU lets it pass)."""

    online: bool = False
    needs_batches: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    statistics: ClassVar[tuple] = (ChannelRange(),)

    def edit(self, program, leaves: Leaves, chosen: Sequence[str], states: Mapping[str, Mapping]) -> Edits:
        slices, smooth, notes = {}, {}, []
        for name in chosen:
            if not name.endswith("down"):
                continue
            site = program.by_name[name]
            up = site.leaf.replace("down", "up")
            factor = jnp.maximum(states[name]["channel_above"], 1e-3)
            if self.online:
                smooth[name] = factor
                continue
            assert leaves.editable(up, site.slice) and leaves.editable(site.leaf, site.slice)
            slices[up, site.slice] = leaves.slice(up, site.slice) / factor
            slices[site.leaf, site.slice] = leaves.slice(site.leaf, site.slice) * factor[:, None]
            notes.append(f"{name} levelled by {float(factor.max()):.4g}")
        return Edits(slices=slices, smooth=smooth, notes=tuple(notes))


def params(stacked: bool) -> dict:
    rng = np.random.default_rng(0)
    make = lambda *shape: rng.standard_normal(shape) / np.sqrt(shape[-2])  # noqa: E731
    up, down = make(LAYERS, D, 2 * D) * np.logspace(-1, 1, 2 * D), make(LAYERS, 2 * D, D)
    layers = {"up": jnp.asarray(up, jnp.float32), "down": jnp.asarray(down, jnp.float32)}
    if stacked:
        return {"layers": layers}
    return {"layers": [jax.tree.map(lambda a, i=i: a[i], layers) for i in range(LAYERS)]}


def layer(h, w):
    return h + jax.nn.relu(h @ w["up"]) @ w["down"]


def scanned(p, x):
    return lax.scan(lambda h, w: (layer(h, w), None), x, p["layers"])[0]


def unrolled(p, x):
    for w in p["layers"]:
        x = layer(x, w)
    return x


def rows(n: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((n, D)), jnp.float32)


BATCHES = [(rows(16, 1),), (rows(16, 2),), (rows(5, 3),)]
RULES = [qjax.Rule("**", weights=qjax.Int(8, per="tensor"))]
GPTQ = [qjax.Rule("**", weights=qjax.Int(4), rounding=qjax.GPTQ())]
FORMS = {"scan": (scanned, True), "list": (unrolled, False)}


def floats(model):
    return jax.tree.map(lambda a: a.dequantize() if is_quantized(a) else a, model.params, is_leaf=is_quantized)


@pytest.mark.every(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rules", [RULES, GPTQ], ids=["nearest", "gptq"])
def test_a_pass_sees_the_activations_of_its_block(form, rules):
    fn, stacked = FORMS[form]
    p = params(stacked)
    model = qjax.quantize(fn, p, recipe=qjax.Recipe(rules, prepare=[Level()]), batches=BATCHES)
    assert sum("levelled" in note for note in model.report.notes) == LAYERS
    if rules is not RULES:
        return
    # By hand: float statistics, since rounding to nearest lets later blocks see the float function.
    hs, got = [b[0] for b in BATCHES], floats(model)
    for i in range(LAYERS):
        w = jax.tree.map(lambda a: a[i], p["layers"]) if stacked else p["layers"][i]  # noqa: B023
        top = jnp.stack([jax.nn.relu(h @ w["up"]).max(0) for h in hs]).max(0)
        want = w["down"] * jnp.maximum(top, 1e-3)[:, None]
        found = got["layers"]["down"][i] if stacked else got["layers"][i]["down"]
        step = jnp.abs(want).max() / 127.5
        assert float(jnp.abs(found - want).max()) <= float(step) * 0.51
        hs = [layer(h, w) for h in hs]


def test_factors_are_kept_beside_the_weight():
    p = params(True)
    plain = qjax.quantize(scanned, p, *BATCHES[0], recipe=qjax.Recipe(RULES))
    model = qjax.quantize(scanned, p, recipe=qjax.Recipe(RULES, prepare=[Level(online=True)]), batches=BATCHES)
    assert model.params["layers"]["down"].aux[SMOOTH].shape == (LAYERS, 1, 2 * D)
    assert SMOOTH not in model.params["layers"]["up"].aux
    x = rows(20, 9)
    want = scanned(p, x)
    assert float(jnp.abs(model(model.params, x) - want).max()) < 2 * float(jnp.abs(plain(plain.params, x) - want).max())
    np.testing.assert_allclose(scanned(floats(model), x), model(model.params, x), rtol=1e-4, atol=1e-4)


def test_two_passes_see_what_the_one_before_did():
    model = qjax.quantize(scanned, params(True), recipe=qjax.Recipe(RULES, prepare=[Level(), Level()]), batches=BATCHES)
    notes = [note for note in model.report.notes if "levelled" in note]
    assert len(notes) == 2 * LAYERS
    assert all(note.endswith("levelled by 1") for note in notes if note not in notes[::2]), notes


@pytest.mark.every(2)
@pytest.mark.parametrize("rules", [RULES, GPTQ], ids=["nearest", "gptq"])
def test_a_killed_job_goes_on_to_the_same_result(tmp_path, rules):
    recipe = qjax.Recipe(rules, prepare=[Level()])
    whole = qjax.quantize(scanned, params(True), recipe=recipe, batches=BATCHES)

    class Killed(Exception):
        pass

    def kill(done, total, name):
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        qjax.quantize(scanned, params(True), recipe=recipe, batches=BATCHES, resume=tmp_path / "job", progress=kill)
    again = qjax.quantize(scanned, params(True), recipe=recipe, batches=BATCHES, resume=tmp_path / "job")
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert whole.report.notes == again.report.notes


def test_lazy_leaves_are_edited_slice_by_slice():
    p, read = params(True), []

    def lazy(name):
        a = np.asarray(p["layers"][name])
        return qjax.Lazy(a.shape, a.dtype, lambda: a, lambda i: (read.append((name, i)), a[i])[1])

    held = {"layers": {name: lazy(name) for name in ("up", "down")}}
    recipe = qjax.Recipe(RULES, prepare=[Level()])
    model = qjax.quantize(scanned, held, recipe=recipe, batches=BATCHES)
    want = qjax.quantize(scanned, p, recipe=recipe, batches=BATCHES)
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {name for name, _ in read} == {"up", "down"}


@dataclasses.dataclass(frozen=True)
class Wrong:
    how: str
    needs_batches: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    statistics: ClassVar[tuple] = (ChannelRange(),)

    def edit(self, program, leaves, chosen, states):
        first = [name for name in chosen if name.endswith("up")]
        if not first:
            return Edits()
        site = program.by_name[first[0]]
        return {
            "other block": Edits(slices={(site.leaf, ((0, LAYERS - 1),)): leaves.slice(site.leaf, ((0, 0),))}),
            "shape": Edits(slices={(site.leaf, site.slice): leaves.slice(site.leaf, site.slice)[:2]}),
            "factors": Edits(smooth={first[0]: jnp.zeros(D)}),
            "site": Edits(smooth={"layers/9/up": jnp.ones(D)}),
        }[self.how]


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("other block", "which other blocks read"),
        ("shape", r"from float32\[8, 16\] to float32\[2, 16\]"),
        ("factors", "positive finite"),
        ("site", "no site with a weight"),
    ],
)
def test_the_verifier_names_what_is_wrong(how, message):
    with pytest.raises(QjaxError, match=message):
        qjax.quantize(scanned, params(True), recipe=qjax.Recipe(RULES, prepare=[Wrong(how)]), batches=BATCHES)


def test_what_cannot_be_asked_for_is_refused():
    recipe = qjax.Recipe(RULES, prepare=[Level()])
    with pytest.raises(RecipeError, match="looks at activations"):
        qjax.quantize(scanned, params(True), *BATCHES[0], recipe=recipe)

    @dataclasses.dataclass(frozen=True)
    class Plain:
        needs_batches: ClassVar[bool] = False
        exact: ClassVar[bool] = True

        def edit(self, program, leaves, chosen):
            return Edits()

    with pytest.raises(RecipeError, match="put it in front"):
        recipe = qjax.Recipe(RULES, prepare=[Level(), Plain()])
        qjax.quantize(scanned, params(True), recipe=recipe, batches=BATCHES)


def test_leaves_lay_edits_over_one_another():
    rng = np.random.default_rng(5)
    base = rng.standard_normal((3, 4, 5)).astype(np.float32)
    leaves, want = Leaves(["a"], [base]), base.copy()
    for key in [((0, 1),), ((1, 2),), ((0, 2), (1, 3)), (), ((1, 0),), ((0, 0), (2, 4))]:
        where = tuple(dict(key).get(axis, slice(None)) for axis in range(3))
        value = rng.standard_normal(want[where].shape).astype(np.float32)
        leaves.put(0, key, jnp.asarray(value))
        want[where] = value
        np.testing.assert_array_equal(leaves["a"], want)
        for other in [(), ((0, 1),), ((1, 2),), ((0, 2), (1, 3)), ((2, 4),), ((0, 2), (2, 1))]:
            there = tuple(dict(other).get(axis, slice(None)) for axis in range(3))
            np.testing.assert_array_equal(leaves.slice("a", other), want[there], err_msg=f"{key} {other}")
