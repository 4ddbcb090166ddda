"""EQ-Net's accuracy predictor on ResNet20: subnets of a supernet that is initialised and not trained, on CIFAR-10.

    python -m benchmarks.predictor [--data ../shared/data] [--subnets 200] [--images 160] [--resume DIR]

Weights and activations of 2 to 8 bits in all eight forms, first and last layer at 8; quantizers as `init` makes them
from 64 training images, batch-norm statistics of the float network. The score of a subnet is its top-1 agreement with
the float network on further training images. A fifth of the subnets is held out.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from benchmarks import measure
from benchmarks.static import ROOT
from qjax.search import CQAP, Genetic, collect_subnets, fit_predictor, over_population, predict, search_choice
from qjax.search.choices import draw_choices
from qjax.supernet import Space, encode_choice


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    parser.add_argument("--subnets", type=int, default=200)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--budget", type=float, default=3.5)
    parser.add_argument("--resume", type=Path)
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    folder = given.data / "models/resnet20-cifar10"
    fn, params, _ = qjax.models.load(folder)
    with np.load(given.data / "images/cifar10/calib-500.npz") as file:
        order = np.random.default_rng(0).permutation(len(file["images"]))
        pixels = jnp.asarray(qjax.models.image_processor(folder)(list(file["images"][order[: 64 + given.images]])))
    first, images = pixels[:64], pixels[64:]
    net = qjax.elastic(fn, Space())
    domain = net.domain(params, first)
    state = net.init(params, first)
    program = qjax.trace(fn, params, first[:1])
    sites = [program.site(name) for name in domain.sites]
    weights = [int(np.prod(site.weight_shape)) for site in sites]
    inputs = [int(np.prod(site.shapes[0])) for site in sites]
    float_labels = fn(params, images).argmax(-1)

    def agreed(choice, params, state, images, labels):
        return (net.apply(params, state, choice, images)[0].argmax(-1) == labels).mean()

    many = jax.jit(over_population(agreed))

    def evaluate(choices):
        return many(jnp.asarray(choices), params, state, images, float_labels)

    def told(done, total, what):
        print(f"{done} of {total}: {what}", flush=True)

    job = {"model": "resnet20", "images": given.images}
    begun = time.perf_counter()
    subnets = collect_subnets(
        evaluate, domain, weights, inputs, given.subnets, resume=given.resume, job=job, progress=told
    )
    seconds = time.perf_counter() - begun
    settings = CQAP(epochs=400, batch=64)
    fitted = fit_predictor(subnets.encoded, subnets.scores, settings)
    form = (True, True, True)
    score = lambda c: predict(fitted.params, encode_choice(c, jnp.asarray(form)))  # noqa: E731
    found = search_choice(score, domain, weights, inputs, given.budget, form=form, settings=Genetic(generations=100))
    below = int(np.floor(given.budget))
    drawn, forms = draw_choices(1, domain, weights, inputs, 4000)
    average = [(drawn[:, 1:-1, c] * np.array(s)[1:-1]).sum(1) / sum(s[1:-1]) for c, s in ((0, weights), (1, inputs))]
    fine = (forms == form).all(1) & np.all([(a > given.budget - 0.5) & (a <= given.budget) for a in average], axis=0)
    some = drawn[fine][:7]
    rows = np.stack([found.choice, *some])
    rows = np.concatenate([rows, np.repeat(domain.uniform(below, below, form)[None], 8 - len(rows), axis=0)])
    rows[-1] = domain.uniform(below, below, form)
    scores = np.asarray(evaluate(rows))
    record = {
        "subnets": given.subnets,
        "images": given.images,
        "seconds": seconds,
        "held": {k: float(v) for k, v in vars(fitted.held).items()},
        "scores": {"least": float(subnets.scores.min()), "most": float(subnets.scores.max())},
        "found": {"average": list(found.average), "predicted": found.score, "measured": float(scores[0])},
        "random": [float(v) for v in scores[1 : 1 + len(some)]],
        "uniform": {"bits": below, "measured": float(scores[-1])},
    }
    lines = [
        ["predictor on held-out subnets", str(fitted.held)],
        [
            f"searched, {found.average[0]:.2f} / {found.average[1]:.2f} bits",
            f"{scores[0]:.3f} ({found.score:.3f} predicted)",
        ],
        [f"best of {len(some)} random ones", f"{max(record['random'], default=float('nan')):.3f}"],
        [f"{below} bits everywhere", f"{scores[-1]:.3f}"],
    ]
    text = f"ResNet20, untrained supernet, {given.subnets} subnets, agreement with float on {given.images} images.\n\n"
    measure.save("predictor", record, text + measure.table(["what", "figure"], lines), given.out)


if __name__ == "__main__":
    main()
