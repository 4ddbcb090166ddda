"""Emitting softmax, logarithmic codes and the product with the values as one op.

The program has a softmax and, somewhere behind it, a product. The op reads what the softmax reads, so that has to be at
hand where the product is emitted: the analysis says which variable of which jaxpr holds the scores (`scores_at`), the
replay keeps its value while that jaxpr runs (`Kept`), and gives it to shared bodies of calls as a further operand. The
softmax itself is replayed as it stood; nothing reads it any more, and the compiler drops it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from jax import lax
from jax.extend import core as jex

from qjax import ops
from qjax.analysis.reads import Path
from qjax.composites import Attention
from qjax.composites.graph import Value
from qjax.formats import Log
from qjax.kernels.devices import cuda_capability, platform_here
from qjax.rewriting.operands import Operands, fixed_aux

Place = tuple[Path, Any]
"""A scope, which is the address of the body of a call, and a variable of it."""

ROUNDED = "rounded, then a float product"
"""How the operands of products of activations run that are no such op."""


@dataclasses.dataclass(frozen=True)
class Softmaxed:
    """Where an attention's op can be emitted.

    Attributes:
        place: of the scores.
        side: which operand of the product with the values the probabilities are.
        dims: for each dimension of that operand the dimension of the scores.
    """

    place: Place
    side: int
    dims: tuple[int, ...]


def softmaxed(found: Attention, acts: Operands) -> Softmaxed | str:
    """Return how the product with the values of an attention becomes the op, or why it does not."""
    softmax, values = found.softmax, found.values
    if softmax is None or found.probabilities is None:
        return "it is one fused kernel"
    side = 0 if values.inputs[0] is found.probabilities.value else 1
    p, v = acts.sides[side], acts.sides[1 - side]
    if p is None or not isinstance(p.fmt, Log) or p.fmt.shift or p.fmt.group is not None or p.fmt.per != "tensor":
        return "its probabilities have no logarithmic codes"
    if p.aux is None or p.aux[0] != (1.0,):
        return "the scale of its probabilities is not 1"
    contract, batch = (sides[side] for sides in values.params["dimension_numbers"])
    dims = _moved(found.probabilities.value, softmax.output)
    if softmax.output.node is None or softmax.output.node.name == "select_n":
        return "something is zeroed behind its softmax"
    if dims is None or softmax.labels != softmax.logit_labels:
        return "its probabilities are laid out anew before the product"
    if [dims[d] for d in contract] != list(softmax.axes):
        return "the product sums over other axes than the softmax"
    if v is not None and v.aux is not None and len(v.aux[0]) > 1:
        theirs = values.params["dimension_numbers"][1][1 - side]
        if not set(v.heads) <= set(theirs):
            return "heads of its values are no batch of the product"
    if values.params.get("out_sharding") is not None:
        return "its sharding is asked for by name"
    place = _visible(softmax.logits, values.path)
    if place is None:
        return "its softmax is inside a function that its product is not in"
    return Softmaxed(place, side, dims)


def _moved(value: Value, source: Value) -> tuple[int, ...] | None:
    """For each dimension of a value that of its source, of which it is a cast or a transpose; None: it is not."""
    dims = tuple(range(value.ndim))
    while value is not source:
        node = value.node
        if node is None or node.name not in ("convert_element_type", "copy", "transpose"):
            return None
        if node.name == "transpose":
            permutation = node.params["permutation"]
            dims = tuple(permutation[d] for d in dims)
        value = node.inputs[0]
    return dims


def _visible(value: Value, path: Path) -> Place | None:
    """The innermost place of a value that is in reach of the equation at ``path``."""
    places = [(value.scope, value.atom), *value.aliases]
    reach = [
        (scope, atom)
        for scope, atom in places
        if not isinstance(atom, jex.Literal)
        and path[: len(scope)] == scope
        and all(step == ("jaxpr", 0) for step in path[len(scope) : -1] if isinstance(step, tuple))
    ]
    return max(reach, key=lambda place: len(place[0]), default=None)


class Kept:
    """Part of a `qjax.rewrite.Rewriter`: the scores of attentions, while the body that computes them is replayed."""

    program: Any
    inputs: dict[str, Any]
    kept: dict[int, Any]
    """Number of the read that is the product with the values -> scores."""
    brings_scores: ClassVar[bool] = True
    """Whether bodies of shared calls are given scores; where they are given other things, products stay products."""

    @functools.cached_property
    def softmaxed(self) -> dict[int, Softmaxed]:
        """How products with values become the op, by the number of their read."""
        out: dict[int, Softmaxed] = {}
        if not self.brings_scores or not any(isinstance(act, Operands) for act in self.inputs.values()):
            return out
        for read in self.program.analysis.reads:
            number = self.program.read_at.get(read.composite.values.path) if _is_attention(read) else None
            if number is None or number in out:
                continue
            names = self.program.slices[number].name_of.values()
            acts = {self.inputs.get(name) for name in names}
            how = [softmaxed(read.composite, a) if isinstance(a, Operands) else "it is float" for a in acts]
            if len(how) == 1 and isinstance(how[0], Softmaxed):
                out[number] = how[0]
        return out

    @functools.cached_property
    def wanted(self) -> dict[Path, dict[Any, list[int]]]:
        """Scope -> variable -> the reads whose scores it holds."""
        out: dict[Path, dict[Any, list[int]]] = {}
        for number, how in self.softmaxed.items():
            scope, variable = how.place
            out.setdefault(scope, {}).setdefault(variable, []).append(number)
        return out

    def keep(self, wanted: Mapping[Any, list[int]], variables: Sequence[Any], values: Sequence[Any]) -> None:
        """Keep those of these values that are scores."""
        for variable, value in zip(variables, values, strict=True):
            for number in wanted.get(variable, ()):
                self.kept[number] = value

    def drop(self, wanted: Mapping[Any, list[int]]) -> None:
        """Forget the scores of a body that has been replayed: they are values of its own trace."""
        for numbers in wanted.values():
            for number in numbers:
                self.kept.pop(number, None)

    def brought(self, numbers: Sequence[int]) -> list[Any]:
        """The scores of each of these reads that are computed outside of the call at hand."""
        return [self.kept.get(number) for number in numbers]

    @contextlib.contextmanager
    def bringing(self, held: Mapping[int, Any]) -> Iterator[None]:
        """Use inside the scores that a shared body was given."""
        before, self.kept = self.kept, {n: scores for n, scores in held.items() if scores is not None}
        try:
            yield
        finally:
            self.kept = before


def _is_attention(read: Any) -> bool:
    return isinstance(read.composite, Attention)


def emit_log_attention(rewriter: Any, eqn: Any, values: list[Any], act: Operands, where: str) -> Any:
    """Return the product with the values of an attention as the op, or None where it has to stay a product."""
    site = rewriter.program.by_name.get(where)
    how: Softmaxed | None = rewriter.softmaxed.get(site.read) if site is not None else None
    scores = rewriter.kept.get(site.read) if site is not None else None
    if how is None or scores is None:
        return None
    (contract, batch), side = eqn.params["dimension_numbers"], how.side
    other = 1 - side
    p, rounding = act.sides[side], act.sides[other]
    assert p is not None
    v, out = values[other], eqn.outvars[0].aval
    free = [tuple(d for d in range(values[n].ndim) if d not in contract[n] and d not in batch[n]) for n in range(2)]
    sizes = [tuple(values[n].shape[d] for d in free[n]) for n in range(2)]
    lead = tuple(v.shape[d] for d in batch[other])
    keys = v.shape[contract[other][0]]

    order = (*batch[side], *free[side], *contract[side])
    scores = lax.transpose(scores, [how.dims[d] for d in order]).reshape(*lead, math.prod(sizes[side]), keys)
    there = (*batch[other], *contract[other], *free[other])
    moved = lax.transpose(v, there).reshape(*lead, keys, math.prod(sizes[other]))
    fitted = None
    if rounding is not None and rounding.aux is not None:
        aux = fixed_aux(v, rounding, where)
        each = {n: lax.transpose(a, there).reshape(*(a.shape[d] for d in batch[other]), 1, 1) for n, a in aux.items()}
        fitted = rounding.fmt, each
    implementation = _implementation(rewriter.implementation)
    if rewriter.choices is not None:
        sizes_of = (*lead, *scores.shape[-2:-1], moved.shape[-1], keys)
        rewriter.choices[where, p.fmt.name] = ops.choose(
            "log_attention",
            p.fmt,
            fitted[0] if fitted is not None else None,
            sizes_of,
            platform_here(),
            x_dtype=scores.dtype,
            capability=cuda_capability(),
            implementation=implementation,
        )
    y = ops.log_attention(
        scores,
        moved,
        p.fmt,
        values=fitted,
        out_dtype=out.dtype,
        precision=eqn.params["precision"],
        implementation=implementation,
        site=where,
    )
    n = len(lead)
    y = y.reshape(*lead, *sizes[side], *sizes[other])
    if side:  # the values come first in the product
        first = n + len(sizes[side])
        y = lax.transpose(y, (*range(n), *range(first, y.ndim), *range(n, first)))
    return y


def lowering_of(rewriter: Any, site: Any) -> tuple[str, str]:
    """Return how the product with the values of an attention site runs, and why it is not the op where it could be."""
    found = rewriter.program.analysis.reads[site.read].composite
    if not isinstance(found, Attention):
        return ROUNDED, ""
    number = rewriter.program.read_at.get(found.values.path)
    acts = None if number is None else rewriter.inputs.get(rewriter.where(number))
    if not isinstance(acts, Operands) or not any(o is not None and isinstance(o.fmt, Log) for o in acts.sides):
        return ROUNDED, ""
    name = next(o.fmt.name for o in acts.sides if o is not None and isinstance(o.fmt, Log))
    choice = (rewriter.choices or {}).get((rewriter.where(number), name))
    if choice is not None:
        return f"log_attention by {choice.name}", ""
    why = softmaxed(found, acts)
    return ROUNDED, "no log_attention: " + (why if isinstance(why, str) else "its formats differ between loop steps")


def _implementation(name: str | None) -> str | None:
    """A lowering that is named for the whole model, where this op has one of that name."""
    return name if any(e.name == name for e in ops.lowering_table("log_attention").rows) else None
