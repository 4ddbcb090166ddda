"""The tuner, by a clock that is a formula: what it tries, takes, writes, and leaves out. Nothing is compiled here."""

from __future__ import annotations

import dataclasses

import pytest
from mosaic import described_gpu

from qjax.errors import DeviceError, LoweringError
from qjax.formats import Float8, Int, MixedBits, WordTiles
from qjax.kernels import tuned, tuning
from qjax.kernels.dot import hopper
from qjax.kernels.dot.hopper import Schedule
from qjax.kernels.dot.schedules import REVISIONS, chosen_ragged, ragged_schedule_for
from qjax.kernels.dot.words import footprint
from qjax.kernels.samples import Product, arguments, format_named, problem_of, weights
from qjax.kernels.tuned import Key

G128 = Int(4, group=128)
PRODUCT = Product(G128, 1024, 2048, 16)
FOOTPRINT = footprint(WordTiles(G128, 1024))


@pytest.fixture
def gpu(monkeypatch):
    """An H200 that is described; schedules stand for their programs."""
    monkeypatch.setattr(tuning, "_compiled", lambda schedules, lower: [(s, s) for s in schedules])
    with described_gpu():
        yield


def microseconds(schedule: Schedule) -> float:
    return 10 / schedule.splits + abs(schedule.stages - 4) + schedule.tokens / 16


def clock(schedule, sets, *, trials):
    assert len(sets) >= 2 and trials == 7
    if schedule.splits == 8:
        raise RuntimeError("out of memory")
    return microseconds(schedule) * 1e-6


def run(path, products=(PRODUCT,), **options):
    said = []
    return list(tuning.tune(products, path, clock=clock, say=said.append, **options)), said


def test_the_fastest_is_written_and_found_again(gpu, tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    (found,), said = run(path)
    assert said == [] and found.product == PRODUCT
    times = {s: t for s, t in found.tried if isinstance(t, float)}
    assert found.tried[0][0] == Schedule(16, 4, 4)  # the rule of thumb's goes first
    assert all("out of memory" in t for s, t in found.tried if s.splits == 8)
    assert found.row.us == min(times.values()) == microseconds(Schedule(**found.row.schedule))
    assert found.row.heuristic_us == microseconds(Schedule(16, 4, 4))
    monkeypatch.setenv(tuned.FILE, str(path))
    look = tuned.look_up(found.row.key, Schedule(16, 6, 4))
    assert look == tuned.Found(Schedule(**found.row.schedule), "your file")


def test_what_is_known_is_not_measured_again_unless_asked(gpu, tmp_path):
    path = tmp_path / "tuned.json"
    run(path)
    before = path.read_text()
    assert run(path) == ([], [])
    assert len(run(path, again=True)[0]) == 1
    assert path.read_text() == before  # reproducible


def test_when_the_time_is_up_what_was_measured_stays(gpu, tmp_path):
    found, said = run(tmp_path / "tuned.json", seconds=-1)
    assert found == [] and "1 of 1 products are left" in said[0]


@pytest.mark.slow
def test_what_cannot_run_is_said_and_the_rest_goes_on(gpu, tmp_path):
    found, said = run(tmp_path / "tuned.json", [Product(Int(3), 128, 128, 8), PRODUCT])
    assert len(found) == 1 and len(said) == 1 and "int3" in said[0]


def test_a_damaged_file_stops_it(gpu, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text("{")
    with pytest.raises(DeviceError, match="tuned.json"):
        run(path)


def test_without_a_gpu_there_is_nothing_to_tune(tmp_path, capsys):
    assert tuning.main(["--out", str(tmp_path / "tuned.json")]) == 2
    assert "nothing to tune" in capsys.readouterr().err


def test_ties_go_to_the_rule_of_thumb_then_to_the_simpler_schedule():
    rule, plain, split = Schedule(16, 6, 3), Schedule(16, 4), Schedule(16, 5, 2)
    assert tuning.choose({split: 1.0, plain: 1.005, rule: 1.009}, rule) == rule
    assert tuning.choose({split: 1.0, plain: 1.005, rule: 1.02}, rule) == plain
    assert tuning.choose({split: 1.0, plain: 1.02, rule: 1.02}, rule) == split


@pytest.mark.parametrize("kernel", ["codes8", "words16"])
@pytest.mark.parametrize("tokens", [8, 64, 256])
def test_candidates_fit(tokens, kernel):
    key = Key(kernel, 1, "int4 g128 tiles", "bfloat16", 4096, 14336, tokens)
    rule = Schedule(min(tokens, 128), 6)
    made = tuning.hopper_candidates(key, rule)
    assert made[0] == rule and 4 <= len(set(made)) <= 80
    assert all(s.fits(4096, 14336) and s.tokens in hopper.TOKENS and s.stages > 1 for s in made)
    assert any(s.tall > 1 for s in made) == (kernel == "words16")


@pytest.mark.parametrize("tokens", [1, 16, 4096])
def test_candidates_of_experts_fit(tokens):
    key = Key("ragged_words16", 1, "int4 g128 tiles", "bfloat16", 4096, 14336, tuned.bucket(tokens), 8)
    rule = ragged_schedule_for(4096, 14336, tokens, 8, footprint=FOOTPRINT)
    made = tuning.ragged_candidates(key, rule)
    assert made[0] == rule and 4 <= len(set(made)) <= 60 and len({s.tokens for s in made}) >= 2
    assert all(s.fits(4096, 14336) and s.tokens in hopper.TOKENS and s.stages > 1 for s in made)


def test_experts_are_tuned_and_their_kernel_takes_what_was_found(gpu, tmp_path, monkeypatch):
    path, product = tmp_path / "tuned.json", Product(G128, 512, 1024, 40, experts=4)
    assert str(product) == "int4 g128 bfloat16 [512, 1024] x 4 experts, 40 tokens"
    (found,), said = run(path, [product])
    assert said == [] and found.row.key == Key(
        "ragged_words16", REVISIONS["words16"], "int4 g128 tiles", "bfloat16", 512, 1024, 64, 4
    )
    best = Schedule(**found.row.schedule)
    assert best != ragged_schedule_for(512, 1024, 40, 4, footprint=FOOTPRINT)
    (_, _, _, sizes), (_, _, _, others) = arguments(product, weights(G128, 512, 1024, True, 2, None, 4))
    assert sizes.sum() == others.sum() == 40 and (sizes != others).any()
    monkeypatch.setenv(tuned.FILE, str(path))
    problem = problem_of(product, weights(G128, 512, 1024, True, 2, None, 4)[0])
    chosen = [
        chosen_ragged("words16", p, t, FOOTPRINT) for p, t in ((problem, 40), (dataclasses.replace(problem, n=500), 33))
    ]
    assert chosen == [best, best]


def test_formats_by_their_short_names():
    assert format_named("int4 g128") == G128
    assert format_named("UINT4_g64") == Int(4, group=64, symmetric=False)
    assert format_named("int8 token") == Int(8, per="token")
    assert format_named("fp8") == Float8()
    assert format_named("mixed") == MixedBits()
    for wrong in ("", "int4 128", "q4", "int8 g0"):
        with pytest.raises(LoweringError, match="unknown format"):
            format_named(wrong)
