"""Hugging Face folders, read and written without torch: ``config.json``, ``model.safetensors``, sharded index.

Which architecture belongs to which function stands in ``REGISTRY``; how our parameter names translate into those of a
checkpoint stands in two tables below. A checkpoint must fit exactly: a tensor that is missing, misshapen or left over
is an error, because a model that ignores a bias runs and is wrong.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qjax.errors import ModelError, near
from qjax.models.config import FAMILIES, LlamaConfig
from qjax.models.functional import stack_layers
from qjax.models.language import LanguageModel
from qjax.models.vit import ARCHITECTURES, ImageClassifier, VitConfig

Config = LlamaConfig | VitConfig
Function = LanguageModel | ImageClassifier

REGISTRY: dict[str, tuple[Callable[[dict[str, Any]], Config], Callable[[Any], Function]]] = {
    **dict.fromkeys(FAMILIES, (LlamaConfig.from_hf, LanguageModel)),
    **dict.fromkeys(ARCHITECTURES, (VitConfig.from_hf, ImageClassifier)),
}

# model_type of a config.json whose "architectures" is missing
_BY_TYPE = {family: name for name, family in FAMILIES.items()} | {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassification",
}

# Ours -> theirs. "{p}" is vit or deit. Several names: dialects of transformers, the first is the one we write.
_LLAMA = {
    "embed": ("model.embed_tokens",),
    "norm": ("model.norm",),
    "lm_head": ("lm_head",),
    "attn": ("model.layers.{i}.self_attn",),
    "attn_norm": ("model.layers.{i}.input_layernorm",),
    "mlp_norm": ("model.layers.{i}.post_attention_layernorm",),
    "mlp/gate": ("model.layers.{i}.mlp.gate_proj",),
    "mlp/up": ("model.layers.{i}.mlp.up_proj",),
    "mlp/down": ("model.layers.{i}.mlp.down_proj",),
}
_VIT = {
    "embeddings/patch": ("{p}.embeddings.patch_embeddings.projection",),
    "embeddings/cls_token": ("{p}.embeddings.cls_token",),
    "embeddings/distillation_token": ("{p}.embeddings.distillation_token",),
    "embeddings/position": ("{p}.embeddings.position_embeddings",),
    "norm": ("{p}.layernorm",),
    "classifier": ("classifier",),
    "distillation_classifier": ("distillation_classifier",),
    "attn_norm": ("{p}.encoder.layer.{i}.layernorm_before", "{p}.layers.{i}.layernorm_before"),
    "mlp_norm": ("{p}.encoder.layer.{i}.layernorm_after", "{p}.layers.{i}.layernorm_after"),
    "attn/q_proj": ("{p}.encoder.layer.{i}.attention.attention.query", "{p}.layers.{i}.attention.q_proj"),
    "attn/k_proj": ("{p}.encoder.layer.{i}.attention.attention.key", "{p}.layers.{i}.attention.k_proj"),
    "attn/v_proj": ("{p}.encoder.layer.{i}.attention.attention.value", "{p}.layers.{i}.attention.v_proj"),
    "attn/o_proj": ("{p}.encoder.layer.{i}.attention.output.dense", "{p}.layers.{i}.attention.o_proj"),
    "mlp/up": ("{p}.encoder.layer.{i}.intermediate.dense", "{p}.layers.{i}.mlp.fc1"),
    "mlp/down": ("{p}.encoder.layer.{i}.output.dense", "{p}.layers.{i}.mlp.fc2"),
}
_LEAVES = {"kernel": ".weight", "scale": ".weight", "embedding": ".weight", "bias": ".bias"}

# Tensors that checkpoints carry and that no weight of the function answers to.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.pooler\.|\.mask_token$|\.position_ids$")


def checkpoint_names(config: Config, name: str) -> list[str]:
    """Names that a checkpoint may give to our parameter ``layers/3/mlp/up/kernel``, the one we write first."""
    layer = re.match(r"layers/(\d+)/(.*)", name)
    index, rest = layer.groups() if layer else ("", name)
    *parents, leaf = rest.split("/")
    table = _LLAMA if isinstance(config, LlamaConfig) else _VIT
    prefix = "deit" if isinstance(config, VitConfig) and config.distilled else "vit"
    stem, tail = "/".join(parents), _LEAVES.get(leaf, "")
    if leaf not in _LEAVES:  # a bare parameter: a token, the positions
        stem = rest
    elif stem not in table:  # attn/q_proj, attn/q_norm: the child keeps its name
        stem, child = parents[0], parents[1]
        tail = f".{child}{tail}"
    theirs = [t.format(i=index, p=prefix) + tail for t in table[stem]]
    if isinstance(config, VitConfig) and config.teacher:
        theirs = ["cls_" + t if t.startswith("classifier") else t for t in theirs]
    return theirs


def _from_checkpoint(array: np.ndarray, leaf: str) -> np.ndarray:
    """Torch keeps linears as [out, in] and convolutions as [out, in, height, width]."""
    if leaf != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)


def _to_checkpoint(array: np.ndarray, leaf: str) -> np.ndarray:
    if leaf != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); {advice}.") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} does not hold a JSON object; {advice}.")
    return data


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
    config = _read_json(path, "take the one that came with the checkpoint")
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else _BY_TYPE.get(str(config.get("model_type")))
    if name not in REGISTRY:
        shown = name or config.get("model_type") or "none named"
        raise ModelError(
            f"{path} is of architecture {shown!r}, which is not supported{near(str(shown), REGISTRY)}; supported are "
            f"{', '.join(REGISTRY)}; for any other model bring your own JAX function to qjax.quantize."
        )
    if config.get("quantization_config"):
        raise ModelError(f"{path} says that the weights are quantized already; load the float checkpoint instead.")
    return {**config, "architectures": [name]}


class _Checkpoint:
    """The tensors of a folder by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            self.files = dict.fromkeys(self._names(single), single)
        elif index.is_file():
            where = _read_json(index, "download it again").get("weight_map")
            if not isinstance(where, dict):
                raise ModelError(f"{index} has no weight_map; download it again.")
            self.files = {}
            for file in sorted(set(where.values())):
                if not (folder / file).is_file():
                    raise ModelError(f"{folder} lacks {file}, which {index.name} names; download the missing shard.")
                self.files.update(dict.fromkeys(self._names(folder / file), folder / file))
        elif list(folder.glob("*.bin")):
            raise ModelError(
                f"{folder} holds pickled torch weights only; convert them once with transformers: "
                "model.save_pretrained(folder, safe_serialization=True)."
            )
        else:
            raise ModelError(f"{folder} has no model.safetensors; download the weights into it.")
        self.used: set[str] = set()

    @staticmethod
    def _names(path: Path) -> list[str]:
        try:
            with safe_open(path, framework="numpy") as file:
                return list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is damaged or cut short ({error}); download it again.") from None

    def read(self, ours: str, theirs: list[str], shape: tuple[int, ...]) -> np.ndarray:
        """One tensor in our layout."""
        name = next((t for t in theirs if t in self.files), None)
        if name is None:
            raise ModelError(
                f"{self.folder} has no tensor {theirs[0]!r} (for {ours!r}){near(theirs[0], self.files)}; config.json "
                "and weights must come from the same checkpoint."
            )
        self.used.add(name)
        try:
            with safe_open(self.files[name], framework="numpy") as file:
                stored = file.get_slice(name).get_dtype()
                array = file.get_tensor(name) if stored in ("F64", "F32", "F16", "BF16") else None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.files[name]} is damaged ({error}); download it again.") from None
        if array is None:
            raise ModelError(
                f"tensor {name!r} of {self.folder} is stored as {stored}, not as floating point of 16 bits or more; "
                "load the float checkpoint."
            )
        leaf = ours.rsplit("/", 1)[-1]
        fits = array.ndim == len(shape) and (array := _from_checkpoint(array, leaf)).shape == shape
        if not fits:
            raise ModelError(
                f"tensor {name!r} of {self.folder} gives {ours!r} the shape {tuple(array.shape)}, but config.json asks "
                f"for {shape}; config.json and weights must come from the same checkpoint."
            )
        return array

    def check_all_used(self, tied: bool) -> None:
        """Refuse tensors that the function would silently leave out."""
        left = sorted(set(self.files) - self.used)
        left = [n for n in left if not _IGNORED.search(n) and not (tied and n == "lm_head.weight")]
        if left:
            shown = ", ".join(repr(n) for n in left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            raise ModelError(
                f"{self.folder} holds tensors that config.json does not account for: {shown}; config.json and weights "
                "must come from the same checkpoint."
            )


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def load(folder: str | Path, *, dtype: Any = jnp.float32, scan_layers: bool = False) -> tuple[Function, Any, Config]:
    """Read a Hugging Face folder.

    Args:
        folder: with ``config.json`` and ``model.safetensors`` or ``model.safetensors.index.json`` and its shards.
        dtype: of the parameters; float16 and bfloat16 weights are widened to float32 unless another one is asked for,
            None keeps what is stored.
        scan_layers: decoders only: stack the layers and scan over them.

    Returns:
        ``fn, params, config``. ``params`` is a plain tree named like ``layers/3/attn/q_proj/kernel``. A decoder's
        ``fn(params, tokens [B, T]) -> logits [B, T, vocab]`` also has ``prefill``, ``decode_step``, ``init_cache`` and
        ``generate``; a classifier's is ``fn(params, pixels [B, H, W, 3]) -> logits [B, classes]``.

    Raises:
        ModelError: a missing file, an architecture that is not supported, damaged weights, or tensors that are
            missing, misshapen or left over.
    """
    folder = Path(folder)
    raw = read_config(folder)
    read, make = REGISTRY[raw["architectures"][0]]
    config = read(raw)
    fn = make(config)
    if scan_layers and not isinstance(fn, LanguageModel):
        raise ModelError("scan_layers is for decoders; load an image classifier without it.")
    checkpoint = _Checkpoint(folder)
    wanted = fn.abstract_params()
    tree = jax.tree.structure(wanted)
    target = None if dtype is None else np.dtype(dtype)
    leaves = []
    for ours, spec in _named(wanted):
        array = checkpoint.read(ours, checkpoint_names(config, ours), spec.shape)
        leaves.append(jnp.asarray(np.ascontiguousarray(array), dtype=target))
    checkpoint.check_all_used(isinstance(config, LlamaConfig) and config.tie_word_embeddings)
    params = jax.tree.unflatten(tree, leaves)
    if scan_layers:
        return dataclasses.replace(fn, scan_layers=True), stack_layers(params), config
    return fn, params, config


def abstract(folder: str | Path, *, dtype: Any = jnp.float32) -> tuple[Function, Any, Config]:
    """As :func:`load`, but parameters are ``jax.ShapeDtypeStruct`` and no weights are read; config.json suffices."""
    raw = read_config(folder)
    read, make = REGISTRY[raw["architectures"][0]]
    config = read(raw)
    fn = make(config)
    return fn, fn.abstract_params(dtype), config


def save_weights(path: str | Path, params: Any, config: Config, *, dtype: Any = ml_dtypes.bfloat16) -> None:
    """Write parameters (unrolled form) as one safetensors file with Hugging Face's names and layouts.

    Args:
        path: of the file, ``.../model.safetensors``.
        params: float parameters.
        config: that they belong to.
        dtype: to store them in.
    """
    tensors = {}
    for ours, leaf in _named(params):
        array = _to_checkpoint(np.asarray(leaf), ours.rsplit("/", 1)[-1])
        tensors[checkpoint_names(config, ours)[0]] = np.ascontiguousarray(array).astype(dtype)
    save_file(tensors, str(path), metadata={"format": "pt"})
