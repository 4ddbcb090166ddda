"""The record: counting, scores, storage."""

import copy
import json
import math
import pickle

import numpy as np
import pytest

from qjax.errors import DataError, QjaxError
from qjax.report import Report, SiteRow, recovery


def _same(a: Report, b: Report) -> bool:
    return json.dumps(a.to_dict()) == json.dumps(b.to_dict())


def test_round_trip(any_report):
    back = Report.from_dict(json.loads(any_report.json()))
    assert _same(back, any_report)
    assert all(isinstance(r.shape, tuple) for r in back.rows)


def test_json_is_strict(awkward_report):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(awkward_report.json(), parse_constant=refuse)
    assert Report.from_dict(awkward_report.to_dict()).rows[0].sqnr_db == math.inf


def test_numpy_figures_are_stored_as_numbers():
    row = SiteRow("w", "dot", "w", (2, 2), "int8", bytes_before=np.int64(16), sqnr_db=np.float32(3.5))
    report = Report("m", "r", (row,), 0, np.int64(16), np.int64(4), scores={"kl": np.float32(0.5)})
    assert Report.from_dict(json.loads(report.json())).rows[0].sqnr_db == 3.5


@pytest.mark.parametrize(
    "change, says",
    [
        ({"version": 99}, "version 99"),
        ({"version": None}, "version None"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_foreign_files_are_refused(small_report, change, says):
    with pytest.raises(DataError, match=says):
        Report.from_dict({**small_report.to_dict(), **change})


def test_damaged_file_is_one_sentence(tmp_path):
    (tmp_path / "report.json").write_text("{ not json")
    with pytest.raises(QjaxError, match="not a readable report"):
        Report.load(tmp_path)
    with pytest.raises(QjaxError, match="not a readable report"):
        Report.load(tmp_path / "missing.json")


def test_figures_by_hand():
    rows = (
        SiteRow(
            "a", "dot", "a", (8, 4), "int4 g8", bits_per_element=6.0, bytes_before=128, bytes_after=24, sqnr_db=20.0
        ),
        SiteRow("a#1", "dot", "a", (8, 4), "int4 g8", bits_per_element=6.0),
        SiteRow("b", "dot", "b", (4, 4), "float32", reason="skipped", bytes_before=64, bytes_after=64),
        SiteRow("s", "attention", "", (), "float32", reason="no rule"),
    )
    report = Report("m", "r", rows, 16, 208, 104)
    assert report.compression == 2.0
    assert report.bits(report.quantized) == 6.0  # the second reader of a leaf is not counted again
    assert report.bits() == 8 * (24 + 64) / 48
    assert report.bits((rows[3],)) is None
    assert [r.name for r in report.left] == ["b", "s"]
    assert report.row("b") is rows[2]
    with pytest.raises(DataError, match="did you mean 'a#1'"):
        report.row("a#2")


def test_scores_are_added_and_replaced_without_changing_the_original(small_report):
    new = small_report.with_scores({"kl": 0.5}, top1=0.25)
    assert (new.scores["kl"], new.scores["top1"], new.scores["perplexity"]) == (0.5, 0.25, 5.0123)
    assert small_report.scores["kl"] == 0.1423 and "top1" not in small_report.scores
    with pytest.raises(TypeError):
        new.scores["kl"] = 1.0


def test_notes_are_not_repeated(small_report):
    new = small_report.with_notes("b", "b").with_notes("b")
    assert new.notes == (*small_report.notes, "b")


def test_copies_and_hashes(small_report):
    for copied in (copy.deepcopy(small_report), pickle.loads(pickle.dumps(small_report))):
        assert copied == small_report and hash(copied) == hash(small_report)


def test_recovery():
    assert recovery(0.75, 0.8) == pytest.approx(93.75)
    assert recovery(4.5, 4.0, higher_is_better=False) == pytest.approx(100 * 4 / 4.5)
    assert recovery(3.9, 4.0, higher_is_better=False) > 100
    assert math.isnan(recovery(0.1, 0.0)) and math.isnan(recovery(math.nan, 0.5))


def test_save(tmp_path, small_report):
    assert [p.name for p in small_report.save(tmp_path / "out")] == ["report.json", "report.html", "report.txt"]
    assert _same(Report.load(tmp_path / "out"), small_report)
    small_report.save(tmp_path / "only.html")
    assert (tmp_path / "only.html").read_text(encoding="utf-8") == small_report.html()
