"""EQ-Net's supernet of ResNet-20 against networks trained for one form, and without its losses. A resumable table.

    python -m benchmarks.supernet --work DIR [--data ../shared/data] [--epochs 5] [--float-epochs 2] [--rows ...]

All rows begin from one float network: the pretrained one, first fine-tuned in float on the same 20,000 images. Then

- ``supernet``: highest, random and lowest subnet of each batch, both losses; ``no-wdr`` and ``no-gpg``: without one;
- ``lsq-channel-4`` and so on: one network for one form (per channel and symmetric, or per tensor and asymmetric) and
  one bit width, by the same quantizers, from the same first steps: a subnet of one in every step.

Batch norms of every subnet are recalibrated on 2,000 training images, and it is tested on 2,000 test images, on each of
which rows are compared pairwise. Every row, and every test of one, is kept in DIR as soon as it is there; a command
with fewer rows or one that was killed goes on, and the table holds what DIR has. With ``--beside`` the record (JSON) of
another run stands below it: rows are compared within a run, since each run has a float network of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qjax
from benchmarks import measure
from benchmarks.cifar import Cifar, pixels
from benchmarks.static import ROOT
from qjax.checkpoint.parts import load_part, open_job, save_part
from qjax.supernet import Fixed, Sandwich, Schedule, Space, moments, recalibrate, train

BITS = (2, 3, 4, 6, 8)
FORMS = tuple(itertools.product((True, False), repeat=3))
SINGLE = {"channel": (True, True, True), "tensor": (False, False, False)}
SINGLE_BITS = (2, 3, 4, 8)
SUPERNETS = {"supernet": BITS, "no-wdr": (2, 4), "no-gpg": (2, 4)}
"""Rows, and the bits that they are tested at."""

ROWS = (*SUPERNETS, *(f"lsq-{form}-{bits}" for bits in SINGLE_BITS for form in SINGLE))
CALIBRATION, TESTED = (20, 100), 100


def name_of(form: Sequence[bool]) -> str:
    """``channel/sym/asym``: granularity, symmetry of weights, of activations."""
    return "/".join(("channel" if form[0] else "tensor", *("sym" if s else "asym" for s in form[1:])))


@dataclasses.dataclass
class Bench:
    """What the rows share."""

    model: Any
    data: Cifar
    work: Path
    given: Any

    def __post_init__(self) -> None:
        self.space = Space(BITS, BITS)
        self.trained = qjax.elastic(self.model.train_step_stats, self.space)
        self.tested = qjax.elastic(self.model, self.space)
        self.per_epoch = len(self.data.images) // self.given.batch
        self.steps = max(round(self.per_epoch * self.given.epochs), 1)
        stack = self.data.images[: CALIBRATION[0] * CALIBRATION[1]].reshape(*CALIBRATION, 32, 32, 3)
        self.calibration = pixels(stack)
        self.test = pixels(self.data.test_images.reshape(-1, TESTED, 32, 32, 3))

        def right(params: Any, state: Any, choice: Any, calibration: Any, test: Any) -> Any:
            own = recalibrate(self.trained, params, state, choice, calibration)
            one = lambda x: jnp.argmax(self.tested.apply(own, state, choice, x)[0], -1)  # noqa: E731
            return jax.lax.map(one, test).reshape(-1)

        self.predict = jax.jit(right)

    def batches(self, step: int) -> Any:
        """As `train` takes them."""
        x, y = self.data.batch(step, self.given.batch)
        return (x,), y

    def float_network(self) -> tuple[Any, np.ndarray]:
        """The fine-tuned float network, trained unless it is there, and what the pretrained one and it have right."""
        params = qjax.models.load(self.given.data / "models" / "resnet20-cifar10")[1]
        steps = max(round(self.per_epoch * self.given.float_epochs), 1)
        optimizer = optax.chain(optax.clip(1.0), optax.adam(optax.cosine_decay_schedule(self.given.rate, steps)))
        carry = (params, optimizer.init(params))
        found = load_part(self.work / "float")
        done = 0
        if found is not None:
            carry = jax.tree.unflatten(jax.tree.structure(carry), [found[0][str(n)] for n in range(len(found[0]))])
            done = int(found[1]["step"])

        @jax.jit
        def step(carry: Any, x: Any, y: Any) -> Any:
            def loss(p: Any) -> Any:
                logits, moved = self.model.train_step_stats(p, x)
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), moved

            (value, moved), grads = jax.value_and_grad(loss, has_aux=True)(carry[0])
            updates, moments = optimizer.update(grads, carry[1], carry[0])
            return (optax.apply_updates(moved, updates), moments), value

        for number in range(done, steps):
            (x,), y = self.batches(number)
            carry, value = step(carry, x, y)
            if (number + 1) % 50 == 0 or number + 1 == steps:
                save_part(
                    self.work / "float",
                    {str(n): np.asarray(a) for n, a in enumerate(jax.tree.leaves(carry))},
                    {"step": number + 1},
                )
                print(f"float {number + 1}/{steps} loss {float(value):.3f}", flush=True)
        run = jax.jit(lambda p: jax.lax.map(lambda x: jnp.argmax(self.model(p, x), -1), self.test).reshape(-1))
        return carry[0], np.stack([run(params), run(carry[0])]) == self.data.test_labels

    def first_state(self, params: Any) -> Any:
        """Steps before training, from 256 images; the same for all rows."""
        shapes = jax.eval_shape(lambda p: self.trained.init(p, jnp.zeros((256, 32, 32, 3)), sample=1), params)
        found = load_part(self.work / "init")
        if found is None:
            state = self.trained.init(params, pixels(self.data.images[:256]))
            save_part(self.work / "init", {str(n): np.asarray(a) for n, a in enumerate(jax.tree.leaves(state))}, {})
            found = load_part(self.work / "init")
            assert found is not None
        return jax.tree.unflatten(jax.tree.structure(shapes), [found[0][str(n)] for n in range(len(found[0]))])

    def row(self, name: str, params: Any, state: Any) -> None:
        """Train a row and test its subnets, unless they are there."""
        single = None
        if name.startswith("lsq-"):
            _, form, bits = name.split("-")
            single = (SINGLE[form], int(bits))
        schedule = Schedule(
            self.steps,
            sampling=Sandwich() if single is None else Fixed(single[1], single[1], single[0]),
            lam=0.0 if name == "no-gpg" else 0.5,
            wdr=0.0 if name == "no-wdr" or single else 1.0,
            learning_rate=self.given.rate,
        )
        wanted = [single] if single else list(itertools.product(FORMS, SUPERNETS[name]))
        left = [(f, b) for f, b in wanted if self.kept(name, f, b) is None]
        if not left:
            return
        begun = time.perf_counter()

        def told(done: int, total: int, metrics: Mapping[str, float]) -> None:
            if done % 50 == 0 or done == total:
                each = (time.perf_counter() - begun) / max(done, 1)
                shown = " ".join(f"{k} {v:.3f}" for k, v in metrics.items())
                print(f"{name} {done}/{total} {shown} ({each:.2f} s a step)", flush=True)

        done = train(self.trained, params, state, self.batches, schedule, folder=self.work / name, save_every=50,
                     progress=told)  # fmt: skip
        weights = self.trained.weights(done.params, self.test[0])
        away = [abs(float(moments(w)[1]) - 1.8) for w in weights.values()]
        domain = self.trained.domain(params, self.test[0])
        for form, bits in left:
            choice = domain.uniform(bits, bits, form)
            labels = self.predict(done.params, done.state, choice, self.calibration, self.test)
            right = np.asarray(labels) == self.data.test_labels
            said = {"epochs": self.given.epochs, "kurtosis": float(np.mean(away))}
            save_part(self.work / "tests" / name / self.key(form, bits), {"right": right}, said)
            print(f"{name}: {name_of(form)} {bits} bits: {100 * right.mean():.2f} %", flush=True)

    @staticmethod
    def key(form: Sequence[bool], bits: int) -> str:
        """Folder of a test."""
        return name_of(form).replace("/", "-") + f"-{bits}"

    def kept(self, name: str, form: Sequence[bool], bits: int) -> tuple[np.ndarray, dict[str, Any]] | None:
        """Which test images a subnet has right, and what was said of it."""
        found = load_part(self.work / "tests" / name / self.key(form, bits))
        return None if found is None else (np.asarray(found[0]["right"], bool), found[1])


def paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean difference of two rows in points, and its standard error over images; [.., images] each."""
    difference = 100 * (a.reshape(-1, a.shape[-1]).mean(0) - b.reshape(-1, b.shape[-1]).mean(0))
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(difference.size))


def gathered(bench: Bench, of_float: np.ndarray) -> dict[str, Any]:
    """The record of what is there."""
    record: dict[str, Any] = {
        "epochs": bench.given.epochs,
        "float_epochs": bench.given.float_epochs,
        "batch": bench.given.batch,
        "float": {"pretrained": float(of_float[0].mean()), "fine-tuned": float(of_float[1].mean())},
        "top1": {},
        "kurtosis": {},
        "paired": {},
    }
    for name, tested in SUPERNETS.items():
        cells = {bench.key(f, b): bench.kept(name, f, b) for f in FORMS for b in tested}
        there = {key: cell for key, cell in cells.items() if cell is not None}
        if there:
            record["top1"][name] = {key: float(right.mean()) for key, (right, _) in there.items()}
            record["kurtosis"][name] = next(said["kurtosis"] for _, said in there.values())
    for (form, full), bits in itertools.product(SINGLE.items(), SINGLE_BITS):
        single, ours = bench.kept(f"lsq-{form}-{bits}", full, bits), bench.kept("supernet", full, bits)
        if single is not None:
            record["top1"][f"lsq-{form}-{bits}"] = float(single[0].mean())
            if ours is not None:
                record["paired"][f"supernet over lsq-{form}-{bits}"] = list(paired(ours[0], single[0]))
    for name, bits in [(name, b) for name, tested in SUPERNETS.items() for b in tested if name != "supernet"]:
        pairs = [(bench.kept("supernet", f, bits), bench.kept(name, f, bits)) for f in FORMS]
        both = [(a[0], b[0]) for a, b in pairs if a is not None and b is not None]
        if len(both) == len(FORMS):
            gains = paired(*(np.stack(side) for side in zip(*both, strict=True)))
            record["paired"][f"supernet over {name}, {bits} bits"] = list(gains)
    return record


def shown(record: dict[str, Any], level: str = "###") -> list[str]:
    """A record as lines of text."""
    top1, float_ = record["top1"], record["float"]
    percent = lambda share: "" if share is None else f"{100 * share:.2f}"  # noqa: E731
    difference = lambda label: "{:+.2f} ± {:.2f}".format(*record["paired"][label])  # noqa: E731
    text = [
        f"{record['epochs']:g} epochs of 20,000 images a row in batches of {record['batch']}, after "
        f"{record['float_epochs']:g} in float: {percent(float_['pretrained'])} % before, "
        f"{percent(float_['fine-tuned'])} % after.",
        "",
    ]
    for name in [name for name in SUPERNETS if name in top1]:
        lines = [[name_of(f), *(percent(top1[name].get(Bench.key(f, b))) for b in SUPERNETS[name])] for f in FORMS]
        header = ["form", *(f"{b} bits" for b in SUPERNETS[name])]
        text += [f"{level} {name}", "", measure.table(header, lines), ""]
    lines = []
    for (form, full), bits in itertools.product(SINGLE.items(), SINGLE_BITS):
        name = f"lsq-{form}-{bits}"
        if name in top1:
            label = f"supernet over {name}"
            ours = top1["supernet"][Bench.key(full, bits)] if label in record["paired"] else None
            gain = difference(label) if label in record["paired"] else ""
            lines.append([f"{name_of(full)} {bits} bits", percent(top1[name]), percent(ours), gain])
    if lines:
        text += [f"{level} Beside networks trained for one form", ""]
        text += [measure.table(["form", "own network", "supernet", "difference ± standard error"], lines), ""]
    without = [(name, bits) for name, tested in SUPERNETS.items() for bits in tested]
    labels = {f"{name}, {bits} bits": f"supernet over {name}, {bits} bits" for name, bits in without}
    lines = [[what, difference(label)] for what, label in labels.items() if label in record["paired"]]
    if lines:
        text += [f"{level} What each loss gives: the supernet less the one without it, over all forms", ""]
        text += [measure.table(["without", "difference ± standard error"], lines), ""]
    if record["kurtosis"]:
        found = ", ".join(f"{name} {value:.3f}" for name, value in record["kurtosis"].items())
        text += [f"Mean |kurtosis - 1.8| of the weights: {found}.", ""]
    return text


def written(bench: Bench, of_float: np.ndarray) -> None:
    """The table of what is there, and of another run."""
    record = gathered(bench, of_float)
    text = [
        "ResNet-20, CIFAR-10, 2,000 test images. Per cent right; forms are granularity and symmetry of weights, and "
        "symmetry of activations. Weights and activations have the same bits, the first and last layer 8.",
        "",
        *shown(record),
    ]
    if bench.given.beside is not None:
        record["beside"] = json.loads(bench.given.beside.read_text())
        text += [f"### Another run, {record['beside']['environment']['date']}", "", *shown(record["beside"], "####")]
    measure.save("supernet", record, "\n".join(text).rstrip(), bench.given.out)


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--float-epochs", type=float, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of Adam, to 0 by a cosine")
    parser.add_argument("--beside", type=Path, metavar="JSON", help="the record of another run, to show below")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    given = parser.parse_args()
    job = {"epochs": given.epochs, "float": given.float_epochs, "batch": given.batch, "rate": given.rate}
    work = open_job(given.work, job, "supernet table")
    model = qjax.models.load(given.data / "models" / "resnet20-cifar10")[0]
    bench = Bench(model, Cifar.read(given.data), work, given)
    params, of_float = bench.float_network()
    state = bench.first_state(params)
    for name in given.rows:
        bench.row(name, params, state)
    written(bench, of_float)


if __name__ == "__main__":
    main()
