"""``qjax inspect``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import qjax
from qjax.applying.reporting import dtypes_of
from qjax.cli.output import print_json, print_rich, waiting
from qjax.errors import ModelError
from qjax.folders import is_saved, read_manifest
from qjax.report import Report
from qjax.report.text import size


def run(args: argparse.Namespace) -> None:
    """Show the sites of a float model, or the report of a quantized one."""
    if is_saved(args.folder):
        read_manifest(args.folder)
        report = Report.load(args.folder)
        if args.recipe:
            raise ModelError(f"{args.folder} is quantized already; --recipe is for the folder of the float model")
        if args.json:
            print_json(report.to_dict())
        else:
            print_rich(report)
        return
    from qjax import models

    fn, params, config = models.abstract(args.folder)
    weights = _check_weights(args.folder)
    with waiting("tracing"):
        import jax

        example = example_input(config)
        plan = qjax.plan(fn, params, example, recipe=args.recipe) if args.recipe else None
        program = plan.program if plan else qjax.trace(fn, params, example)
    leaves = jax.tree.leaves(params)
    count = sum(math.prod(x.shape) for x in leaves)
    if args.json:
        out: dict[str, Any] = {
            "model": args.folder.resolve().name,
            "architecture": config.architecture,
            "parameters": count,
            "weights_on_disk": weights,
            "sites": [_site(s) for s in program.sites],
        }
        if plan:
            out |= {"recipe": plan.recipe.name, "float_bytes": plan.float_bytes, "stored_bytes": plan.stored_bytes}
        print_json(out)
        return
    on_disk = f", {size(weights)} on disk" if weights else ", no weights in the folder"
    print(f"{args.folder.resolve().name}: {config.architecture}, {count:,} parameters{on_disk}\n")
    print(program)
    if plan:
        print(f"\n{plan.recipe.name or args.recipe}, from {dtypes_of(leaves)}: {plan}")


def example_input(config: Any) -> Any:
    """An abstract input of the model: 16 tokens, or one image."""
    import jax
    import jax.numpy as jnp

    if hasattr(config, "vocab_size"):
        return jax.ShapeDtypeStruct((1, 16), jnp.int32)
    return jax.ShapeDtypeStruct((1, *config.image_size, config.num_channels), jnp.float32)


def _check_weights(folder: Path) -> int:
    """Bytes of the safetensors files, whose headers are read: a damaged file is said here and not only at loading."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):
                total += file.stat().st_size
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{file} is damaged or cut short ({e}); download it again") from e
    return total


def _site(site: Any) -> dict[str, Any]:
    fields = ("name", "op", "leaf", "dtype", "repeats", "flops", "bytes", "reason")
    return {**{f: getattr(site, f) for f in fields}, "shape": list(site.weight_shape or ())}
