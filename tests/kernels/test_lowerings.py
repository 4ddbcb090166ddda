"""Every lowering of qjax passes the suite that others are held to."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from qjax import ops
from qjax.formats import MXFP4, MXFP8, NF4, NVFP4, DualGrained, Float8, Int, Log, Progressive
from qjax.testing import check_lowering

WEIGHTS = [
    Int(8),
    Int(4, group=32),
    Int(3),
    Int(2, group=32, symmetric=False),
    NF4(group=32),
    MXFP4(),
    NVFP4(),
    MXFP8(),
    Float8("e5m2"),
    DualGrained(32),
]
GRAINED = [DualGrained(32), Progressive(32)]
INTEGERS = [Int(8), Int(8, symmetric=False), Int(4, group=32), Int(4), Int(3, group=32, symmetric=False), *GRAINED]
TOKEN = Int(8, per="token")
TOKENS = [TOKEN, Int(8, per="tensor"), Int(8, per="token", symmetric=False), Int(6, group=32)]
LOGS = [Log(3, 21), Log(4, 24, zero="mask", shift=0.17, folded=True), Log(4, 37, zero="clamp")]  # 1, 2 and 3 digits
EIGHTS = [Float8(per="token"), Float8("e5m2", per="tensor")]

SUITES = {
    ("dot", "dequantize"): {"weights": WEIGHTS, "acts": [None, TOKEN]},
    ("dot", "dequantize_blocks"): {"weights": WEIGHTS},
    ("dot", "int_dot"): {"weights": INTEGERS, "acts": TOKENS},
    ("dot", "float8_dot"): {"weights": [Float8(), Float8("e5m2", per="tensor")], "acts": EIGHTS},
    ("dot_transposed", "dequantize"): {"weights": WEIGHTS[:5]},
    ("dot_transposed", "dequantize_blocks"): {"weights": WEIGHTS[:5]},
    ("conv", "dequantize"): {"weights": [Int(8), Int(4, group=8), NF4(group=8), DualGrained(8)], "acts": [None, TOKEN]},
    ("conv", "int_conv"): {"weights": [Int(8), Int(4)], "acts": [Int(8, per="tensor"), TOKEN]},
    ("ragged_dot", "experts"): {"weights": [Int(8), Int(4, group=32), NF4(group=32), *GRAINED], "acts": [None, TOKEN]},
    ("ragged_dot", "dequantize"): {"weights": [Int(8)]},
    ("dot", "log_digits"): {"weights": [Int(4, symmetric=False), Int(8), Int(4, group=32)], "acts": LOGS},
}


@pytest.mark.every(7)
@pytest.mark.parametrize(("op", "name"), SUITES)
def test_lowering(op, name):
    check_lowering(op, name, dtypes=(jnp.float32, jnp.bfloat16), examples=3, **SUITES[op, name])


def test_no_lowering_is_forgotten():
    there = {(e.op, e.name) for e in ops.lowering_table().rows if e.function.__module__.startswith("qjax.")}
    oracles = {(op, "reference") for op in ("dot", "dot_transposed", "conv", "ragged_dot", "attention")}
    # test_mosaic*.py, test_triton.py, test_mosaic_ragged.py
    on_gpus = {("dot", "mosaic"), ("dot", "triton"), ("ragged_dot", "mosaic")}
    rows = {("quantize_rows", "mosaic"), ("quantize_rows", "xla")}  # test_rows.py
    attention = {("log_attention", name) for name in ("xla", "lookup", "mosaic")}  # test_log_attention.py
    # test_native.py, test_native_formats.py, test_attention.py
    compiled = {("dot", "native"), ("ragged_dot", "native"), ("attention", "native")}
    offsets = {("dot", "affine_dot")}  # test_integer_dot.py
    assert there - oracles - on_gpus - rows - attention - compiled - offsets == set(SUITES)
