"""`save` and `load`: between a `qjax.Model` and a checkpoint folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from qjax.checkpoint.arrays import read_arrays, write_arrays
from qjax.checkpoint.leaves import array_key, build, describe, plain_specs, shape_and_dtype, shardings_of
from qjax.checkpoint.metadata import load_metadata, make_metadata, refuse_newer_metadata
from qjax.checkpoint.processes import with_copies, writing_together
from qjax.checkpoint.store import ARRAYS, METADATA, reading, verify, write_json
from qjax.checkpoint.tree import Leaves, contain, containers_of, nest
from qjax.errors import CheckpointError, FormatError, LayoutError, QjaxError
from qjax.recipe import Recipe
from qjax.report.data import Report
from qjax.transforms import Model, Rewritten


def save(path: str | Path, model: Model, *, keep: int = 1, source: str | Path | None = None) -> Path:
    """Save a quantized model; what was saved at ``path`` before is replaced when the new one is complete.

    A kill or an error at any moment leaves the older checkpoint as it was. Saves of several threads or processes to
    one path take turns. Where jax runs on several processes, all of them call this, with a path that all can reach;
    what is not sharded over them is the same in each.

    Args:
        path: a folder; made where it is missing, refused where it holds something else.
        model: what `qjax.quantize` returned; its arrays may be sharded.
        keep: how many versions to keep, this one included.
        source: the file or folder that the float weights come from; the SHA-256 of its files is recorded.

    Returns:
        The folder of the new version, inside ``path``; `load` takes either.

    Raises:
        CheckpointError: the model or the folder cannot be used, writing failed (a full disk), or the processes of one
            job hold different numbers.
    """
    if not isinstance(model, Model):
        raise CheckpointError(f"qjax.save takes the Model that qjax.quantize returned, not {type(model).__name__}")
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise CheckpointError(f"keep={keep!r}; give the number of versions to keep, 1 or more")
    path = _local(path)
    arrays: dict[str, Any] = {}
    leaves, names = [], {}
    found = Leaves.of(model.params)
    for number, (name, leaf) in enumerate(found.arrays.items()):
        shape, dtype = shape_and_dtype(leaf)
        stored = describe(name, leaf, array_key(number, name), arrays)
        names |= {key: name for key in arrays if key not in names}
        leaves.append({"name": name, "shape": shape, "dtype": dtype, "stored": stored})
    try:
        metadata = make_metadata(
            leaves=leaves,
            containers=containers_of(model.params),
            recipe=model.recipe,
            report=model.report,
            options={"max_runs": model.rewritten.max_runs, "implementation": model.rewritten.implementation},
            source=source,
        )
        arrays = with_copies(arrays, names)
        with writing_together(path, keep) as folder:
            write_arrays(folder / ARRAYS, arrays)
            if jax.process_index() == 0:
                write_json(folder / METADATA, metadata)
    except QjaxError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"saving to {path} failed ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "what was saved there before is untouched; mend the cause and save again"
        ) from error
    return folder


def load(path: str | Path, fn: Callable[..., Any], like: Any = None, *, shardings: Any = None) -> Model:
    """Load a quantized model; neither calibration data nor the float weights are needed.

    Args:
        path: the folder that `save` wrote, or one version in it.
        fn: the float function ``fn(params, *args, **kwargs)`` that was quantized.
        like: the float parameter tree, abstract (`jax.ShapeDtypeStruct`) or not: an `nnx.State`, an Equinox module,
            any pytree. The result has its structure and its static leaves. None gives the dicts, lists and tuples
            that were saved, or, for trees of other nodes, nested dicts by name (``params["layers"]["0"]["kernel"]``).
        shardings: a tree as ``plan.shardings`` returns, or one of `jax.sharding.NamedSharding` for the float tree, or
            one sharding for all leaves; leaves where it has None go to the default device.

    Returns:
        The model. Leaves are jax arrays; those of 64 bits stay NumPy arrays where jax_enable_x64 is off.

    Raises:
        CheckpointError: there is no checkpoint, a file is missing, truncated or changed, its format is newer, it is of
            another model, or it needs a number format that is not registered.
    """
    if not callable(fn):
        raise CheckpointError(f"qjax.load needs the function that was quantized, not {type(fn).__name__}")
    with reading(_local(path)) as folder:
        refuse_newer_metadata(folder)
        verify(folder)
        metadata = load_metadata(folder)
        leaves = metadata["leaves"]
        wanted = None if like is None else Leaves.of(like)
        if wanted is not None:
            _check_same_model(folder, leaves, wanted.arrays)
        recipe, report = _described(folder, metadata)
        _check_formats(folder, leaves)
        places = _places(leaves, shardings)
        specs = [spec for leaf in leaves for spec in plain_specs(leaf["stored"])]
        arrays = read_arrays(folder / ARRAYS, specs, places)
    values = {leaf["name"]: build(leaf["stored"], arrays) for leaf in leaves}
    if wanted is not None:
        params = wanted.replaced(values)
    elif metadata["containers"] is not None:
        params = contain(metadata["containers"], values)
    else:
        params = nest(values)
    return Model(fn, params, recipe, report, Rewritten(fn, recipe, **metadata["options"]))


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise CheckpointError(f"{path} is no local folder; save to a local one and copy it")
    return Path(path).absolute()


def _check_same_model(folder: Path, leaves: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> None:
    """Compare names, shapes and dtypes; name the first few differences with both values."""
    saved = {leaf["name"]: (leaf["shape"], leaf["dtype"]) for leaf in leaves}
    asked = {name: shape_and_dtype(leaf) for name, leaf in wanted.items()}
    only_saved = [f"{name} {_show(saved[name])}" for name in saved if name not in asked]
    only_asked = [f"{name} {_show(asked[name])}" for name in asked if name not in saved]
    differ = [
        f"{name} is {_show(saved[name])} in the checkpoint and {_show(asked[name])} in like"
        for name in saved
        if name in asked and saved[name] != asked[name]
    ]
    parts = []
    if differ:
        parts.append(_few(differ))
    if only_saved:
        parts.append(f"like lacks {_few(only_saved)}")
    if only_asked:
        parts.append(f"the checkpoint lacks {_few(only_asked)}")
    if parts:
        raise CheckpointError(
            f"the checkpoint {folder} is of another model: {'; '.join(parts)}; "
            "load it with the function and the parameter tree that it was saved from"
        )


def _show(what: tuple[Sequence[int], str]) -> str:
    shape, dtype = what
    return f"{dtype}[{','.join(map(str, shape))}]"


def _few(items: Sequence[str], count: int = 3) -> str:
    more = len(items) - count
    return ", ".join(items[:count]) + (f" and {more} more" if more > 0 else "")


def _described(folder: Path, metadata: Mapping[str, Any]) -> tuple[Recipe, Report]:
    try:
        recipe = Recipe.from_dict({key: value for key, value in metadata["recipe"].items() if key != "hash"})
        return recipe, Report.from_dict(metadata["report"])
    except QjaxError as error:
        raise CheckpointError(
            f"{folder / METADATA} says what this installation of qjax cannot read: {error}; "
            f"it was written by qjax {metadata.get('qjax')}: install that one, and the plugins that it had"
        ) from error


def _check_formats(folder: Path, leaves: Sequence[Mapping[str, Any]]) -> None:
    """Refuse formats that are not registered before gigabytes are read."""
    nothing = dict.fromkeys(spec["array"] for leaf in leaves for spec in plain_specs(leaf["stored"]))
    for leaf in leaves:
        if leaf["stored"]["kind"] in ("qarray", "qstack"):
            try:
                build(leaf["stored"], nothing)
            except (FormatError, LayoutError) as error:
                raise CheckpointError(
                    f"{folder}: the leaf {leaf['name']} needs a number format that this installation lacks ({error}); "
                    "install or import the package that registers it before loading"
                ) from error


def _places(leaves: Sequence[Mapping[str, Any]], shardings: Any) -> dict[str, Any]:
    """Key of array -> sharding."""
    if shardings is None:
        return {}
    names = [leaf["name"] for leaf in leaves]
    if isinstance(shardings, jax.sharding.Sharding):
        given = dict.fromkeys(names, shardings)
    else:
        given = Leaves.of(shardings, _is_place).arrays
        unknown = [name for name in given if name not in names]
        if unknown:
            raise CheckpointError(
                f"shardings has leaves that the checkpoint lacks: {_few(unknown)}; it is a tree like the parameters, "
                "with None where a leaf goes to the default device"
            )
    return {
        key: place
        for leaf in leaves
        for key, place in shardings_of(leaf["name"], leaf["stored"], given.get(leaf["name"])).items()
    }


def _is_place(x: Any) -> bool:
    from qjax.formats import is_quantized

    return is_quantized(x) or isinstance(x, jax.sharding.Sharding | jax.sharding.PartitionSpec)
