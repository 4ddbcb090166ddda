"""The accuracy table's registry, its data, what it keeps on disk, and the orderings; no model is quantized here."""

from __future__ import annotations

import json
import types

import jax
import numpy as np
import pytest

import qjax
from benchmarks.accuracy import checks, measuring, models, rows, table
from benchmarks.accuracy.checks import FAIL, MISSING, PASS
from qjax.evaluate import paired_test


@pytest.fixture
def cases():
    blocks = {"resnet20": "stage*/**"}
    return {
        name: types.SimpleNamespace(name=name, blocks=blocks.get(name, "layers/**"), batches=[()])
        for name in models.CASES
    }


def test_every_row_is_a_recipe(cases):
    names = [row.name for row in rows.ROWS]
    assert len(set(names)) == len(names)
    for row in rows.ROWS:
        for model, case in cases.items():
            if row.fits(model):
                made = row.make(case)
                assert made.rules[-1].match == case.blocks
                assert qjax.Recipe.from_dict(made.to_dict()) == made


def test_the_rows_of_the_issue_are_there():
    names = {row.name for row in rows.ROWS}
    grid = {
        f"{m}-w{b}g{g}"
        for m in ("rtn", "mse", "hqq", "gptq", "awq", "rotated-gptq")
        for b in (4, 3, 2)
        for g in (128, 64)
    }
    others = "smoothquant-w4a8 dgq-w4a8 qoq-w4a8 qoq-w4a8-g128 preset-w8a8_int preset-w8a8_fp preset-nf4"
    assert grid | set(others.split()) | {"preset-mxfp4a16", "preset-nvfp4a16", "ptqtp-1", "ptqtp-2", "ptqtp-3"} <= names


def test_patterns_name_rows():
    assert [r.name for r in rows.named(["ptqtp-*", "rtn-w8a8"])] == ["rtn-w8a8", "ptqtp-1", "ptqtp-2", "ptqtp-3"]
    with pytest.raises(SystemExit, match="no row is named 'gptw'"):
        rows.named(["gptw"])


def test_sentence_pairs_are_the_same_every_time(data_dir):
    pairs = models.book_pairs(data_dir, 10)
    assert pairs == models.book_pairs(data_dir, 10) and len(pairs) == 20
    assert all(4 <= len(s.split()) <= 30 for pair in pairs for s in pair)


def test_a_model_calibrates_itself(data_dir):
    """Rows are drawn from the model's own distribution, by an explicit key."""
    folder = data_dir / "models/stories260k"
    fn, params, _ = qjax.models.load(folder)
    found = models.own_stories(fn, params, 1, 3, 24)
    assert found.shape == (3, 24) and (found[:, 0] == 1).all()
    np.testing.assert_array_equal(found, models.own_stories(fn, params, 1, 3, 24))
    assert (found != models.own_stories(fn, params, 1, 3, 24, seed=1)).any()
    logits = np.asarray(fn(params, found[:, :-1]), np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logits, found[:, 1:, None], -1).mean()
    assert 0.5 < nll < 3.0  # the model's entropy, far from log 512 = 6.2 of random tokens


def units(seed, level, n=400):
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(9).gamma(1.0, size=n)
    kl = (level * base * (1 + 0.1 * rng.normal(size=n))).astype(np.float32)
    nll = (3 + level * base).astype(np.float32)
    return {"kl": kl, "nll": nll, "agreement": kl < 1, "cluster": np.arange(n) // 8}


@pytest.fixture
def results(tmp_path):
    """Made-up results of the language model: KL of each row is its level."""
    task = types.SimpleNamespace(name="B", score="perplexity", metrics=("kl", "agreement", "nll"))
    other = types.SimpleNamespace(name="A", score="perplexity", metrics=("kl", "agreement", "nll"))
    levels = {"float": 0.0, "rtn-w4g128": 0.02, "gptq-w4g128": 0.01, "rtn-w3g128": 0.1, "gptq-w3g128": 0.3}
    levels |= {"ptqtp-2": 0.05, "dgq-w4a8": 0.025, "rtn-w4a8": 0.06}
    for seed, (row, level) in enumerate(levels.items()):
        found = units(seed, level)
        scores = {t.name: measuring.scored(t, found, units(0, 0.0)) for t in (task, other)}
        said = {"bits": 4.25, "seconds": 1, "stored_bytes": 1, "scores": scores, "said": "made up"}
        kept = {f"{t}/{key}": v for t in ("A", "B") for key, v in found.items()}
        measuring.keep(tmp_path, "books-6m", row, said, kept)
    measuring.keep(tmp_path, "books-6m", "sparse-w4", {"refused": "axes of 7"}, {})
    return tmp_path


def test_orderings_are_judged_unit_by_unit(results):
    found = {c.title: c for c in checks.orderings(results, ["books-6m"])}
    verdicts = {title: c.verdict for title, c in found.items()}
    assert verdicts["GPTQ beats RTN at 4 bits, g128"] == PASS and verdicts["GPTQ beats RTN at 3 bits, g128"] == FAIL
    assert verdicts["GPTQ beats RTN at 4 bits, g64"] == MISSING
    assert verdicts["PTQTP with 2 planes beats INT3 g128"] == verdicts["INT4 g128 beats PTQTP with 2 planes"] == PASS
    assert verdicts["DGQ W4A8 beats RTN W4A8 per channel"] == PASS
    a, b = (measuring.units_of(results, "books-6m", r, "B") for r in ("gptq-w4g128", "rtn-w4g128"))
    test = paired_test(a["kl"], b["kl"], a["cluster"])
    assert f"difference {test.difference:.2g} ± {test.stderr:.1g}" in found["GPTQ beats RTN at 4 bits, g128"].said
    # exp(3 + .025 m) / exp(3 + .02 m) with m the mean of the made-up units: half a percent
    assert verdicts["DGQ W4A8 within 1 % perplexity of RTN W4A16 g128, protocol A"] == PASS
    assert checks.counted(list(found.values())).startswith("6 passed, 1 FAILED, ")


def test_perplexity_beyond_the_margin_fails(results):
    said = list(checks.near_in_perplexity(results, "t", "books-6m", "gptq-w3g128", "rtn-w4g128", 1.0))
    assert [c.verdict for c in said] == [FAIL, FAIL] and "%" in said[0].said


def test_the_table(results):
    text = table.table(results, rows.named(None), ["books-6m"])
    assert "| **W3A16 g128** |" in text and "| AWQ |" not in text
    assert "int4 with 2:4 sparsity, SparseGPT |  | refused |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1
    assert table.refusals(results, rows.named(None), ["books-6m"]) == ["- sparse-w4 on books-6m: axes of 7"]
    brief = table.table(results, rows.named(None), ["books-6m"], brief=True)
    assert "ppl" not in brief and brief.count("\n") == text.count("\n")
    table.plot(results, rows.named(None), ["books-6m"], results / "plot.svg")
    assert (results / "plot.svg").read_text().startswith("<?xml")


def test_results_are_measured_once(results, monkeypatch):
    """What is there is not done again, a damaged file is, and another process's row is left to it."""
    done = []

    class Scorer:
        def __init__(self, case):
            self.case = case

        def of_float(self):
            raise AssertionError("the float model is scored")

        def row(self, row):
            done.append(row.name)
            return {"refused": "again"}, {}

    monkeypatch.setattr(measuring, "Scorer", Scorer)
    case = types.SimpleNamespace(tasks=())

    def scorer():
        return Scorer(case)

    these = rows.named(["rtn-w4g128", "gptq-w4g128", "mse-w4g128", "hqq-w4g128"])
    (results / "books-6m" / "gptq-w4g128.json").write_text('{"scores"')
    with measuring.claimed(results, "books-6m", "hqq-w4g128") as mine:
        assert mine
        measuring.measure_rows(results, "books-6m", scorer, these, lambda text: None)
    assert done == ["mse-w4g128", "gptq-w4g128"]
    measuring.measure_rows(results, "books-6m", scorer, these, lambda text: None)
    assert done[2:] == ["hqq-w4g128"]
    measuring.measure_rows(results, "books-6m", scorer, rows.named(["awq-w4g64"]), lambda text: None, end=0)
    assert len(done) == 3, "no row is begun after the end"
    assert json.loads((results / "books-6m" / "mse-w4g128.json").read_text())["refused"] == "again"
    assert not list((results / "books-6m").glob("*.partial"))


def test_errors_of_matrices():
    from benchmarks.accuracy.layers import errors

    rng = np.random.default_rng(0)
    w, q = rng.normal(size=(2, 5, 7))
    x = rng.normal(size=(40, 7))
    found = errors(w, q, x.T @ x)
    assert found["output"] == pytest.approx(np.square(x @ (w - q).T).sum())
    assert found["squared"] == pytest.approx(np.square(w - q).sum())
    assert jax.numpy.isfinite(found["hqq"])


def test_a_row_that_breaks_down_stops_no_other(tmp_path, monkeypatch):
    class Scorer:
        def __init__(self, case):
            self.case = case

        def of_float(self):
            return {"refused": "none"}, {}

        def row(self, row):
            if row.name == "rtn-w4g128":
                raise ZeroDivisionError("a mistake")
            return {"refused": "none"}, {}

    monkeypatch.setattr(measuring, "Scorer", Scorer)
    told = []
    these = rows.named(["rtn-w4g128", "gptq-w4g128"])
    case = types.SimpleNamespace(tasks=())
    measuring.measure_rows(tmp_path, "books-6m", lambda: Scorer(case), these, told.append)
    assert "rtn-w4g128 BROKE DOWN" in told[1] and "ZeroDivisionError: a mistake" in told[1]
    assert measuring.kept(tmp_path, "books-6m", "gptq-w4g128") and not measuring.kept(
        tmp_path, "books-6m", "rtn-w4g128"
    )
