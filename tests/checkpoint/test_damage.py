"""Damaged, foreign and newer checkpoints: each has one sentence that says which file or leaf, and what to do."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_models import X, apply, make_params

import qjax
from qjax.checkpoint import read_metadata, store
from qjax.errors import CheckpointError
from qjax.formats import Format, Int, registry


def refused(path, *said, like=None, fn=apply, **kwargs):
    """Assert that loading fails with one sentence that has these words in it."""
    with pytest.raises(CheckpointError) as caught:
        qjax.load(path, fn, like, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in said), message
    return message


def current(path):
    return path / "versions" / store.read_pointer(path).current


def test_no_checkpoint(tmp_path):
    refused(tmp_path / "none", "no checkpoint at", "no such folder", "that qjax.save wrote")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no checkpoint at", "no file CURRENT")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "it is a file")
    (tmp_path / "killed" / "versions").mkdir(parents=True)
    refused(tmp_path / "killed", "no save into it was ever completed")


def test_every_file_truncated_emptied_flipped_or_gone(saved):
    files = sorted(p for p in current(saved).rglob("*") if p.is_file())
    assert len(files) > 8 and {"manifest.json", "metadata.json"} < {p.name for p in files}
    for file in (saved / "CURRENT", *files):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 4
        for damage in (content[:-1], content[: len(content) // 2], b"", bytes(flipped), content + b"0"):
            file.write_bytes(damage)
            refused(saved, str(file), "restore the folder from a copy, or save the model again")
        file.unlink()
        refused(saved, str(file) if file.name != "CURRENT" else "no checkpoint")
        file.write_bytes(content)
    assert qjax.load(saved, apply).params


@pytest.mark.parametrize("name", ["CURRENT", "manifest.json", "metadata.json"])
def test_any_bit(saved, name):
    file = saved / name if name == "CURRENT" else current(saved) / name
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for at, bit in zip(rng.integers(len(content), size=300), rng.integers(8, size=300), strict=True):
        flipped = bytearray(content)
        flipped[at] ^= 1 << bit
        file.write_bytes(bytes(flipped))
        with pytest.raises(CheckpointError, match=name):
            read_metadata(saved)


def test_pointer_to_nowhere(saved, tmp_path):
    shutil.rmtree(current(saved))
    refused(saved, "CURRENT names the version", "is missing")
    store._point(saved, store.Pointer("../../elsewhere"))
    refused(saved, "names no version")


@pytest.mark.parametrize("name", ["CURRENT", "manifest.json", "metadata.json"])
def test_newer_format(saved, name):
    file = saved / name if name == "CURRENT" else current(saved) / name
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2, "unheard": "of"}))
    refused(saved, str(file), "format 2", "reads formats up to 1", "newer one")
    with pytest.raises(CheckpointError, match="format 2"):
        read_metadata(saved)


def test_metadata_that_this_qjax_cannot_read(saved):
    file = current(saved) / "metadata.json"
    data = json.loads(file.read_text())
    data["recipe"]["rules"][-1]["weights"] = {"format": "trits"}
    file.write_text(json.dumps(data))
    (current(saved) / "manifest.json").unlink()
    store._write_manifest(current(saved))
    refused(saved, "cannot read", "trits", f"qjax {qjax.__version__}")


def test_another_model(saved):
    like = make_params()
    refused(
        saved, "layers/0/w is float32[16,16] in the checkpoint and float32[16,8] in like", like=other(like, (16, 8))
    )
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), like)
    message = refused(
        saved, "layers/0/b is float32[16] in the checkpoint and bfloat16[16] in like", "1 more", like=half
    )
    assert "layers/1/w" not in message
    more = {**like, "head": np.ones((2, 3), np.float32)}
    refused(saved, "the checkpoint lacks head float32[2,3]", "that it was saved from", like=more)
    fewer = {"layers": like["layers"][:1]}
    refused(saved, "like lacks layers/1/b float32[16], layers/1/w float32[16,16]", like=fewer)
    refused(saved, "like lacks layers/0/b", "1 more", "the checkpoint lacks w", like={"w": like["layers"][0]["w"]})
    refused(saved, "like lacks", like={})


def other(params, shape):
    first = {**params["layers"][0], "w": np.ones(shape, np.float32)}
    return {"layers": [first, params["layers"][1]]}


def test_a_format_that_is_not_registered(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Halves(Int):
        bits: int = 8

    fn = lambda p, x: x @ p["w"]  # noqa: E731
    params, x = {"w": np.eye(16, dtype=np.float32)}, X
    recipe = qjax.Recipe([qjax.Rule("**", weights=Halves())])
    model = qjax.quantize(fn, params, x, recipe=recipe)
    with pytest.raises(qjax.errors.QjaxError, match="cannot be saved|register"):  # it calls itself Int
        qjax.save(tmp_path / "m", model)
    assert not (tmp_path / "m").exists()

    monkeypatch.setattr(registry, "_FORMATS", dict(registry._FORMATS))
    monkeypatch.setattr(Halves, "key", "halves")
    registry.register_format("halves", Halves)
    qjax.save(tmp_path / "m", model)
    assert isinstance(qjax.load(tmp_path / "m", fn, params).params["w"].fmt, Halves)
    monkeypatch.setitem(registry._FORMATS, "halves", Format)
    del registry._FORMATS["halves"]
    refused(tmp_path / "m", "halves", "plugin", fn=fn, like=params)
