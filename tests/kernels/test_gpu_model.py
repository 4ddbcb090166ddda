"""The benchmark of whole models, tried out on CPU: its checks, its page, and what it says a GPU would run."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from benchmarks import gpu_model
from benchmarks.gpu_parts import model as part
from qjax.models import LanguageModel


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    assert gpu_model.main(["--tiny", "--scan", "--batch", "2", "--schemes", "W4A16", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "gpu_model-scan-cpu.json").read_text())
    assert [(r["scheme"], r["what"], r["batch"]) for r in record["rows"]] == [
        ("bfloat16", "decode", 2),
        ("W4A16", "decode", 2),
        ("bfloat16", "prefill", 1),
        ("W4A16", "prefill", 1),
    ]
    assert not [r for r in record["rows"] if "failure" in r] and not record["left_out"]
    (found,) = record["schemes"]
    assert found["lowerings"] == {"mosaic": 13} and all(c["right"] for c in found["checks"])
    four_bit, wide = (next(r for r in record["rows"] if r["scheme"] == s) for s in ("W4A16", "bfloat16"))
    assert 3 < (wide["bytes"] - wide["cache_bytes"]) / (four_bit["bytes"] - four_bit["cache_bytes"]) < 3.8
    page = (tmp_path / "gpu_model-scan-cpu.md").read_text()
    assert (
        "tiny W4A16: right" in page and "| tiny decode W4A16 | 2 |" in page and page in capsys.readouterr().out + page
    )


@pytest.mark.slow
def test_codes_of_another_row_are_noticed(monkeypatch):
    fn = LanguageModel(part.SIZES["tiny"])
    scheme, pack = part.SCHEMES["W4A8"], part.packed
    model = part.quantized(fn, scheme)
    with monkeypatch.context() as m:

        def turned(params, scheme):
            first = params["layers"][0]["mlp"]["down"]["kernel"]
            turn = dataclasses.replace(first, aux={**first.aux, "scale": first.aux["scale"][::-1]})
            layer = {**params["layers"][0], "mlp": {**params["layers"][0]["mlp"], "down": {"kernel": turn}}}
            return pack({**params, "layers": [layer, *params["layers"][1:]]}, scheme)

        m.setattr(part, "packed", turned)
        assert not any(row["right"] for row in part.checks(fn, model, scheme))


def test_lazy_and_whole_parameters_are_the_same():
    for scan in (False, True):
        fn = LanguageModel(part.SIZES["tiny"], scan_layers=scan)
        lazy, whole = (jax.tree.leaves(part.parameters(fn, lazily)) for lazily in (True, False))
        assert len(lazy) == len(whole) == len(jax.tree.leaves(fn.abstract_params()))
        for a, b in zip(lazy[:3], whole[:3], strict=True):
            assert a.shape == b.shape and (jax.numpy.asarray(a) == b).all()


@pytest.mark.parametrize(("ms", "said"), [(1.0, "is reached: least 3.00"), (1.5, "IS NOT REACHED: least 2.00")])
def test_the_page_says_whether_the_aim_is_reached(ms, said):
    row = {"size": "8B", "what": "decode", "batch": 1, "options": "", "tokens_per_second": 1.0}
    row |= {"bytes": 8, "share_of_copy": 0.5}
    rows = [{**row, "scheme": "bfloat16", "ms": 3.0}, {**row, "scheme": "W4A16", "ms": ms}]
    rows.append({**row, "scheme": "W4A16", "batch": 2, "failure": "no memory"})
    record = {
        "context": 1,
        "prompt": 1,
        "scan": False,
        "apart": False,
        "copy": 1.0,
        "schemes": [],
        "rows": rows,
        "left_out": ["1B"],
    }
    page = gpu_model.text(record)
    assert f"{said}, batch 1" in page and "failed: " in page and "left out, the time was up: 1B" in page
