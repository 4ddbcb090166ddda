"""``qjax search --supernet``: the subnet of a trained supernet within a budget, run or predicted."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax import evaluate, models
from qjax.cli.calibrating import draw
from qjax.cli.output import counting, listed, print_json, print_rich, say, table, waiting
from qjax.cli.scoring import check_data
from qjax.errors import DataError, ModelError, SearchError
from qjax.folders import Loaded, is_saved, load_float, save_folder
from qjax.search import (
    NSGA2,
    Budget,
    Found,
    Genes,
    Genetic,
    SubnetFront,
    best_as_run,
    budget_windows,
    choice_front,
    collect_subnets,
    compare_baselines,
    draw_valid,
    fit_predictor,
    over_population,
    plot_subnets,
    predict,
    search_choice,
    site_costs,
    uniform_choices,
)
from qjax.search.choices import HEADS, in_blocks
from qjax.search.genes import FORMS
from qjax.search.windows import CHUNK, IDLE, Windows, none_within
from qjax.supernet import Domain, Supernet, load_trained, recalibrate
from qjax.supernet import sizes as job_sizes

BATCH = 50
"""Images at a time."""
BLOCK = 8
"""Subnets in one call of the compiled program."""
PACKED = "packed"
"""The folder of the packed subnet, in the folder that is written."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A supernet and what its subnets are scored on.

    Attributes:
        t: the supernet in its form for inference. params, state: trained. example: arguments of one example.
        one: ``one(choice, *shared) -> score``. shared: what it takes besides. said: what the score is.
        own: choice -> the parameters that a subnet runs with, its batch norms recalibrated.
        what: a description for the folders, JSON-able.
    """

    t: Supernet
    params: Any
    state: Any
    example: tuple[Any, ...]
    one: Callable[..., Any]
    shared: tuple[Any, ...]
    own: Callable[[Any], Any]
    said: str
    what: dict[str, Any]

    @property
    def domain(self) -> Domain:
        """Its choices."""
        return self.t.domain(self.params, *self.example)


def run(args: argparse.Namespace) -> None:
    """Search, and write the choice and its recipe."""
    start = time.monotonic()
    budgets = [Budget.of(part) for part in listed([args.budget])]
    if any(b.kind in ("seconds", "joules") for b in budgets) and not args.device:
        raise SearchError(f"a budget of {args.budget} needs --device, such as --device h200")
    if args.text is None and args.images is None:
        raise DataError("search needs data: give --text FILE for a language model or --images DIR for a classifier")
    if is_saved(args.folder):
        raise ModelError(f"{args.folder} is quantized already; give the folder of the float model")
    out = args.out or Path(f"{args.folder.resolve().name}-subnet")
    with waiting("reading weights"):
        loaded = load_float(args.folder)
        check_data(loaded, args)
        job = (_of_text if loaded.reads_text else _of_images)(loaded, args)
    domain, form = job.domain, _form(args.form, job.domain)
    group = _group(args.group, domain)
    counted = job_sizes(job.t, job.params, *job.example)
    sizes = counted.weights, counted.inputs
    kinds = dict.fromkeys(b.kind for b in budgets if b.kind != "bits")
    more: dict[str, Any] = {"form": form, "group": group, "on": args.device, "rows": args.rows}
    costs = [site_costs(job.t, job.params, job.state, *job.example, kind=k, **more) for k in kinds]
    genes = Genes(domain, form, group=group)
    genes = dataclasses.replace(genes, paired=not all(genes.additive(c.table) for c in costs))
    windows = budget_windows(genes, *sizes, budgets, costs={c.kind: c for c in costs})
    if not len(draw_valid(args.seed, genes.allowed, windows, 1)):  # not after an hour of measuring
        raise SearchError(f"{args.budget}: {none_within(windows, genes.allowed, IDLE * 10 * CHUNK, args.seed)}")
    out.mkdir(parents=True, exist_ok=True)
    measured = jax.jit(over_population(job.one))
    run_block = lambda choices: measured(jnp.asarray(choices), *job.shared)  # noqa: E731
    settings: dict[str, Any] = {"form": form, "group": group, "seed": args.seed}
    held = None
    if args.predictor:
        with counting("measuring subnets") as progress:
            subnets = collect_subnets(
                run_block, domain, *sizes, args.predictor, form=form, block=BLOCK, seed=args.seed,
                resume=out / "subnets", job=job.what, progress=progress,
            )  # fmt: skip
        with counting("fitting the predictor") as progress:
            fitted = fit_predictor(subnets.encoded, subnets.scores, seed=args.seed, progress=progress)
        held, asked = fitted.held, jnp.asarray(form)
        scores = lambda c: predict(fitted.params, subnets.encode(c, asked))  # noqa: E731
        how, settings_front = Genetic(generations=args.generations or 500), NSGA2(64, args.generations or 100)
    else:
        size = max(8, args.population)
        how = Genetic(size, size // 4, size // 2, size // 2, args.generations or 5)
        settings_front = NSGA2(size + size % 2, args.generations or 5)
        settings |= {"block": BLOCK, "resume": out / "measured", "job": job.what}
        scores = run_block
    limit = budgets[0].amount if not args.predictor else None
    first = next((c for c in costs if c.kind == budgets[0].kind), None)
    with counting("front") as progress:
        said = _moved(progress, settings_front.generations, -1)
        front = choice_front(
            scores, domain, *sizes, first, most=limit, settings=settings_front, progress=said, **settings
        )
    uniform = np.array(list(uniform_choices(genes, windows).values()), np.int32).reshape(-1, *domain.shape)
    seeds = _within(front, uniform, genes, windows, how.population // 2)
    with counting("search") as progress:
        said = _moved(progress, how.generations, 0)
        found = search_choice(
            scores, domain, *sizes, budgets, costs=costs, settings=how, seeds=seeds, progress=said,
            baselines=args.predictor is not None, **settings,
        )  # fmt: skip
    if args.predictor:  # predictions are to be checked: the best few, and what they have to beat, are run
        found, score = best_as_run(found, run_block, scores, *sizes, costs, block=BLOCK, also=uniform)
        run = functools.partial(in_blocks, run_block, block=BLOCK)
        found = dataclasses.replace(found, baselines=compare_baselines(run, genes, windows, 2 * BLOCK, args.seed))
    else:
        score = found.score
    _write(out, job, found, front, score, budgets, args)
    with waiting("packing"):
        model = job.t.convert(job.own(found.choice), job.state, found.choice, *job.example)
        report = dataclasses.replace(model.report, model=loaded.name, recipe="subnet")
        save_folder(out / PACKED, args.folder, model, report)
    if args.json:
        seconds = round(time.monotonic() - start, 2)
        print_json({"model": loaded.name, **_as_dict(found, score, budgets, args), "out": str(out), "seconds": seconds})
    else:
        _show(loaded.name, job, found, front, score, held, out, args)


def _of_images(loaded: Loaded, args: argparse.Namespace) -> Job:
    """Top-1 on some images, batch norms recalibrated on others where the model has them."""
    data = evaluate.read_images(args.images)
    training: Any = getattr(loaded.fn, "train_step_stats", None)
    wanted = args.samples or 500
    apart = (500 if args.recalibrate is None else args.recalibrate) if training is not None else 0
    if wanted + apart > len(data):
        raise DataError(
            f"{args.images} has {len(data)} images; {wanted} to score on and {apart} to recalibrate on are asked for: "
            "give fewer with --samples and --recalibrate"
        )
    rows = np.random.default_rng(args.seed).permutation(len(data))[: wanted + apart]
    prepare = models.image_processor(loaded.folder)
    pixels = jnp.asarray(prepare(data.only(rows.tolist()).images))
    labels = jnp.asarray(data.labels[rows], jnp.int32)
    size = min(BATCH, wanted)
    filled = -wanted % size  # the last batch; no class is -1
    parts = np.arange(wanted + filled).reshape(-1, size) % wanted
    shown = pixels[apart:][parts]
    truth = jnp.where(jnp.arange(wanted + filled).reshape(-1, size) < wanted, labels[apart:][parts], -1)
    example = (pixels[:1],)
    fn: Callable[..., Any] = training if training is not None and apart else loaded.fn
    t, trained = load_trained(args.supernet, fn, loaded.params, shown[0])
    tested = qjax.elastic(loaded.fn, t.space)

    def one(choice: Any, params: Any, state: Any, others: Any, images: Any, labels: Any) -> Any:
        mine = recalibrate(t, params, state, choice, others) if apart else params

        def right(part: Any) -> Any:
            return (tested.apply(mine, state, choice, part[0])[0].argmax(-1) == part[1]).sum()

        return jax.lax.map(right, (images, labels)).sum() / wanted

    each = min(BATCH, apart)
    others = pixels[: apart // each * each].reshape(-1, each, *pixels.shape[1:]) if apart else jnp.zeros((0, 1))
    moved = jax.jit(lambda choice: recalibrate(t, trained.params, trained.state, choice, others))
    own = moved if apart else lambda choice: trained.params
    shared = (trained.params, trained.state, others, shown, truth)
    recalibrated = f", batch norms recalibrated on {len(others) * each} others" if apart else ""
    said = f"top-1 on {wanted} images{recalibrated}"
    what = _what(args, trained, wanted, apart)
    return Job(tested, trained.params, trained.state, example, one, shared, own, said, what)


def _of_text(loaded: Loaded, args: argparse.Namespace) -> Job:
    """Negative cross-entropy in nats a token."""
    args.calibration = args.text
    drawn = draw(loaded, args)
    say(drawn.said)
    tokens = [jnp.asarray(batch[0]) for batch in drawn.batches]
    t, trained = load_trained(args.supernet, loaded.fn, loaded.params, tokens[0])

    def one(choice: Any, params: Any, state: Any, tokens: Any) -> Any:
        total, count = jnp.zeros(()), 0
        for part in tokens:
            logits = jax.nn.log_softmax(t.apply(params, state, choice, part)[0][:, :-1])
            total += jnp.take_along_axis(logits, part[:, 1:, None], axis=-1).sum()
            count += part[:, 1:].size
        return total / count

    count = sum(part[:, 1:].size for part in tokens)
    said = f"negative cross-entropy in nats, {count:,} tokens"
    shared = (trained.params, trained.state, tokens)
    own, what = lambda choice: trained.params, _what(args, trained, count, 0)  # noqa: E731
    return Job(t, trained.params, trained.state, (tokens[0][:1],), one, shared, own, said, what)


def _what(args: argparse.Namespace, trained: Any, scored: int, apart: int) -> dict[str, Any]:
    data = args.text or args.images
    steps = len(next(iter(trained.metrics.values()), ()))
    return {
        "supernet": str(args.supernet.resolve()),
        "steps": steps,
        "data": str(data.resolve()),
        "scored on": scored,
        "recalibrated on": apart,
        "seed": args.seed,
    }


def _form(given: str | None, domain: Domain) -> tuple[bool, bool, bool]:
    """``channel/sym/asym`` as flags; None is the first form of per channel, symmetric, symmetric that the space has."""
    names = {"channel": (0, True), "tensor": (0, False)}
    there = [f for f in FORMS[::-1] if all(any(f[c] in row[2 + c] for row in domain.allowed) for c in range(3))]
    if given is None:
        return there[0]
    parts = given.split("/")
    if len(parts) != 3 or parts[0] not in names or any(p not in ("sym", "asym") for p in parts[1:]):
        raise SearchError(f"--form {given!r}; say channel/sym/sym: channel or tensor, then sym or asym of both")
    form = (parts[0] == "channel", parts[1] == "sym", parts[2] == "sym")
    if form not in there:
        raise SearchError(f"--form {given}: the supernet has {', '.join(map(form_name, there))}")
    return form


def _group(given: int | None, domain: Domain) -> int | None:
    """The length of all groups; None is the first that the space has, or none."""
    groups = domain.space.groups
    if given is not None and given not in groups:
        raise SearchError(f"--group {given}: the supernet has {', '.join(map(str, groups)) or 'no groups'}")
    return given


def form_name(form: tuple[bool, bool, bool]) -> str:
    """``channel/sym/asym``."""
    return "/".join(("channel" if form[0] else "tensor", *("sym" if s else "asym" for s in form[1:])))


def _moved(progress: Callable[[int, int, str], None], generations: int, at: int) -> Callable[[int, Any], None]:
    def moved(number: int, population: Any) -> None:
        values = np.asarray(population.values)[:, at]
        best = values[np.isfinite(values)]
        progress(number, generations, f"best score {-best.min():.4g}" if len(best) else "")

    return moved


def _within(front: SubnetFront, uniform: np.ndarray, genes: Genes, windows: Windows, most: int) -> np.ndarray | None:
    """Uniform bits, then the choices of the front, the best first: those that are within the windows."""
    points = sorted((p for curve in front.curves.values() for p in curve), key=lambda p: -p.score)
    choices = [*uniform, *(p.choice for p in points)]
    genomes = list(dict.fromkeys(tuple(genes.genomes(choice).tolist()) for choice in choices))
    fine = [g for g in genomes if windows.hold(np.array([g], np.int32))[0]]
    return np.asarray(genes.choice(np.array(fine[:most], np.int32))) if fine else None


def _as_dict(found: Found, score: float, budgets: list[Budget], args: argparse.Namespace) -> dict[str, Any]:
    against = found.baselines
    return {
        "supernet": str(args.supernet),
        "budget": [dataclasses.asdict(b) for b in budgets],
        "form": form_name(found.genes.form),
        "score": score,
        "predicted": found.score if args.predictor else None,
        "average_bits": list(found.average),
        "costs": dict(found.costs),
        "random": against.random if against else None,
        "uniform": against.uniform if against else None,
        "sites": list(found.genes.domain.sites),
        "choice": found.choice.tolist(),
    }


def _write(
    out: Path, job: Job, found: Found, front: SubnetFront, score: float, budgets: list[Budget], args: argparse.Namespace
) -> None:
    data = {**_as_dict(found, score, budgets, args), "scored": job.said}
    (out / "choice.json").write_text(json.dumps(data, indent=1) + "\n")
    recipe = job.t.recipe(job.params, job.state, found.choice, *job.example)
    (out / "recipe.toml").write_text(recipe.to_toml())
    curves = {
        name: [{"cost": p.cost, "score": p.score, "choice": p.choice.tolist()} for p in points]
        for name, points in front.curves.items()
    }
    (out / "front.json").write_text(json.dumps({"kind": front.kind, "curves": curves}) + "\n")
    what = ("predicted " if args.predictor else "") + job.said.partition(",")[0]
    plot_subnets(front, out / "front.svg", found, score_name=what)


def _show(
    name: str, job: Job, found: Found, front: SubnetFront, score: float, held: Any, out: Path, args: argparse.Namespace
) -> None:
    print(f"{name}: supernet {args.supernet}, budget {args.budget}, {form_name(found.genes.form)}")
    print(f"Score: {job.said}\n")
    print_rich(table(HEADS, found.rows(), left=(0, 3)))
    run, predicted = (" as run", f", {found.score:.4g} as predicted") if args.predictor else ("", "")
    print(f"\n{found.spent}: {score:.4g}{run}{predicted}, after {found.evaluations:,} scorings")
    if found.baselines:
        print("Compared with, as run:")
        print("\n".join(f"  {line}" for line in found.baselines.lines()))
        if found.baselines.random > score:
            print("  A random choice is better: the predictor errs by more than choices differ; measure more subnets.")
    if held is not None:
        print(f"Predictor on held-out subnets: {held}")
    print()
    print_rich(table(("cost", *front.curves), front.rows(8)))
    print(f"Saved in {out} ({out / 'front.svg'} shows other budgets).")
    data = f"--text {args.text}" if args.text else f"--images {args.images}"
    print(f"{out / PACKED} is the subnet, packed, with the supernet's weights. Next: qjax eval {out / PACKED} {data}")
    print("(choice.json is for Supernet.convert; recipe.toml gives its bits to other weights, without its training.)")
