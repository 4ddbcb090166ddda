"""AdaLog and the methods it is compared with, on a vision transformer: top-1, KL of logits, error of outputs.

    python -m benchmarks.adalog --resume DIR [--bits 3,4,6,8] [--seeds 0,1,2] [--methods adalog,log2]
    python -m benchmarks.adalog --resume DIR --rows 512 --images 4 --steps 4       # a search on a part of the tokens
    python -m benchmarks.adalog --resume DIR --model deit-tiny --image-set IMAGENET/val --calibration-set IMAGENET/train

Of the 500 images of ``shared/data`` 32 are for calibration, drawn by the seed, and the other 468 for scoring. Each row
is kept in DIR when it is done, and so is each layer of a search: a killed run goes on from there. Top-1 of 468 images
has a standard error of 2 points: compare the paired differences, which stand beside it.

``--model`` and ``--image-set`` name another classifier and other labelled images (`qjax.evaluate.read_images`), so that
published checkpoints can be measured on a folder of ImageNet: one folder of images for each of the model's classes.
With ``--calibration-set`` the 32 images are drawn from there and all of the image set is scored. Images are read as
they are needed. The authors calibrate with training images in the augmentation of training; here they pass the
checkpoint's own processing.
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

    def __init__(self, folder: Path, images: Path, calibration: Path | None = None):
        self.folder = folder
        self.fn, self.params, config = models.load(folder)
        self.prepare = models.image_processor(folder)
        self.data = read_set(images, config.num_labels)
        self.apart = None if calibration is None else read_set(calibration, config.num_labels)
        self.labels = np.asarray(self.data.labels)
        self.logits = self.of(self.fn, self.params, np.arange(len(self.labels)))

    def drawn(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The prepared images of calibration, and which images of the set are scored."""
        source = self.data if self.apart is None else self.apart
        if len(source) < 33:
            raise SystemExit(f"32 images are for calibration and others for scoring; there are {len(source)}")
        used = np.sort(np.random.default_rng(seed).choice(len(source), 32, replace=False))
        every = np.arange(len(self.labels))
        pixels = np.asarray(self.prepare(source.only(used.tolist()).images))
        return pixels, every if self.apart is not None else np.setdiff1d(every, used)

    def of(self, fn: Any, params: Any, rows: np.ndarray, size: int = 50) -> np.ndarray:
        """Logits of images by number, so many at a time; the last batch is filled up, so one shape is compiled."""
        run, parts = jax.jit(fn), []
        for at in range(0, len(rows), size):
            part = np.resize(rows[at : at + size], size).tolist()
            parts.append(np.asarray(run(params, np.asarray(self.prepare(self.data.only(part).images)))))
        return np.concatenate(parts)[: len(rows)].astype(np.float64)


def read_set(path: Path, classes: int) -> Any:
    """Labelled images whose labels are classes of the model."""
    found = evaluate.read_images(path)
    folders = len(found.classes) if not (path / "labels.csv").is_file() and path.is_dir() else classes
    if folders != classes or found.labels.max() >= classes:
        raise SystemExit(
            f"{path} has {folders} folders of classes with labels up to {found.labels.max()}, and the model has "
            f"{classes} classes; the order of all folders is what numbers them, so give one for each class"
        )
    return found


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def measured(data: Set, method: str, bits: int, seed: int, search: dict[str, Any], folder: Path) -> dict[str, Any]:
    preset = qjax.recipe(f"adalog-w{bits}a{bits}")
    how = dataclasses.replace(preset.settle, **METHODS[method], **search, seed=seed)
    recipe = qjax.Recipe(preset.rules, name=f"{method}-w{bits}a{bits}", settle=how)
    pixels, rest = data.drawn(seed)
    batches = [(pixels[at : at + 16],) for at in range(0, 32, 16)]
    start = time.perf_counter()
    model = qjax.quantize(data.fn, data.params, recipe=recipe, batches=batches, resume=folder)
    seconds = time.perf_counter() - start
    want, got = data.logits[rest], data.of(model, model.params, rest)
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
    parser.add_argument("--calibration-set", type=Path, default=None)
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
        given.calibration_set,
    )
    rows = rows_of(data, given)
    found, text = summary(rows)
    top = np.mean([np.mean(r["float_right"]) for r in rows])
    searched = rows[0]["search"]
    said = ", ".join(f"{k} {v}" for k, v in searched.items()) if searched else "the whole schedule"
    text = (
        f"{data.folder.name}: 32 images for calibration, {len(rows[0]['right'])} for scoring, seeds {given.seeds}; "
        f"search: {said}. "
        f"Float top-1 {top:.1%}. KL of logits in nats, output error: squared error of the logits over their squares. "
        "Differences to AdaLog are over the same images.\n\n" + text
    )
    measure.save("adalog", {"measured": found}, text, given.out)


if __name__ == "__main__":
    main()
