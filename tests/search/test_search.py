"""Sensitivities against what they say they are, computed in NumPy, and assignments against plans and reports."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import CheckpointError, DataError, SearchError
from qjax.formats import quantize_array
from qjax.hardware import Accelerator
from qjax.search import Budget, Sensitivities, assign, plot_front, save_front, sensitivities

RNG = np.random.default_rng(0)
PARAMS = {
    "up": {"kernel": RNG.standard_normal((32, 48)).astype(np.float32) / 6},
    "mid": {"kernel": RNG.standard_normal((48, 48)).astype(np.float32) / 7},
    "head": {"kernel": RNG.standard_normal((48, 6)).astype(np.float32) / 3},
    "bias": RNG.standard_normal(6).astype(np.float32),
}
BATCHES = [(RNG.standard_normal((16, 32)).astype(np.float32),) for _ in range(3)]
W4 = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=16))], name="W4")
W8 = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8))], name="W8")
W8A8 = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.Int(8, per="token"))], name="W8A8")


def fn(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"])
    h = jnp.tanh(h @ params["mid"]["kernel"])
    return h @ params["head"]["kernel"] + params["bias"]


def by_hand(params, x):
    """Logits in float64, and the inputs of the three products."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    a = np.tanh(x @ p["up"]["kernel"])
    b = np.tanh(a @ p["mid"]["kernel"])
    return b @ p["head"]["kernel"] + p["bias"], {"up": x.astype(np.float64), "mid": a, "head": b}


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rounded(name, fmt):
    w = jnp.asarray(PARAMS[name]["kernel"])
    return np.asarray(quantize_array(w, fmt, in_axes=0).dequantize(), np.float64)


FORMATS = {"W4": qjax.Int(4, group=16), "W8": qjax.Int(8)}


@pytest.fixture(scope="module")
def found():
    return sensitivities(fn, PARAMS, BATCHES, [W4, W8], by=("kl", "output", "fisher"))


def row(found, name):
    return next(r for r in found.rows if r.name.startswith(name))


@pytest.mark.parametrize("name", ["up", "mid", "head"])
@pytest.mark.parametrize("choice", ["W4", "W8"])
def test_kl_with_one_layer_quantized(found, name, choice):
    changed = {**PARAMS, name: {"kernel": rounded(name, FORMATS[choice])}}
    want = []
    for (x,) in BATCHES:
        p, q = (softmax(by_hand(params, x)[0]) for params in (PARAMS, changed))
        want.append((p * np.log(p / q)).sum(-1))
    assert row(found, name).losses["kl"][choice] == pytest.approx(np.mean(want), rel=1e-3)
    assert found.predictions == 48


@pytest.mark.parametrize("name", ["up", "mid", "head"])
@pytest.mark.parametrize("choice", ["W4", "W8"])
def test_error_of_a_layers_outputs(found, name, choice):
    w = np.asarray(PARAMS[name]["kernel"], np.float64)
    x = np.concatenate([by_hand(PARAMS, x)[1][name] for (x,) in BATCHES])
    want = np.square(x @ (w - rounded(name, FORMATS[choice]))).sum() / np.square(x @ w).sum()
    assert row(found, name).losses["output"][choice] == pytest.approx(want, rel=1e-4)


def test_second_order_is_the_fisher_diagonal():
    """Of the last layer it is known: F_kc = mean of h_k² p_c (1 - p_c). Drawn labels approach it with their number."""
    many = BATCHES * 60
    made = sensitivities(fn, PARAMS, many, [W4], by="fisher", seed=3)
    delta = np.asarray(PARAMS["head"]["kernel"], np.float64) - rounded("head", FORMATS["W4"])
    total, count = 0.0, 0
    for (x,) in BATCHES:
        logits, inputs = by_hand(PARAMS, x)
        p = softmax(logits)
        total += np.einsum("tk,tc,kc->", np.square(inputs["head"]), p * (1 - p), np.square(delta))
        count += len(x)
    assert row(made, "head").losses["fisher"]["W4"] == pytest.approx(0.5 * total / count, rel=0.1)


def test_second_order_is_near_kl(found):
    for r in found.rows:
        for choice in ("W4", "W8"):
            assert 0.2 < r.losses["fisher"][choice] / r.losses["kl"][choice] < 5


def test_fewer_bits_lose_more(found):
    for r in found.rows:
        for measure in ("kl", "output", "fisher"):
            assert r.losses[measure]["W4"] > r.losses[measure]["W8"] > r.losses[measure]["float"] == 0


def test_quantized_activations_are_replayed():
    made = sensitivities(fn, PARAMS, BATCHES, {"W8": W8, "W8A8": W8A8})
    for r in made.rows:
        rules = [qjax.Rule(r.name, weights=qjax.Int(8), inputs=qjax.Int(8, per="token")), qjax.Rule("**", skip=True)]
        model = qjax.quantize(fn, PARAMS, *BATCHES[0], recipe=qjax.Recipe(rules))
        want = [qjax.evaluate.logit_divergence(fn(PARAMS, x), model(model.params, x)).kl for (x,) in BATCHES]
        assert r.losses["kl"]["W8A8"] == pytest.approx(np.mean(want), rel=1e-4)
        assert r.formats_of("W8A8")[1] == qjax.Int(8, per="token")


def test_another_score():
    def squares(a, b):
        return float(jnp.mean(jnp.square(a - b))), a.shape[0]

    made = sensitivities(lambda p, x: fn(p, x)[:, 0], PARAMS, BATCHES, [W4], score=squares)
    changed = {**PARAMS, "up": {"kernel": rounded("up", FORMATS["W4"])}}
    want = np.mean([np.square(by_hand(PARAMS, x)[0][:, 0] - by_hand(changed, x)[0][:, 0]).mean() for (x,) in BATCHES])
    assert row(made, "up").losses["kl"]["W4"] == pytest.approx(want, rel=1e-3)


def test_roundings_with_data_are_choices():
    gptq = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=16), rounding=qjax.GPTQ())], name="GPTQ")
    made = sensitivities(fn, PARAMS, BATCHES, [W4, gptq], by="output")
    for r in made.rows:
        assert r.losses["output"]["GPTQ"] < r.losses["output"]["W4"]
    best = assign(made, "6.5 bits")
    assert set(best.choices.values()) <= {"GPTQ", "float"} and best.recipe().needs_batches


# Groups


def scanned(params, x):
    def step(h, layer):
        return jnp.tanh(h @ layer["a"]) @ layer["b"], None

    return jax.lax.scan(step, x, params["layers"])[0] @ params["head"]


STACKED = {
    "layers": {
        "a": RNG.standard_normal((3, 16, 32)).astype(np.float32) / 4,
        "b": RNG.standard_normal((3, 32, 16)).astype(np.float32) / 5,
    },
    "head": RNG.standard_normal((16, 5)).astype(np.float32),
}
ROWS = [(RNG.standard_normal((8, 16)).astype(np.float32),)]


def test_layers_of_a_scan_are_groups_of_their_own():
    made = sensitivities(scanned, STACKED, ROWS, [W4, W8])
    assert [r.name for r in made.rows] == [f"layers/{i}/{n}" for n in "ab" for i in range(3)] + ["head"]
    part = np.asarray(quantize_array(jnp.asarray(STACKED["layers"]["a"][1]), FORMATS["W4"], in_axes=0).dequantize())
    a = STACKED["layers"]["a"].copy()
    a[1] = part
    changed = {**STACKED, "layers": {**STACKED["layers"], "a": a}}
    want = qjax.evaluate.logit_divergence(scanned(STACKED, ROWS[0][0]), scanned(changed, ROWS[0][0])).kl
    assert made.rows[1].name == "layers/1/a" and made.rows[1].losses["kl"]["W4"] == pytest.approx(want, rel=1e-4)
    best = assign(made, "6.5 bits")
    model = qjax.quantize(scanned, STACKED, *ROWS[0], recipe=best.recipe())
    assert model.report.stored_bytes == best.stored_bytes
    for r in model.report.quantized:
        assert r.format.startswith("int4" if best.choices[r.name] == "W4" else "int8")


def test_tied_sites_share_a_format():
    made = sensitivities(scanned, STACKED, ROWS, [W4, W8], tie=[("a", "b")])
    assert [r.sites for r in made.rows[:3]] == [(f"layers/{i}/a", f"layers/{i}/b") for i in range(3)]
    assert made.rows[0].elements == 2 * 16 * 32


def test_readers_of_one_leaf_are_one_group():
    def twice(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    w = {"w": RNG.standard_normal((16, 16)).astype(np.float32)}
    made = sensitivities(twice, w, ROWS, [W4, W8], by=("kl", "output"))
    assert [r.sites for r in made.rows] == [("w", "w#1")]
    best = assign(made, "8.9 bits")
    assert repr(made) == "Sensitivities(1 groups in W4, W8, float; kl, output)"
    assert repr(best).startswith("Assignment(") and f" bits of 8.9 bits: 1 × {best.choices['w']}; loss " in repr(best)
    assert str(best).splitlines()[1].split() == ["w", best.choices["w"]]
    assert qjax.quantize(twice, w, *ROWS[0], recipe=best.recipe()).report.stored_bytes == best.stored_bytes


def test_sites_that_a_choice_skips():
    some = qjax.Recipe([qjax.Rule("head/**", skip=True), *W4.rules], name="some")
    made = sensitivities(fn, PARAMS, BATCHES, [some, W8])
    assert set(row(made, "head").bytes) == {"W8", "float"} and set(row(made, "up").bytes) == {"some", "W8", "float"}
    best = assign(made, "8.5 bits")
    model = qjax.quantize(fn, PARAMS, *BATCHES[0], recipe=best.recipe())
    assert model.report.stored_bytes == best.stored_bytes


# Assignments


@pytest.mark.parametrize("budget", ["6 bits", "6.4 bits", "7.3 bits", "12 bits", "4 kB", "6 kB"])
def test_an_assignment_is_the_best_and_is_what_is_stored(found, budget):
    best = assign(found, budget)
    model = qjax.quantize(fn, PARAMS, *BATCHES[0], recipe=best.recipe())
    assert model.report.stored_bytes == best.stored_bytes
    limit = Budget.of(budget)
    cost = best.bits if limit.kind == "bits" else best.stored_bytes
    assert cost == pytest.approx(best.cost) and cost <= limit.amount

    def total(choices):
        stored = sum(r.bytes[c] for r, c in zip(found.rows, choices, strict=True))
        return stored * 8 / found.elements if limit.kind == "bits" else stored + found.other_bytes

    import itertools

    least = min(
        sum(r.losses["kl"][c] for r, c in zip(found.rows, choices, strict=True))
        for choices in itertools.product(*(list(r.bytes) for r in found.rows))
        if total(choices) <= limit.amount
    )
    assert best.loss == pytest.approx(least) and best.exact


def test_no_quantization_is_a_choice(found):
    best = assign(found, "40 bits")
    assert set(best.choices.values()) == {"float"} and best.loss == 0 and best.bits == 32
    assert best.front[-1].loss == 0 and best.front[-1].counts == {"float": 3}


def test_a_budget_below_the_smallest_says_what_is_possible(found):
    says = r"budget of 3 bits is below the smallest possible [0-9.]+ bits, which is 3 groups in W4; give more"
    with pytest.raises(SearchError, match=says):
        assign(found, "3 bits")
    smallest = sum(min(r.bytes.values()) for r in found.rows) + found.other_bytes
    with pytest.raises(SearchError, match=f"below the smallest possible {smallest / 1e3:.4g} kB"):
        assign(found, "100 B")


@pytest.mark.parametrize("on", ["h200", Accelerator()])
@pytest.mark.parametrize("kind", ["seconds", "joules"])
def test_time_and_energy(found, on, kind):
    from qjax.hardware import cost

    def of(r, choice):
        return sum(cost((p.n, p.k), 16, *r.formats_of(choice), on=on)[kind] for p in r.parts)

    low = sum(min(of(r, c) for c in r.bytes) for r in found.rows)
    best = assign(found, Budget(kind, low * 1.4), on=on)
    assert best.cost <= low * 1.4 and best.budget.kind == kind
    want = sum(of(r, best.choices[r.name]) for r in found.rows)
    assert best.cost == pytest.approx(want)
    with pytest.raises(SearchError, match="below the smallest possible"):
        assign(found, Budget(kind, low * 0.9), on=on)
    with pytest.raises(SearchError, match="needs the device"):
        assign(found, Budget(kind, 1.0))


def test_costs_of_ones_own(found):
    costs = {r.name: {c: {"W4": 1.0, "W8": 2.0, "float": 9.0}[c] for c in r.bytes} for r in found.rows}
    best = assign(found, Budget("seconds", 5.0), costs=costs)
    assert sorted(best.choices.values()) == ["W4", "W8", "W8"] and best.cost == 5.0


def test_the_front(found, tmp_path):
    best = assign(found, "7 bits")
    costs, losses = [p.cost for p in best.front], [p.loss for p in best.front]
    assert costs == sorted(costs) and losses == sorted(losses, reverse=True)
    assert best.loss >= np.interp(best.cost, costs, losses) - 1e-12
    save_front(best, tmp_path / "front.json")
    assert json.loads((tmp_path / "front.json").read_text())["counts"] == best.counts
    for name in ("a.svg", "b.svg", "c.png"):
        plot_front(best, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    text = (tmp_path / "a.svg").read_text()
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert all(part in text for part in ("bits per weight (float: 32 bits)", "all W4", "all W8", "budget", "loss "))
    plot_front(assign(found, "40 bits"), tmp_path / "float.svg")  # then the picture goes on to float
    assert "(float" not in (tmp_path / "float.svg").read_text()


def test_lazy_parameters_have_sizes_and_no_losses(found):
    lazy = jax.tree.map(lambda a: qjax.Lazy(a.shape, a.dtype, lambda: pytest.fail("nothing is read")), PARAMS)
    sizes = sensitivities(fn, lazy, BATCHES, [W4, W8], by=())
    assert [r.bytes for r in sizes.rows] == [r.bytes for r in found.rows] and sizes.other_bytes == found.other_bytes
    with pytest.raises(SearchError, match="load them without lazy=True"):
        sensitivities(fn, lazy, BATCHES, [W4, W8], by="output")


def test_sensitivities_as_a_file(found, tmp_path):
    found.save(tmp_path / "s.json")
    again = Sensitivities.load(tmp_path / "s.json")
    assert again == found and assign(again, "7 bits").recipe() == assign(found, "7 bits").recipe()
    for text, says in (("{", "no JSON"), ("{}", "no sensitivities"), ('{"version": 2}', "version 2")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(SearchError, match=says):
            Sensitivities.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("6 bits", "bits", 6),
        ("5.92bits", "bits", 5.92),
        ("10 MB", "bytes", 1e7),
        ("2 MiB", "bytes", 2**21),
        ("2e3 kB", "bytes", 2e6),
        ("1.5 ms", "seconds", 1.5e-3),
        ("20 us", "seconds", 2e-5),
        ("5 mJ", "joules", 5e-3),
    ],
)
def test_budgets(text, kind, amount):
    read = Budget.of(text)
    assert (read.kind, read.amount) == (kind, pytest.approx(amount))


@pytest.mark.parametrize("text", ["", "6", "six bits", "6 apples", "1.2.3 bits", "-1 bits", "0 bits"])
def test_budgets_that_cannot_be(text):
    with pytest.raises(SearchError, match="budget"):
        Budget.of(text)


# Bad input


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"choices": []}, SearchError, "nothing to choose from"),
        ({"choices": [qjax.Recipe(W4.rules)]}, SearchError, "needs a name"),
        ({"choices": [W4, W4]}, SearchError, "two choices are called 'W4'"),
        ({"choices": {"float": W4}}, SearchError, "'float' is always there"),
        ({"by": "mood"}, SearchError, "kl, output, fisher"),
        ({"batches": []}, DataError, "no batches"),
        ({"batches": iter(BATCHES)}, DataError, "only once"),
        ({"choices": [qjax.Recipe([qjax.Rule("**", skip=True)], name="none")]}, SearchError, "quantizes any site"),
    ],
)
def test_what_cannot_be_measured(given, error, says):
    args = {"fn": fn, "params": PARAMS, "batches": BATCHES, "choices": [W4], **given}
    with pytest.raises(error, match=says):
        sensitivities(args.pop("fn"), args.pop("params"), args.pop("batches"), args.pop("choices"), **args)


def test_quantized_parameters_are_refused():
    model = qjax.quantize(fn, PARAMS, *BATCHES[0], recipe=W8)
    with pytest.raises(SearchError, match="quantized already"):
        sensitivities(fn, model.params, BATCHES, [W4])


def test_a_loss_that_is_no_number_is_refused(found):
    bad = dataclasses.replace(found.rows[0], losses={"kl": {**found.rows[0].losses["kl"], "W4": float("nan")}})
    with pytest.raises(SearchError, match="the loss 'kl' of W4 is nan"):
        assign(dataclasses.replace(found, rows=(bad, *found.rows[1:])), "7 bits")
    with pytest.raises(SearchError, match="'mood' was not measured"):
        assign(found, "7 bits", by="mood")


# Going on


class Killed(Exception):
    pass


def test_a_killed_search_goes_on(found, tmp_path):
    seen = []

    def kill(done, total, what):
        seen.append((done, total, what))
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        sensitivities(fn, PARAMS, BATCHES, [W4, W8], resume=tmp_path / "job", progress=kill)
    file = tmp_path / "job" / "measured.jsonl"
    assert len(file.read_text().splitlines()) == 3
    with file.open("a") as f:
        f.write('{"measure": "kl", "gro')
    after = []
    made = sensitivities(
        fn, PARAMS, BATCHES, [W4, W8], resume=tmp_path / "job", progress=lambda *said: after.append(said)
    )
    assert after[0][0] == 3 and len([s for s in after if s[2].endswith(" kl")]) == 3
    assert [r.losses["kl"] for r in made.rows] == [r.losses["kl"] for r in found.rows]
    again = []
    made = sensitivities(
        fn, PARAMS, BATCHES, [W4, W8], resume=tmp_path / "job", progress=lambda *said: again.append(said)
    )
    assert not [s for s in again if s[2].endswith(" kl")] and made.predictions == 48


def test_the_folder_of_another_search_is_refused(tmp_path):
    sensitivities(fn, PARAMS, BATCHES[:1], [W4], by="output", resume=tmp_path / "job")
    for batches, choices in ((BATCHES, [W4]), (BATCHES[:1], [W8])):
        with pytest.raises(CheckpointError, match="begun search of something else"):
            sensitivities(fn, PARAMS, batches, choices, by="output", resume=tmp_path / "job")
