"""check_pass: what every prepare pass has to satisfy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qjax.passes import PreparePass, run_passes
from qjax.program import trace
from qjax.trees import is_array, replace_arrays


def check_pass(
    step: Any, fn: Callable[..., Any], params: Any, *args: Any, rtol: float = 1e-4, atol: float = 1e-5, **kwargs: Any
) -> Any:
    """Check a prepare pass on one model.

    The pass offers the protocol; its edits keep names, shapes and dtypes and are finite; two runs agree bit for bit;
    it copes with no site being chosen; and where it says ``exact``, the float function gives the same results.

    Args:
        step: the pass.
        fn, params, *args, **kwargs: a model and concrete arguments.
        rtol, atol: how far results of an exact pass may be apart.

    Returns:
        The edited parameter tree.

    Raises:
        AssertionError: one of these does not hold.
        QjaxError: the verifier refuses the edits.
    """
    assert isinstance(step, PreparePass), f"{step!r} has no needs_batches, exact and edit(program, leaves, chosen)"
    program = trace(fn, params, *args, **kwargs)
    leaves = [x for x in jax.tree.leaves(params) if is_array(x)]
    chosen = [s.name for s in program.sites if s.op in ("dot", "conv", "ragged_dot") and s.reads_parameter]
    first, _ = run_passes([step], program, leaves, chosen)
    again, _ = run_passes([step], program, leaves, chosen)
    for name, a, b in zip(program.leaf_names, first, again, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=f"two runs differ at {name}")
    run_passes([step], program, leaves, [])
    edited = replace_arrays(params, first)
    if step.exact:
        want, got = fn(params, *args, **kwargs), fn(edited, *args, **kwargs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), want, got)
    return edited
