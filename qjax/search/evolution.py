"""Searches that go on for generations: one loop for all of them, kept on disk after every generation.

Everything that is drawn in generation g comes from ``fold_in(key(seed), g)``, so the population after g generations is
all there is to keep, and a job that was killed ends with the result of one that was not.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.checkpoint.parts import check_same
from qjax.checkpoint.store import read_sealed_json, replace_json
from qjax.errors import CheckpointError, SearchError
from qjax.search.nsga2 import (
    NSGA2,
    Evaluate,
    Population,
    best_first,
    check_mask,
    children,
    evaluated,
    first_genomes,
    generation,
    survivors,
)

Progress = Callable[[int, Population], None]
"""Called after each generation (0 is the first population) with the population, the best first."""
FILE = "population.json"


def evolve_front(
    evaluate: Evaluate,
    allowed: np.ndarray,
    settings: NSGA2 | None = None,
    *,
    seeds: np.ndarray | None = None,
    seed: int = 0,
    compiled: bool = True,
    resume: str | Path | None = None,
    job: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Population:
    """Search with NSGA-II.

    Args:
        evaluate: genomes int32 [any, genes] -> (values [any, objectives], violation [any]).
        allowed: bool [genes, choices].
        settings: None takes the usual ones.
        seeds: int32 [any, genes], assignments to begin with.
        seed: of all draws.
        compiled: whether ``evaluate`` may be traced: a generation is then one program. If not it is called as it is,
            with arrays, and may do anything.
        resume: a folder in which the population is kept after every generation.
        job: what ``evaluate`` measures, JSON-able: a folder of something else is refused.
        progress: called after every generation.

    Returns:
        The last population, the best first; `qjax.search.front` picks the undominated.

    Raises:
        SearchError: seeds or a mask that cannot be.
        CheckpointError: ``resume`` holds another job, or is damaged.
    """
    settings = settings or NSGA2()
    allowed = check_mask(allowed)
    seeds = check_genomes(seeds, allowed) if seeds is not None else None
    kept = Kept(
        resume,
        {
            "search": "nsga2",
            "seed": seed,
            "population": settings.population,
            **settings.operators,
            "allowed": digest(allowed),
            "seeds": None if seeds is None else digest(seeds),
            "job": dict(job or {}),
        },
    )
    mask, key = jnp.asarray(allowed), jax.random.key(seed)

    found = kept.load()
    if found is None:
        genomes = _begin(jax.random.fold_in(key, 0), mask, settings.population, seeds)
        population, done = _sort(evaluated(genomes, jax.jit(evaluate) if compiled else evaluate))[0], 0
        kept.save(population, done)
    else:
        population, done = found
    if progress:
        progress(done, population)
    if compiled:
        step = jax.jit(lambda k, p: generation(k, p, mask, evaluate, settings))
    else:

        def step(k: jax.Array, p: Population) -> Population:
            return _select(p, evaluated(_propose(k, p.genomes, mask, **settings.operators), evaluate))

    for number in range(done + 1, settings.generations + 1):
        population = step(jax.random.fold_in(key, number), population)
        kept.save(population, number)
        if progress:
            progress(number, population)
    return population


_begin = jax.jit(first_genomes, static_argnums=2)
_propose = jax.jit(children, static_argnames=("crossover", "mutation", "near"))
_select = jax.jit(survivors)
_sort = jax.jit(best_first)


def check_genomes(genomes: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Genomes as int32 [any, genes].

    Raises:
        SearchError: another shape, or a choice that a gene does not have.
    """
    genomes = np.asarray(genomes)
    if genomes.ndim != 2 or genomes.shape[1] != len(allowed) or genomes.dtype.kind not in "iu":
        raise SearchError(f"seeds {genomes.dtype} {genomes.shape}; integers [any, {len(allowed)}] are needed")
    inside = (genomes >= 0) & (genomes < allowed.shape[1])
    fine = inside & allowed[np.arange(len(allowed)), np.where(inside, genomes, 0)]
    if not fine.all():
        row, gene = np.argwhere(~fine)[0]
        has = np.flatnonzero(allowed[gene]).tolist()
        raise SearchError(f"seed {row} has choice {genomes[row, gene]} for gene {gene}, which has the choices {has}")
    return genomes.astype(np.int32)


def digest(array: np.ndarray) -> str:
    """A few letters that stand for an array."""
    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).hexdigest()[:16]


class Kept:
    """A population in a folder, replaced as a whole after each generation.

    Args:
        path: the folder; None keeps nothing.
        job: what is searched, JSON-able.
    """

    def __init__(self, path: str | Path | None, job: Mapping[str, Any]):
        self.file = None if path is None else Path(path).absolute() / FILE
        self.job = dict(job)
        if self.file is None:
            return
        folder = self.file.parent
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        other = sorted(p.name for p in folder.iterdir() if p.name not in (FILE, f"{FILE}.tmp"))
        if other and not self.file.exists():
            raise CheckpointError(
                f"{folder} holds other things ({', '.join(other[:3])}) and no begun search; give a new folder"
            )

    def load(self) -> tuple[Population, int] | None:
        """The population and the number of generations that made it; None if nothing was kept.

        Raises:
            CheckpointError: it is of another search, or damaged.
        """
        if self.file is None or not self.file.exists():
            return None
        data = read_sealed_json(self.file)
        check_same(self.file.parent, data.get("job", {}), self.job, "search")
        return Population(*(_array(data[name]) for name in Population._fields)), int(data["generation"])

    def save(self, population: Population, number: int) -> None:
        """Keep a population; killed at any moment, this one or the one before is there."""
        if self.file is not None:
            arrays = {name: _text(part) for name, part in population._asdict().items()}
            replace_json(self.file, {"job": self.job, "generation": number, **arrays})


def _text(array: Any) -> dict[str, Any]:
    array = np.ascontiguousarray(array)
    return {
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "base64": base64.b64encode(array.tobytes()).decode("ascii"),
    }


def _array(data: Mapping[str, Any]) -> jax.Array:
    found = np.frombuffer(base64.b64decode(data["base64"]), np.dtype(data["dtype"]))
    return jnp.asarray(found.reshape(data["shape"]))
