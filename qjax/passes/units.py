"""What is calibrated together: products of one input, and the two products of an attention.

Found on the program, wherever its author has written it: products with parameters whose activations are one value form
a unit (queries, keys and values of a layer), and what that value is decides how it may be quantized. It may be what a
LayerNorm gives to these products alone, whose scale and shift then take up those of channels; it may be what a GELU
gives, which has a known minimum; or anything else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax._compat import consts_of, constvars_and_invars
from qjax.analysis.biases import Bias, bias_of
from qjax.composites import Activation, Attention, Level, Node, Norm, Value, find_composites, inlined
from qjax.composites import axes as ax
from qjax.errors import RecipeError
from qjax.program import Program

GELU_SHIFT = {False: 0.16997124254703522, True: 0.17004078}
"""Minus the minimum of GELU, a little above it in float32: of the erf form (as the authors write it), of the tanh form.

The minima are -0.1699712075 and -0.1700407506.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class LinearUnit:
    """Products with parameters that share their activations.

    Attributes:
        sites: their names, in program order.
        decisions: what the recipe says of each.
        kind: "norm", "gelu", "conv" or "plain".
        nodes: the products in the flat program.
        sides: which operand of each is the activations.
        shift: of a GELU, what is added to its outputs so that none is negative.
        norm: (leaf of the scale, leaf of the bias) of the LayerNorm, where ``kind`` is "norm".
        biases: site -> the bias behind it, or why there is none.
        notes: why something is not done.
    """

    sites: tuple[str, ...]
    decisions: tuple[Any, ...]
    kind: str
    nodes: tuple[Node, ...]
    sides: tuple[int, ...]
    shift: float = 0.0
    norm: tuple[str, str] | None = None
    biases: Mapping[str, Bias | str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the first site."""
        return self.sites[0]


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionUnit:
    """An attention.

    Attributes:
        name: of its site.
        decision: what the recipe says of it.
        found: the match.
        notes: why something is not done.
    """

    name: str
    decision: Any
    found: Attention
    notes: tuple[str, ...] = ()


def find_units(program: Program, decisions: Mapping[str, Any]) -> tuple[Level, list[LinearUnit | AttentionUnit]]:
    """Return the flat program, and what of it is calibrated together, in program order.

    Args:
        program: the trace.
        decisions: site name -> what a recipe says.

    Raises:
        RecipeError: a site that is quantized runs inside a loop, or over stacked weights.
    """
    level = inlined(program.jaxpr)
    at = {node.path: node for node in level.nodes}
    composites = find_composites(program.jaxpr)
    # Matches were made on a flat view of their own; values of the two views are told apart by their place.
    acts = {c.output_path: c for c in composites if isinstance(c, Activation | Norm)}
    attentions = {c.output_path: c for c in _attentions(level)}
    groups: dict[Any, list[tuple[Any, Node, int]]] = {}
    units: list[tuple[int, LinearUnit | AttentionUnit]] = []
    for site in program.sites:
        d = decisions[site.name]
        if d.skip or d.rule is None or not (d.weights or d.inputs or d.operands):
            continue
        if site.op == "attention":
            found = attentions.get(site.path)
            if found is None:
                raise RecipeError(_looped(site.name))
            notes = (_ALSO_READ,) if "p" in d.operands and _also_read(level, found) else ()
            units.append((found.scores.index, AttentionUnit(site.name, d, found, notes)))
            continue
        node = at.get(site.path)
        if node is None or program.slices[site.read].loops:
            raise RecipeError(_looped(site.name))
        if site.op not in ("dot", "conv"):
            raise RecipeError(f"{site.name}: a {site.op} is not searched; skip it, or leave it to another recipe")
        if site.batch_axes:
            raise RecipeError(f"{site.name}: its weights are stacked, and scales are searched for one matrix; skip it")
        side = program.analysis.reads[site.read].side
        which = 1 if side == 0 and site.op == "dot" else 0
        key = (node.inputs[which] if site.op == "dot" else site.name, d.weights, d.inputs)
        groups.setdefault(key, []).append((site, node, which))
    for members in groups.values():
        units.append((members[0][1].index, _linear(program, level, members, decisions, acts)))
    return level, [unit for _, unit in sorted(units, key=lambda pair: pair[0])]


_ALSO_READ = (
    "its probabilities are also read by something else than the product with the values: that gets them as they are, "
    "and only the product gets codes"
)


def _also_read(level: Level, found: Attention) -> bool:
    """Whether anything but the product with the values reads the probabilities of an attention."""
    if found.probabilities is None:
        return False
    line = [ax.root(found.probabilities.value)]
    while line:
        value = line.pop()
        if value in level.outputs:
            return True
        for user in value.users:
            if user is found.values:
                continue
            if user.name not in ax.TRANSPARENT:
                return True
            line += user.outputs
    return False


def _attentions(level: Level) -> list[Attention]:
    from qjax.composites.find import composites_of

    return [c for c in composites_of(level) if isinstance(c, Attention)]


def _looped(name: str) -> str:
    return (
        f"{name}: it runs inside a loop over layers, and AdaLog's search takes layers that are written out one by one; "
        "unroll the loop, or skip the site"
    )


def _linear(
    program: Program,
    level: Level,
    members: list[tuple[Any, Node, int]],
    decisions: Mapping[str, Any],
    acts: Mapping[Any, Activation | Norm],
) -> LinearUnit:
    sites = tuple(site.name for site, _, _ in members)
    nodes, sides = tuple(node for _, node, _ in members), tuple(which for _, _, which in members)
    common: dict[str, Any] = dict(
        sites=sites,
        decisions=tuple(decisions[name] for name in sites),
        nodes=nodes,
        sides=sides,
        biases={name: bias_of(program, name) for name in sites},
    )
    if members[0][0].op == "conv":
        return LinearUnit(kind="conv", **common)
    value = nodes[0].inputs[sides[0]]
    source = ax.root(value)
    made = _made_by(source, acts)
    if made is None:  # windows of a feature map: rows moved about, channels as they were
        source = _unmoved(value)
        made = _made_by(source, acts)
        made = made if isinstance(made, Norm) else None
    if isinstance(made, Activation):
        if made.kind != "gelu":
            note = f"its inputs are those of a {made.kind} and no GELU: they are quantized evenly"
            return LinearUnit(kind="plain", notes=(note,), **common)
        notes = tuple(
            f"the shift of its inputs is not folded into a bias but taken off at run time: {n}: {why}"
            for n, why in common["biases"].items()
            if isinstance(why, str)
        )
        return LinearUnit(kind="gelu", shift=GELU_SHIFT[made.approximate], notes=notes, **common)
    if isinstance(made, Norm) and made.kind == "layer_norm":
        norm = _parameters(program, level, made, source, nodes)
        if isinstance(norm, tuple):
            missing = next((f"{n}: {why}" for n, why in common["biases"].items() if isinstance(why, str)), None)
            tied = next((n for n in sites if _readers(program, n) > 1), None)
            if missing is None and tied is None:
                return LinearUnit(kind="norm", norm=norm, **common)
            norm = f"{tied} reads a weight that others read too" if tied else f"a bias is missing behind it ({missing})"
        note = f"its LayerNorm is not re-parameterized: {norm}"
        return LinearUnit(kind="plain", notes=(note,), **common)
    return LinearUnit(kind="plain", **common)


def _made_by(source: Value, acts: Mapping[Any, Activation | Norm]) -> Activation | Norm | None:
    """The activation or norm that gives a value; casts behind it were walked through, those within may belong to it."""
    node = source.node
    if node is None:
        return None
    found = acts.get(node.path)
    if found is not None:
        return found
    for user in source.users:  # a cast that the match has taken in stands between
        if user.name in ax.TRANSPARENT and user.path in acts:
            return acts[user.path]
    return None


def _unmoved(value: Value) -> Value:
    """The value whose rows ops have moved about (Swin's windows and their shifts), with its channels as they were."""
    while (node := value.node) is not None:
        if node.name == "concatenate":  # jnp.roll: two slices in another order
            cuts = [part.node for part in node.inputs]
            wholes = [cut.inputs[0] for cut in cuts if cut is not None and cut.name == "slice"]
            along = node.params["dimension"]
            same = len(wholes) == len(cuts) and all(w is wholes[0] for w in wholes)
            if not same or along == len(value.shape) - 1 or wholes[0].shape != value.shape:
                return value
            if len({cut.params["start_indices"][along] for cut in cuts if cut is not None}) < len(cuts):
                return value  # one part twice
            value = wholes[0]
        elif _moves_rows(node):
            value = node.inputs[0]
        else:
            return value
    return value


def _moves_rows(node: Node) -> bool:
    """Whether a node takes or moves whole rows along the last axis, and adds none."""
    if not node.inputs or not node.inputs[0].shape or not node.outputs or not node.outputs[0].shape:
        return False
    before, after, params = node.inputs[0].shape, node.outputs[0].shape, node.params
    last = len(before) - 1
    if before[-1] != after[-1]:
        return False
    match node.name:
        case "transpose":
            return params["permutation"][-1] == last
        case "broadcast_in_dim":
            return bool(params["broadcast_dimensions"]) and params["broadcast_dimensions"][-1] == len(after) - 1
        case "squeeze":
            return last not in {d % (last + 1) for d in params["dimensions"]}
        case "expand_dims":
            return True
        case "reshape":
            return params.get("dimensions") is None
        case "pad":
            return all((int(low), int(high), int(inner)) == (0, 0, 0) for low, high, inner in params["padding_config"])
        case name:
            return name in ax.TRANSPARENT


def _readers(program: Program, name: str) -> int:
    """How many sites read the slice that a site reads."""
    site = program.by_name[name]
    return sum(other.leaf == site.leaf and other.slice == site.slice for other in program.sites)


def _parameters(
    program: Program, level: Level, norm: Norm, source: Value, products: tuple[Node, ...]
) -> tuple[str, str] | str:
    """Names of the leaves of a LayerNorm's scale and bias, or why its output cannot be changed."""
    if norm.scale is None or norm.bias is None:
        return "it has no scale or no bias"
    if norm.axes != (norm.input.ndim - 1,):
        return "it normalises other axes than the last"
    queue, ends = [source], set()
    for value in queue:
        for user in value.users:
            onward = user.output.users if user.name == "slice" else [user]
            if all(n.name in ax.TRANSPARENT or _unmoved(n.output) is _unmoved(source) for n in onward):
                queue += [n.output for n in onward if n.output not in queue]
            else:
                ends.add(user)
        if value in level.outputs:
            return "its output is a result of the function"
    if ends != set(products):
        other = next(iter(ends - set(products)), None)
        return f"its output is read by {other.name if other is not None else 'nothing'} too"
    names = []
    for what in (norm.scale, norm.bias):
        leaf = _leaf(program, what)
        if leaf is None:
            return "its scale or bias is computed, or read in other places too"
        names.append(leaf)
    return names[0], names[1]


def _leaf(program: Program, value: Value) -> str | None:
    """The parameter leaf that a value is, if it is one and nothing else reads it."""
    root = ax.root(value)
    if root.node is not None or root.scope != ():
        return None
    variables = constvars_and_invars(program.jaxpr)
    number = next((n for n, v in enumerate(variables) if v is root.atom), None)
    if number is None:
        return None
    number -= len(consts_of(program.jaxpr))
    if not 0 <= number < len(program.leaf_names) or len(root.users) != 1:
        return None
    return program.leaf_names[number]
