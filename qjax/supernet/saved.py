"""Reading what `train` keeps: a folder says its space, sites and schedule, and holds parameters and tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.checkpoint.parts import load_part
from qjax.errors import CheckpointError
from qjax.supernet.elastic import Supernet, elastic
from qjax.supernet.space import Space
from qjax.supernet.training import Trained


def load_trained(folder: str | Path, fn: Callable[..., Any], params: Any, *args: Any) -> tuple[Supernet, Trained]:
    """Read a supernet that `train` has trained, or is training.

    Args:
        folder: what was given to `train` as ``folder``. The space is read from it.
        fn: the function that was trained, or its form for inference: one with the same products.
        params: of the shapes and order of those that were trained, such as the float model's; abstract ones will do.
        *args: arguments of ``fn``; abstract ones will do.

    Returns:
        The supernet of ``fn``, and the trained parameters, state and metrics as of the last checkpoint.

    Raises:
        CheckpointError: there is no checkpoint of a supernet there, or it is of another function.
    """
    folder = Path(folder).absolute()
    job = load_part(folder / "job") if folder.is_dir() else None
    if job is None or not {"space", "sites", "schedule"} <= set(job[1]):
        raise CheckpointError(f"{folder} holds no supernet; give the folder= of a qjax.supernet.train")
    t = elastic(fn, Space.from_dict(job[1]["space"]))
    sites, domain = job[1]["sites"], t.domain(params, *args)
    if list(domain.sites) != sites:
        other = next((f"{a} there, {b} here" for a, b in zip(sites, domain.sites, strict=False) if a != b), None)
        other = other or f"{len(sites)} there, {len(domain.sites)} here"
        raise CheckpointError(f"{folder} holds a supernet of other sites ({other}); give the model that it was made of")
    found = load_part(folder / "training")
    if found is None:
        raise CheckpointError(f"{folder} holds a begun training without a checkpoint; let it go on until it has one")
    abstract = jax.eval_shape(lambda p, a: t.init(p, *a, sample=1), params, args)
    wanted = {"params": params, "state": abstract}
    leaves = {name: jax.tree.leaves(tree) for name, tree in wanted.items()}
    there = [found[0][str(n)] for n in range(min(len(found[0]), sum(map(len, leaves.values()))))]
    shapes = [np.shape(a) for part in leaves.values() for a in part]
    if [np.shape(a) for a in there] != shapes:
        raise CheckpointError(
            f"{folder} holds parameters or tables of other shapes; give the model that the supernet was made of"
        )
    there = [jnp.asarray(a) for a in there]
    cut = len(leaves["params"])
    return t, Trained(
        jax.tree.unflatten(jax.tree.structure(params), there[:cut]),
        jax.tree.unflatten(jax.tree.structure(abstract), there[cut:]),
        {name: np.asarray(values) for name, values in found[1]["metrics"].items()},
    )
