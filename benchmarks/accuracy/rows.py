"""The rows of the accuracy table: name -> recipe. A new method is one line here.

``quantizes the blocks' products``: embeddings, heads, classifiers and first layers stay float in every row, so that
rows differ by the method alone.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import qjax
from benchmarks.accuracy.models import LANGUAGE, Case
from qjax.formats import DualGrained, MixedBits, Progressive

TRANSFORMERS = ("books-6m", "stories260k", "vit-tiny", "minilm")
BEST = {"actorder": "static", "observer": qjax.MSE()}
TOKEN = qjax.Int(8, per="token", scale="qmax")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: as on the command line.
        title: what the table says.
        section: heading that it stands under.
        make: the recipe for a model.
        only: models that it is for; () for all.
        extra: models on which it is measured with ``--all`` only, to keep the usual run short.
    """

    name: str
    title: str
    section: str
    make: Callable[[Case], qjax.Recipe]
    only: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    def fits(self, model: str, every: bool = True) -> bool:
        """Whether the row is measured on a model."""
        return (not self.only or model in self.only) and (every or model not in self.extra)


def recipe(case: Case, weights: Any, rounding: Any = None, inputs: Any = None, prepare: Any = ()) -> qjax.Recipe:
    """The blocks' products quantized so; a group longer than an axis is one group."""
    rule = qjax.Rule(case.blocks, weights=weights, rounding=rounding, inputs=inputs, clamp_group=True)
    return qjax.Recipe([rule], prepare)


def grid_format(bits: int, group: int, case: Case) -> Any:
    """Integers with zero points in groups; per output channel for convolutions, which have no groups with data."""
    if case.name == "resnet20":
        return qjax.Int(bits, symmetric=False)
    return qjax.Int(bits, group=group, symmetric=False)


def _grid() -> list[Row]:
    """RTN, MSE, HQQ, GPTQ, AWQ and rotation, at three widths and two groups."""
    rows = []

    def with_float_zeros(fmt: Any) -> Any:
        return dataclasses.replace(fmt, zero="float")

    def add(key: str, title: str, bits: int, group: int, rounding: Any) -> None:
        def make(case: Case) -> qjax.Recipe:
            fmt = grid_format(bits, group, case)
            return recipe(case, with_float_zeros(fmt) if key == "hqq" else fmt, rounding)

        only = TRANSFORMERS if group == 64 else ()
        # Axes of stories260k are 64 and 172, of ViT-Ti 192 and 768: two group sizes differ little there, and two bits
        # destroy ViT-Ti, whatever the method. The orderings that are judged are measured everywhere.
        judged = bits > 2 and key in ("rtn", "gptq")
        extra = ("stories260k", "vit-tiny", "minilm") if group == 64 and not judged else ()
        extra = extra or (("vit-tiny",) if bits == 2 else ())
        rows.append(Row(f"{key}-w{bits}g{group}", title, f"W{bits}A16 g{group}", make, only, extra))

    for bits in (4, 3, 2):
        for group in (128, 64):
            add("rtn", "RTN", bits, group, qjax.RTN())
            add("mse", "MSE range", bits, group, qjax.RTN(qjax.MSE()))
            add("hqq", "HQQ, float zeros", bits, group, qjax.HQQ())
            add("gptq", "GPTQ", bits, group, qjax.GPTQ(**BEST))
            add("awq", "AWQ", bits, group, qjax.passes.AWQ())
            add("rotated-gptq", "GPTQ, rotated", bits, group, qjax.passes.Rotated(qjax.GPTQ(**BEST)))
    return rows


def _simple(name: str, title: str, section: str, *how: Any, only: tuple[str, ...] = TRANSFORMERS, **more: Any) -> Row:
    return Row(name, title, section, lambda case: recipe(case, *how, **more), only)


def _preset(name: str, title: str, section: str, only: tuple[str, ...] = TRANSFORMERS) -> Row:
    def make(case: Case) -> qjax.Recipe:
        rule = qjax.recipe(name).rules[-1]
        return qjax.Recipe([dataclasses.replace(rule, match=case.blocks)])

    return Row(f"preset-{name.lower()}", title, section, make, only)


def _planes(count: int) -> Row:
    def make(case: Case) -> qjax.Recipe:
        return recipe(case, qjax.formats.TritPlanes(planes=count), qjax.passes.PTQTP())

    words = "plane" if count == 1 else "planes"
    return Row(f"ptqtp-{count}", f"PTQTP, {count} trit {words}", "Few bits", make, TRANSFORMERS)


W8, W4A8, FOUR, FEW = "W8A8", "W4A8", "4-bit formats", "Few bits"

ROWS: tuple[Row, ...] = (
    _preset("W8A8_FP", "float8 e4m3 (W8A8_FP)", W8, ()),
    _preset("W8A8_INT", "int8, GPTQ (W8A8_INT)", W8, ()),
    _simple("rtn-w8a8", "int8, RTN", W8, qjax.Int(8, scale="qmax"), None, TOKEN, only=()),
    *_grid(),
    _preset("W4A16_INT", "int4 g128, MSE, GPTQ (W4A16_INT)", FOUR),
    *(
        Row(f"folded-gptq-w{bits}g128", f"uint{bits} g128, GPTQ, residual stream rotated", FOUR,
            lambda case, bits=bits: recipe(case, grid_format(bits, 128, case), qjax.GPTQ(**BEST), None,
                                           (qjax.passes.Rotate(),)), LANGUAGE)
        for bits in (4, 3)
    ),
    _preset("NF4", "NF4 g64", FOUR),
    _preset("MXFP4A16", "MXFP4", FOUR),
    _preset("NVFP4A16", "NVFP4", FOUR),
    Row("autoround-w4g128", "uint4 g128, AutoRound", FOUR,
        lambda case: recipe(case, qjax.Int(4, group=128, symmetric=False), qjax.passes.AutoRound()),
        ("books-6m",), ("books-6m",)),  # minutes of training
    _simple("rtn-w4a8", "int4 per channel, RTN", W4A8, qjax.Int(4), None, TOKEN),
    _simple("rtn-w4a8-g128", "int4 g128, RTN", W4A8, qjax.Int(4, group=128), None, TOKEN),
    Row("smoothquant-w4a8", "int4 g128, SmoothQuant", W4A8,
        lambda case: recipe(case, qjax.Int(4, group=128), None, TOKEN, (qjax.passes.SmoothQuant(),)), TRANSFORMERS),
    _simple("dgq-w4a8", "DGQ g128", W4A8, DualGrained(group=128), qjax.passes.DGQ(), TOKEN),
    _simple("qoq-w4a8", "QoQ per channel", W4A8, qjax.Int(4, symmetric=False), qjax.passes.QoQ(), TOKEN),
    _simple("qoq-w4a8-g128", "QoQ g128", W4A8, Progressive(group=128), qjax.passes.QoQ(), TOKEN),
    _simple("twobit-2.4", "2-bit strips", FEW, MixedBits(0, select="global"), qjax.passes.TwoBit()),
    _simple("twobit-2.9", "2 bits, a strip in 4 of 4 bits", FEW, MixedBits(), qjax.passes.TwoBit()),
    _simple("twobit-3.0", "the same, 0.5 % FP16", FEW, MixedBits(outliers=0.005), qjax.passes.TwoBit()),
    _simple("sparse-w4", "int4 with 2:4 sparsity, SparseGPT", FEW, qjax.formats.Sparse24(), qjax.passes.SparseGPT()),
    *(_planes(count) for count in (1, 2, 3)),
)  # fmt: skip


def named(patterns: list[str] | None) -> list[Row]:
    """Rows whose names match one of the patterns, in table order; all without patterns.

    Raises:
        SystemExit: a pattern that matches none.
    """
    import fnmatch

    if not patterns:
        return list(ROWS)
    for pattern in patterns:
        if not any(fnmatch.fnmatch(row.name, pattern) for row in ROWS):
            raise SystemExit(f"no row is named {pattern!r}; there are {', '.join(row.name for row in ROWS)}")
    return [row for row in ROWS if any(fnmatch.fnmatch(row.name, p) for p in patterns)]


warnings.filterwarnings("ignore", category=qjax.errors.QjaxWarning)
