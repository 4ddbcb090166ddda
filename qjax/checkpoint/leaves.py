"""Parameter leaves as JSON and plain arrays, and back.

A leaf becomes a *spec*, JSON-able, and the plain arrays that it is made of, which go to Orbax under keys of their own:

    {"kind": "array", "shape": [3, 4], "dtype": "float32", "array": "0003-norm-scale"}
    {"kind": "key", "impl": "threefry2x32", "data": <array spec>}
    {"kind": "qarray", "format": {...}, "layout": {...}, "dtype": "float32", "codes": <array spec>, "aux": {name: …}}
    {"kind": "qstack", "axis": 0, "assign": [[part, position], ...], "parts": [<spec>, ...]}

Nothing is pickled. Arrays without elements have no key: Orbax stores none, and their shape says everything. Integers
of fewer than 8 bits, which its storage does not know, are stored as 8-bit ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax.errors import CheckpointError, FormatError, LayoutError
from qjax.formats import QArray, QStack, format_from_dict, is_quantized
from qjax.kernels import neutral
from qjax.rewriting.sharding import quantized_specs

Spec = dict[str, Any]


def is_key(dtype: Any) -> bool:
    """Whether this is the dtype of typed PRNG keys."""
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def array_key(number: int, name: str) -> str:
    """A key for the arrays of leaf ``number``: unique, and safe in any path."""
    return f"{number:04d}-{re.sub(r'[^A-Za-z0-9_]+', '-', name)[-80:].strip('-')}"


def describe(name: str, leaf: Any, key: str, arrays: dict[str, Any]) -> Spec:
    """Take a leaf apart.

    Args:
        name: the leaf's name, for errors.
        leaf: an array, a typed PRNG key array, a `QArray` or a `QStack`.
        key: prefix of the keys of its arrays.
        arrays: gets the arrays, by key.

    Returns:
        The spec, from which `build` makes the leaf again.

    Raises:
        CheckpointError: the leaf cannot be stored: it is abstract, traced, donated or of an unknown kind.
    """
    if isinstance(leaf, QStack):
        parts = [describe(name, part, f"{key}.part{i}", arrays) for i, part in enumerate(leaf.parts)]
        return {"kind": "qstack", "axis": leaf.axis, "assign": [list(a) for a in leaf.assign], "parts": parts}
    if isinstance(leaf, QArray):
        leaf = neutral(leaf)  # what is on disk belongs to no platform's kernel
        return {
            "kind": "qarray",
            **_format_spec(name, leaf),
            "codes": _plain(f"{name} (codes)", leaf.codes, f"{key}.codes", arrays),
            "aux": {n: _plain(f"{name} ({n})", a, f"{key}.{n}", arrays) for n, a in leaf.aux.items()},
        }
    if is_key(leaf.dtype):
        _refuse_absent(name, leaf)
        impl = jax.random.key_impl(leaf)
        if not isinstance(impl, str):
            raise CheckpointError(
                f"{name} holds PRNG keys of the unregistered kind {impl}; save jax.random.key_data of them instead"
            )
        return {"kind": "key", "impl": impl, "data": _plain(name, jax.random.key_data(leaf), key, arrays)}
    return _plain(name, leaf, key, arrays)


def build(spec: Spec, arrays: Mapping[str, Any]) -> Any:
    """Put a leaf together again from its spec and the arrays (or their shardings) by key.

    Raises:
        FormatError, LayoutError: the spec names a format that is not registered, or settings it does not have.
    """
    if spec["kind"] == "qstack":
        assign = tuple((part, position) for part, position in spec["assign"])
        return QStack(tuple(build(part, arrays) for part in spec["parts"]), spec["axis"], assign)
    if spec["kind"] == "qarray":
        aux = {name: build(a, arrays) for name, a in spec["aux"].items()}
        return QArray.from_spec(spec, build(spec["codes"], arrays), aux)
    if spec["kind"] == "key":
        return jax.random.wrap_key_data(build(spec["data"], arrays), impl=spec["impl"])
    return arrays[spec["array"]] if spec["array"] else with_dtype(np.zeros(spec["shape"], _dtype(spec)), spec)


def abstract(spec: Spec) -> Any:
    """A quantized leaf with abstract arrays."""
    shapes = {s["array"]: jax.ShapeDtypeStruct(tuple(s["shape"]), _dtype(s)) for s in plain_specs(spec)}
    return build(spec, shapes)


def plain_specs(spec: Spec) -> list[Spec]:
    """The specs of the plain arrays in a leaf, in order."""
    if spec["kind"] == "qstack":
        return [s for part in spec["parts"] for s in plain_specs(part)]
    if spec["kind"] == "qarray":
        return [spec["codes"], *spec["aux"].values()]
    return [spec["data"]] if spec["kind"] == "key" else [spec]


def shape_and_dtype(leaf: Any) -> tuple[list[int], str]:
    """The shape and dtype that the user sees, as JSON: ``[3, 4], "float32"``; ``"key<fry>"`` for PRNG keys."""
    dtype = leaf.dtype
    return [int(n) for n in leaf.shape], str(dtype) if is_key(dtype) else np.dtype(dtype).name


def shardings_of(name: str, spec: Spec, sharding: Any) -> dict[str, Any]:
    """A sharding for each plain array of a leaf.

    Args:
        name: the leaf's name, for errors.
        spec: the leaf.
        sharding: None; a sharding of the leaf as the user sees it; or, for a quantized leaf, the leaf with a sharding
            at each child, as ``plan.shardings`` gives it.

    Returns:
        Key of the array -> sharding, for arrays that have elements.

    Raises:
        CheckpointError: the sharding does not fit the leaf.
    """
    if sharding is None:
        return {}
    try:
        given = _by_array(spec, sharding)
        for s, one in given:
            if not isinstance(one, jax.sharding.Sharding):
                raise ValueError(f"{one!r} is no jax.sharding.Sharding; build NamedSharding(mesh, spec) from it")
            one.shard_shape(tuple(s["shape"]))
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"shardings: {name} cannot be restored so: {_one_line(error)}") from error
    return {s["array"]: one for s, one in given if s["array"]}


def _by_array(spec: Spec, sharding: Any) -> list[tuple[Spec, Any]]:
    if spec["kind"] == "qstack":
        if isinstance(sharding, QStack):
            pairs = zip(spec["parts"], sharding.parts, strict=True)
        else:  # every part has all axes of the whole
            pairs = ((part, sharding) for part in spec["parts"])
        return [pair for part, one in pairs for pair in _by_array(part, one)]
    if spec["kind"] == "qarray":
        if isinstance(sharding, jax.sharding.NamedSharding):
            specs = quantized_specs(abstract(spec), sharding.spec, sharding.mesh)
            named: Callable[[Any], Any] = lambda s: jax.sharding.NamedSharding(sharding.mesh, s)  # noqa: E731
            codes, aux = named(specs.codes), {n: named(s) for n, s in specs.aux.items()}
        elif isinstance(sharding, QArray):
            codes, aux = sharding.codes, sharding.aux
        else:
            codes, aux = sharding, dict.fromkeys(spec["aux"], sharding)
        return [(spec["codes"], codes), *((s, aux[n]) for n, s in spec["aux"].items())]
    if is_quantized(sharding):
        raise ValueError("it is stored as plain numbers, and a quantized leaf of shardings was given")
    return [(s, sharding) for s in plain_specs(spec)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _format_spec(name: str, leaf: QArray) -> Spec:
    """The static part of a QArray, refused where it could not be read back."""
    try:
        spec = leaf.spec()
        again = format_from_dict(spec["format"])
    except (FormatError, LayoutError) as error:
        raise CheckpointError(f"{name} cannot be saved: {error}") from error
    if again != leaf.fmt:
        raise CheckpointError(
            f"{name} cannot be saved: its format {type(leaf.fmt).__name__} reads back from its own to_dict() as "
            f"{again!r}; register the class with qjax.register_format with fields of plain values"
        )
    return spec


def _plain(name: str, array: Any, key: str, arrays: dict[str, Any]) -> Spec:
    _refuse_absent(name, array)
    dtype = np.dtype(array.dtype)
    if not (jnp.issubdtype(dtype, jnp.number) or dtype.kind == "b"):
        raise CheckpointError(f"{name} is an array of dtype {dtype.name}; parameters are numbers")
    spec = {"kind": "array", "shape": [int(n) for n in array.shape], "dtype": dtype.name}
    if not math.prod(array.shape):
        return {**spec, "array": None}
    if not isinstance(array, jax.Array):
        array = np.asarray(array, dtype.newbyteorder("="))
    arrays[key] = array.astype(narrow) if (narrow := stored_dtype(dtype)) != dtype else array
    return {**spec, "array": key}


def stored_dtype(dtype: Any) -> np.dtype:
    """The dtype in which an array is stored: its own, or 8 bits for narrower integers."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer) and jax.dtypes.itemsize_bits(dtype) < 8:
        return np.dtype(np.int8 if jnp.issubdtype(dtype, jnp.signedinteger) else np.uint8)
    return dtype


def _refuse_absent(name: str, array: Any) -> None:
    """Refuse an array without numbers in it."""
    if isinstance(array, Tracer):
        raise CheckpointError(f"{name} is being traced; call qjax.save outside jit, grad and vmap")
    if isinstance(array, jax.Array) and array.is_deleted():
        raise CheckpointError(f"{name} was deleted or donated; save the parameters before they are given away")
    if not isinstance(array, jax.Array | np.ndarray | np.generic):
        raise CheckpointError(
            f"{name} is a {type(array).__name__} without numbers; save needs the parameters themselves"
        )


def with_dtype(array: Any, spec: Spec) -> Any:
    """A stored array in the dtype that it stands for, on the device unless jax would narrow it."""
    dtype = _dtype(spec)
    array = array if array.dtype == dtype else array.astype(dtype)
    if isinstance(array, jax.Array) or jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return array
    return jnp.asarray(array)


def _dtype(spec: Spec) -> np.dtype:
    return jnp.dtype(spec["dtype"])  # jnp knows bfloat16 and the 8-bit floats by name
