"""Reports to render: a small one like stories260k's, a large mixed one with 500 sites, and awkward ones."""

from __future__ import annotations

import math
import random

import pytest

from qjax.report import Report, SiteRow


def weight_row(name, shape, fmt="int4 g128", bits=4.125, sqnr=21.0, **more) -> SiteRow:
    elements = math.prod(shape)
    facts = {
        "op": "dot",
        "leaf": name,
        "bits_per_element": bits,
        "bytes_before": 4 * elements,
        "bytes_after": round(elements * bits / 8),
        "sqnr_db": sqnr,
        "lowering": "xla_dequant",
        "flops": 2 * elements,
    }
    return SiteRow(name=name, shape=shape, format=fmt, **{**facts, **more})


def float_row(name: str, shape: tuple[int, ...], reason: str, op: str = "dot") -> SiteRow:
    elements = math.prod(shape)
    return SiteRow(
        name,
        op,
        name,
        shape,
        "float32",
        reason=reason,
        bits_per_element=32.0,
        bytes_before=4 * elements,
        bytes_after=4 * elements,
        lowering="xla",
    )


def finish(model: str, recipe: str, rows: list[SiteRow], other: int, notes=(), scores=None) -> Report:
    return Report(
        model,
        recipe,
        tuple(rows),
        other,
        other + sum(r.bytes_before for r in rows),
        other + sum(r.bytes_after for r in rows),
        tuple(notes),
        scores or {},
    )


def small(layers: int = 2) -> Report:
    """14 sites and one left in float."""
    rng = random.Random(1)
    one_group = "one group of 64 because the axis is shorter than the preset's group of 128"
    rows: list[SiteRow] = [
        float_row("embed/embedding", (512, 64), "left by rule 1 ('**/embed*/**', skip=True)", "embedding")
    ]
    for i in range(layers):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rows.append(
                weight_row(
                    f"layers/{i}/attn/{part}/kernel",
                    (64, 64 if part[0] in "qo" else 32),
                    "int4 g64",
                    4.5,
                    19.5 + rng.random() * 2,
                    note=one_group,
                )
            )
        for part, shape in (("gate", (64, 172)), ("up", (64, 172)), ("down", (172, 64))):
            rows.append(
                weight_row(
                    f"layers/{i}/mlp/{part}/kernel",
                    shape,
                    "int4 g128",
                    4.5,
                    18.5 + rng.random() * 2,
                    note="" if part == "down" else one_group,
                )
            )
    scores = {"perplexity": 5.0123, "float_perplexity": 4.2943, "tokens": 56046, "kl": 0.1423, "agreement": 0.8412}
    return finish("stories260k", "W4A16", rows, 2816, ["weights are read once per token on this platform"], scores)


def large() -> Report:
    """504 sites: 72 layers of seven, formats from a search, two layers left, an unrolled head."""
    rng = random.Random(2)
    rows: list[SiteRow] = [
        weight_row("embed/embedding", (32000, 1024), "int8 per channel", 8.03, 42.1, op="embedding", lowering="take")
    ]
    kinds = (
        ("int4 g128", 4.125, 20.0),
        ("int8 per channel", 8.03, 43.0),
        ("nf4 g64", 4.5, 22.0),
        ("int3 g128", 3.125, 14.2),
    )
    for i in range(72):
        for part, shape in (
            ("attn/q_proj", (1024, 1024)),
            ("attn/k_proj", (1024, 256)),
            ("attn/v_proj", (1024, 256)),
            ("attn/o_proj", (1024, 1024)),
            ("mlp/gate", (1024, 2816)),
            ("mlp/up", (1024, 2816)),
            ("mlp/down", (2816, 1024)),
        ):
            name = f"layers/{i}/{part}/kernel"
            if part == "mlp/down" and i in (0, 71):
                rows.append(
                    float_row(name, shape, f"the recipe's search left {name} in float: its KL alone exceeds the budget")
                )
                continue
            fmt, bits, db = rng.choices(kinds, (6, 2, 2, 1))[0]
            slow = (
                "slower than float on this CPU: int4 is dequantized in every call"
                if fmt == "int4 g128" and "mlp" in part
                else ""
            )
            rows.append(
                weight_row(
                    name,
                    shape,
                    fmt,
                    bits,
                    rng.gauss(db, 1.0),
                    note=slow,
                    inputs="int8 dynamic per token" if bits > 8 else "float",
                    lowering="int8_dot" if bits > 8 else "xla_dequant",
                )
            )
    rows.append(
        SiteRow(
            "lm_head/kernel#1",
            "dot",
            "embed/embedding",
            (32000, 1024),
            "int8 per channel",
            bits_per_element=8.03,
            lowering="xla_dequant",
        )
    )
    scores = {"perplexity": 11.842, "float_perplexity": 11.613, "kl": 0.01873, "agreement": 0.9411, "tokens": 245569}
    return finish(
        "books-1b",
        "search-4.5bit",
        rows,
        590_000,
        ["16 runs of layers with equal formats: the scan selects per layer"],
        scores,
    )


def awkward() -> Report:
    """Names that could break a page, figures that are no numbers, a site without a weight."""
    rows = [
        weight_row("a/<script>alert(1)</script>/kernel", (3, 5), "int8 per channel", 10.0, math.inf),
        weight_row(
            "very/" + "long_segment_name/" * 9 + "kernel", (7, 7), "int2 g32", 3.0, -2.5, note='says "no" & <yes>'
        ),
        SiteRow(
            "layers/0/attn/scores",
            "attention",
            "",
            (),
            "float32",
            reason="no rule names op 'attention'",
            bits_per_element=32.0,
        ),
        weight_row("zero/kernel", (4, 4), "int8 per tensor", 10.0, math.nan),
    ]
    return finish("m & <n>", "mine", rows, 0, ["a note with </script> in it"], {"kl": math.nan})


@pytest.fixture(params=[small, large, awkward], ids=lambda f: f.__name__)
def any_report(request: pytest.FixtureRequest) -> Report:
    return request.param()


@pytest.fixture
def small_report() -> Report:
    return small()


@pytest.fixture
def large_report() -> Report:
    return large()


@pytest.fixture
def awkward_report() -> Report:
    return awkward()
