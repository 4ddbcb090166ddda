"""A subnet as files that any runtime reads: codes, steps and offsets of each layer, and the tables of all forms.

    subnet.json           what each layer is: form, shape, axes, the layer whose weight it reads
    subnet.safetensors    SITE/weight.codes, .scale, .offset, .code_sums, SITE/input.scale, .offset
    tables.safetensors    SITE/TABLE [*stack, N, 1 or N * groups, 7], columns of 2 to 8 bits: what another form takes

Numbers are ``code * scale + offset``; without an offset it is 0. Steps and offsets are those in effect: |s| + 1e-6, and
the magnitude of an offset where the space says ``abs_offset``. Weights are matrices [*stack, N, K], K being the summed
axes in the order that subnet.json gives; codes are int8, those of 2 and 4 bits packed, low bits first
(`qjax.formats.packing`), in uint8 [*stack, N, bytes]. Steps, offsets and sums are [*stack, N or 1], and with groups
along K [*stack, N, groups]; ``group`` is then their length. Activation codes are signed where
``input_signed``, else from 0.

Source: EQ-Net (Xu et al. 2023, arXiv:2308.07650) for the tables. Sums of codes are for products of codes: with c and
s, b for codes, scale and offset,  y = s_w s_x sum(c_w c_x) + s_w b_x sum(c_w) + s_x b_w sum(c_x) + K b_w b_x.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from qjax.analysis.naming import Site
from qjax.errors import CheckpointError
from qjax.formats import QArray
from qjax.supernet.space import COLUMNS, Domain
from qjax.supernet.tables import INPUT_SIGNED

MANIFEST, SUBNET, TABLES = "subnet.json", "subnet.safetensors", "tables.safetensors"
VERSION = 1
PACKED_BITS = (2, 4)
"""Codes of these widths are packed; others take a byte each."""


def weight_tensors(weight: QArray, sums: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a weight, and what its layer's entry says of it.

    Args:
        weight: of one site, `Int` symmetric or `Affine`.
        sums: with the integer sums of codes.
    """
    canonical = weight.canonical()
    codes = np.asarray(weight.unpacked())
    packed = weight.fmt.code_bits in PACKED_BITS
    out = {"weight.codes": np.asarray(canonical.codes) if packed else codes}
    for name in ("scale", "offset"):
        if name in canonical.aux:
            a = np.asarray(canonical.aux[name], np.float32)
            out[f"weight.{name}"] = a[..., 0] if a.shape[-1] == 1 else a
    group = getattr(weight.fmt, "group", None)
    if sums:
        wide = codes.astype(np.int32)
        if group:
            wide = np.pad(wide, [(0, 0)] * (wide.ndim - 1) + [(0, -wide.shape[-1] % group)])
            wide = wide.reshape(*wide.shape[:-1], -1, group)
        out["weight.code_sums"] = wide.sum(-1, dtype=np.int32)
    said = {
        "shape": list(weight.shape),
        "stack_axes": list(weight.stack_axes),
        "out_axes": list(weight.out_axes),
        "in_axes": list(weight.in_axes),
        "n": int(codes.shape[-2]),
        "k": int(codes.shape[-1]),
        "codes": f"packed {weight.fmt.code_bits} bits" if packed else "int8",
        **({"group": group} if group else {}),
    }
    return out, said


def layers(
    program_sites: Mapping[str, Site],
    domain: Domain,
    owners: Mapping[str, str],
    choice: np.ndarray,
    stored: Mapping[str, Any],
    constants: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """The entries and the tensors of all layers of a subnet.

    Args:
        program_sites: name -> site.
        domain, owners, choice: of the subnet.
        stored: leaf -> quantized array.
        constants: site -> step and offset of its activations.
        state: of the supernet.
    """
    rows = dict(zip(domain.sites, choice, strict=True))
    summed = {owners[name] for name, row in rows.items() if not row[3] or (row[1] and not row[4])}
    entries: dict[str, dict[str, Any]] = {}
    tensors: dict[str, np.ndarray] = {}
    for name, row in rows.items():
        site = program_sites[name]
        form = dict(zip(COLUMNS[:5], (int(v) for v in row[:5]), strict=True))  # of groups, the length is said below
        entries[name] = {**form, "leaf": site.leaf, "slice": [list(at) for at in site.slice], "weight": owners[name]}
        own: dict[str, np.ndarray] = {}
        if owners[name] == name:
            weight = stored[site.leaf or ""]
            for axis, at in sorted(site.slice, reverse=True):
                weight = weight.index_stack(axis, at)
            own, said = weight_tensors(weight, name in summed)
            entries[name] |= said
        numbers = constants.get(name, {})
        if numbers:
            entries[name]["input_signed"] = bool(np.asarray(state[name][INPUT_SIGNED]).reshape(()) > 0)
        own |= {
            f"input.{k}": np.asarray(numbers[k], np.float32).reshape(1) for k in ("scale", "offset") if k in numbers
        }
        tensors |= {f"{name}/{key}": a for key, a in own.items()}
    return entries, tensors


def check_destination(folder: str | Path) -> None:
    """Refuse to write over what is no export.

    Raises:
        CheckpointError: it is a file, or a folder with other things in it.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST).is_file())):
        raise CheckpointError(f"{folder} holds other things and no exported subnet; give a new or an empty folder")


def write(
    folder: str | Path,
    sites: Mapping[str, Mapping[str, Any]],
    subnet: Mapping[str, np.ndarray],
    tables: Mapping[str, np.ndarray],
    said: Mapping[str, Any],
) -> Path:
    """Write the three files beside their place and move them there together; an older export is replaced.

    Args:
        folder: where to.
        sites: entries of layers by name, in program order. subnet, tables: tensors by name.
        said: further words of the manifest.

    Raises:
        CheckpointError: the folder holds something else.
    """
    from qjax import __version__

    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    if old.exists() and not folder.exists():  # killed between the two renames
        old.rename(folder)
    check_destination(folder)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        checksums = {}
        for name, tensors in ((SUBNET, subnet), (TABLES, tables)):
            save_file({k: np.ascontiguousarray(a) for k, a in tensors.items()}, partial / name)
            checksums[name] = hashlib.sha256((partial / name).read_bytes()).hexdigest()
        manifest = {"version": VERSION, "qjax": __version__, **said, "sites": dict(sites), "sha256": checksums}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return folder
