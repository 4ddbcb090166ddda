"""Tables of schedules: what is found, in which order, and what a damaged file does."""

from __future__ import annotations

import dataclasses
import json
import os
from importlib import resources

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mosaic import blank, described_gpu

from qjax.errors import DeviceError, QjaxWarning
from qjax.formats import Int
from qjax.kernels import tuned
from qjax.kernels.dot import schedules
from qjax.kernels.dot.hopper import TOKENS, Schedule
from qjax.kernels.pack import pack
from qjax.kernels.registry import select
from qjax.kernels.samples import Product, arguments, function_of, problem_of
from qjax.kernels.tuned import Key, Row, bucket, files, look_up, lookup

H200 = "NVIDIA H200"
KEY = Key("words16", 1, "int4 g128 tiles", "bfloat16", 4096, 4096, 16)
RULE = Schedule(16, 6, 1)
BEST = Schedule(16, 4, 2)


def row(key=KEY, schedule=BEST, us=1.5):
    return Row(key, dataclasses.asdict(schedule), us, 2.0)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A user's file with one result."""
    path = tmp_path / "mine.json"
    tuned.write(path, H200, [row()], "today")
    monkeypatch.setenv(tuned.FILE, str(path))
    monkeypatch.setattr(files, "_said", set())
    return path


@given(st.integers(0, 5000))
def test_buckets_hold_their_tokens_and_stand_for_themselves(tokens):
    found = bucket(tokens)
    assert found >= max(tokens, 8) and found & (found - 1) == 0
    assert bucket(found) == found
    assert found == 8 or tokens > found // 2


def test_a_result_is_found_on_its_device_alone(file):
    assert look_up(KEY, RULE, device=H200) == tuned.Found(BEST, "your file")
    assert look_up(KEY, RULE, device="NVIDIA H100 80GB HBM3") == tuned.Found(RULE, "heuristic")
    assert look_up(KEY, RULE) == tuned.Found(RULE, "heuristic")  # compiled for no GPU
    with described_gpu():
        assert tuned.schedule_of(KEY, RULE) == BEST


@pytest.mark.parametrize(
    "change",
    [{"kernel": "codes8"}, {"revision": 2}, {"formats": "int8 tiles"}, {"dtype": "float16"}, {"tokens": 32}],
)
def test_nothing_but_the_shape_may_differ(file, change):
    assert look_up(dataclasses.replace(KEY, **change), RULE, device=H200).source == "heuristic"


def test_the_nearest_shape_stands_in_within_a_factor(file):
    near = lambda n, k: look_up(dataclasses.replace(KEY, n=n, k=k), RULE, device=H200).source  # noqa: E731
    assert near(5120, 4096) == near(6144, 4096) == near(4096, 3072) == "near 4096 x 4096"
    assert near(6272, 4096) == near(5120, 5120) == "heuristic"


def test_of_two_shapes_equally_near_the_smaller_is_taken(file):
    small, large = (dataclasses.replace(KEY, n=n) for n in (2048, 2592))
    tuned.write(file, H200, [row(large, Schedule(16, 3)), row(small, Schedule(16, 5))], "today")
    between = dataclasses.replace(KEY, n=2304)  # 2304^2 = 2048 * 2592
    assert look_up(between, RULE, device=H200).schedule == Schedule(16, 5)


def test_a_schedule_that_does_not_fit_is_passed_over(file):
    assert look_up(KEY, RULE, lambda s: s.splits == 1, device=H200).source == "heuristic"


def test_a_user_s_result_goes_before_that_of_qjax_and_an_exact_one_before_a_near_one(file, monkeypatch):
    other = dataclasses.replace(KEY, n=5120)
    table = {H200: {KEY: row(schedule=Schedule(16, 3)), other: row(other, Schedule(16, 5))}}
    monkeypatch.setattr(files, "shipped", lambda: table)
    assert look_up(KEY, RULE, device=H200) == tuned.Found(BEST, "your file")
    assert look_up(other, RULE, device=H200) == tuned.Found(Schedule(16, 5), "table")


def test_what_is_forced_is_taken(file):
    with described_gpu(), tuned.forced(Schedule(16, 2), "words16"):
        assert tuned.schedule_of(KEY, RULE) == Schedule(16, 2)
        assert tuned.schedule_of(dataclasses.replace(KEY, kernel="codes8"), RULE) == RULE


def test_files_are_written_whole_sorted_and_read_back(file):
    more = [row(dataclasses.replace(KEY, tokens=t), us=t / 10) for t in (64, 8, 16)]
    tuned.write(file, "Another", more, "then")
    tables = tuned.read(file)
    assert tables[H200] == {KEY: row()}
    assert list(tables["Another"].values()) == sorted(more, key=lambda r: r.key)
    before = file.read_text()
    tuned.write(file, "Another", more[::-1], "then")
    assert file.read_text() == before
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 1}',
        '{"version": 9, "devices": {}}',
        '{"version": 1, "devices": {"x": {}}}',
        '{"version": 1, "devices": {"x": {"results": [3]}}}',
        '{"version": 1, "devices": {"x": {"results": [{"schedule": {}}]}}}',
    ],
)
def test_a_damaged_file_is_named_and_never_overwritten(file, text):
    file.write_text(text)
    with pytest.raises(DeviceError, match=file.name):
        tuned.read(file)
    with pytest.raises(DeviceError, match=file.name):
        tuned.write(file, H200, [row()], "today")
    assert file.read_text() == text
    with pytest.warns(QjaxWarning, match=file.name):
        assert look_up(KEY, RULE, device=H200).source == "heuristic"
    assert look_up(KEY, RULE, device=H200).source == "heuristic"  # said once


@pytest.mark.parametrize("change", [{"n": 0}, {"n": "4096"}, {"us": -1}, {"us": None}, {"tokens": True}, {"more": 1}])
def test_a_row_that_is_none_is_named(file, change):
    data = json.loads(file.read_text())
    data["devices"][H200]["results"][0].update(change)
    file.write_text(json.dumps(data))
    with pytest.raises(DeviceError, match=f"result 0 of .*{next(iter(change))}"):
        tuned.read(file)


def test_a_schedule_of_another_version_is_warned_of(file):
    strange = Row(KEY, {"tokens": 16, "stages": 4, "colour": 3}, 1.0, 1.0)
    tuned.write(file, H200, [strange], "today")
    with pytest.warns(QjaxWarning, match="colour"):
        assert look_up(KEY, RULE, device=H200).source == "heuristic"


def test_a_file_that_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv(tuned.FILE, str(tmp_path / "none.json"))
    monkeypatch.setattr(files, "_said", set())
    with pytest.warns(QjaxWarning, match="cannot be read"):
        assert look_up(KEY, RULE, device=H200).source == "heuristic"


def test_what_qjax_ships_is_sound():
    for kind, rows in tuned.shipped().items():
        assert (resources.files(tuned) / tuned.file_name(kind)).is_file()
        for key, found in rows.items():
            assert key.tokens == bucket(key.tokens) and not key.n % 128 and not key.k % 128
            assert found.us <= found.heuristic_us * 1.011
            if key.kernel in schedules.REVISIONS:
                schedule = Schedule(**found.schedule)
                assert schedule.tokens in TOKENS and schedule.fits(key.n, key.k)


def test_the_kernel_asks_by_its_shape_with_padding(monkeypatch):
    monkeypatch.setattr(lookup, "_hooks", [])
    with described_gpu(), tuned.asked() as found:
        product = Product(Int(4, group=128), 200, 300, 17)
        w = pack(blank(product.weight, 200, 300))
        problem = problem_of(product, w)
        jax.eval_shape(function_of(select(problem, "mosaic"), problem), *arguments(product, [w])[0])
    assert found == [(Key("words16", 2, "int4 g128 tiles", "bfloat16", 256, 384, 32), Schedule(32, 3))]
