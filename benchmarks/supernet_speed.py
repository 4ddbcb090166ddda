"""How fast a ResNet20 supernet evaluates subnets and trains, in one run on CPU.

    python -m benchmarks.supernet_speed [--data ../shared/data] [--population 8] [--images 32] [--batch 32]

Evaluations: random subnets (bits 2 to 8, all forms) give the logits of some images. One compiled program takes the
choice as data: a population in one call by lax.map, the same by vmap, and one call a subnet. Against it a program for
each choice, where the choice is a constant: traced, compiled and run once, as whoever has no traced choice would.

Training: EQ-Net's step (highest, random and lowest subnet, guidance, weight regularization, Adam) beside a float step
of the same batch, optimizer and batch norms. Three forwards and backwards take three float steps' time by nature.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qjax
from benchmarks import measure
from benchmarks.measure import interleaved, milliseconds
from benchmarks.static import ROOT
from qjax.search import over_population
from qjax.supernet import Fixed, Sandwich, Schedule, Space, make_step, sample_choice

SUBNETS = 3
BOUND = 1.2 * SUBNETS
"""The largest ratio of training steps that the project allows itself."""


def evaluations(model: Any, params: Any, images: Any, population: int, compiled: int, budget: float) -> dict[str, Any]:
    """Subnets a second, by how they are run."""
    t = qjax.elastic(model, Space())
    domain, state = t.domain(params, images), t.init(params, images)
    keys = iter(jax.random.split(jax.random.key(0), population + compiled))
    choices = jnp.stack([sample_choice(next(keys), domain) for _ in range(population)])

    def one(choice: Any, params: Any, state: Any, images: Any) -> Any:
        return t.apply(params, state, choice, images)[0]

    mapped = jax.jit(over_population(one))
    together = jax.jit(over_population(one, at_once=population))
    single = jax.jit(one)
    cases: dict[str, Callable[[], Any]] = {
        "one program, lax.map": lambda: mapped(choices, params, state, images),
        "one program, a call a subnet": lambda: [single(c, params, state, images) for c in choices],
        "one program, vmap": lambda: together(choices, params, state, images),
    }
    first, results = {}, {}
    for name, case in cases.items():
        begun = time.perf_counter()
        results[name] = np.asarray(jnp.stack(list(jax.block_until_ready(case()))))
        first[name] = time.perf_counter() - begun
    base = results["one program, lax.map"]
    scale = np.abs(base).max()
    for name, got in results.items():  # other sums, and now and then another code: a check of the wiring
        assert np.median(np.abs(got - base)) < 1e-3 * scale, name
    times = interleaved(cases, budget=budget)
    rows = [
        {"case": name, "first": first[name], "seconds": t.least / population, "per_second": population / t.least}
        for name, t in times.items()
    ]
    taken = []
    for key in keys:
        choice = sample_choice(key, domain)
        begun = time.perf_counter()
        jax.block_until_ready(jax.jit(lambda p, s, x, choice=choice: one(choice, p, s, x))(params, state, images))
        taken.append(time.perf_counter() - begun)
    rows.append({"case": "a program a choice", "first": taken[0], "seconds": min(taken), "per_second": 1 / min(taken)})
    best = max(r["per_second"] for r in rows)
    return {"rows": [{**r, "share": r["per_second"] / best} for r in rows]}


def training(model: Any, params: Any, images: Any, labels: Any, budget: float) -> dict[str, Any]:
    """A step of the supernet and of parts of it, over a float step."""
    fn = model.train_step_stats
    t = qjax.elastic(fn, Space())
    state = t.init(params, images)
    schedule = Schedule(1000)
    adam = optax.chain(optax.clip(schedule.clip), optax.adam(optax.cosine_decay_schedule(1e-3, 1000)))

    @jax.jit
    def float_step(params: Any, moments: Any) -> Any:
        def loss(p: Any) -> Any:
            logits, moved = fn(p, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), moved

        grads, moved = jax.grad(loss, has_aux=True)(params)
        updates, moments = adam.update(grads, moments, params)
        return optax.apply_updates(moved, updates), moments

    cases: dict[str, Callable[[], Any]] = {"float": functools.partial(float_step, params, adam.init(params))}
    optimizer = schedule.optimizer()
    moments = optimizer.init({"params": params, "state": state})
    for name, own in (
        ("highest, random, lowest", Schedule(1000, sampling=Sandwich())),
        ("the same without weight regularization", Schedule(1000, sampling=Sandwich(), wdr=0.0)),
        ("one subnet at 4 bits, without it", Schedule(1000, sampling=Fixed(4), wdr=0.0)),
    ):
        step = jax.jit(make_step(t, own, optimizer))
        cases[name] = functools.partial(step, params, state, moments, 0, (images,), labels)
    first = {}
    for name, case in cases.items():
        begun = time.perf_counter()
        jax.block_until_ready(case())
        first[name] = time.perf_counter() - begun
    times = interleaved(cases, budget=budget)
    base = times["float"]
    return {
        "rows": [
            {
                "case": name,
                "first": first[name],
                "seconds": t.least,
                "over_float": t.over(base),
                "least_over_float": t.least_over(base),
                "bound": BOUND if name == "highest, random, lowest" else None,
            }
            for name, t in times.items()
        ]
    }


def main() -> None:
    """Run, print, save."""
    options = measure.parser(__doc__ or "")
    options.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    options.add_argument("--population", type=int, default=8)
    options.add_argument("--images", type=int, default=32, help="that a subnet is evaluated on")
    options.add_argument("--batch", type=int, default=32, help="of a training step")
    options.add_argument("--compiled", type=int, default=3, help="choices with a program of their own")
    options.add_argument("--budget", type=float, default=60.0, help="seconds for each of the two tables")
    given = options.parse_args()
    if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "0") not in ("", "0"):
        raise SystemExit("JAX_DISABLE_MOST_OPTIMIZATIONS is set; unset it, speeds of such programs say nothing")
    jax.config.update("jax_platforms", "cpu")
    folder = given.data / "models/resnet20-cifar10"
    model, params, _ = qjax.models.load(folder)
    with np.load(given.data / "images/cifar10/calib-500.npz") as file:
        count = max(given.images, given.batch)
        pixels = jnp.asarray(qjax.models.image_processor(folder)(list(file["images"][:count])))
        labels = jnp.asarray(file["labels"][:count], jnp.int32)
    found = evaluations(model, params, pixels[: given.images], given.population, given.compiled, given.budget)
    steps = training(model, params, pixels[: given.batch], labels[: given.batch], given.budget)
    text = f"ResNet20: subnets evaluated on {given.images} images, a population of {given.population}.\n\n"
    text += measure.table(
        ["case", "subnets/s", "ms", "of the fastest", "first call s"],
        [
            [r["case"], f"{r['per_second']:.3g}", milliseconds(r["seconds"]), f"{r['share']:.3f}", f"{r['first']:.1f}"]
            for r in found["rows"]
        ],
    )
    text += f"\n\nA training step on {given.batch} images; ratios: medians within a round, then minima.\n\n"
    text += measure.table(
        ["case", "ms", "over float", "minima", "at most", "first call s"],
        [
            [
                r["case"],
                milliseconds(r["seconds"]),
                f"{r['over_float']:.2f}",
                f"{r['least_over_float']:.2f}",
                f"{r['bound']:.1f}" if r["bound"] else "",
                f"{r['first']:.1f}",
            ]
            for r in steps["rows"]
        ],
    )
    settings = {name: getattr(given, name) for name in ("population", "images", "batch", "compiled")}
    measure.save("supernet_speed", {**settings, "evaluations": found, "training": steps}, text, given.out)


if __name__ == "__main__":
    main()
