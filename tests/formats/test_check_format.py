"""The built-in formats hold what `qjax.testing.check_format` asks of any."""

from __future__ import annotations

import pytest

from qjax.formats import MXFP4, MXFP8, NF4, NVFP4, Float8, Int
from qjax.testing import check_format

FORMATS = [
    Int(3, group=16),
    Int(4, group=128),
    Int(8, per="tensor"),
    Int(4, group=5, symmetric=False),
    Int(3, group=8, symmetric=False, zero="float"),
    Int(2, per="token", scale="qmax"),
    Float8("e5m2", per="tensor"),
    NF4(),
    MXFP4(),
    MXFP8("e5m2"),
    NVFP4(),
]


@pytest.mark.every(4)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_built_in(fmt):
    check_format(fmt, examples=15, exact_zero=getattr(fmt, "zero", None) != "float")
