"""Formats by name, and plugins."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os

import pytest

from qjax import plugins
from qjax.errors import FormatError, QjaxWarning
from qjax.formats import Format, Int, format_from_dict, formats, get, register_format

BUILT_IN = {"int", "float8", "nf4", "mxfp4", "mxfp8", "nvfp4"}
WRONG_TYPE = pytest.mark.skipif(bool(os.environ.get("QJAX_BEARTYPE")), reason="beartype refuses it first")


def test_built_in_formats_are_there():
    assert set(formats()) >= BUILT_IN
    assert get("int") is Int


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"format": "in"}, "did you mean 'int'"),
        ({"bits": 4}, "key 'format'"),
        pytest.param("int4", "key 'format'", marks=WRONG_TYPE),
        ({"format": "int", "bits": 4, "grop": 3}, "no setting 'grop' .did you mean 'group'"),
        ({"format": "int"}, "missing 1 required positional argument: 'bits'"),
        pytest.param({"format": "int", "bits": "4"}, "2 to 8", marks=WRONG_TYPE),
        ({"format": "mxfp4", "block": 16}, "it has none"),
    ],
)
def test_wrong_descriptions_say_what_is_wrong(spec, words):
    with pytest.raises(FormatError, match=words):
        format_from_dict(spec)


def test_a_key_belongs_to_one_class():
    with pytest.raises(FormatError, match="taken by qjax.formats.integer.Int"):
        register_format("int", type("Other", (Format,), {}))
    with pytest.raises(FormatError, match="not registered"):

        @dataclasses.dataclass(frozen=True)
        class Nameless(Format):
            per = "channel"
            group = None

        Nameless().to_dict()


@dataclasses.dataclass(frozen=True)
class _Entry:
    name: str
    value: str
    plugin: object

    def load(self):
        if isinstance(self.plugin, Exception):
            raise self.plugin
        return self.plugin


def test_plugins_are_loaded_once_and_a_broken_one_is_named(monkeypatch):
    calls = []
    entries = [
        _Entry("good", "good:register", lambda: calls.append("good")),
        _Entry("broken", "broken", ImportError("no module named x")),
        _Entry("module", "module", plugins),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries if group == "qjax.plugins" else [])
    monkeypatch.setattr(plugins, "_loaded", None)
    with pytest.warns(QjaxWarning, match="'broken' .* ImportError: no module named x"):
        assert plugins.load() == ["good", "module"]
    assert plugins.load() == ["good", "module"] and calls == ["good"]
