"""Finding the sites of a jaxpr: a read-only walk that follows every parameter leaf to the equations that read it.

The walk visits each equation once, with one `Val` per variable, and descends into every sub-jaxpr that jax's public
control flow makes (jit, scan, while, cond, remat, custom_jvp/vjp, shard_map). It records a `Read` for each product,
convolution, lookup and composite; `qjax.analysis.naming` turns reads into named `Site`s, one per slice of a stack.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.extend import core as jex

from qjax._compat import consts_of, constvars_and_invars, open_jaxpr, scan_arity, sub_jaxprs
from qjax.analysis import provenance
from qjax.analysis.known import Known, known_result
from qjax.analysis.provenance import Index, Ref
from qjax.analysis.reads import Analysis, Loop, Path, Read, Slicing, flops_of, scope_of
from qjax.analysis.values import (
    DATA,
    Near,
    Val,
    captured_value,
    carry_in,
    carry_out,
    common_prefix,
    leaving,
    localized,
    nearest,
)
from qjax.composites import Attention, Composite, Norm, find_nested

OPAQUE = {
    "pallas_call",
    "custom_partitioning",
    "ffi_call",
    "pure_callback",
    "io_callback",
    "call_hi_primitive",
    "custom_lin",
    "xla_call_module",
    "call_exported",
    "tpu_custom_call",
    "triton_kernel_call",
}
"""Primitives whose insides qjax does not look into."""


def analyze(closed: Any, leaf_names: list[str], leaf_shapes: list[tuple[int, ...]], n_leaves: int) -> Analysis:
    """Walk a closed jaxpr whose first ``n_leaves`` arguments are the parameter leaves.

    Args:
        closed: the traced program.
        leaf_names: name of each parameter leaf.
        leaf_shapes: shape of each parameter leaf.
        n_leaves: how many of the leading arguments are parameter leaves.

    Returns:
        The reads, loops and other uses.
    """
    walker = _Walker(leaf_names, leaf_shapes, find_nested(closed))
    args = [
        Val(Ref.whole(i, leaf_shapes[i]), frozenset((i,)), near=Near(walker.segments[i], ())) if i < n_leaves else DATA
        for i in range(len(closed.in_avals))
    ]
    walker.body(closed, args, (), "", ())
    return Analysis(walker.reads, walker.loops, walker.other_uses, walker.slicing)


def views(closed: Any, leaf_names: list[str], leaf_shapes: list[tuple[int, ...]]) -> dict[tuple[Path, Any], Ref]:
    """Which values are views of parameter leaves: ``(address of the body, variable)`` to the view.

    Args:
        closed: the traced program, whose leading arguments are the parameter leaves.
        leaf_names, leaf_shapes: of the parameter leaves.
    """
    walker = _Walker(leaf_names, leaf_shapes, [])
    walker.views = {}
    args = [
        Val(Ref.whole(i, leaf_shapes[i]), frozenset((i,)), near=Near(walker.segments[i], ()))
        if i < len(leaf_names)
        else DATA
        for i in range(len(closed.in_avals))
    ]
    walker.body(closed, args, (), "", ())
    return walker.views


class _Walker:
    views: dict[tuple[Path, Any], Ref] | None = None

    def __init__(self, leaf_names: list[str], leaf_shapes: list[tuple[int, ...]], composites: list[Composite]):
        self.leaf_shapes = leaf_shapes
        self.slicing: list[Slicing] = []
        self.composites = {c.output_path: c for c in composites}
        self.products: dict[Path, str] = {}  # the two products of each attention
        for c in composites:
            if isinstance(c, Attention):
                self.products |= {c.scores.path: "scores", c.values.path: "values"}
        self.segments = [tuple(n.split("/")) for n in leaf_names]
        self.reads: list[Read] = []
        self.loops: dict[int, Loop] = {}
        self.other_uses: dict[int, set[str]] = {}
        self.event = 0

    # ------------------------------------------------------------------------------------------- the walk
    def body(self, jaxpr: Any, args: list[Val], path: Path, scope: str, loops: tuple[int, ...]) -> list[Val]:
        """Walk a jaxpr on the values of its arguments; its constants are captured arrays."""
        inner = open_jaxpr(jaxpr)
        consts = [captured_value(c) for c in consts_of(jaxpr)]
        env: dict[Any, Val] = dict(zip(constvars_and_invars(jaxpr), consts + args, strict=True))
        for i, eqn in enumerate(inner.eqns):
            name = eqn.primitive.name
            here = (*path, i)
            ins = [self.read(env, a) for a in eqn.invars]
            handler = getattr(self, f"do_{name}", None)
            if handler is not None:
                outs = handler(eqn, ins, here, scope, loops)
            elif (subs := sub_jaxprs(eqn.params)) and name not in OPAQUE:
                outs = self.call(eqn, subs, ins, here, scope, loops)
            else:
                outs = self.plain(eqn, ins, here, scope, loops)
            found = self.composites.get(here)
            if found is not None:
                self.composite(found, here, eqn, ins, outs, scope, loops)
            for var, out in zip(eqn.outvars, outs, strict=True):
                env[var] = out
        if self.views is not None:
            self.views |= {(path, var): val.ref for var, val in env.items() if val.ref is not None}
        return [self.read(env, v) for v in inner.outvars]

    def read(self, env: dict[Any, Val], atom: Any) -> Val:
        if isinstance(atom, jex.Literal):
            value = np.asarray(atom.val) if np.ndim(atom.val) == 0 else None
            if value is not None and value.dtype.kind in "iub":
                return Val(known=Known(value))
            return Val()
        return env.get(atom, DATA)

    # ------------------------------------------------------------------------------------------- equations
    def plain(self, eqn: Any, ins: list[Val], here: Path, scope: str, loops: tuple[int, ...]) -> list[Val]:
        name = eqn.primitive.name
        first = ins[0] if ins else Val()
        view = provenance.VIEWS.get(name)
        if name == "dynamic_slice" and first.ref is not None and self.looks_up(eqn, ins):
            self.embedding(eqn, ins, here, scope, loops)
        elif view is not None and first.ref is not None:
            self.event += 1
            knowns = [v.known for v in ins]
            refs = view(first.ref, eqn, knowns, self.event)
            refs = refs if isinstance(refs, list) else [refs]
            if any(r is not None for r in refs):
                self.note_slices(first.ref, refs, loops)
                if name == "gather" and ins[1].known is None:  # which matrices are picked is data
                    first = dataclasses.replace(first, data=True)
                return [
                    dataclasses.replace(first, ref=r, known=None, near=self.near_of(r) if r else first.near)
                    for r in refs
                ]
        if name == "gather" and first.ref is not None and ins[1].data:
            self.embedding(eqn, ins, here, scope, loops)
        elif name == "select_n" and all(v.leaves and not v.data for v in ins[1:]):
            ins = ins[1:]  # choosing among weights by data still gives a weight
        elif name in OPAQUE:
            for v in ins:
                if v.ref is not None:
                    self.opaque(eqn, v.ref, here, scope, loops)
        if not eqn.outvars:
            return []
        known = known_result(eqn, [v.known for v in ins])
        if name == "optimization_barrier":
            return list(ins)
        leaves = frozenset().union(*(v.leaves for v in ins if not v.data)) if ins else frozenset()
        data = any(v.data for v in ins) or name in ("random_bits", "random_unwrap", "random_seed")
        for v in ins:
            if v.ref is not None:
                self.other_uses.setdefault(v.ref.leaf, set()).add(name)
        const = not data and not leaves and any(v.const for v in ins)
        counter = any(v.counter for v in ins) and all(v.counter or v.known is not None for v in ins)
        out = Val(None, leaves if not data else frozenset(), data, const, known, nearest(ins), counter)
        return [out] + [dataclasses.replace(out, known=None)] * (len(eqn.outvars) - 1)

    def near_of(self, ref: Ref) -> Near:
        return Near(self.segments[ref.leaf], ref.index)

    def note_slices(self, before: Ref, refs: list[Ref | None], loops: tuple[int, ...]) -> None:
        for ref in refs:
            for index in ref.index[len(before.index) :] if ref is not None else ():
                if index.loop in self.loops:
                    self.loops[index.loop].leaves.add(before.leaf)
                    continue
                size = self.leaf_shapes[before.leaf][index.axis]
                position = index.values[0] if index.loop is None else None
                loop = loops[-1] if index.loop is not None and loops else None
                self.slicing.append(Slicing(index.event, before.leaf, size, position, loop))

    def do_dot_general(self, eqn: Any, ins: list[Val], here: Path, scope: str, loops: tuple[int, ...]) -> list[Val]:
        (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
        return self.product("dot", eqn, ins, here, scope, loops, [(lc, lb), (rc, rb)])

    def do_conv_general_dilated(
        self, eqn: Any, ins: list[Val], here: Path, scope: str, loops: tuple[int, ...]
    ) -> list[Val]:
        spec = eqn.params["dimension_numbers"].rhs_spec  # (O, I, *spatial)
        return self.product("conv", eqn, ins, here, scope, loops, [None, ((*spec[2:], spec[1]), ())])

    def do_ragged_dot_general(
        self, eqn: Any, ins: list[Val], here: Path, scope: str, loops: tuple[int, ...]
    ) -> list[Val]:
        dn = eqn.params["ragged_dot_dimension_numbers"]
        (_, rc), (_, rb) = dn.dot_dimension_numbers
        return self.product("ragged_dot", eqn, ins, here, scope, loops, [None, (rc, (*dn.rhs_group_dimensions, *rb))])

    def product(
        self,
        op: str,
        eqn: Any,
        ins: list[Val],
        here: Path,
        scope: str,
        loops: tuple[int, ...],
        dims: list[tuple[Any, Any] | None],
    ) -> list[Val]:
        """A product of two operands: find the one that is a weight, or say why there is none."""
        near = nearest(ins[:2])
        common: dict[str, Any] = dict(
            path=here,
            loops=loops,
            shapes=tuple(tuple(a.aval.shape) for a in eqn.invars[:2]),
            out_shape=tuple(eqn.outvars[0].aval.shape),
            scope=scope_of(scope, eqn),
            flops=flops_of(op, eqn),
            near=near,
        )
        # a product that sums over nothing of a weight only scales: that is no linear site
        sides = [s for s in (1, 0) if dims[s] is not None and ins[s].ref is not None and dims[s][0]]  # type: ignore[index]
        data = [v.data for v in ins[:2]]
        out_near = near
        read = None
        if sides and any(data):
            side = next((s for s in sides if data[1 - s]), sides[0])
            ref = ins[side].ref
            assert ref is not None
            contract, batch = dims[side]  # type: ignore[misc]
            kept = [d for d in range(len(ref.dims)) if d not in contract and d not in batch]
            axes = [ref.axes_of(list(d)) for d in (contract, kept, batch)]
            summed = ref.summed_axes(contract)
            if op == "conv":  # groups run over (H, W, I), wherever these stand in the leaf
                order = [axis for d in contract for axis, _, _ in ref.dims[d]]
                summed = tuple(sorted(summed, key=order.index)) if set(summed) <= set(order) else summed
            reason = ""
            if any(a is None for a in axes) or set(summed) & set((axes[1] or ()) + (axes[2] or ())):
                reason = "only part of a weight axis is contracted: reshape the weight so that whole axes are"
            elif axes[0] and not summed:
                reason = "the product mixes whole matrices and sums over none of their axes"
            read = Read(
                op=op,
                kind=op,
                side=side,
                ref=ref,
                in_axes=summed,
                out_axes=axes[1] or (),
                batch_axes=ref.leaf_axes(batch),
                dtype=str(eqn.invars[side].aval.dtype),
                reason=reason,
                **common,
            )
            out_near = self.near_of(ref)
        else:
            side = 1 if not data[1] else 0
            blank: dict[str, Any] = dict(side=None, ref=None, in_axes=(), out_axes=(), batch_axes=())
            dtype = str(eqn.invars[side].aval.dtype)
            leaves = tuple(sorted(ins[0].leaves | ins[1].leaves))
            if not any(data):
                if leaves:
                    why = "both operands are parameters: the product is itself a computed weight"
                    read = Read(op=op, kind="computed", dtype=dtype, reason=why, leaves=leaves, **blank, **common)
            elif all(data):
                read = Read(op="matmul", kind=self.products.get(here, "matmul"), dtype=dtype, **blank, **common)
            elif ins[side].leaves and ins[side].ref is not None:
                why = "the product sums over no axis of the weight: it only scales"
                read = Read(op=op, kind="outer", dtype=dtype, reason=why, leaves=leaves, **blank, **common)
            elif ins[side].leaves:
                names = ", ".join("/".join(self.segments[i]) for i in sorted(ins[side].leaves))
                why = f"the weight is computed from {names}: store the computed weight as one leaf to quantize it"
                read = Read(
                    op=op,
                    kind="computed",
                    dtype=dtype,
                    reason=why,
                    leaves=tuple(sorted(ins[side].leaves)),
                    **blank,
                    **common,
                )
                out_near = Near(common_prefix([self.segments[i] for i in sorted(ins[side].leaves)]), None)
            elif ins[side].const or ins[side].known is None:
                why = "the weight is a captured constant: pass it in params to quantize it"
                read = Read(op=op, kind="captured", dtype=dtype, reason=why, **blank, **common)
        if read is not None:
            self.reads.append(read)
        leaves = frozenset() if any(data) else ins[0].leaves | ins[1].leaves
        return [Val(leaves=leaves, data=any(data), near=out_near)] * len(eqn.outvars)

    def looks_up(self, eqn: Any, ins: list[Val]) -> bool:
        """Whether a dynamic_slice takes one row of a table at an index that is data (a single token)."""
        shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
        picked = [d for d, (n, size) in enumerate(zip(shape, sizes, strict=True)) if size != n]
        if len(shape) != 2 or len(picked) != 1 or sizes[picked[0]] != 1:
            return False
        index = ins[1 + picked[0]]
        return index.data and index.known is None and not index.counter

    def embedding(self, eqn: Any, ins: list[Val], here: Path, scope: str, loops: tuple[int, ...]) -> None:
        """Rows looked up by run-time indices: a gather, or a dynamic_slice of one row."""
        ref, sizes = ins[0].ref, eqn.params["slice_sizes"]
        assert ref is not None
        shape = eqn.invars[0].aval.shape
        if eqn.primitive.name == "gather":
            dn = eqn.params["dimension_numbers"]
            looked_up = tuple(dn.start_index_map)
            dropped = set(dn.collapsed_slice_dims) == set(looked_up) and not dn.operand_batching_dims
        else:
            looked_up, dropped = tuple(d for d, n in enumerate(shape) if sizes[d] != n), True
        rows = ref.axes_of(list(looked_up))
        kept = ref.axes_of([d for d in range(len(shape)) if d not in looked_up])
        whole = all(sizes[d] == n for d, n in enumerate(shape) if d not in looked_up)
        single = all(sizes[d] == 1 for d in looked_up) and dropped
        ok = rows is not None and kept and whole and single and len(looked_up) == 1
        self.reads.append(
            Read(
                path=here,
                op="embedding",
                kind="embedding",
                side=0,
                ref=ref,
                in_axes=kept or (),
                out_axes=rows or (),
                batch_axes=(),
                loops=loops,
                shapes=tuple(tuple(a.aval.shape) for a in eqn.invars[:2]),
                out_shape=tuple(eqn.outvars[0].aval.shape),
                dtype=str(eqn.invars[0].aval.dtype),
                flops=0,
                near=nearest(ins),
                scope=scope_of(scope, eqn),
                reason="" if ok else "not a lookup of whole rows: stored in float",
            )
        )

    def opaque(self, eqn: Any, ref: Ref, here: Path, scope: str, loops: tuple[int, ...]) -> None:
        self.reads.append(
            Read(
                path=here,
                op="opaque",
                kind=eqn.primitive.name,
                side=None,
                ref=ref,
                in_axes=(),
                out_axes=(),
                batch_axes=(),
                loops=loops,
                shapes=tuple(tuple(getattr(a.aval, "shape", ())) for a in eqn.invars),
                out_shape=tuple(getattr(eqn.outvars[0].aval, "shape", ())) if eqn.outvars else (),
                dtype="",
                flops=0,
                near=None,
                scope=scope_of(scope, eqn),
                reason=f"read inside an opaque {eqn.primitive.name}, which qjax cannot rewrite",
            )
        )

    def composite(
        self,
        found: Composite,
        here: Path,
        eqn: Any,
        ins: list[Val],
        outs: list[Val],
        scope: str,
        loops: tuple[int, ...],
    ) -> None:
        """A matched softmax, activation, norm or attention, recorded at the equation that yields its result."""
        near = outs[0].near
        if found.op == "norm" and any(v.leaves and not v.data for v in ins):
            near = nearest([v for v in ins if v.leaves and not v.data])  # named after its own scale
            if near is not None and isinstance(found, Norm) and found.scale is not None and found.bias is not None:
                near = Near(near.segments[:-1], near.index)  # this is its bias; what scale and bias have in common
        out = tuple(eqn.outvars[0].aval.shape)
        self.reads.append(
            Read(
                path=here,
                op=found.op,
                kind=found.kind,
                side=None,
                ref=None,
                in_axes=(),
                out_axes=(),
                batch_axes=(),
                loops=loops,
                shapes=(out,),
                out_shape=out,
                dtype=str(eqn.outvars[0].aval.dtype),
                flops=0,
                near=near,
                scope=scope_of(scope, eqn),
                composite=found,
            )
        )

    # ------------------------------------------------------------------------------------------- control flow
    def call(
        self,
        eqn: Any,
        subs: list[tuple[tuple[str, int], Any]],
        ins: list[Val],
        here: Path,
        scope: str,
        loops: tuple[int, ...],
    ) -> list[Val]:
        """jit, remat, custom_jvp/vjp, shard_map, …: one body whose arguments are the equation's operands."""
        key, body = subs[0]
        consts = [captured_value(c) for c in consts_of(body)]
        variables = constvars_and_invars(body)
        if len(variables) != len(consts) + len(ins):
            for v in ins:
                if v.ref is not None:
                    self.opaque(eqn, v.ref, here, scope, loops)
            return [DATA] * len(eqn.outvars)
        label = scope_of(scope, eqn)
        args = list(ins)
        if eqn.primitive.name == "shard_map":
            args = [localized(v, var) for v, var in zip(ins, variables[len(consts) :], strict=True)]
            outs = self.body(body, args, (*here, key), label, loops)
            return [dataclasses.replace(v, ref=None, data=v.data or v.ref is not None) for v in outs]
        return self.body(body, args, (*here, key), label, loops)

    def do_scan(self, eqn: Any, ins: list[Val], here: Path, scope: str, loops: tuple[int, ...]) -> list[Val]:
        n_consts, n_carry = scan_arity(eqn.params)
        length, body = eqn.params["length"], eqn.params["jaxpr"]
        loop = self.new_loop(length, loops, here)
        consts, carry, xs = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]
        order = np.arange(length)[::-1] if eqn.params["reverse"] else np.arange(length)
        carried = carry_in(body, n_consts, n_carry, carry, loop, length)
        sliced = [self.slice_leading(v, loop, order) for v in xs]
        outs = self.body(body, consts + carried + sliced, (*here, ("jaxpr", 0)), scope_of(scope, eqn), (*loops, loop))
        return carry_out(carry, carried, outs[:n_carry]) + [leaving(v) for v in outs[n_carry:]]

    def new_loop(self, length: int | None, loops: tuple[int, ...], path: Path) -> int:
        loop = len(self.loops)
        self.loops[loop] = Loop(length, set(), loops, path)
        return loop

    def slice_leading(self, v: Val, loop: int, order: np.ndarray) -> Val:
        """The value of one scan step of ``xs``: its leading axis is sliced away by the loop."""
        known = None
        if v.known is not None and v.known.loop is None and v.known.value.ndim >= 1:
            known = Known(v.known.value[order], loop)
        ref = None
        if v.ref is not None and v.ref.dims and len(v.ref.dims[0]) == 1 and v.ref.dims[0][0][1] == 1:
            axis = v.ref.dims[0][0][0]
            ref = dataclasses.replace(
                v.ref, dims=v.ref.dims[1:], index=(*v.ref.index, Index(axis, tuple(int(i) for i in order), loop))
            )
            self.loops[loop].leaves.add(ref.leaf)
        return dataclasses.replace(v, ref=ref, known=known, near=self.near_of(ref) if ref else v.near)

    def do_while(self, eqn: Any, ins: list[Val], here: Path, scope: str, loops: tuple[int, ...]) -> list[Val]:
        p = eqn.params
        n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
        loop = self.new_loop(None, loops, here)
        carry = ins[n_cond + n_body :]
        carried = carry_in(p["body_jaxpr"], n_body, len(carry), carry, loop, None)
        label = scope_of(scope, eqn)
        self.body(p["cond_jaxpr"], ins[:n_cond] + carried, (*here, ("cond_jaxpr", 0)), label, (*loops, loop))
        outs = self.body(
            p["body_jaxpr"], ins[n_cond : n_cond + n_body] + carried, (*here, ("body_jaxpr", 0)), label, (*loops, loop)
        )
        return carry_out(carry, carried, outs)

    def do_cond(self, eqn: Any, ins: list[Val], here: Path, scope: str, loops: tuple[int, ...]) -> list[Val]:
        label = scope_of(scope, eqn)
        results = [
            self.body(b, ins[1:], (*here, ("branches", i)), label, loops) for i, b in enumerate(eqn.params["branches"])
        ]
        merged = []
        for outs in zip(*results, strict=True):
            weights = all(v.leaves and not v.data for v in outs)  # which one is data, but each of them is a weight
            leaves = frozenset().union(*(v.leaves for v in outs)) if weights else frozenset()
            merged.append(Val(leaves=leaves, data=not weights, near=nearest(list(outs))))
        return merged
