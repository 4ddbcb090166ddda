"""EQ-Net's accuracy predictor on a supernet of ResNet20, and what a search with it finds, on CIFAR-10.

    python -m benchmarks.predictor [--supernet FOLDER] [--data ../shared/data] [--subnets 1000] [--resume DIR]

FOLDER is what `qjax.supernet.train` kept of the network's ``train_step_stats``; without it the supernet is as `init`
makes it, with bits 2, 3, 4, 6 and 8, and not trained. Each subnet has its batch norms recalibrated on 1,000 training
images and is scored on 1,000 others, by top-1 and by cross-entropy; a fifth of the subnets is held out. With --resume
nothing is measured twice. The predictor and the searches are of --score: cross-entropy, whose differences between
subnets are not drowned by the few images that change sides, or top-1.

Then, for each budget of average bits, a search by the predictor, whose best 8 are run, beside the best 8 by the
predictor of as many random valid choices as it scored, 16 random valid choices, and the same bits everywhere. All are
measured alike, and of each the best as measured is shown.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from benchmarks import measure
from benchmarks.cifar import Cifar, pixels
from benchmarks.static import ROOT
from qjax.checkpoint.parts import open_job
from qjax.search import (
    CQAP,
    Agreement,
    Genes,
    Genetic,
    Subnets,
    agreement,
    best_as_run,
    collect_subnets,
    fit_predictor,
    over_population,
    predict,
    random_choices,
    search_choice,
)
from qjax.search.whole import Remembered
from qjax.supernet import Space, encode_choice, load_trained, recalibrate, sizes

BITS = (2, 3, 4, 6, 8)
"""Of the supernet that is not trained."""
FORM = (True, True, True)
"""Of searches: per channel, both symmetric."""
BEST = 8
"""Choices that are run, of those that the predictor has for the best."""
SPLITS = 5
"""Ways to hold out a fifth; the first one is reported, the others say how much it depends on which fifth."""
BOUNDS = {"pearson": 0.9, "kendall": 0.75}
SETTINGS = CQAP(epochs=400, batch=64)


class Measured:
    """What a subnet of one supernet scores.

    Args:
        given: the options.
    """

    def __init__(self, given: Any):
        folder = given.data / "models" / "resnet20-cifar10"
        model, params, _ = qjax.models.load(folder)
        data = Cifar.read(given.data)
        count = given.calibration + given.images
        if given.calibration % given.batch or given.images % given.batch or count > len(data.images):
            raise SystemExit(f"--batch {given.batch} has to divide --calibration and --images, {count} images in all")
        shown = pixels(data.images[:count])
        batches = lambda a: a.reshape(-1, given.batch, *a.shape[1:])  # noqa: E731
        calibration, images = batches(shown[: given.calibration]), batches(shown[given.calibration :])
        labels = batches(jnp.asarray(data.labels[given.calibration : count]))
        if given.supernet is None:
            trained = qjax.elastic(model.train_step_stats, Space(BITS, BITS))
            state, self.steps = trained.init(params, shown[:16]), 0
        else:
            trained, found = load_trained(given.supernet, model.train_step_stats, params, images[0])
            params, state, self.steps = found.params, found.state, len(found.metrics["loss"])
        tested = qjax.elastic(model, trained.space)
        self.domain = tested.domain(params, images[0])
        counted = sizes(tested, params, images[0, :1])
        self.weights, self.inputs = counted.weights, counted.inputs

        def one(choice: Any, params: Any, state: Any, calibration: Any, images: Any, labels: Any) -> Any:
            own = recalibrate(trained, params, state, choice, calibration)

            def batch(part: Any) -> Any:
                logits, truth = tested.apply(own, state, choice, part[0])[0], part[1]
                surprise = -jnp.take_along_axis(jax.nn.log_softmax(logits), truth[:, None], axis=-1)
                return (logits.argmax(-1) == truth).mean(), surprise.mean()

            right, loss = jax.lax.map(batch, (images, labels))
            half = len(right) // 2
            return {
                "score": right.mean(),
                "loss": loss.mean(),
                "first": right[:half].mean(),
                "second": right[half:].mean(),
            }

        many = jax.jit(over_population(one))
        self.seconds: list[float] = []

        def evaluate(choices: np.ndarray) -> Mapping[str, Any]:
            begun = time.perf_counter()
            out = jax.block_until_ready(many(jnp.asarray(choices), params, state, calibration, images, labels))
            self.seconds.append((time.perf_counter() - begun) / len(choices))
            return out

        self.evaluate = evaluate
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves((params, state)):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        self.job = {
            "model": "resnet20",
            "supernet": digest.hexdigest()[:16],
            "calibration": given.calibration,
            "images": given.images,
            "batch": given.batch,
        }

    def remembered(self, folder: Path | None, block: int, score: str) -> Remembered:
        """Scores of choices [any, N, 5], a file for all."""
        name = "measured" if score == "top-1" else f"measured-{score}"
        file = None if folder is None else open_job(folder / name, self.job, "measuring") / "choices.jsonl"

        def of(flat: np.ndarray) -> Any:
            found = self.evaluate(flat.reshape(-1, *self.domain.shape))
            return found["score"] if score == "top-1" else -found["loss"]

        return Remembered(of, file, block)


def splits(subnets: Subnets, scores: np.ndarray) -> list[Agreement]:
    """Agreement on the held-out fifth, for several ways to hold one out."""
    return [fit_predictor(subnets.encoded, scores, SETTINGS, seed=n).held for n in range(SPLITS)]


def halves(subnets: Subnets) -> Agreement:
    """How the scores on one half of the images agree with those on the other: what their number alone allows."""
    return agreement(subnets.also["first"], subnets.also["second"])


def searched(what: Measured, params: Any, budget: float, given: Any, known: Remembered) -> dict[str, Any]:
    """One budget: found by the predictor, and what it has to beat."""
    score = lambda c: predict(params, encode_choice(c, jnp.asarray(FORM)))  # noqa: E731
    how = Genetic(generations=given.generations)
    both = what.weights, what.inputs
    found = search_choice(score, what.domain, *both, budget, form=FORM, settings=how, baselines=True)
    genes, against = Genes(what.domain, FORM), found.baselines
    assert against is not None and against.random_choice is not None
    windows = genes.windows(*both, budget)
    run = lambda choices: known(np.asarray(choices).reshape(len(choices), -1))  # noqa: E731
    best, measured = best_as_run(found, run, score, *both, block=BEST)
    many = random_choices(0, genes, windows, found.evaluations)
    order = np.argsort(
        -np.concatenate([np.asarray(score(some)) for some in np.array_split(many, len(many) // 500 + 1)])
    )
    uniform = against.uniform_choice
    return {
        "budget": budget,
        "average": list(best.average),
        "evaluations": found.evaluations,
        "predicted": {"found": best.score, "random": against.random, "uniform": against.uniform},
        "measured": {
            "found": measured,
            "first by predictor": float(run(found.choice[None])[0]),
            "random by predictor": float(run(many[order[:BEST]]).max()),
            "random": float(run(random_choices(1, genes, windows, given.random)).max()),
            "uniform": None if uniform is None else float(run(uniform[None])[0]),
        },
        "uniform_bits": against.uniform_bits,
        "choice": best.choice.tolist(),
    }


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    parser.add_argument(
        "--supernet", type=Path, metavar="FOLDER", help="a trained supernet (default: as init makes it)"
    )
    parser.add_argument("--subnets", type=int, default=1000)
    parser.add_argument("--calibration", type=int, default=1000, metavar="N", help="images to recalibrate on")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="images to score on")
    parser.add_argument("--batch", type=int, default=50, help="images at a time, of both")
    parser.add_argument("--block", type=int, default=8, help="subnets in one call of the compiled program")
    parser.add_argument("--budgets", type=float, nargs="+", default=[3.0, 3.5, 4.0, 5.0])
    parser.add_argument("--generations", type=int, default=500)
    parser.add_argument("--random", type=int, default=16, help="random choices that are measured for each budget")
    parser.add_argument("--score", choices=["cross-entropy", "top-1"], default="cross-entropy", help="of searches")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="where measurements are kept")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    what = Measured(given)
    begun = time.perf_counter()

    def told(done: int, total: int, said: str) -> None:
        print(f"{done} of {total}: {said}; {what.seconds[-1]:.2f} s each", flush=True)

    both = what.weights, what.inputs
    kept = None if given.resume is None else given.resume / "subnets"
    subnets = collect_subnets(
        what.evaluate, what.domain, *both, given.subnets, block=given.block, resume=kept, job=what.job, progress=told
    )
    collected = time.perf_counter() - begun
    values = {"cross-entropy": -subnets.also["loss"], "top-1": subnets.scores}
    fitted = fit_predictor(subnets.encoded, values[given.score], SETTINGS)
    held, noise = {name: splits(subnets, of) for name, of in values.items()}, halves(subnets)
    both_scores = agreement(values["cross-entropy"], values["top-1"])
    known = what.remembered(given.resume, given.block, given.score)
    rows = [searched(what, fitted.params, budget, given, known) for budget in given.budgets]
    supernet = f"trained for {what.steps:,} steps" if what.steps else "not trained"
    record = {
        "supernet": supernet,
        "subnets": given.subnets,
        **what.job,
        "seconds": {
            "collecting": collected,
            "a subnet": min(what.seconds, default=None),
        },
        "score": given.score,
        "held": numbers(fitted.held),
        "bounds": BOUNDS,
        "splits": {name: [numbers(one) for one in each] for name, each in held.items()},
        "halves": numbers(noise),
        "top-1 and cross-entropy as measured": numbers(both_scores),
        "scores": {"least": float(subnets.scores.min()), "most": float(subnets.scores.max())},
        "searched": rows,
    }
    lines = [_line(f"{name}, predicted and measured, held out ({SPLITS} fifths)", each) for name, each in held.items()]
    lines.append(_line("top-1 and cross-entropy of a subnet, both measured", [both_scores]))
    lines.append(_line("top-1 on one half of the images and on the other", [noise]))
    text = (
        f"ResNet20, supernet {supernet}; {given.subnets:,} subnets, each recalibrated on {given.calibration:,} "
        f"training images of CIFAR-10 and scored on {given.images:,} others, top-1 from {subnets.scores.min():.3f} to "
        f"{subnets.scores.max():.3f}; {fitted.held.count} of them held out. Bounds: Pearson {BOUNDS['pearson']}, "
        f"Kendall {BOUNDS['kendall']}.\n\n"
    )
    text += measure.table(["agreement", "Pearson", "Spearman", "Kendall", "RMSE"], lines)
    text += f"\n\nSearches by {given.score}" + (
        ", in nats, lower is better:" if given.score == "cross-entropy" else ":"
    )
    sign = -1 if given.score == "cross-entropy" else 1
    shown = []
    for row in rows:
        measured, uniform = row["measured"], row["uniform_bits"]
        same = "" if uniform is None else f"{sign * measured['uniform']:.3f} ({uniform[0]}/{uniform[1]})"
        bits = " / ".join(f"{v:.2f}" for v in row["average"])
        found = f"{sign * measured['found']:.3f} ({sign * row['predicted']['found']:.3f})"
        random = [f"{sign * measured[k]:.3f}" for k in ("random by predictor", "random")]
        shown.append([f"{row['budget']:g}", bits, found, *random, same])
    text += "\n\n" + measure.table(
        ["budget, average bits", "found has", "found: measured (predicted)",
         f"{rows[0]['evaluations']:,} random, by the predictor", f"best of {given.random} random, measured",
         "bits everywhere"], shown,
    )  # fmt: skip
    measure.save("predictor" if what.steps else "predictor-untrained", record, text, given.out)


def numbers(found: Agreement) -> dict[str, float]:
    """For the record."""
    return {k: float(v) for k, v in vars(found).items()}


def _line(name: str, found: list[Agreement]) -> list[str]:
    """Least and most of each correlation."""
    out = [name]
    for field in ("pearson", "spearman", "kendall", "rmse"):
        values = [getattr(a, field) for a in found]
        out.append(f"{min(values):.3f}" + (f" to {max(values):.3f}" if len(values) > 1 else ""))
    return out


if __name__ == "__main__":
    main()
