"""AdaLog and the methods it is compared with, on a vision transformer: top-1, KL of logits, error of outputs.

    python -m benchmarks.adalog --resume DIR [--bits 3,4,6,8] [--seeds 0,1,2] [--methods adalog,log2]
    python -m benchmarks.adalog --resume DIR --rows 512 --images 4 --steps 4       # a search on a part of the tokens
    python -m benchmarks.adalog --resume DIR --record benchmarks/results/adalog-cpu.json   # without rows that it has
    python -m benchmarks.adalog --resume DIR --methods adalog-reconstructed --reconstruct 1000 --batch 8
    python -m benchmarks.adalog --resume DIR --model deit-tiny --image-set IMAGENET/val --calibration-set IMAGENET/train

Of the 500 images of ``shared/data`` 32 are for calibration, drawn by the seed, and the other 468 for scoring. Each row
is kept in DIR when it is done, and so is each layer of a search: a killed run goes on from there. Top-1 of 468 images
has a standard error of 2 points: compare the paired differences, which stand beside it.

``--record`` names a file that keeps rows for good, image by image: a row with the same model, images, search, method,
bits and seed is taken from it, new rows are added, and the tables are of all rows in it, one for each search.

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
from qjax.passes.adalog import BLOCK_INPUTS
from qjax.passes.fpcs_losses import chosen_products

RECONSTRUCTED = "-reconstructed"
"""How the name of a method ends whose blocks are trained after the search."""

METHODS: dict[str, dict[str, Any]] = {
    "adalog": {},
    "log2": dict(softmax="log2", gelu="log2"),
    "log_sqrt2": dict(softmax="log_sqrt2", gelu="log_sqrt2"),
    "twin": dict(softmax="twin", gelu="twin", reparameterize=False),
    "repq": dict(softmax="log_sqrt2", gelu="uniform", uniform="percentile"),
    "percentile": dict(softmax="uniform", gelu="uniform", uniform="percentile", reparameterize=False),
    "minmax": dict(softmax="uniform", gelu="uniform", uniform="minmax", reparameterize=False),
}
METHODS |= {name + RECONSTRUCTED: METHODS[name] for name in ("adalog", "log2", "log_sqrt2")}
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


def said(entry: dict[str, Any]) -> str:
    """A method, and how blocks were trained, as the table names it."""
    name = SAID[entry["method"].removesuffix(RECONSTRUCTED)]
    if not entry["reconstruct"]:
        return name
    source = ", on quantized inputs" if entry["block_inputs"] == "quantized" else ""
    return f"{name}; then {entry['reconstruct']} steps of {entry['batch']} images a block{source}"


class Set:
    """Images, what the float model says of them, and which are for calibration."""

    def __init__(self, folder: Path, images: Path, calibration: Path | None = None):
        self.folder = folder
        self.names = {"model": folder.name, "set": images.name, "calibration": calibration and calibration.name}
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


def measured(
    data: Set, method: str, bits: int, seed: int, search: dict[str, Any], training: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """One row, as it is kept: see `compact`."""
    preset = qjax.recipe(f"adalog-w{bits}a{bits}")
    how = dict(METHODS[method], **search, **training, seed=seed)
    how = dataclasses.replace(preset.settle, **how)
    recipe = qjax.Recipe(preset.rules, name=f"{method}-w{bits}a{bits}", settle=how)
    pixels, rest = data.drawn(seed)
    batches = [(pixels[at : at + 16],) for at in range(0, 32, 16)]
    whole = not folder.exists()  # else the time is that of what a killed run had left
    start, busy = time.perf_counter(), time.process_time()
    model = qjax.quantize(data.fn, data.params, recipe=recipe, batches=batches, resume=folder)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    want, got = data.logits[rest], data.of(model, model.params, rest)
    p, q = log_softmax(want), log_softmax(got)
    row = {
        **data.names,
        "search": search,
        "method": method,
        "bits": bits,
        "seed": seed,
        **trained_as(training),
        "seconds": round(seconds, 1) if whole else None,
        "processor": round(busy, 1) if whole else None,
        "products": chosen_products(how.products),
        "load": round(os.getloadavg()[0], 1),
        "right": got.argmax(1) == data.labels[rest],
        "float_right": want.argmax(1) == data.labels[rest],
        "kl": (np.exp(p) * (p - q)).sum(1),
        "error": ((got - want) ** 2).sum(1) / (want**2).sum(1),
    }
    remove_job(folder)
    return compact(row)


def trained_as(training: dict[str, Any]) -> dict[str, Any]:
    """How blocks were trained, as it stands in a row."""
    return {"reconstruct": 0, "batch": None, "block_inputs": None} | training


def compact(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is kept: bits of right answers as hexadecimal digits, other numbers of images to four digits."""
    out = dict(row, images=len(row["right"]))
    for key in ("right", "float_right"):
        out[key] = np.packbits(np.asarray(row[key], bool)).tobytes().hex()
    for key in ("kl", "error"):
        out[key] = [float(f"{x:.4g}") for x in row[key]]
    return out


def expanded(row: dict[str, Any]) -> dict[str, Any]:
    """A row with arrays, one number an image."""
    out = dict(row)
    for key in ("right", "float_right"):
        packed = np.frombuffer(bytes.fromhex(row[key]), np.uint8)
        out[key] = np.unpackbits(packed, count=row["images"]).astype(bool)
    for key in ("kl", "error"):
        out[key] = np.asarray(row[key], np.float64)
    return out


KEY = ("model", "set", "calibration", "search", "method", "bits", "seed", "reconstruct", "batch", "block_inputs")


def key_of(row: dict[str, Any]) -> str:
    """What tells one row from another."""
    return json.dumps([row.get(k) for k in KEY], sort_keys=True)


def kept_in(record: Path | None) -> dict[str, dict[str, Any]]:
    """The rows of a record, by key."""
    if record is None or not record.is_file():
        return {}
    return {key_of(row): row for row in json.loads(record.read_text())["rows"]}


def written(record: Path, rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """Write a record, a row a line."""
    head = json.dumps({"environment": measure.environment(), "measured": found}, indent=1)[:-2]
    lines = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in rows)
    fresh = record.with_suffix(".tmp")
    fresh.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    os.replace(fresh, record)


def rows_of(data: Set, given: Any) -> list[dict[str, Any]]:
    """The rows that were asked for, from the folder or the record, or measured."""
    search = {
        name: value
        for name in ("rows", "images", "steps", "rounds", "products")
        if (value := getattr(given, name)) is not None
    }
    known, out = kept_in(given.record), []
    for seed in given.seeds:
        for bits in given.bits:
            for method in given.methods:
                training = {}
                if method.endswith(RECONSTRUCTED):
                    training = dict(reconstruct=given.reconstruct, batch=given.batch, block_inputs=given.block_inputs)
                row = dict(data.names, search=search, method=method, bits=bits, seed=seed, **trained_as(training))
                if key_of(row) in known:
                    out.append(known[key_of(row)])
                    continue
                name = "-".join([method, f"w{bits}", f"s{seed}", *(f"{k}{v}" for k, v in search.items())])
                name += f"-{given.reconstruct}x{given.batch}-{given.block_inputs}" if training else ""
                file = given.resume / f"{name}.json"
                if not file.is_file():
                    row = measured(data, method, bits, seed, search, training, given.resume / f"{name}.job")
                    fresh = file.with_suffix(".tmp")
                    fresh.write_text(json.dumps(row))
                    os.replace(fresh, file)
                    row = expanded(row)
                    top, kl, error = (float(np.mean(row[k])) for k in ("right", "kl", "error"))
                    print(f"{name}: top-1 {top:.1%}, KL {kl:.3f}, error {error:.4f}, {row['seconds']} s", flush=True)
                out.append(json.loads(file.read_text()))
    return out


def order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row stands in a table."""
    bits, method, *training = kind_of(row)
    return bits, list(METHODS).index(method), *(each or 0 for each in training[:2]), str(training[2]), row["seed"]


def kind_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What rows have in common that differ by their seed alone."""
    return row["bits"], row["method"], row["reconstruct"], row.get("batch"), row.get("block_inputs")


def compared_with(kind: tuple[Any, ...]) -> tuple[Any, ...]:
    """The kind of row whose images a row is compared with.

    That is AdaLog, searched alike; and for another method that is trained behind its search, AdaLog trained alike.
    """
    bits, method, *training = kind
    ours = "adalog" + RECONSTRUCTED
    if method.endswith(RECONSTRUCTED) and method != ours:
        return bits, ours, *training
    return bits, "adalog", 0, None, None


def summary(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Mean and spread over seeds, and the difference to AdaLog image by image, of the rows of one search."""
    out = []
    rows = [expanded(row) for row in sorted(rows, key=order)]
    for kind in dict.fromkeys(kind_of(r) for r in rows):
        bits, method = kind[:2]
        mine = [r for r in rows if kind_of(r) == kind]
        each = {k: [float(np.mean(r[k])) for r in mine] for k in ("right", "float_right", "kl", "error")}
        entry: dict[str, Any] = {"bits": bits, "method": method, **{k: mine[0].get(k) for k in trained_as({})}}
        entry["seeds"] = len(mine)
        for key, values in each.items():
            entry[key], entry[f"{key}_spread"] = float(np.mean(values)), float(np.std(values))
        for key in ("seconds", "processor"):
            timed = [value for r in mine if (value := r.get(key)) is not None]
            entry[key] = float(np.mean(timed)) if timed else None
        theirs = {r["seed"]: r for r in rows if kind_of(r) == compared_with(kind)}
        pairs = [(r, theirs[r["seed"]]) for r in mine if r["seed"] in theirs and method != "adalog"]
        for key in ("right", "kl", "error"):
            if pairs:
                a, b = (np.concatenate([p[i][key] for p in pairs]) for i in (0, 1))
                test = paired_test(a, b)
                entry[f"{key}_more"], entry[f"{key}_p"] = test.difference, test.p
        out.append(entry)
    head = ["bits", "method", "seeds", "top-1", "to AdaLog", "KL", "to AdaLog", "output error", "to AdaLog"]
    head += ["seconds", "of processors"]
    table = []
    for e in out:
        cells = [str(e["bits"]), said(e), str(e["seeds"])]
        for key, shape in (("right", "{:.1%}"), ("kl", "{:.3f}"), ("error", "{:.4f}")):
            spread = f" ± {shape.format(e[f'{key}_spread'])}" if e["seeds"] > 1 else ""
            cells.append(shape.format(e[key]) + spread)
            more = ""
            if f"{key}_more" in e:
                more = f"{shape.replace('{:', '{:+').format(e[f'{key}_more'])} ({chance(e[f'{key}_p'])})"
            cells.append(more)
        table.append([*cells, *("" if e[k] is None else f"{e[k]:.0f}" for k in ("seconds", "processor"))])
    return out, measure.table(head, table)


def chance(p: float) -> str:
    """A probability, as far as the test can tell it from 0."""
    return "p < 1e-15" if p < 1e-15 else f"p {p:.1g}"


def tables(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """A summary for each model, images and search among the rows, with what it says of them."""
    found, parts = [], []
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(json.dumps([row[k] for k in KEY[:4]], sort_keys=True), []).append(row)
    for mine in kinds.values():
        first, (entries, text) = mine[0], summary(mine)
        top = np.mean([entry["float_right"] for entry in entries])
        said = ", ".join(f"{k} {v}" for k, v in first["search"].items()) if first["search"] else "the whole schedule"
        source = f" of {first['calibration']}" if first["calibration"] else ""
        parts.append(
            f"{first['model']}, {first['set']}: 32 images{source} for calibration, {first['images']} for scoring; "
            f"search: {said}. Float top-1 {top:.1%}.\n\n{text}"
        )
        found.append({**{k: first[k] for k in KEY[:4]}, "table": entries})
    text = "\n\n".join(parts)
    return found, (
        f"{text}\n\nKL of logits in nats, output error: squared error of the logits over their squares. Differences to "
        "AdaLog are over the same images, of the seeds that both have; those of another method that is trained after "
        "its search are to AdaLog trained alike. Seconds are those of calibration, by the clock and of all processors "
        "together; only the latter mean something on a machine that others use."
    )


def main() -> None:
    parser = measure.parser(__doc__ or "")
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--platform", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--image-set", type=Path, default=None)
    parser.add_argument("--calibration-set", type=Path, default=None)
    parser.add_argument("--resume", type=Path, required=True)
    parser.add_argument("--bits", type=numbers, default=[3, 4, 6, 8])
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(SAID))
    for name in ("rows", "images", "steps", "rounds"):
        parser.add_argument(f"--{name}", type=int, default=None)
    parser.add_argument("--products", choices=("float32", "bfloat16"), default=None)
    parser.add_argument("--reconstruct", type=int, default=1000, help="steps a block, of methods *" + RECONSTRUCTED)
    parser.add_argument("--batch", type=int, default=32, help="images in a step of it")
    parser.add_argument("--block-inputs", choices=BLOCK_INPUTS, default="float", help="what blocks are trained on")
    parser.add_argument("--record", type=Path, default=None, help="rows that are known, to which new ones are added")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cuda,cpu" if given.platform == "cuda" else "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")  # products of float32 in TF32 would count as errors
    given.resume.mkdir(parents=True, exist_ok=True)
    data = Set(
        given.model or given.data / "models/vit-tiny-patch16-224",
        given.image_set or given.data / "images/imagenet-sample-500",
        given.calibration_set,
    )
    rows = rows_of(data, given)
    if given.record is None:
        found, text = tables(rows)
        measure.save("adalog", {"measured": found}, text, given.out)
        return
    rows = list((kept_in(given.record) | {key_of(row): row for row in rows}).values())
    rows.sort(key=lambda row: (json.dumps([row[k] for k in KEY[:4]], sort_keys=True), order(row)))
    found, text = tables(rows)
    written(given.record, rows, found)
    text = f"{text}\n\n{measure.described(measure.environment())} for the last rows.\n"
    given.record.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
