"""Quantized arrays in the calling convention of `jax.export`: their static part as JSON.

Registered once, when `qjax.formats` is imported. A program that only reads an exported function has to import that (or
`qjax`, and touch `qjax.QArray`) before it calls `jax.export.deserialize`.
"""

from __future__ import annotations

import json
from typing import Any

import jax.export
import jax.numpy as jnp
import numpy as np

from qjax.formats.layout import Layout
from qjax.formats.qarray import QArray
from qjax.formats.qstack import QStack
from qjax.formats.registry import format_from_dict

_FORMAT_VERSION = 1


def _qarray_to_bytes(static: tuple[Any, ...]) -> bytes:
    fmt, layout, dtype = static
    spec = {
        "version": _FORMAT_VERSION,
        "format": fmt.to_dict(),
        "layout": layout.to_dict(),
        "dtype": np.dtype(dtype).name,
    }
    return json.dumps(spec, sort_keys=True).encode()


def _qarray_from_bytes(data: bytes) -> tuple[Any, ...]:
    spec = json.loads(bytes(data))
    return format_from_dict(spec["format"]), Layout.from_dict(spec["layout"]), jnp.dtype(spec["dtype"])


def _qstack_to_bytes(static: tuple[Any, ...]) -> bytes:
    axis, assign = static
    return json.dumps({"version": _FORMAT_VERSION, "axis": axis, "assign": assign}).encode()


def _qstack_from_bytes(data: bytes) -> tuple[Any, ...]:
    spec = json.loads(bytes(data))
    return spec["axis"], tuple((int(part), int(at)) for part, at in spec["assign"])


def register() -> None:
    """Tell `jax.export` how to write and read QArray and QStack; a second call does nothing."""
    global _registered
    if _registered:
        return
    _registered = True
    jax.export.register_pytree_node_serialization(
        QArray,
        serialized_name="qjax.QArray",
        serialize_auxdata=_qarray_to_bytes,
        deserialize_auxdata=_qarray_from_bytes,
    )
    jax.export.register_pytree_node_serialization(
        QStack,
        serialized_name="qjax.QStack",
        serialize_auxdata=_qstack_to_bytes,
        deserialize_auxdata=_qstack_from_bytes,
    )


_registered = False
register()
