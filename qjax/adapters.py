"""From modules to functions: ``fn, params`` for Flax NNX, Flax Linen and Equinox.

Each adapter returns a function ``fn(params, *args, **kwargs)`` that calls the module and the parameter tree it reads,
so that everything in qjax sees one shape of model. State that the module changes (batch statistics, caches) is
returned explicitly, never written back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qjax.errors import TraceError


def from_nnx(module: Any, *, mutable: Any = None, method: str = "__call__") -> tuple[Callable[..., Any], Any]:
    """A Flax NNX module as ``fn, params``.

    Args:
        module: the module; it is not changed.
        mutable: an NNX filter (such as ``nnx.BatchStat``) for the state that calls change. With it, ``fn`` returns
            ``(output, changed state)``; without it changes are dropped.
        method: name of the method to call.

    Returns:
        ``fn(params, *args, **kwargs)`` and ``params``, the module's whole `nnx.State`.
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise TraceError(f"from_nnx needs a flax.nnx.Module, not {type(module).__name__}")
    graph, params = nnx.split(module)

    def fn(params: Any, *args: Any, **kwargs: Any) -> Any:
        model = nnx.merge(graph, params, copy=True)  # or the call writes into `params`
        out = getattr(model, method)(*args, **kwargs)
        return out if mutable is None else (out, nnx.state(model, mutable))

    return fn, params


def from_linen(module: Any, variables: Any = None, **apply_kwargs: Any) -> tuple[Callable[..., Any], Any]:
    """A Flax Linen module as ``fn, params``.

    Args:
        module: the module; a bound module brings its own variables.
        variables: the tree that ``module.init`` returned.
        **apply_kwargs: for ``module.apply``, such as ``mutable=["batch_stats"]`` (then ``fn`` returns
            ``(output, changed collections)``) or ``method="encode"``.

    Returns:
        ``fn(variables, *args, **kwargs)`` and the variables; site names begin with the collection (``params/...``).
    """
    import flax.linen as nn

    if not isinstance(module, nn.Module):
        raise TraceError(f"from_linen needs a flax.linen.Module, not {type(module).__name__}")
    if variables is None:
        if module.scope is None:
            raise TraceError("from_linen needs the variables that module.init returned, or a bound module")
        module, variables = module.unbind()

    def fn(variables: Any, *args: Any, **kwargs: Any) -> Any:
        return module.apply(variables, *args, **apply_kwargs, **kwargs)

    return fn, variables


def from_equinox(module: Any) -> tuple[Callable[..., Any], Any]:
    """An Equinox module (any callable pytree) as ``fn, params``: the module is its own parameter tree."""
    if not callable(module):
        raise TraceError(f"from_equinox needs a callable module, not {type(module).__name__}")

    def fn(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    return fn, module
