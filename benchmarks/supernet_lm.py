"""A supernet of a language model: weights of 2 to 8 bits in groups, trained towards the float model, then searched.

    python -m benchmarks.supernet_lm --work DIR [--data ../shared/data] [--steps 200] [--budget 3.25]

The language model that comes with the repository, its layers scanned; activations stay float, the embedding and the
head too, which are one matrix. Weights are symmetric with 2 to 8 bits in groups of 64 or 128, and a choice costs
``bits + 32 / length`` a weight, its float32 scale included, so 3.25 is what 3 bits everywhere cost in groups of 128.

- The supernet starts from the float weights and `init`'s steps, and is trained with EQ-Net's losses, of which the float
  model is the first teacher; no label enters (``--lam 1``).
- ``sensitivity``: the exact assignment within the budget by second-order sensitivities of the float model
  (`qjax.search.sensitivities`, `assign`), over the same formats.
- ``searched``: EQ-Net's genetic search over the trained supernet's choices within the budget, by KL divergence to the
  float model on training text, begun at the sensitivity assignment and uniform bits; ``--random N`` compares it with
  the best of N random choices within the budget.

All are scored on validation text that neither training nor search sees. Every stage is kept in DIR; a command that was
killed goes on, one with more ``--generations`` goes on searching, and the table is written anew after each stage. For
another budget, a copy of DIR without ``job`` and ``search`` saves the training.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
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
from benchmarks.static import ROOT
from qjax.checkpoint.parts import load_part, open_job, save_part
from qjax.cli.searching import space as presets
from qjax.evaluate import text_blocks
from qjax.formats import is_quantized
from qjax.search import Genetic, Windows, assign, evolve_best, sensitivities
from qjax.search.windows import tilted
from qjax.supernet import Schedule, Space, train

BITS, GROUPS = tuple(range(2, 9)), (64, 128)
PAIRS = tuple((bits, group) for bits in BITS for group in GROUPS)
"""What a gene stands for, by increasing bits."""
COSTS = np.array([bits + 32 / group for bits, group in PAIRS])
LENGTH, AT_ONCE, SCORED = 256, 2, 2
"""Tokens of a block, blocks of an evaluation, evaluations of a search's score."""
BUDGET = 3.25
SETTINGS = ("steps", "batch", "length", "rate", "lam", "wdr", "budget", "population", "blocks")
"""What a job's folder is for."""


@dataclasses.dataclass
class Bench:
    """What the stages share."""

    given: Any
    work: Path

    def __post_init__(self) -> None:
        folder = ROOT / "examples/assets/books-6m"
        self.fn, self.params, _ = qjax.models.load(folder, scan_layers=True)
        tokenizer = qjax.models.tokenizer(folder)
        with gzip.open(self.given.data / "text/books/train.txt.gz", "rt") as file:
            self.ids = np.asarray(tokenizer.encode(file.read()[:600_000], special=False), np.int32)
        self.bos = tokenizer.bos_id
        text = (self.given.data / "text/books/valid.txt").read_text()[:40_000]
        rows = [r for r in text_blocks(tokenizer, text, protocol="B", context=LENGTH).blocks if len(r) == LENGTH]
        rows = rows[: min(self.given.blocks, len(rows)) // AT_ONCE * AT_ONCE]
        self.test = np.asarray(rows, np.int32).reshape(-1, AT_ONCE, LENGTH)
        # the last tokens that were read are what the search scores on; training draws from those before them
        held = self.ids[-SCORED * AT_ONCE * (LENGTH - 1) :].reshape(SCORED, AT_ONCE, LENGTH - 1)
        self.ids = self.ids[: -held.size]
        self.held = np.concatenate([np.full((SCORED, AT_ONCE, 1), self.bos, np.int32), held], axis=-1)
        self.t = qjax.elastic(self.fn, Space(BITS, (0,), (True,), (True,), groups=GROUPS, ends=None))
        self.domain = self.t.domain(self.params, self.test[0])
        sites = qjax.trace(self.fn, self.params, self.test[0]).by_name
        self.sizes = np.array([np.prod(sites[name].weight_shape or ()) for name in self.domain.sites], np.float64)
        self.float_logits = jax.jit(self.fn)
        self.compared = jax.jit(self._compared)
        self.reference: dict[bytes, Any] = {}
        self.known: dict[tuple[int, ...], float] = {}

    def batches(self, step: int) -> Any:
        """As `train` takes them: rows of training text, and the tokens that follow."""
        rng, (rows, length) = np.random.default_rng([1, step]), (self.given.batch, self.given.length)
        starts = rng.integers(0, len(self.ids) - length, rows)
        words = np.stack([self.ids[s : s + length] for s in starts])
        return (np.concatenate([np.full((rows, 1), self.bos, np.int32), words[:, :-1]], axis=1),), words

    def first_state(self) -> Any:
        """Steps before training."""
        shapes = jax.eval_shape(lambda p: self.t.init(p, self.test[0], sample=1), self.params)
        found = load_part(self.work / "init")
        if found is None:
            state = self.t.init(self.params, self.held[0])
            save_part(self.work / "init", {str(n): np.asarray(a) for n, a in enumerate(jax.tree.leaves(state))}, {})
            found = load_part(self.work / "init")
            assert found is not None
        leaves = [jnp.asarray(found[0][str(n)]) for n in range(len(found[0]))]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    def trained(self, state: Any) -> Any:
        """The trained supernet."""
        begun = time.perf_counter()

        def told(done: int, total: int, metrics: Mapping[str, float]) -> None:
            if done % 10 == 0 or done == total:
                shown = " ".join(f"{k} {v:.4f}" for k, v in metrics.items())
                print(f"training {done}/{total} {shown} ({time.perf_counter() - begun:.0f} s)", flush=True)

        given = self.given
        schedule = Schedule(
            given.steps, lam=given.lam, wdr=given.wdr, learning_rate=given.rate, steps_rate=given.rate / 3
        )
        teacher = functools.partial(self.float_logits, self.params)
        return train(self.t, self.params, state, self.batches, schedule, folder=self.work / "training", save_every=10,
                     progress=told, teacher=teacher)  # fmt: skip

    def sensitivity(self) -> np.ndarray:
        """Genome of the assignment by sensitivities, within the budget."""
        choices = {}
        for group in GROUPS:
            choices |= {f"{name}/{group}": r for name, r in presets(f"{BITS[0]}-{BITS[-1]}/{group}").items()}
        found = sensitivities(self.fn, self.params, [(rows,) for rows in self.held], choices, by="fisher",
                              resume=self.work / "sensitivities")  # fmt: skip
        best = assign(found, f"{self.given.budget} bits", by="fisher").choices
        names = [f"int{bits}/{group}" for bits, group in PAIRS]
        most = len(names) - 1  # float, which is a choice too, costs more than any
        return np.array([names.index(best[s]) if best[s] in names else most for s in self.domain.sites], np.int32)

    def choice(self, genome: Any) -> np.ndarray:
        """The choice of a genome, for `apply` and `convert`."""
        choice = self.domain.uniform(8)
        pairs = np.array(PAIRS)[np.asarray(genome)]
        choice[:, 0] = pairs[:, 0]
        choice[:, 5] = [GROUPS.index(g) for g in pairs[:, 1]]
        return choice

    def cost(self, genome: Any) -> float:
        """Stored bits a weight."""
        return float((COSTS[np.asarray(genome)] * self.sizes).sum() / self.sizes.sum())

    def _compared(self, params: Any, state: Any, choice: Any, tokens: Any, reference: Any) -> Any:
        """Sums over a batch: KL to the float model, equal first choices, negative log-likelihood of both."""
        out, _ = self.t.apply(params, state, choice, tokens)
        a, b = (jax.nn.log_softmax(x[:, :-1].astype(jnp.float32)) for x in (reference, out))
        targets = jnp.asarray(tokens)[:, 1:, None]
        nll = [-jnp.take_along_axis(x, targets, axis=-1).sum() for x in (a, b)]
        same = (a.argmax(-1) == b.argmax(-1)).sum()
        return jnp.stack([jnp.sum(jnp.exp(a) * (a - b)), same.astype(jnp.float32), *nll])

    def score(self, params: Any, state: Any, genome: Any, batches: np.ndarray) -> dict[str, float]:
        """KL in nats a prediction, agreement of first choices, perplexity of the float model and of the subnet."""
        total, count = np.zeros(4), 0
        choice = jnp.asarray(self.choice(genome))
        for rows in batches:
            key = rows.tobytes()
            if key not in self.reference:
                self.reference[key] = self.float_logits(self.params, rows)
            total += np.asarray(self.compared(params, state, choice, rows, self.reference[key]), np.float64)
            count += rows[:, 1:].size
        kl, same, *nll = (total / count).tolist()
        return {"kl": kl, "agreement": same, "float": float(np.exp(nll[0])), "perplexity": float(np.exp(nll[1]))}

    def windows(self) -> Windows:
        """Costs up to the budget."""
        table = self.sizes[None, :, None] * COSTS / self.sizes.sum()
        return Windows(table, np.array([self.given.budget - 0.5]), np.array([self.given.budget]), ("bits",))

    def kls(self, done: Any, genomes: Any) -> np.ndarray:
        """KL of choices on the text that is searched on; each is evaluated once."""
        for genome in np.asarray(genomes):
            if tuple(genome.tolist()) not in self.known:
                self.known[tuple(genome.tolist())] = self.score(done.params, done.state, genome, self.held)["kl"]
        return np.array([self.known[tuple(g.tolist())] for g in np.asarray(genomes)], np.float32)

    def searched(self, done: Any, seeds: np.ndarray) -> tuple[np.ndarray, int]:
        """The best genome that the search finds, and how many choices it looked at."""
        size, generations = self.given.population, self.given.generations
        settings = Genetic(size, max(size // 3, 2), size // 2, size // 2, generations)
        told = lambda n, p: print(f"generation {n}: KL {float(p.values[0, 0]):.5f}", flush=True)  # noqa: E731
        allowed = np.ones((len(self.sizes), len(PAIRS)), bool)
        job = {"steps": self.given.steps, "scored": SCORED * AT_ONCE}
        found = evolve_best(lambda g: jnp.asarray(-self.kls(done, g)), allowed, self.windows(), settings, seeds=seeds,
                            compiled=False, job=job, progress=told, resume=self.work / "search")  # fmt: skip
        return np.asarray(found.genomes[0]), size + 2 * (size // 2) * generations

    def best_of_random(self, done: Any, count: int) -> np.ndarray:
        """The best of random choices within the budget, drawn near it."""
        windows, rng, drawn = self.windows(), np.random.default_rng(0), []
        chances = tilted(windows, np.ones((len(self.sizes), len(PAIRS)), bool))
        while len(drawn) < count:
            genome = np.array([rng.choice(len(p), p=p) for p in chances], np.int32)
            if windows.hold(genome[None])[0]:
                drawn.append(genome)
        return drawn[int(self.kls(done, np.stack(drawn)).argmin())]

    def row(self, name: str, params: Any, state: Any, genome: np.ndarray) -> dict[str, Any]:
        """Scores of a subnet on the validation text, and on what the search sees."""
        key = self.work / "tests" / name.replace(" ", "-").replace(",", "")
        found = load_part(key)
        if found is None or not np.array_equal(found[0]["genome"], genome):
            scores = self.score(params, state, genome, self.test)
            said = {"row": name, "bits": self.cost(genome), **scores}
            said["kl_searched"] = self.score(params, state, genome, self.held)["kl"]
            save_part(key, {"genome": np.asarray(genome, np.int32)}, said)
            print(said, flush=True)
            found = load_part(key)
            assert found is not None
        return found[1]

    def packed(self, done: Any, genome: np.ndarray) -> dict[str, float]:
        """The converted model of a subnet beside the supernet: the largest difference of logits, bytes, its scores."""
        rows = self.test[0]
        model = self.t.convert(done.params, done.state, self.choice(genome), rows)
        run = jax.jit(lambda p, c, x: self.t.apply(p, done.state, c, x)[0])
        ours = run(done.params, jnp.asarray(self.choice(genome)), rows)
        theirs = model(model.params, rows)
        reference = self.float_logits(self.params, rows)
        kl = [qjax.evaluate.logit_divergence(reference, x).kl for x in (ours, theirs)]
        weights = [a for a in jax.tree.leaves(model.params, is_leaf=is_quantized) if is_quantized(a)]
        return {
            "largest_logit": float(jnp.abs(ours).max()),
            "largest_difference": float(jnp.abs(ours - theirs).max()),
            "kl_supernet": kl[0],
            "kl_packed": kl[1],
            "bytes": int(sum(w.nbytes for w in weights)),
        }


def written(bench: Bench, rows: list[dict[str, Any]], more: Mapping[str, Any]) -> None:
    """The table of what is there."""
    given = bench.given
    tokens = given.steps * given.batch * given.length
    text = (
        f"books-6m, {len(bench.sizes)} scanned products, weights of 2 to 8 bits in groups of 64 or 128; {given.steps} "
        f"steps of three subnets on {given.batch} x {given.length} tokens ({tokens:,} tokens), taught by the float "
        f"model. Perplexity and KL to float (nats) on {bench.test.size // LENGTH} blocks of {LENGTH} tokens of "
        f"validation text; the float model has {rows[0]['float']:.3f}. Bits a weight with scales; the budget is "
        f"{given.budget:g}.\n\n"
    )
    text += measure.table(
        ["choice", "bits", "KL", "agreement", "perplexity", "KL, text searched on"],
        [[r["row"], f"{r['bits']:.3f}", f"{r['kl']:.5f}", f"{100 * r['agreement']:.1f} %", f"{r['perplexity']:.3f}",
          f"{r['kl_searched']:.5f}"] for r in rows],
    )  # fmt: skip
    if "evaluations" in more:
        text += f"\n\nThe search looked at {more['evaluations']} choices."
    if "packed" in more:
        packed = more["packed"]
        text += (
            f" The searched choice packed: {packed['bytes']:,} bytes; on one batch its KL is "
            f"{packed['kl_packed']:.6f}, the supernet's {packed['kl_supernet']:.6f}, and logits of up to "
            f"{packed['largest_logit']:.1f} differ by at most {packed['largest_difference']:.1e}."
        )
    settings = {name: getattr(given, name) for name in (*SETTINGS, "generations")}
    name = "supernet_lm" if given.budget == BUDGET else f"supernet_lm_{given.budget:g}"
    measure.save(name, {"settings": settings, "rows": rows, **more}, text, given.out)


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row of a training batch")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of Adam, to 0 by a cosine")
    parser.add_argument("--lam", type=float, default=1.0, help="share of the teacher; the rest is the labels'")
    parser.add_argument("--wdr", type=float, default=1.0)
    parser.add_argument("--budget", type=float, default=BUDGET, help="stored bits a weight, scales included")
    parser.add_argument("--population", type=int, default=24)
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument("--random", type=int, default=0, help="random choices within the budget to compare with")
    parser.add_argument("--blocks", type=int, default=32, help="blocks of 256 tokens of validation text")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    work = open_job(given.work, {name: getattr(given, name) for name in SETTINGS}, "supernet of a language model")
    bench = Bench(given, work)
    state = bench.first_state()
    by_sensitivity = bench.sensitivity()
    uniform = {bits: np.full(len(bench.sizes), PAIRS.index((bits, 128)), np.int32) for bits in (2, 3, 4)}
    cases = {**{f"{bits} bits": genome for bits, genome in uniform.items()}, "sensitivity": by_sensitivity}
    rows = [bench.row(f"{name}, before", bench.params, state, genome) for name, genome in cases.items()]
    done = bench.trained(state)
    rows += [bench.row(f"{name}, after", done.params, done.state, genome) for name, genome in cases.items()]
    written(bench, rows, {})
    seeds = np.stack([g for g in cases.values() if bench.windows().hold(g[None])[0]])
    best, count = bench.searched(done, seeds)
    if given.random:
        random = bench.best_of_random(done, given.random)
        rows.append(bench.row(f"best of {given.random} random, after", done.params, done.state, random))
    rows.append(bench.row("searched, after", done.params, done.state, best))
    more: dict[str, Any] = {"evaluations": count, "choice": best.tolist()}
    written(bench, rows, more)
    written(bench, rows, {**more, "packed": bench.packed(done, best)})


if __name__ == "__main__":
    main()
