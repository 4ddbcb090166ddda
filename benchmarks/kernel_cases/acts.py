"""Activations quantized row by row: alone, after norms, after a gate."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from qjax.formats import Float8, Int
from qjax.kernels.act.reference import Before
from qjax.kernels.act.rows import quantize

INT8, FLOAT8 = Int(8, per="token"), Float8(per="token")

ALONE, GATE = Before(), Before("gate")
RMS_NORM = Before("rms_norm", 1e-6, weight=True)
LAYER_NORM = Before("layer_norm", 1e-5, weight=True, bias=True)

WORDS = {"nothing": "alone", "rms_norm": "RMS norm", "layer_norm": "layer norm", "gate": "SiLU gate"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled kernel."""

    fmt: Int | Float8
    before: Before
    k: int
    dtype: str = "bfloat16"

    multiplies = ""

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"rows {WORDS[self.before.kind]} {self.fmt.name}, {self.dtype}, K = {self.k}"

    def function(self) -> Any:
        """The kernel, and the shapes of its arguments."""
        x = jax.ShapeDtypeStruct((64, self.k), np.dtype(self.dtype))
        row = jax.ShapeDtypeStruct((self.k,), np.dtype(self.dtype))
        extra = [x] if self.before.kind == "gate" else [row] * (self.before.weight + self.before.bias)
        return functools.partial(quantize, fmt=self.fmt, before=self.before), (x, extra)


def cases() -> list[Case]:
    """Every kind and format at a usual length; long rows, odd rows and other dtypes."""
    out = [Case(fmt, before, 4096) for fmt in (INT8, FLOAT8) for before in (ALONE, RMS_NORM, LAYER_NORM, GATE)]
    out += [Case(FLOAT8, ALONE, 28672), Case(INT8, RMS_NORM, 8192), Case(INT8, LAYER_NORM, 16384)]
    out += [Case(FLOAT8, GATE, 14336), Case(INT8, GATE, 28672), Case(INT8, RMS_NORM, 28672)]
    out += [Case(INT8, ALONE, 28672, "float32"), Case(FLOAT8, ALONE, 11008, "float16"), Case(INT8, GATE, 1001)]
    return out
