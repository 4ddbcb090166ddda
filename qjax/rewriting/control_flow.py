"""Re-emitting control flow through jax's public functions, with quantized values passing in.

Each function takes ``(rewriter, eqn, values, path, context)`` and returns the outputs of the equation. Bodies are
replayed by ``rewriter.run``; quantized values enter scans as ``xs``, jits and conditions as pytree arguments, and stay
out of loop state.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import ops
from qjax._compat import bind, consts_of, constvars_and_invars, open_jaxpr, scan_arity
from qjax.errors import LayoutError
from qjax.formats import QArray, QStack, is_quantized
from qjax.rewriting.selection import Layer, Selected, cut, dense
from qjax.rewriting.sharding import quantized_specs
from qjax.rewriting.steps import Steps


class SelectedResult(Exception):
    """A jit body would return a selected layer, which is no pytree."""


INLINE = object()
"""In ``Rewriter.shared``: a body that cannot be a jit of its own."""


def do_jit(rw: Any, eqn: Any, values: list[Any], here: Any, context: Any) -> list[Any]:
    """jit: bodies that were one stay one, so that 24 calls of one layer compile once."""
    body = eqn.params["jaxpr"]
    path = (*here, ("jaxpr", 0))
    below = rw.active.get(path, ())
    inner = tuple((relative, rw.acts_of(number, context)) for relative, number in below)
    free, fixed = _split_selected(values)
    leaves, treedef = jax.tree.flatten(free)
    numbers = [number for _, number in below]
    brought = rw.brought(numbers)
    key = (id(body), treedef, tuple(_aval(x) for x in leaves), repr(inner), _type_of(brought))
    if fixed or rw.shared.get(key) is INLINE:  # a selected layer is no pytree: inline
        return rw.run(body, values, path, context)
    if key not in rw.shared:

        def body_function(brought: list[Any], *args: Any) -> tuple[list[Any], Any]:
            with rw.bringing(dict(zip(numbers, brought, strict=True))), rw.collecting() as taken:
                outs = rw.run(body, args, path, context)
            if _split_selected(outs)[1]:
                raise SelectedResult
            return outs, taken

        body_function.__name__ = body_function.__qualname__ = eqn.params.get("name") or "jit"
        rw.shared[key] = (jax.jit(body_function, keep_unused=eqn.params.get("keep_unused", False)), body, below)
    in_shardings, out_shardings = (eqn.params.get(k) or () for k in ("in_shardings", "out_shardings"))
    try:
        placed = [_constrained(v, s) for v, s in itertools.zip_longest(values, in_shardings)]
        outs, taken = rw.shared[key][0](brought, *placed)
    except SelectedResult:
        rw.shared[key] = INLINE
        return rw.run(body, values, path, context)
    if taken:  # collected under the reads of the call that was traced first
        known = {relative: number for relative, number in below}
        taken = rw.moved(taken, {number: known[relative] for relative, number in rw.shared[key][2]})
        rw.deposit(taken)
    return [_constrained(v, s) for v, s in itertools.zip_longest(outs, out_shardings)]


def _constrained(value: Any, sharding: Any) -> Any:
    return lax.with_sharding_constraint(value, sharding) if isinstance(sharding, jax.sharding.Sharding) else value


def _aval(x: Any) -> Any:
    return jax.typeof(x)


def _type_of(tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple(_aval(x) for x in leaves)


def _split_selected(values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    return [v for v in values if not isinstance(v, Selected)], [v for v in values if isinstance(v, Selected)]


def do_remat(rw: Any, eqn: Any, values: list[Any], here: Any, context: Any) -> list[Any]:
    """remat: policies that name dots see the quantized dot as one."""
    p = eqn.params
    function = jax.checkpoint(
        _body(rw, p["jaxpr"], (*here, ("jaxpr", 0)), context, values),
        prevent_cse=p["prevent_cse"],
        policy=ops.remat_policy(p["policy"]) if p["policy"] is not None else None,
    )
    outs, taken = function(*_free(values))
    rw.deposit(taken)
    return outs


def _free(values: Sequence[Any]) -> list[Any]:
    return [v for v in values if not isinstance(v, Selected)]


def _body(rw: Any, jaxpr: Any, path: Any, context: Any, values: Sequence[Any]) -> Callable[..., Any]:
    """A function of the pytree operands; selected layers are closed over.

    Its results are float arrays, and what was collected beside them.
    """

    def function(*free: Any) -> tuple[list[Any], dict[Any, Any]]:
        it = iter(free)
        args = [v if isinstance(v, Selected) else next(it) for v in values]
        with rw.collecting() as taken:
            outs = [rw.dense(o, "a result of a sub-function") for o in rw.run(jaxpr, args, path, context)]
        return outs, taken

    return function


# ------------------------------------------------------------------------------------------------------------ loops


def do_scan(rw: Any, eqn: Any, values: list[Any], here: Any, context: Any) -> list[Any]:
    """scan: one scan where all steps agree, a few scans in a row, or one scan that selects."""
    p = eqn.params
    n_consts, n_carry = scan_arity(p)
    length, reverse = p["length"], p["reverse"]
    path = (*here, ("jaxpr", 0))
    loop = rw.program.loop_at[here]
    consts, init, xs = values[:n_consts], values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]
    invariant = _invariant(p["jaxpr"], n_consts, n_carry)
    init = [v if inv else rw.dense(v, "loop state") for v, inv in zip(init, invariant, strict=True)]
    xs = [_scannable(rw, x) for x in xs]
    decisions = rw.varies(path, loop, context)  # by time step
    slices = np.arange(length)[::-1] if reverse else np.arange(length)  # time step -> slice of xs
    signature = [
        (tuple(x.assign[slices[t]][0] for x in xs if isinstance(x, QStack)), decisions[t] if decisions else ())
        for t in range(length)
    ]
    runs = [list(g) for _, g in itertools.groupby(range(length), key=lambda t: signature[t])]
    if length == 0 or len(runs) <= 1:
        return _emit_scan(rw, p, path, context, loop, consts, init, xs, invariant, list(range(length)), slices, None)
    if len(runs) <= rw.max_runs:
        rw.note("loops", f"a scan of {length} steps runs as {len(runs)} scans, since its layers have different formats")
        pieces = []
        for steps in runs:
            outs = _emit_scan(rw, p, path, context, loop, consts, init, xs, invariant, steps, slices, None)
            init = [i if inv else o for i, o, inv in zip(init, outs[:n_carry], invariant, strict=True)]
            pieces.append(outs[n_carry:])
        if reverse:
            pieces = pieces[::-1]
        ys = [jnp.concatenate(parts, axis=0) for parts in zip(*pieces, strict=True)]
        return [*init, *ys]
    rw.note("loops", f"a scan of {length} steps selects its formats at run time: they change {len(runs) - 1} times")
    running = jnp.arange(length, dtype=jnp.int32)
    if reverse:
        running = running[::-1]
    return _emit_scan(rw, p, path, context, loop, consts, init, xs, invariant, list(range(length)), slices, running)


def _emit_scan(
    rw: Any,
    p: dict[str, Any],
    path: Any,
    context: Any,
    loop: int,
    consts: list[Any],
    init: list[Any],
    xs: list[Any],
    invariant: list[bool],
    steps: list[int],
    slices: np.ndarray,
    running: Any,
) -> list[Any]:
    """Emit the scan for some consecutive steps; ``running`` holds the time step by slice where the body selects."""
    n_carry = len(init)
    where = sorted(int(slices[t]) for t in steps)
    whole = len(where) == len(slices)
    sliced: list[Any] = []
    stays = [_stack_of(rw, x, where[0], running) if where else None for x in xs]
    at = jnp.arange(len(where), dtype=jnp.int32) if any(stays) else None
    for x, stay in zip(xs, stays, strict=True):
        if stay is not None:
            sliced.append(None)
        elif isinstance(x, QStack):
            sliced.append(None if running is not None else _run_of(x, where))
        else:
            sliced.append(x if whole else jax.tree.map(lambda a: lax.slice_in_dim(a, where[0], where[-1] + 1), x))

    in_rows = sorted(steps, key=lambda t: slices[t])  # what is stacked stands in the order of xs
    brought = rw.brought_rows([number for _, number in rw.active.get(path, ())], loop, in_rows, context)

    def body(carry: list[Any], step: Any) -> tuple[list[Any], Any]:
        current, t, rows, position = step
        inner = dict(context)
        inner[loop] = Steps(tuple(steps), t)
        args = []
        for x, c, stay in zip(xs, current, stays, strict=True):
            if stay is not None:
                args.append(Layer(stay[0], position + stay[1]))
            elif isinstance(x, QStack) and running is not None:
                index = t if int(slices[0]) == 0 else len(slices) - 1 - t
                args.append(Selected(x, index))
            else:
                args.append(c)
        it = iter(carry)
        state = [v if inv else next(it) for v, inv in zip(init, invariant, strict=True)]
        with rw.bringing(rows), rw.collecting() as taken:
            outs = rw.run(p["jaxpr"], [*consts, *state, *args], path, inner)
        outs = [o if i < n_carry and invariant[i] else rw.dense(o, "loop state") for i, o in enumerate(outs)]
        return [o for o, inv in zip(outs[:n_carry], invariant, strict=True) if not inv], (outs[n_carry:], taken)

    moving = [v for v, inv in zip(init, invariant, strict=True) if not inv]
    last, (ys, taken) = lax.scan(
        body,
        moving,
        (sliced, running, brought, at),
        length=len(steps),
        reverse=p["reverse"],
        unroll=_unroll(p["unroll"], len(steps)),
    )
    if taken:
        rw.deposit(rw.stacked(taken, loop, in_rows))
    it = iter(last)
    return [v if inv else next(it) for v, inv in zip(init, invariant, strict=True)] + list(ys)


def _stack_of(rw: Any, x: Any, first: int, running: Any) -> tuple[QArray, int] | None:
    """The weight whose slices a scan leaves where they are, and which of them it begins with; None if it cuts them."""
    if isinstance(x, QStack):
        if running is not None:
            return None
        part, first = x.assign[first]
        x = x.parts[part]
    return (x, first) if rw.reads_in_place(x) else None


def _unroll(unroll: Any, length: int) -> Any:
    return min(unroll, max(length, 1)) if isinstance(unroll, int) and not isinstance(unroll, bool) else unroll


def _run_of(x: QStack, where: list[int]) -> Any:
    """The slices ``where`` (consecutive, of one part) as a stacked value."""
    for start, stop, part in x.runs():
        if start <= where[0] and where[-1] < stop:
            rows = functools.partial(lax.slice_in_dim, start_index=where[0] - start, limit_index=where[-1] + 1 - start)
            return jax.tree.map(rows, part)
    raise LayoutError("these slices of a stack have several formats")


def _scannable(rw: Any, x: Any) -> Any:
    """A quantized value whose leading axis a scan can slice, or a float array."""
    x = cut(x)
    if isinstance(x, Selected):
        return rw.dense(x, "a selected slice is scanned over")
    if isinstance(x, QStack) and (x.axis != 0 or any(_leading_is_no_stack(p) for p in x.parts)):
        return rw.dense(x, "a scan slices another axis than the one along which formats differ")
    if is_quantized(x) and not isinstance(x, QStack) and _leading_is_no_stack(x):
        return rw.dense(x, "a scan slices an axis that the weight is not stacked along")
    return x


def _leading_is_no_stack(x: Any) -> bool:
    """Whether slicing the leading axis of all children is not slicing the user's leading axis."""
    if isinstance(x, QStack):
        return x.axis != 0
    return is_quantized(x) and (not x.ndim or x.view.order[0] != ("s", 0))


def _invariant(body: Any, n_consts: int, n_carry: int) -> list[bool]:
    """Which slots of loop state a body hands on untouched."""
    inner = open_jaxpr(body)
    variables = constvars_and_invars(body)[len(consts_of(body)) + n_consts :][:n_carry]
    return [o is v for v, o in zip(variables, inner.outvars[:n_carry], strict=True)]


def do_while(rw: Any, eqn: Any, values: list[Any], here: Any, context: Any) -> list[Any]:
    """while: loop state that the body does not touch is closed over, quantized or not."""
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts, init = values[:n_cond], values[n_cond : n_cond + n_body], values[n_cond + n_body :]
    invariant = _invariant(p["body_jaxpr"], n_body, len(init))
    init = [v if inv else rw.dense(v, "loop state") for v, inv in zip(init, invariant, strict=True)]

    def state(carry: Any) -> list[Any]:
        it = iter(carry)
        return [v if inv else next(it) for v, inv in zip(init, invariant, strict=True)]

    def cond(carry: Any) -> Any:
        with rw.collecting():  # what the condition looks at is observed by the body, or is no site
            return rw.run(p["cond_jaxpr"], [*cond_consts, *state(carry[0])], (*here, ("cond_jaxpr", 0)), context)[0]

    def step(carry: Any) -> tuple[list[Any], Any]:
        with rw.collecting() as taken:
            outs = rw.run(p["body_jaxpr"], [*body_consts, *state(carry)], (*here, ("body_jaxpr", 0)), context)
        return [rw.dense(o, "loop state") for o, inv in zip(outs, invariant, strict=True) if not inv], taken

    moving = [v for v, inv in zip(init, invariant, strict=True) if not inv]
    before = {key: rw.neutral(key) for key in jax.eval_shape(step, moving)[1]} if rw.observing else {}

    def body(carry: Any) -> tuple[list[Any], Any]:
        current, seen = carry
        outs, taken = step(current)
        return outs, {key: rw.tap_of[key[0]].merge(seen[key], taken[key]) for key in seen}

    last, taken = lax.while_loop(cond, body, (moving, before))
    rw.deposit(taken)
    return state(last)


def do_cond(rw: Any, eqn: Any, values: list[Any], here: Any, context: Any) -> list[Any]:
    """Cond and switch."""
    p = eqn.params
    if p.get("branches_platforms") is not None:  # lax.platform_dependent has no public form for a chosen index
        return bind(eqn, [rw.dense(v, "a platform_dependent branch") for v in values])
    branches = [
        _body(rw, branch, (*here, ("branches", i)), context, values[1:]) for i, branch in enumerate(p["branches"])
    ]
    if rw.every_branch:
        free = _free(values[1:])
        ran = [branch(*free) for branch in branches]
        for _, taken in ran:
            rw.deposit(taken)
        chosen = jnp.clip(values[0].astype(jnp.int32), 0, len(branches) - 1)
        return [jnp.stack(results)[chosen] for results in zip(*(outs for outs, _ in ran), strict=True)]
    if rw.observing:
        found = [jax.eval_shape(branch, *_free(values[1:]))[1] for branch in branches]
        keys = list(dict.fromkeys(key for taken in found for key in taken))
        branches = [_with_all(rw, branch, keys) for branch in branches]
    outs, taken = lax.switch(values[0], branches, *_free(values[1:]))
    rw.deposit(taken)
    return list(outs)


def _with_all(rw: Any, branch: Callable[..., Any], keys: list[Any]) -> Callable[..., Any]:
    """A branch that contributes under every key."""

    def function(*args: Any) -> tuple[list[Any], dict[Any, Any]]:
        outs, taken = branch(*args)
        return outs, {key: taken[key] if key in taken else rw.neutral(key) for key in keys}

    return function


# ------------------------------------------------------------------------------------------------ functions with rules


def do_custom_vjp(rw: Any, eqn: Any, values: list[Any], here: Any, context: Any) -> list[Any]:
    """custom_vjp: the value is the rewritten body's, the derivative the user's own rule at the dequantized operands."""
    values = [cut(v) for v in values]
    path = (*here, ("call_jaxpr", 0))
    if rw.observing:
        return rw.run(eqn.params["call_jaxpr"], values, path, context)
    run = _results(_body(rw, eqn.params["call_jaxpr"], path, context, values))
    free = _free(values)
    leaves, treedef = jax.tree.flatten(free)

    def original(args: list[Any]) -> list[Any]:
        it = iter(args)
        return bind(eqn, [dense(v) if isinstance(v, Selected) else dense(next(it)) for v in values])

    @jax.custom_vjp
    def function(*flat: Any) -> list[Any]:
        return run(*jax.tree.unflatten(treedef, flat))

    def forward(*flat: Any) -> Any:
        args = [dense(a) for a in jax.tree.unflatten(treedef, flat)]
        _, pull = jax.vjp(original, args)
        return function(*flat), pull

    def backward(pull: Any, cotangents: Any) -> tuple[Any, ...]:
        (to_args,) = pull(list(cotangents))
        out: list[Any] = []
        for arg, cotangent in zip(free, to_args, strict=True):
            out += [_zero(leaf) for leaf in jax.tree.leaves(arg)] if is_quantized(arg) else [cotangent]
        return tuple(out)

    function.defvjp(forward, backward)
    return list(function(*leaves))


def _results(function: Callable[..., Any]) -> Callable[..., list[Any]]:
    return lambda *args: function(*args)[0]


def _zero(leaf: Any) -> Any:
    floating = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return jnp.zeros_like(leaf) if floating else np.zeros(leaf.shape, jax.dtypes.float0)


def do_custom_jvp(rw: Any, eqn: Any, values: list[Any], here: Any, context: Any) -> list[Any]:
    """custom_jvp: as custom_vjp."""
    values = [cut(v) for v in values]
    path = (*here, ("call_jaxpr", 0))
    if rw.observing:
        return rw.run(eqn.params["call_jaxpr"], values, path, context)
    run = _results(_body(rw, eqn.params["call_jaxpr"], path, context, values))
    quantized = [v for v in values if is_quantized(v)]
    arrays = [v for v in values if not is_quantized(v) and not isinstance(v, Selected)]

    def merge(qs: list[Any], xs: list[Any]) -> list[Any]:
        q, x = iter(qs), iter(xs)
        return [v if isinstance(v, Selected) else next(q) if is_quantized(v) else next(x) for v in values]

    @jax.custom_jvp
    def function(qs: list[Any], xs: list[Any]) -> list[Any]:
        return run(*_free(merge(qs, xs)))

    @function.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (qs, xs), (_, dxs) = primals, tangents
        _, out = jax.jvp(lambda xs: bind(eqn, [dense(v) for v in merge(qs, xs)]), (xs,), (dxs,))
        return function(qs, xs), out

    return list(function(quantized, arrays))


def do_shard_map(rw: Any, eqn: Any, values: list[Any], here: Any, context: Any) -> list[Any]:
    """shard_map: a weight's PartitionSpec becomes that of its codes and scales."""
    p = eqn.params
    path = (*here, ("jaxpr", 0))
    values = [cut(v) for v in values]
    values = [
        rw.dense(v, "a selected slice enters shard_map") if isinstance(v, (Selected, QStack)) else v for v in values
    ]
    specs: list[Any] = []
    for i, (v, spec) in enumerate(zip(values, p["in_specs"], strict=True)):
        if is_quantized(v):
            try:
                spec = quantized_specs(v, spec, p["mesh"], apart=True)
            except LayoutError as error:
                rw.note("dequantized", f"shard_map: {error}")
                values[i] = v = dense(v)
        specs.append(spec)

    manual = p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"]
    found: list[Any] = []

    def body(*args: Any) -> tuple[list[Any], list[Any]]:
        with rw.collecting() as taken:
            outs = [rw.dense(o, "a result of shard_map") for o in rw.run(p["jaxpr"], args, path, context)]
        found[:] = taken
        return outs, [rw.tap_of[key[0]].over_devices(state, tuple(manual)) for key, state in taken.items()]

    mapped = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=tuple(specs),
        out_specs=(list(p["out_specs"]), jax.sharding.PartitionSpec()),
        axis_names=set(manual),
        check_vma=p.get("check_vma", True),
    )
    outs, states = mapped(*values)
    rw.deposit(dict(zip(found, states, strict=True)))
    return list(outs)


CONTROL_FLOW: dict[str, Callable[..., list[Any]]] = {
    "jit": do_jit,
    "pjit": do_jit,
    "closed_call": do_jit,
    "remat2": do_remat,
    "checkpoint": do_remat,
    "scan": do_scan,
    "while": do_while,
    "cond": do_cond,
    "custom_vjp_call": do_custom_vjp,
    "custom_jvp_call": do_custom_jvp,
    "shard_map": do_shard_map,
}
"""Primitive -> how it is re-emitted."""
