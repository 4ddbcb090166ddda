"""Hugging Face folders, read and written without torch: ``config.json``, ``model.safetensors``, sharded index.

What is supported stands in ``FAMILIES``: one record for each architecture, which says how its config.json is read,
which function it makes and what its tensors are called. A checkpoint must fit exactly: a tensor that is missing,
misshapen or left over is an error, because a model that ignores a bias runs and is wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from qjax.errors import ModelError, near
from qjax.models import (
    bert,
    efficientnet,
    gpt2,
    imagenet_resnet,
    llama,
    mobilenet,
    moe,
    opt,
    resnet,
    swin,
    vit,
)
from qjax.models.family import Family
from qjax.models.functional import stack_layers
from qjax.models.language import LanguageModel
from qjax.models.weights import Checkpoint, read_json, stacked_lazily

Config = Any
Function = Any

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    moe.FAMILY,
    gpt2.FAMILY,
    opt.FAMILY,
    vit.FAMILY,
    swin.FAMILY,
    resnet.FAMILY,
    imagenet_resnet.FAMILY,
    mobilenet.FAMILY,
    efficientnet.FAMILY,
    bert.FAMILY,
)

REGISTRY: dict[str, Family] = {name: family for family in FAMILIES for name in family.architectures}

# model_type of a config.json whose "architectures" is missing; the first architecture of a type is meant
_BY_TYPE = {kind: name for name, family in reversed(REGISTRY.items()) for kind in [family.architectures[name]]}

# timm's model names: the architecture, and the settings that make it
_TIMM = {
    timm: (next(iter(family.architectures)), settings) for family in FAMILIES for timm, settings in family.timm.items()
}


def checkpoint_names(config: Config, name: str) -> list[str]:
    """Names that a checkpoint may give to our parameter ``layers/3/mlp/up/kernel``, the one we write first.

    ``{e}`` in a name stands for each index of the parameter's first dimension, as in stacked experts.
    """
    return REGISTRY[config.architecture].checkpoint_names(config, name)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a folder, with ``architectures`` filled in.

    Raises:
        ModelError: no folder, no config.json, an architecture that is not supported, or weights already quantized.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; give the path of a Hugging Face model folder.")
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json; give the folder of a Hugging Face model.")
    config = read_json(path, "take the one that came with the checkpoint")
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else _BY_TYPE.get(str(config.get("model_type")))
    timm = str(config.get("architecture", "")).partition(".")[0]
    if name is None and timm in _TIMM:
        name, settings = _TIMM[timm]
        config = {**config, **settings, "num_labels": config.get("num_classes", 1000)}
    if name not in REGISTRY:
        shown = name or config.get("model_type") or timm or "none named"
        raise ModelError(
            f"{path} is of architecture {shown!r}, which is not supported{near(str(shown), REGISTRY)}; supported are "
            f"{', '.join(REGISTRY)}; for any other model bring your own JAX function to qjax.quantize."
        )
    if config.get("quantization_config"):
        raise ModelError(f"{path} says that the weights are quantized already; load the float checkpoint instead.")
    return {**config, "architectures": [name]}


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _read(folder: Path) -> tuple[Family, Config, Function]:
    raw = read_config(folder)
    family = REGISTRY[raw["architectures"][0]]
    config = family.config(raw)
    return family, config, family.function(config)


def load(
    folder: str | Path, *, dtype: Any = jnp.float32, scan_layers: bool = False, lazy: bool = False
) -> tuple[Function, Any, Config]:
    """Read a Hugging Face folder.

    Args:
        folder: with ``config.json`` and ``model.safetensors`` or ``model.safetensors.index.json`` and its shards.
        dtype: of the parameters; float16 and bfloat16 weights are widened to float32 unless another one is asked for,
            None keeps what is stored.
        scan_layers: decoders only: stack the layers and scan over them.
        lazy: parameters are `qjax.Lazy` leaves, which are read from the files when `qjax.quantize` comes to them: for
            models that are larger than memory. Files have to stay where they are.

    Returns:
        ``fn, params, config``. ``params`` is a plain tree named like ``layers/3/attn/q_proj/kernel``. A decoder's
        ``fn(params, tokens [B, T]) -> logits [B, T, vocab]`` also has ``prefill``, ``decode_step``, ``init_cache`` and
        ``generate``; a classifier's is ``fn(params, pixels [B, H, W, 3]) -> logits [B, classes]``; an encoder's is
        ``fn(params, tokens, attention_mask=None, token_type_ids=None) -> hidden states [B, T, hidden]``.

    Raises:
        ModelError: a missing file, an architecture that is not supported, damaged weights, or tensors that are
            missing, misshapen or left over.
    """
    folder = Path(folder)
    family, config, fn = _read(folder)
    if scan_layers and not isinstance(fn, LanguageModel):
        raise ModelError(f"scan_layers is for decoders, and {folder} holds a {config.architecture}; load it without.")
    checkpoint = Checkpoint(folder, family)
    wanted = fn.abstract_params()
    tree = jax.tree.structure(wanted)
    target = None if dtype is None else np.dtype(dtype)
    leaves = []
    for ours, spec in _named(wanted):
        theirs = family.checkpoint_names(config, ours)
        if lazy:
            leaves.append(checkpoint.lazy(ours, theirs, spec.shape, target))
        else:
            array = checkpoint.read(ours, theirs, spec.shape)
            leaves.append(jnp.asarray(np.ascontiguousarray(array), dtype=target))
    checkpoint.check_all_used(getattr(config, "tie_word_embeddings", False))
    params = jax.tree.unflatten(tree, leaves)
    if scan_layers:
        stacked = stack_layers(params, stacked_lazily if lazy else jnp.stack)
        return dataclasses.replace(fn, scan_layers=True), stacked, config
    return fn, params, config


def abstract(folder: str | Path, *, dtype: Any = jnp.float32) -> tuple[Function, Any, Config]:
    """As :func:`load`, but parameters are ``jax.ShapeDtypeStruct`` and no weights are read; config.json suffices."""
    _, config, fn = _read(Path(folder))
    return fn, fn.abstract_params(dtype), config


def save_weights(path: str | Path, params: Any, config: Config, *, dtype: Any = ml_dtypes.bfloat16) -> None:
    """Write parameters (unrolled form) as one safetensors file with Hugging Face's names and layouts.

    Args:
        path: of the file, ``.../model.safetensors``.
        params: float parameters.
        config: that they belong to.
        dtype: to store them in.
    """
    family = REGISTRY[config.architecture]
    tensors = {}
    for ours, leaf in _named(params):
        array = family.to_checkpoint(np.asarray(leaf), ours)
        theirs = family.checkpoint_names(config, ours)[0]
        parts = {theirs.format(e=e): part for e, part in enumerate(array)} if "{e}" in theirs else {theirs: array}
        tensors |= {name: np.ascontiguousarray(part).astype(dtype) for name, part in parts.items()}
    save_file(tensors, str(path), metadata={"format": "pt"})
