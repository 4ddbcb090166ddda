"""AdaLog and the methods it is compared with, on a vision transformer: top-1, KL of logits, error of outputs.

    python -m benchmarks.adalog --resume DIR [--bits 3,4,6,8] [--seeds 0,1,2] [--methods adalog,log2]
    python -m benchmarks.adalog --resume DIR --rows 512 --images 4 --steps 4       # a search on a part of the tokens

Of the 500 images of ``shared/data`` 32 are for calibration, drawn by the seed, and the other 468 for scoring. Each row
is kept in DIR when it is done, and so is each layer of a search: a killed run goes on from there. Top-1 of 468 images
has a standard error of 2 points: compare the paired differences, which stand beside it. ``--model`` and ``--image-set``
name another classifier and other labelled images, so that published checkpoints can be measured on a folder of ImageNet
(see `qjax.evaluate.read_images`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qjax
from benchmarks import measure
from benchmarks.static import ROOT
from qjax import evaluate, models
from qjax.checkpoint.parts import remove_job
from qjax.evaluate.paired import paired_test

METHODS: dict[str, dict[str, Any]] = {
    "adalog": {},
    "log2": dict(softmax="log2", gelu="log2"),
    "log_sqrt2": dict(softmax="log_sqrt2", gelu="log_sqrt2"),
    "twin": dict(softmax="twin", gelu="twin", reparameterize=False),
    "repq": dict(softmax="log_sqrt2", gelu="uniform", uniform="percentile"),
    "percentile": dict(softmax="uniform", gelu="uniform", uniform="percentile", reparameterize=False),
    "minmax": dict(softmax="uniform", gelu="uniform", uniform="minmax", reparameterize=False),
}
"""Settings of `qjax.passes.AdaLog`; those not named are AdaLog's own."""

SAID = {
    "adalog": "AdaLog",
    "log2": "base 2, all else as AdaLog",
    "log_sqrt2": "base sqrt 2, all else as AdaLog",
    "twin": "twin uniform (PTQ4ViT), no re-parameterization, all else as AdaLog",
    "repq": "RepQ-ViT",
    "percentile": "uniform, percentiles",
    "minmax": "uniform, min-max",
}


class Set:
    """Images, what the float model says of them, and which are for calibration."""

    def __init__(self, folder: Path, images: Path):
        self.folder = folder
        self.fn, self.params, _ = models.load(folder)
        data = evaluate.read_images(images)
        self.pixels = np.asarray(models.image_processor(folder)(data.images))
        self.labels = np.asarray(data.labels)
        self.logits = logits(self.fn, self.params, self.pixels)

    def drawn(self, seed: int) -> np.ndarray:
        return np.sort(np.random.default_rng(seed).choice(len(self.labels), 32, replace=False))


def logits(fn: Any, params: Any, pixels: np.ndarray, size: int = 50) -> np.ndarray:
    run = jax.jit(fn)
    pad = -len(pixels) % size
    whole = np.concatenate([pixels, pixels[:pad]])
    parts = [np.asarray(run(params, whole[at : at + size])) for at in range(0, len(whole), size)]
    return np.concatenate(parts)[: len(pixels)].astype(np.float64)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def measured(data: Set, method: str, bits: int, seed: int, search: dict[str, Any], folder: Path) -> dict[str, Any]:
    preset = qjax.recipe(f"adalog-w{bits}a{bits}")
    how = dataclasses.replace(preset.settle, **METHODS[method], **search, seed=seed)
    recipe = qjax.Recipe(preset.rules, name=f"{method}-w{bits}a{bits}", settle=how)
    used = data.drawn(seed)
    batches = [(data.pixels[used[at : at + 16]],) for at in range(0, 32, 16)]
    start = time.perf_counter()
    model = qjax.quantize(data.fn, data.params, recipe=recipe, batches=batches, resume=folder)
    seconds = time.perf_counter() - start
    rest = np.setdiff1d(np.arange(len(data.labels)), used)
    want, got = data.logits[rest], logits(model, model.params, data.pixels[rest])
    p, q = log_softmax(want), log_softmax(got)
    row = {
        "method": method,
        "bits": bits,
        "seed": seed,
        "search": search,
        "seconds": round(seconds, 1),
        "images": [int(n) for n in rest],
        "right": [bool(b) for b in got.argmax(1) == data.labels[rest]],
        "float_right": [bool(b) for b in want.argmax(1) == data.labels[rest]],
        "kl": [float(k) for k in (np.exp(p) * (p - q)).sum(1)],
        "error": [float(e) for e in ((got - want) ** 2).sum(1) / (want**2).sum(1)],
    }
    remove_job(folder)
    return row


def rows_of(data: Set, given: Any) -> list[dict[str, Any]]:
    search = {
        name: value for name in ("rows", "images", "steps", "rounds") if (value := getattr(given, name)) is not None
    }
    out = []
    for seed in given.seeds:
        for bits in given.bits:
            for method in given.methods:
                name = "-".join([method, f"w{bits}", f"s{seed}", *(f"{k}{v}" for k, v in search.items())])
                file = given.resume / f"{name}.json"
                if not file.is_file():
                    row = measured(data, method, bits, seed, search, given.resume / f"{name}.job")
                    fresh = file.with_suffix(".tmp")
                    fresh.write_text(json.dumps(row))
                    os.replace(fresh, file)
                    top, kl, error = (float(np.mean(row[k])) for k in ("right", "kl", "error"))
                    print(f"{name}: top-1 {top:.1%}, KL {kl:.3f}, error {error:.4f}, {row['seconds']} s", flush=True)
                out.append(json.loads(file.read_text()))
    return out


def summary(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Mean and spread over seeds, and the difference to AdaLog image by image."""
    out = []
    for bits, method in dict.fromkeys((r["bits"], r["method"]) for r in rows):
        mine = [r for r in rows if (r["bits"], r["method"]) == (bits, method)]
        each = {k: [float(np.mean(r[k])) for r in mine] for k in ("right", "float_right", "kl", "error", "seconds")}
        entry: dict[str, Any] = {"bits": bits, "method": method, "seeds": len(mine)}
        for key, values in each.items():
            entry[key], entry[f"{key}_spread"] = float(np.mean(values)), float(np.std(values))
        theirs = {r["seed"]: r for r in rows if (r["bits"], r["method"]) == (bits, "adalog")}
        pairs = [(r, theirs[r["seed"]]) for r in mine if r["seed"] in theirs and method != "adalog"]
        for key in ("right", "kl", "error"):
            if pairs:
                kind = bool if key == "right" else float
                a, b = (np.concatenate([np.asarray(p[i][key], kind) for p in pairs]) for i in (0, 1))
                test = paired_test(a, b)
                entry[f"{key}_more"], entry[f"{key}_p"] = test.difference, test.p
        out.append(entry)
    head = ["bits", "method", "top-1", "to AdaLog", "KL", "to AdaLog", "output error", "to AdaLog", "seconds"]
    table = []
    for e in out:
        cells = [str(e["bits"]), SAID[e["method"]]]
        for key, shape in (("right", "{:.1%}"), ("kl", "{:.3f}"), ("error", "{:.4f}")):
            spread = f" ± {shape.format(e[f'{key}_spread'])}" if e["seeds"] > 1 else ""
            cells.append(shape.format(e[key]) + spread)
            more = ""
            if f"{key}_more" in e:
                more = f"{shape.replace('{:', '{:+').format(e[f'{key}_more'])} (p {e[f'{key}_p']:.1g})"
            cells.append(more)
        table.append([*cells, f"{e['seconds']:.0f}"])
    return out, measure.table(head, table)


def main() -> None:
    parser = measure.parser(__doc__ or "")
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--image-set", type=Path, default=None)
    parser.add_argument("--resume", type=Path, required=True)
    parser.add_argument("--bits", type=numbers, default=[3, 4, 6, 8])
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    for name in ("rows", "images", "steps", "rounds"):
        parser.add_argument(f"--{name}", type=int, default=None)
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    given.resume.mkdir(parents=True, exist_ok=True)
    data = Set(
        given.model or given.data / "models/vit-tiny-patch16-224",
        given.image_set or given.data / "images/imagenet-sample-500",
    )
    rows = rows_of(data, given)
    found, text = summary(rows)
    top = np.mean([np.mean(r["float_right"]) for r in rows])
    searched = rows[0]["search"]
    said = ", ".join(f"{k} {v}" for k, v in searched.items()) if searched else "the whole schedule"
    text = (
        f"{data.folder.name}: 32 images for calibration, the rest for scoring, seeds {given.seeds}; search: {said}. "
        f"Float top-1 {top:.1%}. KL of logits in nats, output error: squared error of the logits over their squares. "
        "Differences to AdaLog are over the same images.\n\n" + text
    )
    measure.save("adalog", {"measured": found}, text, given.out)


if __name__ == "__main__":
    main()
