"""Recipes as plain data: dictionaries, TOML files and the presets.

The shape, in TOML::

    name = "mine"

    [[rules]]
    match = "**/lm_head/**"
    skip = true
    optional = true

    [[rules]]
    match = "**"
    weights = { format = "int", bits = 4, group = 128 }
    inputs = { dynamic = { format = "int", bits = 8, per = "token" } }

    [[prepare]]
    pass = "SmoothQuant"

A format is a table with the key ``format`` and its settings; ``{ dynamic = <format> }`` and ``{ static = <format>,
observer = <observer> }`` (and ``ema``, ``learned``) say where a scale comes from; roundings, observers and passes are
tables with the class name under ``rounding``, ``observer`` or ``pass`` (``module:Class`` for those of other packages),
and their settings. Settings at their default are left out, and a key that nothing reads is refused, so that a
misspelled setting cannot be ignored.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import sys
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from qjax import plugins
from qjax.errors import QjaxError, RecipeError, near
from qjax.recipe import Recipe, Rule
from qjax.sources import SOURCES

_SOURCES = {source.__name__.lower(): source for source in SOURCES}

# Where the classes named under each key live.
_HOMES = {"rounding": "qjax.passes", "pass": "qjax.passes", "observer": "qjax.calibration"}

# Settings that hold an object, and the key of its class.
_HOLD = {"observer": "observer", "inner": "rounding"}

_FLAGS = ("skip", "optional", "clamp_group")
_RULE_KEYS = tuple(f.name for f in dataclasses.fields(Rule) if f.name != "_")

# What every preset leaves in float, as llm-compressor does: the head, embedding tables with the heads tied to them, and
# what decides which expert a token goes to, where a small error makes another function.
_KEPT_IN_FLOAT = (
    Rule("**/lm_head/**", skip=True, optional=True),
    Rule("**", op="embedding", skip=True, optional=True),
    Rule("**/embedding*", skip=True, optional=True),
    Rule("**/router/**", skip=True, optional=True),
    Rule("**/shared_gate/**", skip=True, optional=True),
)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as JSON-able data, with settings at their default left out."""
    data: dict[str, Any] = {"name": recipe.name} if recipe.name else {}
    data["rules"] = [_rule_to_dict(rule) for rule in recipe.rules]
    if recipe.prepare:
        data["prepare"] = [_object_to_dict(step, "pass") for step in recipe.prepare]
    if recipe.finish:
        data["finish"] = [_object_to_dict(step, "pass") for step in recipe.finish]
    if recipe.settle is not None:
        data["settle"] = _object_to_dict(recipe.settle, "pass")
    return data


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """Return the recipe that the data describes.

    Raises:
        RecipeError: a missing or unknown key, or a value that no recipe can have.
    """
    data = _table(data, "the recipe")
    _known_keys(data, ("name", "rules", "prepare", "finish", "settle"), "the recipe")
    rules = data.get("rules")
    if not isinstance(rules, list) or not rules:
        raise RecipeError("the recipe has no rules; in TOML each begins with a line [[rules]]")
    prepare, finish = data.get("prepare", []), data.get("finish", [])
    for what, given in (("prepare", prepare), ("finish", finish)):
        if not isinstance(given, list):
            raise RecipeError(f"the recipe's {what} is a list of passes; in TOML each begins with a line [[{what}]]")
    return Recipe(
        [_rule_from_dict(rule, f"rule {index}") for index, rule in enumerate(rules)],
        [_object_from_dict(step, "pass", f"prepare pass {index}") for index, step in enumerate(prepare)],
        str(data.get("name", "")),
        finish=[_object_from_dict(step, "pass", f"finishing pass {index}") for index, step in enumerate(finish)],
        settle=_object_from_dict(data["settle"], "pass", "settle") if "settle" in data else None,
    )


def recipe_to_toml(recipe: Recipe) -> str:
    """Return the recipe as the text of a TOML file."""
    data = recipe_to_dict(recipe)
    lines = [f"name = {_toml(data['name'])}", ""] if "name" in data else []
    if "settle" in data:
        lines += [f"settle = {_toml(data['settle'])}", ""]
    for section in ("rules", "prepare", "finish"):
        for table in data.get(section, ()):
            lines += [f"[[{section}]]", *(f"{key} = {_toml(value)}" for key, value in table.items()), ""]
    return "\n".join(lines[:-1]) + "\n"


def recipe_from_toml(source: str | Path) -> Recipe:
    """Return the recipe in a file (a path, or a string that ends in ``.toml``) or in the text itself.

    Raises:
        RecipeError: the file is missing or is not TOML, or what it says is no recipe.
    """
    place = "the recipe"
    try:
        if isinstance(source, Path) or (source.endswith(".toml") and "\n" not in source):
            place = str(source)
            source = Path(source).read_text(encoding="utf-8")
        data = tomllib.loads(source)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"cannot read the recipe file {place}: {why}") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{place} is not TOML: {error}") from error
    return recipe_from_dict(data)


@functools.cache
def presets() -> Mapping[str, Mapping[str, Any]]:
    """Return the table of presets as it stands in ``presets.toml``, by name."""
    return tomllib.loads((resources.files("qjax") / "presets.toml").read_text(encoding="utf-8"))


def load_preset(name: str) -> Recipe:
    """Return the preset of that name in any case, or the recipe in a ``.toml`` file.

    Raises:
        RecipeError: no such preset, with the nearest names; a preset that needs calibration.
    """
    if name.endswith(".toml"):
        return recipe_from_toml(Path(name))
    key = name.strip().upper().replace("-", "_")
    preset = presets().get(key)
    if preset is None:
        hint = near(name, presets()) or f"; there are {', '.join(presets())}"
        raise RecipeError(f"no preset is named {name!r}{hint}; a recipe of your own is a file ending in .toml")
    preset = presets()[preset.get("alias", key)]
    own = ("description", "prepare", "rules", "settle")
    settings = {key: value for key, value in preset.items() if key not in own}
    before = [_rule_from_dict({"match": "**", "optional": True, **r}, f"preset {key}") for r in preset.get("rules", ())]
    rule = _rule_from_dict({"match": "**", "clamp_group": True, **settings}, f"preset {key}")
    steps = [_object_from_dict(step, "pass", f"preset {key}: prepare") for step in preset.get("prepare", ())]
    settle = _object_from_dict(preset["settle"], "pass", f"preset {key}: settle") if "settle" in preset else None
    return Recipe([*_KEPT_IN_FLOAT, *before, rule], steps, name=key, settle=settle)


def _rule_to_dict(rule: Rule) -> dict[str, Any]:
    data: dict[str, Any] = {"match": rule.match}
    if rule.ops != ("linear",):
        data["op"] = rule.op if isinstance(rule.op, str) else list(rule.op)
    if rule.weights is not None:
        data["weights"] = _source_to_dict(rule.weights)
    for key in ("inputs", "outputs"):
        if (source := getattr(rule, key)) is not None:
            data[key] = _source_to_dict(source)
    if rule.operands:
        data["operands"] = {name: _source_to_dict(source) for name, source in rule.operands.items()}
    if rule.rounding is not None:
        data["rounding"] = _object_to_dict(rule.rounding, "rounding")
    return data | {flag: True for flag in _FLAGS if getattr(rule, flag)}


def _rule_from_dict(data: Any, where: str) -> Rule:
    data = _table(data, where)
    _known_keys(data, _RULE_KEYS, where)
    if "match" not in data:
        raise RecipeError(f"{where} has no match, the pattern for site names such as '**/mlp/**'")
    for flag in _FLAGS:
        if not isinstance(data.get(flag, False), bool):
            raise RecipeError(f"{where}: {flag} is true or false, not {data[flag]!r}")
    op = data.get("op", "linear")
    if not isinstance(op, str) and not (isinstance(op, list) and all(isinstance(o, str) for o in op)):
        raise RecipeError(f"{where}: op is a name or a list of names, not {op!r}")
    values: dict[str, Any] = {**data, "op": op if isinstance(op, str) else tuple(op)}
    for key in ("weights", "inputs", "outputs"):
        if key in data:
            values[key] = _source_from_dict(data[key], f"{where}: {key}")
    if "operands" in data:
        operands = _table(data["operands"], f"{where}: operands")
        values["operands"] = {name: _source_from_dict(v, f"{where}: operands.{name}") for name, v in operands.items()}
    if "rounding" in data:
        values["rounding"] = _object_from_dict(data["rounding"], "rounding", f"{where}: rounding")
    return Rule(**values)


def _source_to_dict(source: Any) -> dict[str, Any]:
    kind = type(source).__name__.lower()
    if kind not in _SOURCES:
        return source.to_dict()
    data = {kind: source.fmt.to_dict()}
    for f in dataclasses.fields(source):
        value = getattr(source, f.name)
        if f.name != "fmt" and value != f.default:
            data[f.name] = _object_to_dict(value, "observer") if f.name == "observer" else value
            data[f.name] = list(value) if isinstance(value, tuple) else data[f.name]
    return data


def _source_from_dict(data: Any, where: str) -> Any:
    data = _table(data, where)
    kind = next((k for k in _SOURCES if k in data), None)
    if kind is None:
        return _format_from_dict(data, where)
    settings = [f.name for f in dataclasses.fields(_SOURCES[kind]) if f.name != "fmt"]
    _known_keys(data, (kind, *settings), where)
    values = {name: data[name] for name in settings if name in data}
    if "observer" in values:
        values["observer"] = _object_from_dict(values["observer"], "observer", f"{where}: observer")
    return _SOURCES[kind](_format_from_dict(data[kind], where), **values)


def _format_from_dict(data: Any, where: str) -> Any:
    from qjax.formats.registry import format_from_dict

    try:
        return format_from_dict(dict(_table(data, where)))
    except QjaxError as error:
        raise RecipeError(f"{where}: {error}") from error


def _object_to_dict(value: Any, kind: str) -> dict[str, Any]:
    """A rounding, observer or pass: its class under ``kind``, and the settings that differ from the default."""
    cls = type(value)
    ours = getattr(importlib.import_module(_HOMES[kind]), cls.__name__, None) is cls
    data: dict[str, Any] = {kind: cls.__name__ if ours else f"{cls.__module__}:{cls.__qualname__}"}
    for item in dataclasses.fields(value):
        setting = getattr(value, item.name)
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        if item.init and setting != default:
            kind_of = _HOLD.get(item.name)
            data[item.name] = _object_to_dict(setting, kind_of) if kind_of and setting is not None else setting
    return data


def _object_from_dict(data: Any, kind: str, where: str) -> Any:
    data = dict(_table(data, where))
    cls = _class_named(data.pop(kind, None), kind, where)
    known = [item.name for item in dataclasses.fields(cls) if item.init]
    _known_keys(data, known, f"{where} ({cls.__name__})")
    for key in _HOLD.keys() & data.keys():
        data[key] = _object_from_dict(data[key], _HOLD[key], f"{where}: {key}")
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
    except (TypeError, QjaxError) as error:
        raise RecipeError(f"{where} ({cls.__name__}): {error}") from error


def _class_named(name: Any, kind: str, where: str) -> Any:
    """The class that ``name`` stands for: one of ours by its name, another package's as ``module:Class``.

    A module that nobody has imported is not imported here: a recipe may come with a stranger's checkpoint, and data
    must not decide what code runs.
    """
    home = importlib.import_module(_HOMES[kind])
    known = [n for n in home.__all__ if dataclasses.is_dataclass(getattr(home, n))]
    if name in known:
        return getattr(home, name)
    module_name, colon, class_name = str(name).partition(":")
    if not colon:
        raise RecipeError(f"{where}: no {kind} is named {name!r}{near(str(name), known)}; there are {', '.join(known)}")
    plugins.load()
    cls = getattr(sys.modules.get(module_name), class_name, None)
    if not dataclasses.is_dataclass(cls):
        raise RecipeError(f"{where}: {name!r} is not loaded; import {module_name} first, or install it as a plugin")
    return cls


def _table(data: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} is a table of keys and values, not {data!r}")
    return data


def _known_keys(data: Mapping[str, Any], known: Any, where: str) -> None:
    for key in data:
        if key not in known:
            raise RecipeError(
                f"{where} has the unknown key {key!r}{near(key, known) or '; known are ' + ', '.join(known)}"
            )


def _toml(value: Any) -> str:
    """One value in TOML, tables inline. JSON's strings are TOML's, apart from the delete character."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    raise RecipeError(f"a recipe on disk holds numbers, strings, lists and tables, not {value!r}")


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _toml(key)
