"""Studies: arithmetic of the tables, what is refused, what is done again and what is not."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from xml.etree import ElementTree

import jax.numpy as jnp
import killed_study
import numpy as np
import pytest
from killed_study import BATCHES, BLOCKS, PARAMS, TASK, decoder, run

import qjax
from qjax import studies
from qjax.errors import CheckpointError, DataError, RecipeError
from qjax.evaluate import ImageTask, TextTask
from qjax.evaluate.tasks import SentenceTask, summary

RECIPES = ("W8A16", "W4A16", "W4A16_INT", "W2A16")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    return run(RECIPES, batches=BATCHES, out=out, calibration="On letters."), out


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.slow
def test_figures_are_those_of_every_token(done):
    """Perplexity, KL, agreement and recovery from the quantized model's logits, block by block in float64."""
    model = qjax.quantize(decoder, PARAMS, np.zeros((1, 4), np.int32), recipe="W4A16")
    nll, nll_float, kl, same, sums = [], [], [], [], []
    for block in BLOCKS.blocks:
        p = log_softmax(decoder(PARAMS, block[None, :-1]))[0]
        q = log_softmax(model(model.params, block[None, :-1]))[0]
        at = np.arange(len(block) - 1)
        nll += list(-q[at, block[1:]])
        nll_float += list(-p[at, block[1:]])
        kl += list((np.exp(p) * (p - q)).sum(-1))
        same += list(p.argmax(-1) == q.argmax(-1))
        sums.append((len(block) - 1, (np.exp(p) * (p - q)).sum()))
    result, _ = done
    found = next(o for o in result.outcomes if o.name == "W4A16")
    scores = found.scores["letters"]
    perplexity, of_float = math.exp(np.mean(nll)), math.exp(np.mean(nll_float))
    assert scores["perplexity"].mean == pytest.approx(perplexity, rel=1e-5)
    assert result.float_scores["letters"]["perplexity"].mean == pytest.approx(of_float, rel=1e-5)
    assert scores["kl"].mean == pytest.approx(np.mean(kl), rel=1e-4)
    assert scores["agreement"].mean == pytest.approx(np.mean(same))
    kept = found.recovery["letters"]
    assert kept.mean == pytest.approx(100 * of_float / perplexity, rel=1e-5) and found.average == kept.mean
    gap, starts = np.array(nll_float) - nll, np.cumsum([0] + [n for n, _ in sums])
    pieces = [(gap[a:b] - gap.mean()).sum() ** 2 for a, b in zip(starts, starts[1:], strict=False)]
    wanted = kept.mean * math.sqrt(sum(pieces) * len(sums) / (len(sums) - 1)) / len(gap)
    assert kept.stderr == pytest.approx(wanted, rel=1e-3)
    error = sum((s - n * np.mean(kl)) ** 2 for n, s in sums) * len(sums) / (len(sums) - 1)
    assert scores["kl"].stderr == pytest.approx(math.sqrt(error) / len(kl), rel=1e-3)
    assert result.counts["letters"] == (len(kl), len(BLOCKS.blocks))


@pytest.mark.slow
def test_sizes_are_as_stored(done):
    result, _ = done
    report = qjax.quantize(decoder, PARAMS, np.zeros((1, 4), np.int32), recipe="W4A16").report
    found = next(o for o in result.outcomes if o.name == "W4A16")
    assert (found.stored_bytes, found.bits) == (report.stored_bytes, report.bits(report.quantized))
    assert result.float_bytes == report.float_bytes


def test_comparisons_are_of_the_same_tokens(done):
    result, _ = done
    assert len(result.comparisons) == 6
    c = result.comparison("letters", "W8A16", "W2A16")
    scores = {o.name: o.scores["letters"]["kl"].mean for o in result.outcomes}
    assert c is not None and c.test.difference == pytest.approx(scores["W8A16"] - scores["W2A16"], rel=1e-4)
    assert c.sure and c.test.p < 1e-3
    back = result.comparison("letters", "W2A16", "W8A16")
    assert back is not None and back.test.difference == -c.test.difference
    assert [o.name for o, _ in result.ranking("letters")][0] == "W8A16"


def test_a_complete_study_computes_nothing(done, monkeypatch):
    result, out = done
    monkeypatch.setattr(studies.run, "quantize", None)
    monkeypatch.setattr(TextTask, "reference", None)
    again = run(RECIPES, batches=BATCHES, out=out, calibration="On letters.")
    assert again.json() == result.json() and again.html() == result.html()


@pytest.mark.every(2)
@pytest.mark.parametrize("moment", ["between", "within"])
def test_a_killed_study_goes_on(moment, done, tmp_path, root, monkeypatch):
    """Killed after the second recipe, or after the first block of the third."""
    result, _ = done
    out = tmp_path / "out"
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, killed_study.__file__, moment, str(out), *RECIPES]
    job = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert job.returncode == -signal.SIGKILL, job.stderr
    assert sorted(p.name.split("-")[0] for p in (out / "recipes").iterdir()) == ["W4A16", "W8A16", "float"]
    begun = list((out / "work").rglob("CURRENT"))
    assert bool(begun) == (moment == "within") and not (out / "study.md").exists()
    applied = counted(monkeypatch)
    again = run(RECIPES, batches=BATCHES, out=out, calibration="On letters.")
    assert applied == ["W4A16_INT", "W2A16"]
    assert without_times(again) == without_times(result)


def counted(monkeypatch):
    """Names of the recipes that are applied from now on."""
    applied, quantize = [], studies.run.quantize
    wrapped = lambda *a, **k: applied.append(k["recipe"].name) or quantize(*a, **k)  # noqa: E731
    monkeypatch.setattr(studies.run, "quantize", wrapped)
    return applied


def without_times(result):
    data = json.loads(result.json())
    return {**data, "outcomes": [{k: v for k, v in o.items() if k != "seconds"} for o in data["outcomes"]]}


def test_more_recipes_can_be_added(done, monkeypatch, tmp_path):
    result, out = done
    copy = shutil.copytree(out, tmp_path / "copy")
    applied = counted(monkeypatch)
    more = run(("W8A16", "NF4"), batches=BATCHES, out=copy)
    assert applied == ["NF4"] and [o.name for o in more.outcomes] == ["W8A16", "NF4"]
    assert more.outcomes[0] == result.outcomes[0]


def test_another_study_in_the_folder_is_refused(done):
    _, out = done
    with pytest.raises(CheckpointError, match="begun study of something else: model differ"):
        qjax.study(decoder, {**PARAMS, "lm_head": PARAMS["lm_head"] * 2}, TASK, ["W8A16"], batches=BATCHES, out=out)
    with pytest.raises(CheckpointError, match="tasks differ"):
        run(tasks=TextTask("letters", BLOCKS.first(3)), batches=BATCHES, out=out)
    with pytest.raises(CheckpointError, match="calibration differ"):
        run(batches=BATCHES[:2], out=out)


def test_a_foreign_or_damaged_folder_is_refused(done, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="holds other things"):
        run(out=tmp_path / "notes")
    copy = shutil.copytree(done[1], tmp_path / "copy")
    part = next(p for p in (copy / "recipes").iterdir() if p.name.startswith("W4A16-"))
    victim = max((f for f in part.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError):
        run(("W8A16", "W4A16"), batches=BATCHES, out=copy)


def test_mistakes_are_found_before_anything_is_computed(monkeypatch, tmp_path):
    monkeypatch.setattr(studies.run, "quantize", None)
    with pytest.raises(RecipeError, match="no preset is named 'W4A17' .did you mean 'W4A16'"):
        run(("W8A16", "W4A17"))
    with pytest.raises(RecipeError, match="W8A8_INT, W4A16_INT: recipes that need calibration data"):
        run(("W8A16", "W8A8_INT", "W4A16_INT"))
    with pytest.raises(RecipeError, match="W8A16 is taken"):
        run(("W8A16", "w8a16"))
    with pytest.raises(RecipeError, match="at least one recipe"):
        run(())
    with pytest.raises(DataError, match="different names"):
        run(tasks=[TASK, TASK])
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_does_not_fit_stands_in_the_table_with_the_reason(tmp_path):
    misfit = qjax.Recipe([qjax.Rule("**/nowhere/**", weights=qjax.Int(4))], name="misfit")
    result = run(("W8A16", misfit), out=tmp_path / "out")
    assert [o.name for o in result.applied] == ["W8A16"] and "matches no site" in result.outcomes[1].refused
    assert "cannot be applied: rule 0" in result.markdown() and "cannot be applied" in result.html()
    assert not any(p.name.startswith("misfit") for p in (tmp_path / "out" / "recipes").iterdir())


def test_forms(done):
    result, out = done
    text = (out / "study.md").read_text()
    assert text == result.markdown() and "| W4A16_INT | " in text and "On letters." in text
    order = text[text.index("## Order on letters") :].splitlines()[4:]
    assert re.match(r"\| W8A16 \| .* \|  \|  \|", order[0]) and re.match(r"\| W4A16(_INT)? \| .* \| \+.* ± ", order[1])
    data = json.loads((out / "study.json").read_text())
    assert data["outcomes"][0]["scores"]["letters"]["kl"]["clusters"] == len(BLOCKS.blocks)
    page = (out / "study.html").read_text()
    assert page.count("<svg") == 3 and "http" not in page and "<script" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.S):
        ElementTree.fromstring(svg)
    assert len(set(re.findall(r'\bid="([^"]+)"', page))) == len(re.findall(r'\bid="([^"]+)"', page))
    assert not list((out / "work").iterdir()), "finished recipes leave no work behind"


def test_tables_go_from_the_best_to_the_worst_and_have_units(done):
    result, _ = done
    assert [o.name for o in result.outcomes] == list(RECIPES), "the data stay as they were asked for"
    kl = {o.name: o.scores["letters"]["kl"].mean for o in result.outcomes}
    wanted = sorted(RECIPES, key=kl.get)
    for rows in (result.rows()[1:], result.size_rows()[1:], result.order_rows("letters")):
        assert [r[0] for r in rows] == wanted
    assert result.rows()[0][0] == result.size_rows()[0][0] == "float"
    assert result.columns() == ["", "perplexity", "recovery, %", "KL to float, nats", "agreement, %"]
    scale, unit, digits = result.size_unit()
    assert result.size_columns()[1] == f"stored, {unit}"
    for row, name in zip(result.size_rows()[1:], wanted, strict=True):
        stored = next(o.stored_bytes for o in result.outcomes if o.name == name)
        assert float(row[1].replace(",", "")) * scale == pytest.approx(stored, abs=scale * 10.0**-digits)
    assert "tokens in" in result.markdown() and "one by one" in result.html()


@pytest.mark.slow
def test_the_presets_of_the_study_keep_what_it_says():
    """W8A8-INT (here with smoothing) and W8A8-FP within half a percent of the float perplexity."""
    result = run(("W8A8-INT-smooth", "W8A8-FP"), batches=BATCHES)
    assert all(abs(o.recovery["letters"].mean - 100) < 0.5 for o in result.outcomes)
    assert any("kept beside the weight" in note for note in result.outcomes[0].notes)  # a tanh takes up no factors


def classifier(params, images):
    return jnp.tanh(images.reshape(len(images), -1) @ params["w"]) @ params["head"]


@pytest.mark.slow
def test_images_and_the_average_over_tasks():
    rng = np.random.default_rng(3)
    params = {"w": rng.normal(size=(48, 20)).astype(np.float32) / 7, "head": rng.normal(size=(20, 5)) / 4}
    params["head"] = params["head"].astype(np.float32)
    images = rng.normal(size=(23, 4, 4, 3)).astype(np.float32)
    labels = rng.integers(0, 5, 23)
    tasks = [ImageTask("first", images[:13], labels[:13], batch_size=5), ImageTask("second", images[13:], labels[13:])]
    result = qjax.study(classifier, params, tasks, ["W4A16", "W2A16"])
    model = qjax.quantize(classifier, params, images[:1], recipe="W2A16")
    found = result.outcomes[1]
    for task, part in (("first", slice(0, 13)), ("second", slice(13, 23))):
        choice = np.asarray(model(model.params, images[part])).argmax(-1)
        of_float = np.asarray(classifier(params, images[part])).argmax(-1)
        right, right_float = (choice == labels[part]).mean(), (of_float == labels[part]).mean()
        assert found.scores[task]["top1"].mean == pytest.approx(right)
        assert found.scores[task]["agreement"].mean == pytest.approx((choice == of_float).mean())
        kept = found.recovery[task]
        assert kept.mean == pytest.approx(100 * right / right_float)
        hits, hits_float = (choice == labels[part]) * 1.0, (of_float == labels[part]) * 1.0
        terms = (hits - right / right_float * hits_float) / right_float  # the delta method for a ratio of means
        assert kept.stderr == pytest.approx(100 * np.sqrt((terms**2).sum() / (len(terms) - 1) / len(terms)))
        assert result.counts[task] == (part.stop - part.start,) * 2
    assert found.average == pytest.approx(sum(e.mean for e in found.recovery.values()) / 2)
    assert "average recovery, %" in result.columns() and result.html().count("<svg") == 5


@pytest.mark.slow
def test_sentences():
    rng = np.random.default_rng(4)
    params = {"e": rng.normal(size=(30, 8)).astype(np.float32), "w": rng.normal(size=(8, 8)).astype(np.float32)}

    def encoder(p, tokens, mask):
        return jnp.where(mask[..., None], jnp.tanh(p["e"][tokens] @ p["w"]), 7.0)

    pairs = [tuple(rng.integers(0, 30, n).tolist() for n in rng.integers(2, 40, 2)) for _ in range(9)]
    task = SentenceTask("pairs", pairs, batch_size=4)
    model = qjax.quantize(encoder, params, *task.example(), recipe="W4A16")
    units = task.reference(encoder, params).units(model, model.params)
    assert len(units["cosine_drift"]) == 9 and "" not in summary(task, units)

    def vectors(f, p, ids):
        hidden = np.asarray(f(p, np.array([ids]), np.ones((1, len(ids)), bool)))[0].astype(np.float64)
        return hidden, hidden.mean(0) / np.linalg.norm(hidden.mean(0))

    drift, errors = [], []
    for pair in pairs:
        (h1, v1), (h2, v2) = (vectors(encoder, params, ids) for ids in pair)
        (g1, u1), (g2, u2) = (vectors(model, model.params, ids) for ids in pair)
        drift.append(abs(u1 @ u2 - v1 @ v2))
        errors.append((((g1 - h1) ** 2).sum() + ((g2 - h2) ** 2).sum()) / ((h1**2).sum() + (h2**2).sum()))
    np.testing.assert_allclose(sorted(units["cosine_drift"]), sorted(drift), atol=1e-5)
    np.testing.assert_allclose(sorted(units["output_error"]), sorted(errors), rtol=1e-3)
