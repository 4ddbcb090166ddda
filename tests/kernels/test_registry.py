"""The table of lowerings: choosing, naming, refusing, printing, and what is said of speed."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from qjax import ops
from qjax.errors import LoweringError
from qjax.formats import MXFP4, NF4, Float8, Int, quantize_array
from qjax.kernels import figures, registry

TOKEN = Int(8, per="token")


@pytest.mark.parametrize(
    ("fmt", "act", "shapes", "platform", "name"),
    [
        (Int(8), None, (4, 64, 64), "cpu", "dequantize"),
        (Int(3, group=32), None, (4, 4096, 4096), "cpu", "dequantize_blocks"),
        (Int(4, group=32), None, (4, 4096, 4096), "tpu", "dequantize"),
        (Int(8), TOKEN, (4, 64, 64), "cpu", "int_dot"),
        (Int(4, group=32), TOKEN, (4, 64, 64), "cuda", "int_dot"),
        (Int(4, group=24), TOKEN, (4, 64, 64), "cpu", "dequantize"),
        (NF4(), TOKEN, (4, 64, 64), "cpu", "dequantize"),
        (Float8(), Float8(per="token"), (4, 64, 64), "cpu", "float8_dot"),
        (Float8(group=32), Float8(per="token"), (4, 64, 64), "cpu", "dequantize"),
    ],
)
def test_choices(fmt, act, shapes, platform, name):
    assert ops.choose("dot", fmt, act, shapes, platform).name == name


def test_a_named_lowering_runs_or_says_why_not():
    w = quantize_array(jnp.ones((32, 8)), NF4(group=32), in_axes=0)
    with pytest.raises(LoweringError, match=r"int_dot.*not quantized.*implementation=None"):
        ops.q_dot(jnp.ones((2, 32)), w, implementation="int_dot")
    with pytest.raises(LoweringError, match="'dequantise' of dot .did you mean 'dequantize'"):
        ops.q_dot(jnp.ones((2, 32)), w, implementation="dequantise")
    aux = ops.activation_aux(jnp.ones((2, 32)), TOKEN)
    with pytest.raises(LoweringError, match="nf4 g32 codes are no integers"):
        ops.q_dot(jnp.ones((2, 32)), w, act=(TOKEN, aux), implementation="int_dot")


def test_the_table_prints():
    text = str(ops.lowering_table())
    assert all(name in text for name in ("dot_transposed", "int_conv", "experts", "reference", "any", "cpu"))
    only = ops.lowering_table("conv", "cuda")
    assert {e.op for e in only.rows} == {"conv"} and only.rows[-1].name == "reference"


@pytest.fixture
def table(monkeypatch):
    """A copy of the table that is thrown away after the test."""
    monkeypatch.setattr(registry, "_TABLE", {op: list(rows) for op, rows in registry._TABLE.items()})


@pytest.mark.usefixtures("table")
def test_later_and_higher_registrations_come_first():
    def mine(problem, x, w, act): ...

    ops.register_lowering("dot", "mxfp4", name="general")(mine)
    ops.register_lowering("dot", "mxfp4", "cpu", name="special")(mine)
    ops.register_lowering("dot", MXFP4, when=lambda p: p.rows > 8 or "8 rows are too few", name="rows", priority=20)(
        mine
    )
    assert ops.choose("dot", MXFP4(), None, (16, 32, 32), "cpu").name == "rows"
    assert ops.choose("dot", MXFP4(), None, (8, 32, 32), "cpu").name == "special"
    assert ops.choose("dot", MXFP4(), None, (8, 32, 32), "tpu").name == "general"
    assert ops.choose("dot", Int(8), None, (16, 32, 32), "cpu").name == "dequantize"
    with pytest.raises(LoweringError, match="8 rows are too few"):
        ops.choose("dot", MXFP4(), None, (8, 32, 32), "cpu", implementation="rows")
    with pytest.raises(LoweringError, match="it reads MXFP4 weights"):
        ops.choose("dot", Int(8), None, (16, 32, 32), "cpu", implementation="rows")


@pytest.mark.usefixtures("table")
def test_registering_a_name_again_replaces_it():
    ops.register_lowering("dot", name="twice")(lambda *a: 1)
    ops.register_lowering("dot", name="twice")(lambda *a: 2)
    (entry,) = [e for e in ops.lowering_table("dot").rows if e.name == "twice"]
    assert entry.function() == 2


@pytest.mark.usefixtures("table")
def test_functions_for_several_formats_share_a_name():
    no = lambda p: "its reason"  # noqa: E731
    ops.register_lowering("dot", NF4, "cpu", name="ours")(lambda *a: 1)
    ops.register_lowering("dot", (MXFP4, Int), "cpu", when=no, name="ours")(lambda *a: 2)
    assert [e.format for e in ops.lowering_table("dot").rows if e.name == "ours"] == [(MXFP4, Int), NF4]
    w, x = quantize_array(jnp.ones((32, 8)), MXFP4(), in_axes=0), jnp.ones((2, 32))
    with pytest.raises(LoweringError, match="rows, on cpu: its reason. Leave"):
        ops.q_dot(x, w, implementation="ours")
    with pytest.raises(LoweringError, match="it reads MXFP4 or Int weights; it reads NF4 weights"):
        ops.q_dot(x, quantize_array(jnp.ones((32, 8)), Float8(), in_axes=0), implementation="ours")


def test_choices_quote_what_was_measured(monkeypatch):
    rows = [
        {"op": "dot", "lowering": "dequantize", "weights": "int4 grouped", "act": "", "speed": {"1": 0.5, "16": 1.25}},
        {"op": "dot", "lowering": "int_dot", "weights": "int8", "act": "int8", "speed": {"1": 1.5, "16": 1.75}},
    ]
    monkeypatch.setattr(figures, "table", lambda: {"platform": "cpu", "measured_on": "here", "figures": rows})
    slow = ops.choose("dot", Int(4, group=32), None, (1, 64, 64), "cpu")
    assert slow.slower
    assert slow.note == (
        "int4 g32 weight-only on XLA CPU: unpacked whole for a float product; about 0.5x at 1 row, 1.2x at 16 rows "
        "the speed of float; the gain is memory, not time"
    )
    assert not ops.choose("dot", Int(4, group=32), None, (20, 64, 64), "cpu").slower
    assert not ops.choose("dot", Int(8), TOKEN, (1, 64, 64), "cpu").slower
    near = ops.choose("dot", MXFP4(), None, (1, 64, 64), "cpu")  # not measured: 4 bits are the nearest thing
    assert near.slower and "mxfp4" in near.note
    assert ops.choose("dot", Int(4, group=32), None, (1, 64, 64), "tpu").note == ""


def test_figures_that_are_there_are_of_lowerings_that_are_there():
    known = {(e.op, e.name) for e in ops.lowering_table().rows} | {("take", "rows")}
    assert {(f["op"], f["lowering"]) for f in figures.table()["figures"]} <= known
