"""Measured subnets for a predictor: drawn by number, so a job that was killed goes on to the same set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qjax.checkpoint.parts import open_job
from qjax.errors import SearchError
from qjax.search.choices import draw_choices
from qjax.supernet import Domain, encode_choice


@dataclasses.dataclass(frozen=True)
class Subnets:
    """Subnets and their scores.

    Attributes:
        choices: int32 [n, N, 5 or 6].
        forms: bool [n, 3].
        scores: float64 [n].
    """

    choices: np.ndarray
    forms: np.ndarray
    scores: np.ndarray

    @property
    def encoded(self) -> np.ndarray:
        """What a predictor reads: float32 [n, 6 + 14 N]."""
        return np.asarray(encode_choice(self.choices, self.forms))


def collect_subnets(
    evaluate: Callable[[np.ndarray], Any],
    domain: Domain,
    weights: Sequence[float],
    inputs: Sequence[float],
    count: int,
    *,
    block: int = 8,
    seed: int = 0,
    resume: str | Path | None = None,
    job: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Subnets:
    """Draw subnets and measure them.

    Args:
        evaluate: choices int32 [block, N, 5 or 6] -> scores [block], such as accuracies after recalibration; always
            with as many choices, so that it compiles once. `over_population` spreads it over a mesh.
        domain: of the supernet.
        weights, inputs: as for `qjax.search.Genes.windows`.
        count: how many subnets.
        block: how many are measured at a time.
        seed: of the draws (`draw_choices`).
        resume: a folder; what was measured there is not measured again, and ``count`` may grow.
        job: what is measured, JSON-able: a folder of something else is refused.
        progress: called as ``progress(done, total, what)`` after each block.

    Raises:
        SearchError: a score that is no number; the message names the subnet.
        CheckpointError: ``resume`` holds another job.
    """
    if min(count, block) < 1:
        raise SearchError(f"count={count}, block={block}; positive whole numbers are needed")
    known: dict[int, float] = {}
    file = None
    if resume is not None:
        space = {"space": domain.space.to_dict(), "sites": list(domain.sites), "seed": seed}
        sizes = {"weights": [float(v) for v in weights], "inputs": [float(v) for v in inputs]}
        file = open_job(resume, {**space, **sizes, "of": dict(job or {})}, "collection") / "subnets.jsonl"
        known = _read(file)
    choices, forms = draw_choices(seed, domain, weights, inputs, count)
    missing = [n for n in range(count) if n not in known]
    for at in range(0, len(missing), block):
        some = missing[at : at + block]
        full = some + [some[-1]] * (block - len(some))
        scores = np.asarray(evaluate(choices[full]), np.float64)[: len(some)]
        for n, score in zip(some, scores.tolist(), strict=True):
            if not np.isfinite(score):
                raise SearchError(f"subnet {n} has the score {score}; its choice is {choices[n].tolist()}")
            known[n] = score
        if file is not None:
            with file.open("a") as f:
                f.writelines(json.dumps({"subnet": n, "score": known[n]}) + "\n" for n in some)
        if progress:
            progress(count - len(missing) + at + len(some), count, f"score {scores.mean():.3f}")
    return Subnets(choices, forms, np.array([known[n] for n in range(count)]))


def _read(file: Path) -> dict[int, float]:
    """What is known; a line that a kill cut short is passed over."""
    out: dict[int, float] = {}
    if not file.exists():
        return out
    text = file.read_text()
    if text and not text.endswith("\n"):
        with file.open("a") as f:
            f.write("\n")
    for line in text.splitlines():
        try:
            row = json.loads(line)
            out[int(row["subnet"])] = float(row["score"])
        except (ValueError, KeyError, TypeError):
            continue
    return out
