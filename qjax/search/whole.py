"""How far the outputs move under a whole assignment, measured: every assignment by one compiled program.

Sensitivities are of one group alone, and their sum is an estimate. Here the function is run with all groups quantized
as an assignment says. The weights that each choice stores are kept side by side, and the choice of a group is an index
that is traced, so a population is a loop in one program and nothing is compiled twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from qjax.checkpoint.lines import add_lines, read_lines
from qjax.errors import CheckpointError, DataError, SearchError
from qjax.evaluate.language import _compared
from qjax.observed import argument_tuples
from qjax.program import Signature, trace_flat
from qjax.search.groups import FLOAT, find_groups, resolve_choices
from qjax.search.measuring import Job, kl_score
from qjax.search.populations import over_population

Losses = Callable[[np.ndarray], np.ndarray]
"""Genomes int32 [any, groups], indices into the choices with "float" last -> losses float64 [any]."""
BLOCK = 8
"""Assignments that are measured between two looks at the disk."""


class WholeLosses:
    """Measures assignments: genomes int32 [any, groups] -> float64 [any].

    What is measured is the mean KL divergence of the outputs to those of the float model, in nats a prediction. A
    genome has an index into the choices for each group, "float" the last.

    Args:
        fn: any JAX function ``fn(params, *args)`` whose result is logits [..., classes].
        params: its float parameters, in memory. As many copies of the weights are made as there are choices.
        batches: argument tuples.
        choices, tie: as for `qjax.search.sensitivities`, whose groups these are.
        mesh: devices that share a population along ``axis``.
        axis: of the mesh.

    Raises:
        SearchError: a choice quantizes activations: such choices are programs of their own.
        DataError: batches that cannot be used.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Any,
        batches: Iterable[Any],
        choices: Mapping[str, Any] | Sequence[Any],
        *,
        tie: Sequence[Sequence[str]] = (),
        mesh: Mesh | None = None,
        axis: str = "population",
    ):
        recipes = resolve_choices(choices)
        first = next(argument_tuples(batches), None)
        if first is None:
            raise DataError("there are no batches; give at least one")
        signature, arrays = Signature.of(params, first, {})
        program = trace_flat(fn, signature, arrays)
        groups, decisions = find_groups(program, recipes, tie)
        job = Job(fn, params, batches, recipes, program, groups, decisions, kl_score, 0, None, ())
        for name in recipes:
            if not job.weights_only(name):
                raise SearchError(
                    f"choice {name!r} quantizes activations, and whole assignments are measured by one program in "
                    "which only weights differ; give choices that leave activations in float, or search by sums alone"
                )
        self.fn, self.params, self.batches, self.mesh, self.axis = fn, params, batches, mesh, axis
        self.groups, self.choices = groups, (*recipes, FLOAT)
        self.identity = job.identity()
        self.parts = [(g, part) for g, group in enumerate(groups) for part in group.slices]
        stored = [*(job.stored_leaves(name) for name in recipes), job.leaves]
        # The weights of every choice side by side, float last: leaf -> [choices, *shape].
        self.tables = {
            p: jnp.stack([jnp.asarray(leaves[p], job.leaves[p].dtype) for leaves in stored])
            for p in sorted({part.leaf for _, part in self.parts})
        }
        self._programs: dict[Signature, Callable[..., Any]] = {}

    def __call__(self, genomes: np.ndarray) -> np.ndarray:
        total, count = np.zeros(len(genomes)), 0
        for args in argument_tuples(self.batches):
            signature, arrays = Signature.of(self.params, args, {})
            if signature not in self._programs:
                self._programs[signature] = jax.jit(functools.partial(self._many, signature))
            some, n = self._programs[signature](jnp.asarray(genomes, jnp.int32), self.tables, arrays)
            total, count = total + np.asarray(some, np.float64), count + int(n)
        return total / count

    def _many(self, signature: Signature, genomes: Any, tables: Any, arrays: list[Any]) -> tuple[Any, Any]:
        rebuilt, args, kwargs = signature.rebuild(arrays)
        reference = self.fn(rebuilt, *args, **kwargs)
        many = over_population(functools.partial(self._one, signature), mesh=self.mesh, axis=self.axis)
        return many(genomes, tables, arrays, reference), jnp.int32(np.prod(reference.shape[:-1]))

    def _one(self, signature: Signature, genome: Any, tables: Any, arrays: list[Any], reference: Any) -> Any:
        """The summed divergence of one assignment on one batch."""
        leaves = list(arrays)
        for g, part in self.parts:
            weights = part.of(lax.dynamic_index_in_dim(tables[part.leaf], genome[g], keepdims=False))
            leaves[part.leaf] = part.put(leaves[part.leaf], weights)
        rebuilt, args, kwargs = signature.rebuild(leaves)
        return _compared(reference, self.fn(rebuilt, *args, **kwargs))[0].sum()


AGREE = 0.01
"""Scores that are measured again may differ by so much of the largest: other processors sum in another order."""


def check_kept(folder: Path, kept: Any, now: Any) -> None:
    """See that scores which a folder keeps are of what is scored now.

    Raises:
        CheckpointError: they differ.
    """
    kept, now = np.asarray(kept, np.float64), np.asarray(now, np.float64)
    away = np.abs(kept - now)
    if (away > AGREE * np.abs(kept).max()).any():
        worst = int(np.nanargmax(away))
        raise CheckpointError(
            f"{folder} holds scores of something else: {len(kept)} of them were measured again, and one was "
            f"{kept[worst]:.6g} and is {now[worst]:.6g}. Give another folder, or remove this one to begin again; with "
            "job=..., a few words about what is scored, it is the words that tell jobs apart"
        )


class Remembered:
    """Losses that were measured once are not measured again; in a file they outlive a kill.

    Args:
        losses: what measures.
        file: a line for each assignment; a line that a kill cut short is passed over. None keeps nothing.
        block: how many are measured at a time: always as many, so that nothing is compiled for another number.
        progress: called with the number of assignments that are known after each block.
        check: measure a block of those in the file again, to see that they are losses of the same thing.

    Raises:
        CheckpointError: they are not.
    """

    def __init__(
        self,
        losses: Losses,
        file: Path | None = None,
        block: int = BLOCK,
        progress: Callable[[int], None] | None = None,
        check: bool = False,
    ):
        self.losses, self.file, self.block, self.progress = losses, file, block, progress
        self.known: dict[tuple[int, ...], float] = {}
        for row in read_lines(file) if file is not None else ():
            try:
                self.known[tuple(row["genome"])] = float(row["loss"])
            except (ValueError, KeyError, TypeError):
                continue
        if self.known and check and file is not None:
            some = list(self.known)[:block]
            check_kept(file.parent, [self.known[g] for g in some], self._measured(some))

    def __call__(self, genomes: np.ndarray) -> np.ndarray:
        """The losses of genomes [any, groups], float64 [any]."""
        rows = [tuple(map(int, g)) for g in np.asarray(genomes)]
        new = [g for g in dict.fromkeys(rows) if g not in self.known]
        for at in range(0, len(new), self.block):
            some = new[at : at + self.block]
            for genome, loss in zip(some, self._measured(some).tolist(), strict=True):
                self.known[genome] = loss
                if self.file is not None:
                    add_lines(self.file, [{"genome": genome, "loss": loss}])
            if self.progress:
                self.progress(len(self.known))
        return np.array([self.known[g] for g in rows])

    def _measured(self, some: list[tuple[int, ...]]) -> np.ndarray:
        full = some + [some[-1]] * (self.block - len(some))
        return np.asarray(self.losses(np.array(full, np.int32)))[: len(some)]
