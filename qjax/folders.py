"""Model folders: a Hugging Face one with float weights, or one that ``qjax quantize`` wrote.

The second kind holds everything that running it takes:

    qjax.json                       what it is: format version, model, recipe, where the float weights were
    config.json, tokenizer.json …   copied from the source folder
    checkpoint/                     the packed weights, by qjax.save
    report.json, .html, .txt
    README.md                       a card: base model, recipe, sizes, how to run it
    README.original.md              the card of the float model, where it had one

It is written beside its place and moved there when it is complete, so a kill leaves the older folder, or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qjax
from qjax.errors import CheckpointError, ModelError
from qjax.report import Report
from qjax.report.card import render_card

MANIFEST = "qjax.json"
VERSION = 1
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README*")
_NOT_COPIED = (MANIFEST, "model.safetensors.index.json", "report.json", "report.txt", "README.md")
ORIGINAL_CARD = "README.original.md"
"""What the float model's card is called beside ours."""


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run.

    Attributes:
        folder: where it came from.
        name: the folder's name, or the source's for a quantized one.
        fn: ``fn(params, inputs) -> logits``.
        params: float or packed parameters.
        config: of the architecture.
        base: the float function with ``prefill`` and ``decode_step``, before quantization.
        model: the `qjax.Model`, None for a float folder.
        manifest: what ``qjax.json`` says; {} for a float folder.
    """

    folder: Path
    name: str
    fn: Callable[..., Any]
    params: Any
    config: Any
    base: Any
    model: Any = None
    manifest: dict[str, Any] | None = None

    @property
    def quantized(self) -> bool:
        """Whether this is a folder that qjax wrote."""
        return self.model is not None

    @property
    def kind(self) -> str:
        """What the model is: a language model, a text encoder or an image classifier."""
        if hasattr(self.base, "prefill"):
            return "language model"
        return "text encoder" if self.reads_text else "image classifier"

    @property
    def is_language_model(self) -> bool:
        """Whether it gives the probabilities of next tokens, and so has a perplexity and can generate."""
        return self.kind == "language model"

    @property
    def reads_text(self) -> bool:
        """Whether it reads tokens (else images)."""
        return hasattr(self.config, "vocab_size")

    @property
    def report(self) -> Report:
        """The saved report."""
        return Report.load(self.folder)

    def bind(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Another function over the same parameters."""
        return fn if self.model is None else self.model.bind(fn)


def is_saved(folder: Path) -> bool:
    """Whether ``qjax quantize`` wrote this folder."""
    return (folder / MANIFEST).is_file()


def load_folder(folder: Path) -> Loaded:
    """Load either kind of folder.

    Raises:
        ModelError, CheckpointError: it is incomplete, damaged or not supported.
    """
    return load_saved(folder) if is_saved(folder) else load_float(folder)


def load_float(folder: Path, lazy: bool = False) -> Loaded:
    """Load a Hugging Face folder with its float weights, or with leaves that are read when they are needed."""
    from qjax import models

    fn, params, config = models.load(folder, lazy=lazy)
    return Loaded(folder, folder.resolve().name, fn, params, config, fn)


def load_saved(folder: Path) -> Loaded:
    """Load a folder that ``qjax quantize`` wrote; needs nothing outside it."""
    from qjax import models

    manifest = read_manifest(folder)
    fn, abstract, config = models.abstract(folder)
    model = qjax.load(folder / "checkpoint", fn, like=abstract)
    return Loaded(folder, manifest.get("model", folder.name), model, model.params, config, fn, model, manifest)


def float_source(loaded: Loaded) -> Path | None:
    """The folder with the float weights of a quantized one, where it is still there and holds the same weights."""
    manifest = loaded.manifest or {}
    for source in (manifest.get("source"), manifest.get("source_relative")):
        if not source:
            continue
        path = Path(source) if os.path.isabs(source) else loaded.folder / source
        if (path / "config.json").is_file() and fingerprint(path) == manifest.get("source_fingerprint"):
            return path
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``qjax.json`` says.

    Raises:
        CheckpointError: it is damaged or newer than this qjax.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise CheckpointError(f"{path} is damaged ({type(e).__name__}); quantize again") from e
    if version != VERSION:
        raise CheckpointError(
            f"{path} has version {version!r} and this qjax reads version {VERSION}; quantize again, or use "
            "the qjax that wrote it"
        )
    return manifest


def check_destination(out: Path, source: Path) -> None:
    """Refuse to overwrite what qjax did not write.

    Raises:
        ModelError: `out` is the source folder, a file, or a folder with other things in it.
    """
    if out.resolve() == source.resolve():
        raise ModelError(f"--out {out} is the model's own folder; give another one")
    if out.exists() and not out.is_dir():
        raise ModelError(f"--out {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not is_saved(out):
        raise ModelError(f"--out {out} exists and was not written by qjax; give another folder or remove it")


def save_folder(out: Path, source: Path, model: Any, report: Report, calibration: dict[str, Any] | None = None) -> None:
    """Write a quantized folder; an older one in its place is replaced when the new one is complete.

    Args:
        out: the folder to write.
        source: the Hugging Face folder whose side files are copied.
        model: the `qjax.Model`.
        report: its report, with scores.
        calibration: which rows of which data it was calibrated on.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (out.with_name(f".{out.name}.{kind}") for kind in ("partial", "old"))
    if old.exists() and not out.exists():  # an earlier run was killed between its two last steps
        old.rename(out)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        for pattern in _SIDE_FILES:
            for file in source.glob(pattern):
                if file.is_file() and file.name not in _NOT_COPIED:
                    shutil.copyfile(file, partial / file.name)
        if (source / "README.md").is_file():
            shutil.copyfile(source / "README.md", partial / ORIGINAL_CARD)
        (partial / "README.md").write_text(_card(partial, model, report, calibration), encoding="utf-8")
        qjax.save(partial / "checkpoint", model)
        report.save(partial)
        manifest = {
            "version": VERSION,
            "qjax": qjax.__version__,
            "model": report.model,
            "recipe": report.recipe,
            "source": str(source.resolve()),
            "source_relative": os.path.relpath(source.resolve(), out),
            "source_fingerprint": fingerprint(source),
            **({"calibration": calibration} if calibration else {}),
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if out.exists():
            out.rename(old)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _card(folder: Path, model: Any, report: Report, calibration: dict[str, Any] | None) -> str:
    """The README of a folder that is being written."""
    original = folder / ORIGINAL_CARD
    license = ""
    if original.is_file():
        front = re.match(r"---\n(.*?)\n---\n", original.read_text("utf-8", errors="replace"), re.DOTALL)
        license = "\n".join(re.findall(r"^license\w*:.*$", front[1], re.MULTILINE)) if front else ""
    return render_card(
        report,
        version=qjax.__version__,
        recipe=model.recipe.to_toml(),
        runs=_RUNS,
        license=license,
        original=ORIGINAL_CARD if original.is_file() else "",
        calibration=calibration,
    )


_RUNS = """
fn, abstract, config = qjax.models.abstract(folder)
model = qjax.load(f"{folder}/checkpoint", fn, like=abstract)
out = model(model.params, inputs)                      # inputs: tokens [batch, length], or pixels
"""


def source_size(folder: Path) -> tuple[int, str]:
    """Bytes of the parameters as a Hugging Face folder stores them, and their dtypes; only headers are read."""
    import jax

    from qjax import models
    from qjax.applying.reporting import dtypes_of

    leaves = jax.tree.leaves(models.load(folder, dtype=None, lazy=True)[1])
    return sum(leaf.nbytes for leaf in leaves), dtypes_of(leaves)


def fingerprint(folder: Path) -> str:
    """SHA-256 over config and weights of a Hugging Face folder."""
    total = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        total.update(file.name.encode())
        with file.open("rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()


def size_on_disk(folder: Path) -> int:
    """Bytes of a quantized folder's checkpoint: packed weights, compressed, and what describes them."""
    return sum(file.stat().st_size for file in (folder / "checkpoint").rglob("*") if file.is_file())
