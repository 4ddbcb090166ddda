"""Measured subnets for a predictor: drawn by number, so a job that was killed goes on to the same set."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qjax.checkpoint.lines import add_lines, read_lines
from qjax.checkpoint.parts import open_job
from qjax.errors import SearchError
from qjax.search.genes import FORMS, Genes
from qjax.search.whole import check_kept
from qjax.search.windows import tilted
from qjax.supernet import Domain, encode_choice


@dataclasses.dataclass(frozen=True)
class Subnets:
    """Subnets and their scores.

    Attributes:
        choices: int32 [n, N, 5 or 6].
        forms: bool [n, 3].
        scores: float64 [n].
        also: what else was measured of each, by name, float64 [n].
        groups: how many groups the space has.
        ends: whether the first and the last site have bits to choose, and are encoded.
    """

    choices: np.ndarray
    forms: np.ndarray
    scores: np.ndarray
    also: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    groups: int = 0
    ends: bool = False

    def __repr__(self) -> str:
        more = "".join(f", {name}" for name in self.also)
        low, high = (f(self.scores, initial=e) for f, e in ((np.min, np.inf), (np.max, -np.inf)))
        return f"Subnets({len(self.scores)} of {self.choices.shape[1]} sites, score {low:.4g} to {high:.4g}{more})"

    @property
    def encoded(self) -> np.ndarray:
        """What a predictor reads: float32 [n, 6 + (14 + groups) N]."""
        return np.asarray(self.encode(self.choices, self.forms))

    def encode(self, choices: Any, forms: Any) -> Any:
        """The same of other choices int [..., N, 5 or 6] of forms [..., 3], as what is predicted is to be."""
        return encode_choice(choices, forms, self.groups, ends=self.ends)


def draw_choices(
    seed: int,
    domain: Domain,
    weights: Sequence[float],
    inputs: Sequence[float],
    count: int,
    first: int = 0,
    form: tuple[bool, bool, bool] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Subnets to train a predictor on, spread over forms and average bits.

    The i-th has form i modulo 8 of those that the domain has at some site; its average bits, of weights and of
    activations, are drawn evenly from all but the outer 7 % of what can be reached (2.4 to 7.6 of 2 to 8, as in
    EQ-Net), and its layers under the most random distribution of this average (`qjax.search.windows`). In a space with
    groups all its sites have one of them, in turn. It depends on seed and i alone.

    Args:
        seed: of the draws.
        domain: of the supernet.
        weights, inputs: as for `Genes.windows`.
        count: how many.
        first: i of the first one.
        form: of all of them, in place of every form in turn.

    Returns:
        int32 [count, N, 5 or 6] and their forms, bool [count, 3].
    """
    forms = [f for f in FORMS if all(any(f[c] in row[2 + c] for row in domain.allowed) for c in range(3))]
    if form is not None and tuple(form) not in forms:
        raise SearchError(f"form={form}: the domain has {', '.join(map(str, forms))}")
    forms = [f for f in forms if form is None or f == tuple(form)]
    numbers = np.arange(first, first + count)
    choices, kept = np.zeros((count, *domain.shape), np.int32), np.zeros((count, 3), bool)
    kinds = list(itertools.product(domain.space.groups or (None,), forms))
    for position, (group, form) in enumerate(kinds):
        mine = np.flatnonzero(numbers % len(kinds) == position)
        if not len(mine):
            continue
        genes = Genes(domain, form, group=group)
        windows, mask = genes.windows(weights, inputs, 100.0, 1000.0), genes.allowed
        least = np.where(mask, windows.costs, np.inf).min(axis=-1).sum(axis=-1)
        most = np.where(mask, windows.costs, -np.inf).max(axis=-1).sum(axis=-1)
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
        genomes = np.zeros((len(mine), len(mask)), np.int32)
        for row, n in enumerate(numbers[mine]):
            rng = np.random.default_rng([seed, n])
            share = rng.uniform(1 / 15, 14 / 15, len(least))
            chances = tilted(windows, mask, least + share * (most - least)).cumsum(axis=1)
            genome = (rng.random((len(mask), 1)) >= chances / chances[:, -1:]).sum(axis=1)
            genomes[row] = np.minimum(genome, last)
        choices[mine], kept[mine] = np.asarray(genes.choice(genomes)), form
    return choices, kept


def collect_subnets(
    evaluate: Callable[[np.ndarray], Any],
    domain: Domain,
    weights: Sequence[float],
    inputs: Sequence[float],
    count: int,
    *,
    form: tuple[bool, bool, bool] | None = None,
    block: int = 8,
    seed: int = 0,
    resume: str | Path | None = None,
    job: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Subnets:
    """Draw subnets and measure them.

    Args:
        evaluate: choices int32 [block, N, 5 or 6] -> scores [block], such as accuracies after recalibration; always
            with as many choices, so that it compiles once. `over_population` spreads it over a mesh. A mapping of
            such arrays by name has its "score", and the others are kept beside it.
        domain: of the supernet.
        weights, inputs: as for `qjax.search.Genes.windows`.
        count: how many subnets.
        form: of all of them, if the search is to be in one; None has every form of the domain in turn, an eighth of the
            subnets each where there are all.
        block: how many are measured at a time.
        seed: of the draws (`draw_choices`).
        resume: a folder; what was measured there is not measured again, and ``count`` may grow.
        job: what is measured, JSON-able: a folder of something else is refused. None tells it by the scores: a block of
            the kept ones is measured again.
        progress: called as ``progress(done, total, what)`` after each block.

    Raises:
        SearchError: a score that is no number; the message names the subnet.
        CheckpointError: ``resume`` holds another job.
    """
    if min(count, block) < 1:
        raise SearchError(f"count={count}, block={block}; positive whole numbers are needed")
    known: dict[int, dict[str, float]] = {}
    file = None
    if resume is not None:
        space = {"space": domain.space.to_dict(), "sites": list(domain.sites), "seed": seed}
        sizes = {"weights": [float(v) for v in weights], "inputs": [float(v) for v in inputs]}
        sizes |= {} if form is None else {"form": list(form)}
        file = open_job(resume, {**space, **sizes, "job": dict(job or {})}, "collection") / "subnets.jsonl"
        known = _read(file)
    choices, forms = draw_choices(seed, domain, weights, inputs, count, form=form)
    missing = [n for n in range(count) if n not in known]
    if file is not None and job is None and (there := [n for n in range(count) if n in known][:block]):
        again = evaluate(choices[there + [there[-1]] * (block - len(there))])
        again = again["score"] if isinstance(again, Mapping) else again
        check_kept(file.parent, [known[n]["score"] for n in there], np.asarray(again)[: len(there)])
    for at in range(0, len(missing), block):
        some = missing[at : at + block]
        full = some + [some[-1]] * (block - len(some))
        found = evaluate(choices[full])
        columns = dict(found) if isinstance(found, Mapping) else {"score": found}
        values = {name: np.asarray(column, np.float64)[: len(some)].tolist() for name, column in columns.items()}
        for row, n in enumerate(some):
            score = values["score"][row]
            if not np.isfinite(score):
                raise SearchError(f"subnet {n} has the score {score}; its choice is {choices[n].tolist()}")
            known[n] = {name: column[row] for name, column in values.items()}
        if file is not None:
            add_lines(file, [{"subnet": n, **known[n]} for n in some])
        if progress:
            progress(count - len(missing) + at + len(some), count, f"score {np.mean(values['score']):.3f}")
    names = [name for name in known[0] if name != "score" and all(name in known[n] for n in range(count))]
    columns = {name: np.array([known[n][name] for n in range(count)]) for name in ("score", *names)}
    return Subnets(choices, forms, columns.pop("score"), columns, len(domain.space.groups), domain.free_ends)


def _read(file: Path) -> dict[int, dict[str, float]]:
    """What is known."""
    out: dict[int, dict[str, float]] = {}
    for row in read_lines(file):
        try:
            values = {name: float(value) for name, value in row.items() if name != "subnet"}
            out[int(row["subnet"])] = {"score": values.pop("score"), **values}
        except (ValueError, KeyError, TypeError):
            continue
    return out
