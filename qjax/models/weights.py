"""The safetensors files of a folder: tensors by name, read one at a time, and checked for what was not read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from qjax.errors import ModelError, near
from qjax.lazy import Lazy
from qjax.models.family import Family

_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""What a checkpoint may store weights as."""


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """A JSON object of a file.

    Raises:
        ModelError: the file cannot be read or holds something else; ``advice`` ends the message.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); {advice}.") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} does not hold a JSON object; {advice}.")
    return data


class Checkpoint:
    """The tensors of a folder by name, read one at a time.

    Raises:
        ModelError: there are no safetensors files, one is missing, or one is damaged.
    """

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder = folder
        self.family = family
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            self.files = dict.fromkeys(_names(single), single)
        elif index.is_file():
            where = read_json(index, "download it again").get("weight_map")
            if not isinstance(where, dict):
                raise ModelError(f"{index} has no weight_map; download it again.")
            self.files = {}
            for file in sorted(set(where.values())):
                if not (folder / file).is_file():
                    raise ModelError(f"{folder} lacks {file}, which {index.name} names; download the missing shard.")
                self.files.update(dict.fromkeys(_names(folder / file), folder / file))
        elif list(folder.glob("*.bin")):
            raise ModelError(
                f"{folder} holds pickled torch weights only; convert them once with transformers: "
                "model.save_pretrained(folder, safe_serialization=True)."
            )
        elif (folder / "checkpoint").is_dir():
            raise ModelError(
                f"{folder} holds a quantized model as `qjax quantize` writes it, and no float weights: read it with "
                "qjax.models.abstract and qjax.load, as its README.md shows."
            )
        else:
            raise ModelError(f"{folder} has no model.safetensors; download the weights into it.")
        self.used: set[str] = set()

    def read(self, ours: str, theirs: list[str], shape: tuple[int, ...]) -> np.ndarray:
        """One parameter in our layout.

        Args:
            ours: its name.
            theirs: names it may have; those with ``{e}`` name one tensor for each index of its first dimension.
            shape: what it must have.

        Raises:
            ModelError: no such tensor, another shape, not floating point, or a damaged file.
        """
        if "{e}" not in theirs[0]:
            return self._read(ours, theirs, shape)
        return np.stack([self._read(ours, [t.format(e=e) for t in theirs], shape[1:]) for e in range(shape[0])])

    def lazy(self, ours: str, theirs: list[str], shape: tuple[int, ...], dtype: Any) -> Lazy:
        """One parameter in our layout, read when it is needed; what cannot be read is refused now.

        Args:
            ours, theirs, shape: as for `read`.
            dtype: of the parameter; None is the one that is stored.

        Raises:
            ModelError: as for `read`.
        """
        stacked = "{e}" in theirs[0]
        parts = [[t.format(e=e) for t in theirs] for e in range(shape[0])] if stacked else [theirs]
        stored = {self._check(ours, names, shape[1:] if stacked else shape) for names in parts}
        one = lambda e: self._read(ours, parts[e], shape[1:])  # noqa: E731
        return Lazy(
            shape,
            np.result_type(*stored) if dtype is None else dtype,
            lambda: self.read(ours, theirs, shape),
            one if stacked else None,
        )

    def _check(self, ours: str, theirs: list[str], shape: tuple[int, ...]) -> np.dtype:
        """The dtype of a tensor, of which only the header is read."""
        name = self._name(ours, theirs)
        try:
            with safe_open(self.files[name], framework="numpy") as file:
                header = file.get_slice(name)
                stored, found = header.get_dtype(), tuple(header.get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.files[name]} is damaged ({error}); download it again.") from None
        if stored not in _FLOATS:
            raise self._not_float(name, stored)
        ghost = np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), found, (0,) * len(found))  # a shape, no numbers
        if len(found) != len(shape) or (ghost := self.family.from_checkpoint(ghost, ours)).shape != shape:
            raise self._misshapen(ours, name, ghost.shape, shape)
        return np.dtype(_FLOATS[stored])

    def _read(self, ours: str, theirs: list[str], shape: tuple[int, ...]) -> np.ndarray:
        name = self._name(ours, theirs)
        try:
            with safe_open(self.files[name], framework="numpy") as file:
                stored = file.get_slice(name).get_dtype()
                array = file.get_tensor(name) if stored in _FLOATS else None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.files[name]} is damaged ({error}); download it again.") from None
        if array is None:
            raise self._not_float(name, stored)
        fits = array.ndim == len(shape) and (array := self.family.from_checkpoint(array, ours)).shape == shape
        if not fits:
            raise self._misshapen(ours, name, array.shape, shape)
        return array

    def _name(self, ours: str, theirs: list[str]) -> str:
        """Which of the names that a parameter may have is there."""
        name = next((t for t in theirs if t in self.files), None)
        if name is None:
            raise ModelError(
                f"{self.folder} has no tensor {theirs[0]!r} (for {ours!r}){near(theirs[0], self.files)}; config.json "
                "and weights must come from the same checkpoint."
            )
        self.used.add(name)
        return name

    def _not_float(self, name: str, stored: str) -> ModelError:
        return ModelError(
            f"tensor {name!r} of {self.folder} is stored as {stored}, not as floating point of 16 bits or more; "
            "load the float checkpoint."
        )

    def _misshapen(self, ours: str, name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> ModelError:
        return ModelError(
            f"tensor {name!r} of {self.folder} gives {ours!r} the shape {tuple(found)}, but config.json asks "
            f"for {shape}; config.json and weights must come from the same checkpoint."
        )

    def check_all_used(self, tied: bool) -> None:
        """Refuse tensors that the function would silently leave out.

        Raises:
            ModelError: tensors were not read and are not among those that the family ignores.
        """
        left = sorted(set(self.files) - self.used)
        left = [n for n in left if not re.search(self.family.ignored, n) and not (tied and n == "lm_head.weight")]
        if left:
            shown = ", ".join(repr(n) for n in left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            raise ModelError(
                f"{self.folder} holds tensors that config.json does not account for: {shown}; config.json and weights "
                "must come from the same checkpoint."
            )


def stacked_lazily(layers: Sequence[Lazy]) -> Lazy:
    """Leaves of one shape as one leaf with a leading axis, each slice of which is read by itself."""
    first = layers[0]
    return Lazy(
        (len(layers), *first.shape), first.dtype, lambda: np.stack([np.asarray(a) for a in layers]), lambda i: layers[i]
    )


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut short ({error}); download it again.") from None
