"""Finding attention: ``softmax(mask(queries @ keys * scale)) @ values``, however it is spelled and laid out.

Starting from a softmax, its dimensions are followed forwards to the product with the values and backwards to the
product of queries and keys. It is attention if the softmax runs over exactly the axis that the keys bring in and the
values are contracted over, and if both products agree about every other axis.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from qjax.composites import axes as ax
from qjax.composites import masks
from qjax.composites.axes import Axis, Labels
from qjax.composites.base import Composite, ordered
from qjax.composites.graph import FUSED_ATTENTION, Level, Node, Value
from qjax.composites.roles import roles
from qjax.composites.scores import Condition, Scores, Term, find_scores, product_dims
from qjax.composites.softmax import Softmax, zeroes


@dataclasses.dataclass(frozen=True)
class Operand:
    """A value and what its dimensions are.

    Attributes:
        value: the value.
        dims: for each dimension the numbers of the attention's axes that it is made of, outermost first; a dimension
            of size one that belongs to no axis is empty.
    """

    value: Value
    dims: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Mask:
    """One condition on which scores stay; a mask has all of them joined by "and".

    Attributes:
        operand: the predicate, before it is broadcast; with ``factor``, a constant summand.
        keep: which truth value keeps a score.
        fill: number that replaces a removed score or is added to it; -inf for a constant summand.
        factor: number that a constant summand is multiplied by (zero: the score stays); None for a predicate.
        fixed: whether it can be computed from constants alone.
    """

    operand: Operand
    keep: bool
    fill: float
    factor: float | None
    fixed: bool


@dataclasses.dataclass(frozen=True)
class Factor:
    """A run-time bias (``factor`` times it is added) or gain (multiplied, to the power ``factor``)."""

    operand: Operand
    factor: float


@dataclasses.dataclass(frozen=True)
class Attention(Composite):
    """``output = softmax(masked(cap(scale * q k) + biases)) v``.

    Attributes:
        axes: (role, size) of each logical axis; roles are batch, head, group (query heads that share a key), query,
            key, feature (contracted by the scores), value (features of the values) and unit.
        q, k, v: what enters the two products.
        output_dims: as `Operand.dims`, of ``output``.
        scale: factor on the product of ``q`` and ``k``; what they were multiplied by before is ``prescale``.
        prescale: constant factor already inside ``q`` and ``k``, where it is applied right before the product.
        softcap: ``cap(s) = softcap * tanh(s / softcap)``; None for no cap.
        masks: conditions on scores.
        biases: summands; gains: run-time factors.
        causal: offset and window, if a mask that is known without data is causal.
        padded: whether a mask depends on data.
        groups: query heads per key head, repeated keys included.
        scores, softmax, values: nodes of the two products and the softmax between; all the same fused node and None
            for cuDNN attention.
        probabilities: what enters the product with the values; None when fused.
    """

    op: ClassVar[str] = "attention"
    axes: tuple[tuple[str, int], ...]
    q: Operand
    k: Operand
    v: Operand
    output_dims: tuple[tuple[int, ...], ...]
    scale: float
    prescale: float
    softcap: float | None
    masks: tuple[Mask, ...]
    biases: tuple[Factor, ...]
    gains: tuple[Factor, ...]
    causal: masks.Causal | None
    padded: bool
    groups: int
    scores: Node
    softmax: Softmax | None
    values: Node
    probabilities: Operand | None

    def labels(self, operand: Operand) -> tuple[str, ...]:
        """Return the role of each dimension, such as ``("batch", "query", "head", "feature")``."""
        return tuple("+".join(self.axes[a][0] for a in dim) or "unit" for dim in operand.dims)


def find_attention(level: Level, softmaxes: list[Softmax]) -> list[Attention]:
    """Return the attentions of a level.

    Matched: ``jax.nn.dot_product_attention`` (XLA and cuDNN), Flax, Equinox, and products by hand in any layout, with
    masks by ``where`` or addition, biases, soft-caps, grouped or repeated keys, KV caches.
    Not matched: normalisation after the product with the values, ``exp(log_softmax)``, dropout between the softmax
    and that product, and ``softmax(x @ A) @ B`` with plain inputs A and B and no batch: a layer with two weights.

    Args:
        level: where to look.
        softmaxes: the softmaxes of the level.
    """
    found = [match for node in level.named(FUSED_ATTENTION) if (match := _fused(node)) is not None]
    for softmax in softmaxes:
        if len(softmax.axes) != 1:
            continue
        readers = _readers(softmax)
        if not readers:
            continue
        soft = ax.leaves([softmax.labels[softmax.axes[0]]])
        for scores in find_scores(softmax.logits, list(softmax.logit_labels), soft):
            matches = [match for reader in readers if (match := _assemble(level, softmax, scores, *reader)) is not None]
            if matches:
                found += matches
                break
    return found


def _readers(softmax: Softmax) -> list[tuple[Node, int, Labels, list[Node]]]:
    """Return (product, side, labels of that operand, nodes passed) for each product that reads the probabilities."""
    found = []
    queue: list[tuple[Value, Labels, list[Node]]] = [(softmax.output, list(softmax.labels), [])]
    for value, labels, passed in queue:
        if len(queue) > 24:
            break
        for user in dict.fromkeys(value.users):
            if user.name == "dot_general":
                if user.inputs[0] is not user.inputs[1]:
                    found.append((user, user.inputs.index(value), labels, passed))
            elif user.name == "select_n" and zeroes(user, value, list(softmax.zeroed)):
                queue.append((user.output, labels, [*passed, user]))
            elif user.name in ax.TRANSPARENT and (after := ax.forward(user, labels)) is not None:
                queue.append((ax.result_of(user, value), after, [*passed, user]))
    return found


def _assemble(
    level: Level, softmax: Softmax, scores: Scores, values: Node, side: int, p_labels: Labels, passed: list[Node]
) -> Attention | None:
    """Check that the two products belong together, and describe them."""
    (batch, free), contracted = product_dims(scores.product), scores.product.params["dimension_numbers"][0]
    ks, qs = scores.key_side, 1 - scores.key_side
    q, k, v = scores.product.inputs[qs], scores.product.inputs[ks], values.inputs[1 - side]
    if not contracted[0] or q.ndim < 2 or _is_layer(q, k, v, batch) or _circular(scores):
        return None

    # Axes of every dimension of q, k and v.
    n, middle = len(batch[0]), len(batch[0]) + len(free[0])
    z = scores.labels
    feature = ax.fresh(q.shape[d] for d in contracted[qs])
    q_labels, k_labels = _place(q, batch[qs], z[:n]), _place(k, batch[ks], z[:n])
    frees = (z[n:middle], z[middle:])
    for labels, own, side_ in ((q_labels, free[qs], qs), (k_labels, free[ks], ks)):
        for d, label in zip(own, frees[side_], strict=True):
            labels[d] = label
        for d, label in zip(contracted[side_], feature, strict=True):
            labels[d] = label
    p_contracted, p_batch = values.params["dimension_numbers"]
    v_labels = ax.fresh(v.shape)
    for mine, theirs in ((p_contracted[1 - side], p_contracted[side]), (p_batch[1 - side], p_batch[side])):
        for d, e in zip(mine, theirs, strict=True):
            v_labels[d] = p_labels[e]
    v_free = [d for d in range(v.ndim) if d not in p_contracted[1 - side] and d not in p_batch[1 - side]]

    # Walking back may split axes, so it comes before anything is compared.
    groups = _repeated(k, k_labels, z[:n])
    prescale = _prescale(q) * _prescale(k)
    soft = ax.leaves([softmax.labels[softmax.axes[0]]])
    shared_axes, query_axes = ax.leaves(z[:n]), ax.leaves(frees[qs])

    def telling(labels: Labels) -> list[Axis]:
        return [a for a in ax.leaves(labels) if a.size != 1 or a in soft]

    p_free = [d for d in range(len(p_labels)) if d not in p_contracted[side] and d not in p_batch[side]]
    if telling([p_labels[d] for d in p_contracted[side]]) != soft:
        return None
    if set(telling([p_labels[d] for d in p_batch[side]])) != set(ax.proper(shared_axes)):
        return None
    if set(telling([p_labels[d] for d in p_free])) != set(ax.proper(query_axes)):
        return None

    causal, tokens = _causal(scores.conditions, frees[qs], soft)
    role = roles(q, q_labels, shared_axes, query_axes, ax.leaves(feature), tokens)
    role.update({a: "group" for a in groups})
    role.update({a: "key" for a in soft} | {a: "feature" for a in ax.leaves(feature)})
    role.update({a: "value" for d in v_free for a in ax.leaves([v_labels[d]])})
    out_labels = [p_labels[d] for d in p_batch[side]]
    mine, other = [p_labels[d] for d in p_free], [v_labels[d] for d in v_free]
    out_labels += mine + other if side == 0 else other + mine
    numbering = _Numbering(role)
    # These in this order, so that axes are numbered batch, query, key, feature, value.
    numbering.add([*shared_axes, *query_axes, *soft, *ax.leaves(feature)])
    nodes = {*scores.nodes, *softmax.nodes, *passed, values}
    return Attention(
        kind="attention",
        output=values.output,
        nodes=ordered(nodes),
        exposed=level.exposed(nodes, values.output),
        q=numbering.operand(q, q_labels),
        k=numbering.operand(k, k_labels),
        v=numbering.operand(v, v_labels),
        output_dims=numbering.dims(out_labels),
        scale=scores.scale,
        prescale=prescale,
        softcap=scores.softcap,
        masks=tuple(_mask(numbering, c) for c in scores.conditions),
        biases=tuple(_factor(numbering, t) for t in scores.biases),
        gains=tuple(_factor(numbering, t) for t in scores.gains),
        causal=causal,
        padded=any(not c.value.fixed for c in scores.conditions),
        groups=ax.size(a for a, name in role.items() if name == "group"),
        scores=scores.product,
        softmax=softmax,
        values=values,
        probabilities=numbering.operand(values.inputs[side], p_labels),
        axes=numbering.axes(),
    )


class _Numbering:
    """Numbers for axes, in the order in which they are met."""

    def __init__(self, role: dict[Axis, str]):
        self.role = role
        self.number: dict[Axis, int] = {}

    def add(self, axes: list[Axis]) -> None:
        for axis in axes:
            self.number.setdefault(axis, len(self.number))

    def dims(self, labels: Labels | tuple[tuple[Axis, ...], ...]) -> tuple[tuple[int, ...], ...]:
        self.add([a for a in ax.leaves(labels) if a.size != 1 or a in self.role])
        return tuple(tuple(self.number[a] for a in ax.leaves([label]) if a in self.number) for label in labels)

    def operand(self, value: Value, labels: Labels | tuple[tuple[Axis, ...], ...]) -> Operand:
        return Operand(value, self.dims(labels))

    def axes(self) -> tuple[tuple[str, int], ...]:
        return tuple((self.role.get(a, "unit"), a.size) for a in self.number)


def _place(value: Value, dims: tuple[int, ...], labels: Labels) -> Labels:
    out = ax.fresh(value.shape)
    for d, label in zip(dims, labels, strict=True):
        out[d] = label
    return out


def _is_layer(q: Value, k: Value, v: Value, batch: tuple[tuple[int, ...], ...]) -> bool:
    """Whether ``k`` and ``v`` are rather two weights of a dense layer: untouched inputs, applied to a whole batch."""
    return not batch[0] and ax.root(k).node is None and ax.root(v).node is None and ax.root(q).node is not None


def _circular(scores: Scores) -> bool:
    """Whether a mask, bias or gain is computed from the scores themselves, as in top-k attention."""
    product = scores.product
    stack = [t.value for t in (*scores.biases, *scores.gains, *scores.conditions)]
    seen: set[Node] = set()
    while stack:
        node = stack.pop().node
        if node is product:
            return True
        if node is not None and node not in seen and node.index > product.index:
            seen.add(node)
            stack += node.inputs
    return False


def _prescale(value: Value) -> float:
    """Return the constant that ``value`` has just been multiplied by."""
    factor = 1.0
    for _ in range(4):
        node = ax.root(value).node
        found = ax.scaled(node) if node is not None else None
        if found is None:
            break
        value = found[0]
        factor *= found[1]
    return factor


def _repeated(k: Value, labels: Labels, batch: Labels) -> list[Axis]:
    """Return the shared axes along which the keys are only repeated."""
    _, below = ax.strip(k, labels)
    present = set(ax.leaves(below))
    return [a for a in ax.leaves(batch) if a.size != 1 and a not in present]


def _causal(
    conditions: tuple[Condition, ...], free: Labels, soft: list[Axis]
) -> tuple[masks.Causal | None, list[Axis] | None]:
    """Return the kind of causal mask and the query dimension that it is causal along."""
    fixed = [c for c in conditions if c.value.fixed]
    for label in free:
        query = ax.proper(ax.leaves([label]))
        for together in [fixed, *([c] for c in fixed if len(fixed) > 1)]:
            if query and (kind := masks.causal(together, query, soft)) is not None:
                return kind, query
    return None, None


def _mask(numbering: _Numbering, condition: Condition) -> Mask:
    return Mask(
        operand=numbering.operand(condition.value, condition.labels),
        keep=condition.keep,
        fill=condition.fill,
        factor=condition.factor,
        fixed=condition.value.fixed,
    )


def _factor(numbering: _Numbering, term: Term) -> Factor:
    return Factor(numbering.operand(term.value, term.labels), term.factor)


# ------------------------------------------------------------------------------------------------ cuDNN
_FUSED_AXES = ("batch", "head", "group", "query", "key", "feature", "value")


def _fused(node: Node) -> Attention | None:
    """Describe cuDNN attention; None with dropout, paged keys or a custom change of scores."""
    params = node.params
    if params.get("dropout_rate", 0.0) or params.get("score_mod") is not None:
        return None
    q, k, v, bias = node.inputs[:4]
    if q.ndim != 4 or any(0 not in page.shape for page in node.inputs[8:10]):
        return None
    heads_first = bool(params.get("layout"))  # AttentionLayout: BTNH = 0, BNTH = 1
    head, token = (1, 2) if heads_first else (2, 1)
    groups = q.shape[head] // k.shape[head]
    sizes = (q.shape[0], k.shape[head], groups, q.shape[token], k.shape[token], q.shape[3], v.shape[3])
    heads = (1, 2) if groups > 1 else (1,)

    def dims(heads: tuple[int, ...], tokens: int, last: int) -> tuple[tuple[int, ...], ...]:
        middle = (heads, (tokens,)) if heads_first else ((tokens,), heads)
        return ((0,), *middle, (last,))

    kind = getattr(params.get("mask_type"), "name", "NO_MASK")
    biases = ()
    if 0 not in bias.shape:
        full = ((0,), heads, (3,), (4,))
        labelled = tuple(d if n != 1 else () for d, n in zip(full, bias.shape, strict=True))
        biases = (Factor(Operand(bias, labelled), 1.0),)
    return Attention(
        kind="attention",
        output=node.output,
        nodes=(node,),
        exposed=(),
        axes=tuple(zip(_FUSED_AXES, sizes, strict=True)),
        q=Operand(q, dims(heads, 3, 5)),
        k=Operand(k, dims((1,), 4, 5)),
        v=Operand(v, dims((1,), 4, 6)),
        output_dims=dims(heads, 3, 6),
        scale=float(params["scale"]),
        prescale=_prescale(q) * _prescale(k),
        softcap=None,
        masks=(),
        biases=biases,
        gains=(),
        causal=_fused_causal(kind, params.get("sliding_window_length")),
        padded="PADDING" in kind,
        groups=groups,
        scores=node,
        softmax=None,
        values=node,
        probabilities=None,
    )


def _fused_causal(kind: str, window: int | None) -> masks.Causal | None:
    return masks.Causal(0, window or None) if "CAUSAL" in kind or window else None
