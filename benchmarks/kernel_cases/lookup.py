"""Weights in words times 16-bit activations: float8, NF4, 4-bit floats, 2 bits, trit-planes."""

from __future__ import annotations

from benchmarks.kernel_cases.weights16 import Case, shapes
from qjax.formats import MXFP4, NF4, NVFP4, Float8, Int, TritPlanes
from qjax.kernels.dot import words
from qjax.kernels.dot.hopper import Schedule

FORMATS = (
    Float8(),
    Float8(group=128),
    NF4(),
    MXFP4(),
    NVFP4(),
    Int(2, group=128),
    Int(2, group=64, symmetric=False),
    TritPlanes(),
    TritPlanes(tied=True),
)


def cases() -> list[Case]:
    """Every format in bfloat16 for few tokens and many; some in float16, some cut; tall where one sum is enough."""
    few, many = Schedule(16, 0, tall=2, deep=2), Schedule(128, 0, tall=2, rolling=True)
    out = [Case(fmt, "bfloat16", schedule) for schedule in (few, Schedule(128, 0)) for fmt in FORMATS]
    out += [Case(fmt, "bfloat16", many) for fmt in FORMATS if words.footprint(shapes(fmt, 128, 128).fmt).rolling]
    some = (Float8(), NF4(), MXFP4(), NVFP4(), Int(2, group=128))
    out += [Case(fmt, "float16", Schedule(16, 0)) for fmt in some]
    return out + [Case(fmt, "bfloat16", Schedule(8, 0, 4)) for fmt in (Float8(), NF4(), TritPlanes())]
