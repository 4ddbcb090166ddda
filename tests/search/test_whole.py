"""Whole assignments as measured, against models that are quantized so, and the search over them against all of them."""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import qjax
from qjax.errors import CheckpointError, SearchError
from qjax.search import NSGA2, WholeLosses, assign, plot_front, refine, sensitivities
from qjax.search.whole import Remembered

RNG = np.random.default_rng(0)
PARAMS = {
    "layers": {
        "a": RNG.standard_normal((3, 16, 32)).astype(np.float32) / 2,
        "b": RNG.standard_normal((3, 32, 16)).astype(np.float32) / 3,
    },
    "head": RNG.standard_normal((16, 5)).astype(np.float32),
}
BATCHES = [(RNG.standard_normal((n, 16)).astype(np.float32),) for n in (8, 8, 5)]
CHOICES = [qjax.Recipe([qjax.Rule("**", weights=qjax.Int(b, group=16))], name=f"W{b}") for b in (2, 4)]
TIE = [("a", "b")]


def fn(params, x):
    def step(h, layer):
        return jnp.tanh(h @ layer["a"]) @ layer["b"], None

    return jax.lax.scan(step, x, params["layers"])[0] @ params["head"]


@pytest.fixture(scope="module")
def losses():
    return WholeLosses(fn, PARAMS, BATCHES, CHOICES, tie=TIE)


@pytest.fixture(scope="module")
def found():
    return sensitivities(fn, PARAMS, BATCHES, CHOICES, tie=TIE)


@pytest.fixture(scope="module")
def everything(losses):
    every = np.array(list(itertools.product(range(3), repeat=4)))
    return every, losses(every)


def test_is_the_divergence_of_the_quantized_model(found, everything):
    every, measured = everything
    assert losses_of(every, measured, (2, 2, 2, 2)) == 0, "all in float"
    for n, row in enumerate(found.rows):  # one group alone is what sensitivities are of
        for c, name in enumerate(("W2", "W4")):
            genome = [2, 2, 2, 2]
            genome[n] = c
            assert losses_of(every, measured, genome) == pytest.approx(row.losses["kl"][name], rel=1e-4)
    best = assign(found, "6 bits")
    genome = [found.choices.index(best.choices[row.name]) for row in found.rows]
    model = qjax.quantize(fn, PARAMS, *BATCHES[0], recipe=best.recipe())
    made = [qjax.evaluate.logit_divergence(fn(PARAMS, x), model(model.params, x)) for (x,) in BATCHES]
    want = sum(m.kl * m.count for m in made) / sum(m.count for m in made)
    assert losses_of(every, measured, genome) == pytest.approx(want, rel=1e-4)


def losses_of(every, measured, genome):
    return measured[(every == np.array(genome)).all(axis=1)].item()


def test_finds_the_best_of_all_and_goes_on(found, losses, everything, tmp_path):
    every, measured = everything
    cost = np.array([[row.bytes[c] * 8 / found.elements for c in found.choices] for row in found.rows])
    costs = cost[np.arange(4), every].sum(axis=1)
    fine = costs <= 8
    how = NSGA2(population=16, generations=12)
    seen = []
    best = refine(found, losses, "8 bits", how, resume=tmp_path / "job", progress=seen.append)
    assert best.whole == pytest.approx(measured[fine].min(), rel=1e-6) and best.cost <= 8
    assert seen[-1].generation == 12 and seen[-1].best == best.whole and seen[-1].measured <= fine.sum()
    start = assign(found, "8 bits")
    own = [found.choices.index(start.choices[row.name]) for row in found.rows]
    assert best.whole <= losses_of(every, measured, own), "never worse than what the sums say"
    curve = best.curves["NSGA-II"]
    want = [(c, lo) for c, lo in zip(costs[fine], measured[fine], strict=True)]
    want = sorted((c, lo) for c, lo in want if not any(a <= c and b < lo for a, b in want))
    assert [p.loss for p in curve] == pytest.approx(sorted({lo for _, lo in want}, reverse=True), rel=1e-5)
    for point in best.curves["Lagrangian"]:
        assert min(p.loss for p in curve if p.cost <= point.cost + 1e-9) <= point.loss
    model = qjax.quantize(fn, PARAMS, *BATCHES[0], recipe=best.recipe())
    assert model.report.stored_bytes == best.stored_bytes and json.dumps(best.to_dict())

    # Killed: the last line is cut, the last population is an older one; another budget takes what was measured.
    file = tmp_path / "job/measured.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-3]) + lines[-3][:9])
    (population,) = (tmp_path / "job").glob("population-*/population.json")
    population.unlink()
    again = refine(found, losses, "8 bits", how, resume=tmp_path / "job")
    assert (again.choices, again.whole, again.curves) == (best.choices, best.whole, best.curves)
    refine(found, losses, "7 bits", NSGA2(4, 0), resume=tmp_path / "job")
    other = WholeLosses(fn, PARAMS, BATCHES[:1], CHOICES, tie=TIE)
    with pytest.raises(CheckpointError, match="job differ"):
        refine(found, other, "8 bits", how, resume=tmp_path / "job")
    plot_front(best, tmp_path / "front.svg")
    text = (tmp_path / "front.svg").read_text()
    assert "Lagrangian front, measured" in text and "NSGA-II, measured" in text


def test_over_devices(losses, everything):
    every, measured = everything
    mesh = Mesh(np.array(jax.devices()), ("population",))
    spread = WholeLosses(fn, PARAMS, BATCHES[2:], CHOICES, tie=TIE, mesh=mesh)
    alone = WholeLosses(fn, PARAMS, BATCHES[2:], CHOICES, tie=TIE)
    np.testing.assert_allclose(spread(every[:11]), alone(every[:11]), rtol=1e-5, atol=1e-8)


def test_nothing_is_measured_twice(tmp_path):
    calls = []

    def count(genomes):
        calls.append(len(genomes))
        return genomes.sum(axis=1) * 0.1

    some = Remembered(count, tmp_path / "f", block=4)
    genomes = np.array([[0, 1], [1, 1], [0, 1], [2, 2], [3, 0], [0, 0]])
    np.testing.assert_array_equal(some(genomes), genomes.sum(axis=1) * 0.1)
    np.testing.assert_array_equal(Remembered(count, tmp_path / "f")(genomes), genomes.sum(axis=1) * 0.1)
    assert calls == [4, 4], "five different ones, in blocks of one size"


def test_activations_are_refused():
    both = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.Int(8, per="token"))], name="W8A8")
    with pytest.raises(SearchError, match="'W8A8' quantizes activations"):
        WholeLosses(fn, PARAMS, BATCHES, [*CHOICES, both])
