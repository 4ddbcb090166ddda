"""A prepare pass and a site matcher as a third party would write them, without touching qjax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.composites import Activation, Level, register_matcher
from qjax.errors import QjaxError, RecipeError
from qjax.formats import is_quantized
from qjax.passes import Edits
from qjax.testing import check_pass


@dataclasses.dataclass(frozen=True)
class Balance:
    """Move scale between two products around a ReLU, so that both have rows of like size (Nagel et al. 2019)."""

    first: str
    second: str
    needs_batches: ClassVar[bool] = False
    exact: ClassVar[bool] = True

    def edit(self, program, leaves: Mapping[str, jax.Array], chosen: Sequence[str]) -> Edits:
        if self.first not in chosen or self.second not in chosen:
            return Edits(notes=(f"{self.first} and {self.second} are not both quantized: left alone",))
        a, b = leaves[self.first], leaves[self.second]
        scale = jnp.sqrt(jnp.abs(b).max(1) / jnp.abs(a).max(0))
        return Edits({self.first: a * scale, self.second: b / scale[:, None]}, (f"{self.first} balanced",))


def params():
    rng = np.random.default_rng(0)
    spread = np.logspace(-2, 2, 16)  # every hidden unit matters alike, but their weights are of very unlike size
    up, down = rng.standard_normal((8, 16)) * spread, rng.standard_normal((16, 4)) / spread[:, None]
    return {"up": jnp.asarray(up, jnp.float32), "down": jnp.asarray(down, jnp.float32)}


def fn(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]


X = jnp.asarray(np.random.default_rng(1).standard_normal((5, 8)), jnp.float32)
WEIGHTS = qjax.Rule("**", weights=qjax.Int(4, per="tensor"))


def test_the_property_suite():
    check_pass(Balance("up", "down"), fn, params(), X)


def test_a_pass_runs_before_rounding_and_is_reported():
    plain = qjax.quantize(fn, params(), X, recipe=qjax.Recipe([WEIGHTS]))
    model = qjax.quantize(fn, params(), X, recipe=qjax.Recipe([WEIGHTS], prepare=[Balance("up", "down")]))
    assert "Balance: up balanced" in model.report.notes
    want = fn(params(), X)
    error = [float(jnp.linalg.norm(m(m.params, X) - want)) for m in (plain, model)]
    assert error[1] < 0.5 * error[0]  # per-tensor scales: without balancing the small columns are lost
    exact = jax.tree.map(lambda q: q.dequantize(), model.params, is_leaf=is_quantized)
    np.testing.assert_allclose(model(model.params, X), fn(exact, X), rtol=1e-5, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Wrong:
    """Does one thing that no pass may do."""

    how: str
    needs_batches: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    def edit(self, program, leaves, chosen):
        a = leaves["up"]
        return {
            "shape": Edits({"up": a[:4]}),
            "dtype": Edits({"up": a.astype(jnp.bfloat16)}),
            "nan": Edits({"up": a * jnp.nan}),
            "name": Edits({"upp": a}),
            "type": {"up": a},
        }[self.how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"changes up from float32\[8, 16\]"),
        ("dtype", "bfloat16"),
        ("nan", "NaN or infinite"),
        ("name", "did you mean 'up'"),
        ("type", "returned dict"),
    ],
)
def test_the_verifier_refuses_what_a_pass_must_not_do(how, message):
    with pytest.raises(QjaxError, match=message):
        qjax.quantize(fn, params(), X, recipe=qjax.Recipe([WEIGHTS], prepare=[Wrong(how)]))


def test_what_is_no_pass_is_refused():
    with pytest.raises(RecipeError, match="no pass"):
        qjax.quantize(fn, params(), X, recipe=qjax.Recipe([WEIGHTS], prepare=["smooth"]))


def test_a_site_matcher_adds_sites():
    @register_matcher
    def find_sine(level: Level):
        return [
            Activation(
                kind="sine", output=node.output, nodes=(node,), exposed=(), input=node.inputs[0], approximate=False
            )
            for node in level.named("sin")
        ]

    try:
        program = qjax.trace(lambda p, x: jnp.sin(x @ p["up"]) @ p["down"], params(), X)
        assert [(s.name, s.op) for s in program.sites] == [("up", "dot"), ("up/sine", "activation"), ("down", "dot")]
    finally:
        from qjax.composites import find

        find._MATCHERS.remove(find_sine)
