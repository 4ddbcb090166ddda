"""The table of `benchmarks.adalog`, and the record of its rows."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

import numpy as np

from benchmarks import adalog
from benchmarks.adalog import compact, expanded, kept_in, key_of, rows_of, summary, tables, written

NAMES = {"model": "vit", "set": "images", "calibration": None}


def row(method, seed, shift, search=None, **training):
    rng = np.random.default_rng(seed)
    right = rng.random(60) < 0.8 - shift
    return compact(
        {
            **NAMES,
            "search": search or {},
            "method": method,
            "bits": 4,
            "seed": seed,
            **adalog.trained_as(training),
            "seconds": 10.0 if method == "adalog" else None,
            "right": right,
            "float_right": np.ones(60, bool),
            "kl": rng.random(60) + shift,
            "error": 0.1 * rng.random(60) + shift,
        }
    )


def test_methods_are_compared_image_by_image():
    rows = [row(m, seed, shift) for seed in (0, 1) for m, shift in (("adalog", 0.0), ("minmax", 0.5))]
    found, text = summary([*rows, row("adalog-reconstructed", 0, 0.1, reconstruct=300, batch=8)])
    ours, other, trained = found
    assert ours["seeds"] == 2 and "kl_more" not in ours
    np.testing.assert_allclose([other["kl_more"], other["error_more"]], 0.5, atol=1e-4)
    np.testing.assert_allclose(trained["kl_more"], 0.1, atol=1e-4)
    assert other["right_more"] < 0 and other["right_p"] < 1e-6
    lines = text.splitlines()
    assert len(lines) == 5 and "±" in lines[2] and "+0.500 (p" in lines[3] and "300 steps of 8 images" in lines[4]


def test_what_is_trained_is_compared_with_what_is_trained_alike():
    given = [
        ("adalog", 0, None, None, 0.0), ("adalog", 50, 8, "float", 0.3), ("adalog", 50, 8, "quantized", 0.25),
        ("adalog", 50, 32, "float", 0.2), ("log2", 50, 8, "float", 0.4),
    ]  # fmt: skip
    rows = [
        row(m + "-reconstructed" * bool(n), 0, shift, reconstruct=n, batch=batch, block_inputs=source)
        for m, n, batch, source, shift in given
    ]
    entries, text = summary(rows)
    plain, *trained, other = entries
    assert [e["seeds"] for e in entries] == [1] * 5  # another batch is not another seed
    np.testing.assert_allclose([e["kl_more"] for e in trained], [0.3, 0.25, 0.2], atol=1e-4)
    np.testing.assert_allclose(other["kl_more"], 0.1, atol=1e-4)
    assert "50 steps of 8 images a block, on quantized inputs" in text


def test_rows_are_kept_image_by_image():
    given = {"right": np.arange(61) % 3 == 0, "float_right": np.arange(61) % 2 == 0, "kl": np.full(61, 0.123456)}
    there = expanded(json.loads(json.dumps(compact({**given, "error": np.full(61, 1e-5 / 3)}))))
    for key in ("right", "float_right"):
        np.testing.assert_array_equal(there[key], given[key])
    assert (there["kl"] == 0.1235).all() and (there["error"] == 3.333e-6).all()


def test_known_rows_are_taken_and_searches_stand_apart(tmp_path, monkeypatch):
    record = tmp_path / "record.json"
    searched = {"rows": 64}
    rows = [row("adalog", 0, 0.0), row("adalog", 0, 0.1, searched), row("log2", 0, 0.2, searched)]
    written(record, rows, [])
    assert kept_in(record) == {key_of(r): r for r in rows} and kept_in(tmp_path / "none") == {}
    made = []

    def measured(data, method, bits, seed, search, training, folder):
        made.append((method, seed, search, training))
        return row(method, seed, 0.3, search, **training)

    monkeypatch.setattr(adalog, "measured", measured)
    given = argparse.Namespace(
        record=record, resume=tmp_path, seeds=[0], bits=[4], methods=["adalog", "log2", "adalog-reconstructed"],
        rows=64, images=None, steps=None, rounds=None, products=None, reconstruct=7, batch=8, block_inputs="float",
    )  # fmt: skip
    training = dict(reconstruct=7, batch=8, block_inputs="float")
    found = rows_of(SimpleNamespace(names=NAMES), given)
    assert found[:2] == rows[1:] and made == [("adalog-reconstructed", 0, searched, training)]
    assert rows_of(SimpleNamespace(names=NAMES), given) == found and len(made) == 1  # from the folder
    entries, text = tables([*rows, found[2]])
    assert [len(e["table"]) for e in entries] == [1, 3]
    assert text.count("| bits |") == 2 and "the whole schedule" in text and "search: rows 64" in text
