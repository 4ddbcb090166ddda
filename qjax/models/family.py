"""What qjax knows of one kind of checkpoint, in one record: :class:`Family`. Each architecture's module holds its own.

Parameter names translate by a table from ours to theirs. A key is the path of ours with ``*`` for every number,
without the leaf where that is one of ``LEAVES``; values are templates in which ``{0}``, ``{1}`` are those numbers:

    "layers/*/mlp/up": ("model.layers.{0}.mlp.up_proj",)

Several templates are dialects of the libraries that write checkpoints; the first is the one we write. A parent may
stand for its children, which then keep their names: ``layers/*/attn`` covers ``layers/3/attn/q_proj/kernel``. A key may
have numbers in place of ``*``, where theirs do not count as ours do. Where a leaf of ours stacks what a checkpoint
keeps apart (experts), the template has ``{{e}}`` for the number in the stack.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

LEAVES: Mapping[str, tuple[str, ...]] = {
    "kernel": (".weight",),
    "scale": (".weight",),
    "embedding": (".weight",),
    "bias": (".bias",),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of checkpoint.

    Attributes:
        architectures: Hugging Face's names, each with the ``model_type`` of its config.json. Where config.json names
            no architecture, the first one of its model_type is meant.
        config: from a parsed config.json (``architectures`` filled in) to the configuration, whose ``architecture`` is
            one of these names. Raises ModelError.
        function: from the configuration to ``fn(params, inputs)`` with ``abstract_params``.
        names: from the configuration to the table of names (see the module's docstring).
        leaves: how the last part of our name ends theirs, the first is the one we write.
        ignored: pattern, searched in names of tensors that checkpoints carry and that no weight answers to.
        as_stored: pattern, searched in our names: kernels that are stored as [in, out], as ours are.
        timm: names of timm's models, each with the settings of a config.json that make it; for the first architecture.
    """

    architectures: Mapping[str, str]
    config: Callable[[dict[str, Any]], Any]
    function: Callable[[Any], Any]
    names: Callable[[Any], Mapping[str, tuple[str, ...]]]
    leaves: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: LEAVES)
    ignored: str = r"(?!)"
    as_stored: str = r"(?!)"
    timm: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def checkpoint_names(self, config: Any, name: str) -> list[str]:
        """Names that a checkpoint may give to our parameter, the one we write first."""
        *parents, leaf = name.split("/")
        tails = self.leaves.get(leaf, ("",))
        path = parents if leaf in self.leaves else [*parents, leaf]  # a bare parameter has no leaf: a token, positions
        numbers = [part for part in path if part.isdigit()]
        generic = ["*" if part.isdigit() else part for part in path]
        table = self.names(config)
        for count in range(len(path), 0, -1):
            templates = table.get("/".join(path[:count])) or table.get("/".join(generic[:count]))
            if templates is not None:
                children = "".join(f".{part}" for part in path[count:])
                return [t.format(*numbers) + children + tail for t in templates for tail in tails]
        raise KeyError(f"{name!r} has no name in checkpoints of {config.architecture}")

    def from_checkpoint(self, array: np.ndarray, name: str) -> np.ndarray:
        """Our layout of the stored parameter of this name: linears [in, out], convolutions [height, width, in, out]."""
        if not name.endswith("/kernel") or re.search(self.as_stored, name):
            return array
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else np.swapaxes(array, -1, -2)

    def to_checkpoint(self, array: np.ndarray, name: str) -> np.ndarray:
        """The stored layout: torch keeps linears as [out, in] and convolutions as [out, in, height, width]."""
        if not name.endswith("/kernel") or re.search(self.as_stored, name):
            return array
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else np.swapaxes(array, -1, -2)
