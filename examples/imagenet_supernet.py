"""EQ-Net's published recipe on an ImageNet folder: a supernet of ResNet-18/50, MobileNetV2 or EfficientNet-B0.

    python examples/imagenet_supernet.py --model MODEL --train IMAGENET/train --val IMAGENET/val --work runs/eqnet

MODEL is a folder of a float checkpoint (transformers' or timm's, or torchvision's weights with a config.json of
transformers). IMAGENET/train and IMAGENET/val have a folder of images for each class; classes are counted in the order
of the folders' names, as for the checkpoints. A killed job goes on from its last checkpoint.

The recipe (Xu et al. 2023, arXiv:2308.07650, section 4.1 and the authors' configuration): from the float weights, 120
epochs of Adam at 1e-3 with a cosine to 0, gradients clipped by value at 1, no weight decay, 256 images for each device,
random crops and mirroring; highest, random and lowest subnet of each batch, guidance with lambda 0.5, and weight
distributions. Bits are 2 to 8, and 3 to 8 for the two networks of depthwise convolutions, where 2 costs too much. First
and last layer at 8. Batch norms are recalibrated on 256 training batches before a subnet is tested.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import qjax
from qjax.supernet import Schedule, Space, recalibrate, train

FEW_BITS = ("MobileNetV2ForImageClassification", "EfficientNetForImageClassification")
ENDINGS = (".jpg", ".jpeg", ".png")


class Folder:
    """Images of a folder with a sub-folder for each class; read when they are asked for, by some threads."""

    def __init__(self, root: Path, prepare, threads: int) -> None:
        names = sorted(p.name for p in root.iterdir() if p.is_dir())
        if not names:
            raise SystemExit(f"{root} has no folders of classes")
        self.files = [(p, n) for n, name in enumerate(names) for p in sorted((root / name).iterdir())
                      if p.suffix.lower() in ENDINGS]  # fmt: skip
        self.classes, self.prepare = len(names), prepare
        self.size = prepare.crop or prepare.size
        self.pool = concurrent.futures.ThreadPoolExecutor(threads)

    def training(self, step: int, size: int) -> tuple[tuple[np.ndarray], np.ndarray]:
        """A batch as a function of the step: another order each epoch, a random crop of each image, mirrored or not."""
        per_epoch = max(len(self.files) // size, 1)
        epoch, at = divmod(step, per_epoch)
        rows = np.random.default_rng((1, epoch)).permutation(len(self.files))
        rows = np.resize(rows, per_epoch * size)[at * size : (at + 1) * size]
        seeds = np.random.default_rng((2, step)).integers(0, 2**31, size)
        pixels = list(self.pool.map(self._cropped, [self.files[r][0] for r in rows], seeds))
        return (np.stack(pixels),), np.array([self.files[r][1] for r in rows])

    def _cropped(self, path: Path, seed: int) -> np.ndarray:
        """8 to 100 % of the area at an aspect of 3/4 to 4/3, resized; the usual augmentation of ImageNet."""
        rng, image = np.random.default_rng(seed), Image.open(path).convert("RGB")
        width, height = image.size
        box = (0, 0, width, height)
        for _ in range(10):
            area = width * height * rng.uniform(0.08, 1)
            aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
                box = (int(left), int(top), int(left) + w, int(top) + h)
                break
        image = image.resize(self.size[::-1], Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(image, np.float32)[:, :: rng.choice((1, -1))] * self.prepare.scale
        return (pixels - np.float32(self.prepare.mean)) / np.float32(self.prepare.std)

    def testing(self, size: int):
        """Batches of images as the checkpoint wants them, with labels and how many of them count."""
        for at in range(0, len(self.files), size):
            part = self.files[at : at + size]
            padded = part + part[:1] * (size - len(part))
            pixels = list(self.pool.map(lambda f: self.prepare([f[0]])[0], padded))
            yield np.stack(pixels), np.array([n for _, n in padded]), len(part)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=120)
    parser.add_argument("--steps", type=int, help="in place of epochs")
    parser.add_argument("--batch", type=int, default=256, help="images for each device")
    parser.add_argument("--bits", type=int, nargs="+", help="default: 2 to 8, or 3 to 8 for depthwise networks")
    parser.add_argument("--tested-bits", type=int, nargs="+", help="default: all of --bits")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--calibration-batches", type=int, default=256)
    parser.add_argument("--threads", type=int, default=16, help="that read images")
    args = parser.parse_args()

    model, params, config = qjax.models.load(args.model)
    if not hasattr(model, "train_step_stats"):
        raise SystemExit(f"{args.model} is a {config.architecture}, which has no batch norms to train")
    prepare = qjax.models.image_processor(args.model)
    learned, tested = (Folder(root, prepare, args.threads) for root in (args.train, args.val))
    if learned.classes != config.num_labels or tested.classes != config.num_labels:
        raise SystemExit(
            f"the checkpoint has {config.num_labels} classes, {args.train} has {learned.classes} folders, {args.val} "
            f"has {tested.classes}"
        )
    bits = tuple(args.bits or range(3 if config.architecture in FEW_BITS else 2, 9))
    space = Space(bits, bits)
    t, evaluated = qjax.elastic(model.train_step_stats, space), qjax.elastic(model, space)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    batch = args.batch * jax.device_count()
    steps = args.steps or round(args.epochs * len(learned.files) / batch)
    print(f"{len(learned.files)} images, {steps} steps of {batch} on {jax.device_count()} devices", flush=True)
    first = jnp.asarray(learned.training(0, min(batch, 256))[0][0])
    state = t.init(params, first)

    def told(done: int, total: int, metrics) -> None:
        if done % 20 == 0 or done == total:
            print(f"{done}/{total} " + " ".join(f"{k} {v:.3f}" for k, v in metrics.items()), flush=True)

    done = train(t, params, state, lambda step: learned.training(step, batch), Schedule(steps, learning_rate=args.rate),
                 folder=args.work / "job", save_every=args.save_every, mesh=mesh, progress=told)  # fmt: skip
    params, state = jax.device_get((done.params, done.state))
    one = jax.jit(lambda now, c, x: recalibrate(t, now, state, c, x[None]))
    run = jax.jit(lambda now, c, x: jnp.argmax(evaluated.apply(now, state, c, x)[0], -1))
    domain = evaluated.domain(params, first)
    table = {}
    for form in ((channel, w, a) for channel in (True, False) for w in (True, False) for a in (True, False)):
        for b in args.tested_bits or bits:
            choice, own = domain.uniform(b, b, form), params
            for n in range(args.calibration_batches):
                own = one(own, choice, learned.training(steps + n, batch)[0][0])
            right = [
                int((np.asarray(run(own, choice, x)) == y)[:count].sum()) for x, y, count in tested.testing(args.batch)
            ]
            name = f"{'channel' if form[0] else 'tensor'}/{'/'.join('sym' if s else 'asym' for s in form[1:])}/{b}"
            table[name] = sum(right) / len(tested.files)
            print(f"{name}: {100 * table[name]:.2f} %", flush=True)
            (args.work / "result.json").write_text(json.dumps(table, indent=1), "utf-8")


if __name__ == "__main__":
    main()
