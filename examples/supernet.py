"""A supernet of ResNet-20 on CIFAR-10, trained, and tested in several forms and as packed models.

    python examples/supernet.py --data DATA --work FOLDER --steps 100

DATA is a folder with ``models/resnet20-cifar10`` and ``images/cifar10`` (train-20000.zip, test-2000.npz). A killed run
goes on from its last checkpoint. Writes ``result.json``: accuracies by form, and those of the packed models.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import qjax
from qjax.supernet import Schedule, Space, recalibrate, train

FORMS = {"channel sym": (True, True, True), "tensor asym": (False, False, False), "channel asym": (True, False, False)}


def training_images(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of each class, and their labels by the order of class names."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
        classes = sorted({n.split("/")[0] for n in names})
        by_class = [[n for n in names if n.startswith(f"{c}/")][: count // len(classes)] for c in classes]
        images = [np.asarray(Image.open(io.BytesIO(archive.read(n)))) for part in by_class for n in part]
    return np.stack(images), np.repeat(np.arange(len(classes)), [len(p) for p in by_class])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=20000, help="of the training set")
    parser.add_argument("--tested", type=int, default=2000)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--no-wdr", action="store_true")
    parser.add_argument("--no-gpg", action="store_true")
    args = parser.parse_args()

    model, params, *_ = qjax.models.load(args.data / "models" / "resnet20-cifar10")
    prepare = jax.jit(lambda u: (u / 255.0 - jnp.array([0.485, 0.456, 0.406])) / jnp.array([0.229, 0.224, 0.225]))
    images, labels = training_images(args.data / "images" / "cifar10" / "train-20000.zip", args.images)
    test = np.load(args.data / "images" / "cifar10" / "test-2000.npz")
    x_test, y_test = np.asarray(prepare(test["images"][: args.tested])), test["labels"][: args.tested]

    def batches(step: int) -> tuple[tuple[jax.Array], np.ndarray]:
        rng = np.random.default_rng(step)
        at = rng.choice(len(images), args.batch, replace=False)
        flipped = np.where(rng.random((args.batch, 1, 1, 1)) < 0.5, images[at], images[at][:, :, ::-1])
        return (prepare(flipped),), labels[at]

    space = Space(tuple(args.bits), tuple(args.bits))
    t, evaluated = qjax.elastic(model.train_step_stats, space), qjax.elastic(model, space)
    first = prepare(images[np.random.default_rng(0).choice(len(images), min(256, len(images)), replace=False)])
    state = t.init(params, first)
    schedule = Schedule(
        args.steps, learning_rate=args.rate, lam=0.0 if args.no_gpg else 0.5, wdr=0.0 if args.no_wdr else 1.0
    )

    def told(done: int, total: int, metrics) -> None:
        if done % 10 == 0 or done == total:
            print(f"{done}/{total} " + " ".join(f"{k} {v:.3f}" for k, v in metrics.items()), flush=True)

    done = train(t, params, state, batches, schedule, folder=args.work / "job", save_every=20, progress=told)
    domain = evaluated.domain(done.params, first)
    stack = jnp.stack([batches(10_000 + n)[0][0] for n in range(16)])
    calibrate = jax.jit(lambda c: recalibrate(t, done.params, done.state, c, stack))
    run = jax.jit(lambda p, c, x: jnp.argmax(evaluated.apply(p, done.state, c, x)[0], -1))

    def share(predict) -> float:
        parts = range(0, len(x_test), 500)
        return float(np.mean(np.concatenate([predict(x_test[n : n + 500]) for n in parts]) == y_test))

    result: dict[str, object] = {"float before": share(jax.jit(lambda x: jnp.argmax(model(params, x), -1)))}
    for name, form in FORMS.items():
        for bits in args.bits:
            choice = domain.uniform(bits, bits, form)
            own = calibrate(choice)
            result[f"{name} {bits}"] = share(lambda x, own=own, choice=choice: run(own, choice, x))
            print(f"{name} {bits} bits: {result[f'{name} {bits}']:.4f}", flush=True)
        choice = domain.uniform(4, 4, form)
        own = calibrate(choice)
        packed = evaluated.convert(own, done.state, choice, first)
        result[f"{name} 4 packed"] = share(lambda x, m=packed: jnp.argmax(m(m.params, x), -1))
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "result.json").write_text(json.dumps(result, indent=1), "utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
