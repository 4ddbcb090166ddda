"""Errors of single matrices, in the order that theory says: each method has to be best in what it minimises.

On the weights of real layers and the second moments H of their real inputs, with one format for all methods:

- GPTQ's output error tr((W - Q) H (W - Q)^T) is no larger than that of rounding to nearest in the same order and grid;
- an MSE range has no larger sum |W - Q|^2.4 than the whole range, and HQQ no larger sum |W - Q|^0.7 (its norm);
- PTQTP's squared error falls with every plane.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

import qjax
from benchmarks.accuracy.checks import FAIL, PASS, Check
from benchmarks.accuracy.models import Case
from qjax.statistics import SecondMoment

MATRICES = 4
"""Matrices of a model that are looked at, spread over its layers."""


def errors(w: np.ndarray, q: np.ndarray, h: np.ndarray) -> dict[str, float]:
    """The three errors of W [N, K] and its approximation, in float64."""
    d = w.astype(np.float64) - q
    size = np.abs(d)
    return {
        "output": float(np.einsum("nk,kl,nl->", d, h.astype(np.float64), d)),
        "squared": float(np.square(d).sum()),
        "mse": float((size**2.4).sum()),
        "hqq": float((size**0.7).sum()),
    }


def measured(case: Case) -> Iterable[tuple[str, dict[str, dict[str, float]]]]:
    """Site name -> method -> errors."""
    found = qjax.calibrate(case.fn, case.params, case.batches, statistics={case.blocks: (SecondMoment(),)})
    program = qjax.trace(case.fn, case.params, *case.batches[0])
    leaves = dict(zip(program.leaf_names, jax.tree.leaves(case.params), strict=True))
    sites = [s for s in program.sites if s.name in found and s.op == "dot" and s.name in leaves]
    step = max(1, len(sites) // MATRICES)
    for site in sites[::step][:MATRICES]:
        w = np.asarray(leaves[site.name], np.float32).T  # dot kernels are [K, N] in these models
        stats = {k: np.asarray(v) for k, v in found[site.name].items()}
        yield site.name, {name: errors(w, q, stats["second_moment"]) for name, q in _rounded(w, stats)}


def _rounded(w: np.ndarray, stats: dict[str, Any]) -> Iterable[tuple[str, np.ndarray]]:
    fmt = qjax.Int(4, group=min(128, w.shape[1]), symmetric=False)
    methods: dict[str, tuple[Any, Any]] = {
        "rtn": (fmt, qjax.RTN()),
        "mse": (fmt, qjax.RTN(qjax.MSE())),
        "gptq": (fmt, qjax.GPTQ()),
    }
    methods["hqq"] = (dataclasses.replace(fmt, zero="float"), qjax.HQQ())
    for count in (1, 2, 3):
        methods[f"planes-{count}"] = (qjax.formats.TritPlanes(planes=count, group=fmt.group), qjax.passes.PTQTP())
    for name, (kind, rounding) in methods.items():
        more = {"statistics": stats} if rounding.needs_batches else {}
        codes, aux = rounding.round(w, kind, **more)
        yield name, np.asarray(kind.decode(codes, aux))


ORDERS = (
    ("GPTQ has no larger output error than RTN", "gptq", "rtn", "output"),
    ("an MSE range has no larger error of its norm than the whole range", "mse", "rtn", "mse"),
    ("HQQ has no larger error of its norm than RTN", "hqq", "rtn", "hqq"),
    ("PTQTP: 2 planes have a smaller squared error than 1", "planes-2", "planes-1", "squared"),
    ("PTQTP: 3 planes have a smaller squared error than 2", "planes-3", "planes-2", "squared"),
)


def layer_checks(case: Case) -> list[Check]:
    """Every order on every matrix that was looked at."""
    found = dict(measured(case))
    checks = []
    for title, method, than, metric in ORDERS:
        ratios = {site: e[method][metric] / e[than][metric] for site, e in found.items() if method in e and than in e}
        if not ratios:
            continue
        worst = max(ratios, key=lambda site: ratios[site])
        verdict = PASS if ratios[worst] <= 1 + 1e-6 else FAIL
        middle = float(np.median(list(ratios.values())))
        said = f"{len(ratios)} matrices: ratio {middle:.3f} in the middle, {ratios[worst]:.3f} at most ({worst})"
        checks.append(Check(title, case.name, verdict, said))
    return checks
