"""Running one block of a program: its equations through a rewriter, compiled once for all blocks that are alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.extend import source_info_util as siu

from qjax._compat import consts_of, eval_jaxpr, open_jaxpr, sub_jaxprs
from qjax.blockwise.schedule import Block, Item, Use
from qjax.rewrite import Rewriter
from qjax.rewriting.selection import slice_of
from qjax.rewriting.steps import Steps


def emit_block(rewriter: Rewriter, block: Block, reads: Sequence[Any], takes: Sequence[Any]) -> list[Any]:
    """Emit a block.

    Args:
        rewriter: of the block's program; what it collects is deposited in its innermost dictionary.
        block: the block.
        reads: the inputs of the program for ``block.reads``, slices already taken; quantized ones allowed.
        takes: the values for ``block.takes``.

    Returns:
        The values of ``block.gives``.
    """
    inputs = dict(zip(((u.value, u.index) for u in block.reads), reads, strict=True))
    env: dict[int, Any] = dict(zip(block.takes, takes, strict=True))

    def value_of(use: Use) -> Any:
        if (use.value, use.index) in inputs:
            return inputs[use.value, use.index]
        value = use.constant if use.value < 0 else env[use.value]
        return value if use.index is None else slice_of(value, 0, use.index)

    for item in block.items:
        outs = _emit_item(rewriter, item, [value_of(u) for u in item.uses])
        env.update(zip(item.results, outs, strict=True))
    return [rewriter.dense(env[v], "a value that leaves its block") for v in block.gives]


def _emit_item(rewriter: Rewriter, item: Item, values: list[Any]) -> list[Any]:
    if item.stack:
        ends = [sum(item.stack[: n + 1]) for n in range(len(item.stack))]
        return [jnp.stack(values[end - n : end]) for n, end in zip(item.stack, ends, strict=True)]
    eqn = item.eqn
    stack = siu.current_name_stack() + eqn.source_info.name_stack
    with siu.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
        rewriter.depth = len(getattr(rewriter, "frames", ())) + (item.step is not None)  # type: ignore[attr-defined]
        if item.step is None:
            return rewriter.equation(eqn, values, item.path, {})
        loop = rewriter.program.loop_at[item.path]
        with rewriter.collecting() as taken:
            context = {loop: Steps((item.step,))}
            outs = rewriter.run(eqn.params["jaxpr"], values, (*item.path, ("jaxpr", 0)), context)
        if taken:
            rows = jax.tree.map(lambda a: a[None], taken)
            rewriter.deposit(rewriter.stacked(rows, loop, [item.step]))  # type: ignore[attr-defined]
        return outs


class Compiled:
    """Functions by what they compute: blocks whose jaxprs are the same to the letter share one compilation."""

    def __init__(self) -> None:
        self._programs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, function: Callable[..., Any], args: Any, given_up: Any = ()) -> Callable[[Any, Any], Any]:
        """Return a compiled form of ``function(args, given_up)``, for arguments of these shapes.

        The arrays of ``given_up`` are overwritten by results of the same shapes.
        """
        closed, shape = jax.make_jaxpr(function, return_shape=True)(args, given_up)
        tree = jax.tree.structure(shape)
        consts = consts_of(closed)
        key = (str(closed), tuple(str(jax.typeof(c)) for c in consts))
        if _hides_constants(closed) or key not in self._programs:
            inner = open_jaxpr(closed)
            run = jax.jit(lambda consts, more, *flat: eval_jaxpr(inner, consts, *flat, *more), donate_argnums=1)
            if _hides_constants(closed):
                return lambda args, more: _called(run, consts, args, more, tree)
            self._programs[key] = run
        shared = self._programs[key]
        return lambda args, more: _called(shared, consts, args, more, tree)


def _called(run: Callable[..., Any], consts: Any, args: Any, given_up: Any, tree: Any) -> Any:
    return jax.tree.unflatten(tree, run(consts, jax.tree.leaves(given_up), *jax.tree.leaves(args)))


def _hides_constants(jaxpr: Any, top: bool = True) -> bool:
    """Whether a jaxpr inside has arrays of its own, which its text does not show."""
    if not top and isinstance(jaxpr, jex.ClosedJaxpr) and jaxpr.consts:
        return True
    return any(_hides_constants(sub, top=False) for eqn in open_jaxpr(jaxpr).eqns for _, sub in sub_jaxprs(eqn.params))
