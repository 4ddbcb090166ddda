"""``qjax bench`` on a CPU: the XLA lowerings are timed, what cannot be is said."""

from __future__ import annotations

import json

import pytest

from qjax.cli import main

NAMES = ("int4 g128", "int8 per channel x int8 per token")
SMALL = ("--shapes", "128x256", "--tokens", "1,4", "--trials", "1")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    from qjax.cli import benchmarking
    from qjax.kernels import samples

    monkeypatch.setitem(samples.ROTATE, "cpu", 1 << 16)
    monkeypatch.setattr(benchmarking, "ROTATE", samples.ROTATE)


@pytest.mark.slow
def test_every_lowering_that_can_run_has_a_row(capsys):
    formats = "int4 g128,int8 x int8 token"
    assert main(["bench", "kernels", *SMALL, "--formats", formats, "--device", "h200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clock"] == "wall" and found["peak"] == 989e12
    rows = found["rows"]
    assert {(r["weights"], r["tokens"]) for r in rows} == {(w, t) for w in NAMES for t in (1, 4)}
    assert {"dequantize", "int_dot"} <= {r["kernel"] for r in rows}
    for row in rows:
        assert row["us"] > 0 and row["speedup"] > 0 and 0 < row["of_ceiling"] < 1
        assert row["tflop_s"] == pytest.approx(2 * 128 * 256 * row["tokens"] / row["us"] / 1e6)
    for weights in NAMES:
        assert sum(r["chosen"] for r in rows if r["weights"] == weights) == 2


def test_it_prints_a_table(capsys):
    assert main(["bench", "kernels", *SMALL, "--formats", "int8"]) == 0
    said = capsys.readouterr().out
    assert "dequantize" in said and "measured here" in said and "x bfloat16" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("kernels", "--formats", "q5"), "unknown format"),
        (("kernels", "--shapes", "12"), "4096x4096"),
        (("kernels", "--tokens", "one"), "--tokens 1,16"),
        (("kernels", *SMALL, "--device", "h9000"), "h9000"),
        (("tune",), "nothing to tune"),
    ],
)
def test_what_cannot_be_is_said(capsys, given, said):
    assert main(["bench", *given]) == 2
    assert said in capsys.readouterr().err
