"""Recipes: which sites of a program are quantized, and how.

A recipe is data. Its rules are tried in order on each site, and the first rule that matches the site's name and op
decides; so exceptions come first and the general rule last::

    Recipe([
        Rule("**/lm_head/**", skip=True, optional=True),
        Rule("**/mlp/**", weights=Int(4, group=128)),
        Rule("**", weights=Int(8), inputs=dynamic(Int(8, per="token"))),
    ])

Everything that can be known to be impossible without a program is refused when the rule is built, with the reason. A
rule that matches no site, or only sites that earlier rules have taken, is an error when the recipe meets a program,
unless the rule is optional: a misspelled pattern would otherwise leave a layer in float in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from qjax.errors import QjaxError, RecipeError, near
from qjax.patterns import compile_pattern
from qjax.sources import Dynamic, Fixed, Learned, Static, check_operand, check_source

if TYPE_CHECKING:
    from qjax.formats.base import Format
else:  # jax is imported by the formats, and this module is imported by every `import qjax`
    Format = Any

PARAMETER_OPS = ("dot", "conv", "ragged_dot")  # what the op name "linear" stands for, where the site reads a parameter

# What can be quantized at a site of each op, and the operands that can be named there.
_SETTINGS: dict[str, tuple[str, ...]] = {
    "linear": ("weights", "inputs", "outputs", "rounding"),
    "dot": ("weights", "inputs", "outputs", "rounding"),
    "conv": ("weights", "inputs", "outputs", "rounding"),
    "ragged_dot": ("weights", "inputs", "outputs", "rounding"),
    "embedding": ("weights", "outputs", "rounding"),
    "matmul": ("inputs", "outputs", "operands"),
    "attention": ("outputs", "operands"),
    "softmax": ("inputs", "outputs"),
    "activation": ("inputs", "outputs"),
    "norm": ("inputs", "outputs"),
    "kv_cache": ("operands",),
}
_OPERANDS = {"matmul": ("lhs", "rhs"), "attention": ("q", "k", "p", "v"), "kv_cache": ("k", "v")}
OPS = tuple(_SETTINGS)


@runtime_checkable
class SiteLike(Protocol):
    """What a recipe reads of a site."""

    @property
    def name(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def reads_parameter(self) -> bool: ...


@dataclass(frozen=True, repr=False)
class Rule:
    """What to do at the sites whose name and op match.

    Args:
        match: a pattern for the whole site name, by segments between slashes: ``*`` stands for any characters within
            one segment, a segment ``**`` for any number of segments (none too); ``re:`` in front makes the rest a
            regular expression for the whole name.
        op: the op or ops that the rule is about. ``linear`` (default): dot, conv and ragged_dot that read a
            parameter, which can also be named one by one; ``embedding``, ``matmul`` (a product of two activations),
            ``attention``, ``softmax``, ``activation``, ``norm``, ``kv_cache``.
        weights: the format of the weight; ``static(format, observer)`` chooses its range by that observer, and
            ``learned(format)`` trains its scales.
        inputs: the format of the activations going in; a bare format is taken as ``dynamic(format)``. For this and
            other sources see `qjax.sources`.
        outputs: the format of the result, likewise.
        operands: formats by operand name: ``q, k, p, v`` of attention, ``lhs, rhs`` of a matmul, ``k, v`` of a cache.
        rounding: how weights are rounded; None is round-to-nearest.
        skip: leave the matching sites in float.
        optional: the rule may match nothing, or only what earlier rules have taken.
        clamp_group: a group size above the length of the axis means one group for the axis (and is reported);
            without it that is an error. Presets set it, since they are written without a model in view.

    Raises:
        RecipeError: the settings contradict each other, or the op has no such number to quantize.
    """

    match: str
    _: KW_ONLY
    op: str | tuple[str, ...] = "linear"
    weights: Format | Static | None = None
    inputs: Format | Dynamic | Static | None = None
    outputs: Format | Dynamic | Static | None = None
    operands: Mapping[str, Any] | None = field(default=None, hash=False)
    rounding: Any = None
    skip: bool = False
    optional: bool = False
    clamp_group: bool = False

    def __post_init__(self) -> None:
        _check_rule(self)

    def __repr__(self) -> str:
        """The settings that were given, as they would be written."""
        settings = ((f.name, getattr(self, f.name), f.default) for f in fields(self) if f.name != "match")
        given = [f"{name}={value!r}" for name, value, default in settings if value != default]
        return f"Rule({', '.join([repr(self.match), *given])})"

    @property
    def ops(self) -> tuple[str, ...]:
        """The op names that the rule is about, always as a tuple."""
        return (self.op,) if isinstance(self.op, str) else self.op

    @property
    def title(self) -> str:
        """The rule as errors and reports name it."""
        return f"{self.match!r}" if self.ops == ("linear",) else f"{self.match!r} (op {', '.join(self.ops)})"


def _check_rule(rule: Rule) -> None:
    """Bring a new rule into its normal form and refuse what cannot be."""

    def put(name: str, value: Any) -> None:
        object.__setattr__(rule, name, value)

    def refuse(why: str) -> RecipeError:
        return RecipeError(f"rule {rule.match!r}: {why}")

    if not isinstance(rule.match, str) or not rule.match:
        raise RecipeError(f"a rule's match is a pattern for site names such as '**/mlp/**', not {rule.match!r}")
    if "{" in rule.match and not rule.match.startswith("re:"):
        raise RecipeError(
            f"{rule.match!r}: braces are no pattern (reports use them to say several names at once); write a rule for "
            "each, or a regular expression such as 're:layers/[12]/.*'"
        )
    compile_pattern(rule.match)
    if not isinstance(rule.op, str):
        put("op", rule.op[0] if len(rule.op) == 1 else tuple(rule.op))
    if not rule.ops:
        raise refuse(f"op is an empty tuple; name one or more of {', '.join(OPS)}")
    for op in rule.ops:
        if op not in _SETTINGS:
            raise refuse(f"unknown op {op!r}{near(op, OPS) or '; ops are ' + ', '.join(OPS)}")

    check_source(rule.weights, "weights", refuse)
    if type(rule.weights) is Static and rule.weights.observer is None:
        put("weights", rule.weights.fmt)
    for name in ("inputs", "outputs"):
        put(name, _source(getattr(rule, name)))
    if rule.operands is not None:
        if not isinstance(rule.operands, Mapping):
            raise refuse(f"operands maps names to formats, such as {{'q': Int(8)}}, not {rule.operands!r}")
        put("operands", {name: _source(value) for name, value in rule.operands.items()} or None)

    given = [s for s in ("weights", "inputs", "outputs", "operands", "rounding") if getattr(rule, s) is not None]
    if rule.skip and given:
        raise refuse(f"skip leaves the sites in float, so {' and '.join(given)} cannot be set too; drop one of them")
    if not rule.skip and not set(given) - {"rounding"}:
        raise refuse("it neither skips nor quantizes anything; set skip=True, or weights, inputs, outputs or operands")
    if hasattr(rule.rounding, "seen_by") and isinstance(rule.inputs, Static) and rule.inputs.smooth is not None:
        raise refuse(
            "its inputs are smoothed by ranges of channels, and its rounding rotates them, after which there are no "
            "such channels; leave out smooth=, which a rotation does the work of, or the rotation"
        )
    if rule.rounding is not None and rule.weights is None:
        raise refuse("rounding says how weights are rounded, and the rule has no weights")
    if isinstance(rule.rounding, type | str | int | float):
        raise refuse(f"rounding is a value such as qjax.GPTQ() or qjax.HQQ(), not {rule.rounding!r}")
    for op in rule.ops:
        for setting in given:
            if setting not in _SETTINGS[op]:
                able = [o for o, s in _SETTINGS.items() if setting in s]
                raise refuse(
                    f"a site of op {op!r} has no {setting} to quantize (it has {', '.join(_SETTINGS[op])}; "
                    f"{setting} are for {', '.join(able)}); write one rule for each op"
                )
        for operand in rule.operands or ():
            if operand not in _OPERANDS[op]:
                raise refuse(f"op {op!r} has the operands {', '.join(_OPERANDS[op])}, not {operand!r}")

    for setting, value in _formats_of(rule):
        _check_format(value, setting, refuse)
    for name in ("inputs", "outputs"):
        if isinstance(getattr(rule, name), Fixed):
            raise refuse(f"fixed scales are for operands; write {name}=qjax.static(format), whose scale is calibrated")
        check_source(getattr(rule, name), name, refuse)
    for name, source in (rule.operands or {}).items():
        check_operand(source, f"operands[{name!r}]", refuse)
    if isinstance(rule.inputs, Static) and getattr(rule.rounding, "smooths", False):
        raise refuse(
            f"{rule.rounding!r} divides activations by factors that it finds later, and static scales are calibrated "
            "on undivided ones; use dynamic inputs, or the prepare pass qjax.passes.SmoothQuant"
        )
    fits = getattr(rule.rounding, "check_format", None)
    if fits is not None:
        try:
            fits(rule.weights.fmt if isinstance(rule.weights, Dynamic | Static) else rule.weights)
        except QjaxError as error:
            raise refuse(str(error)) from None


def _source(value: Any) -> Any:
    """A bare format of an activation is dynamic; None and explicit sources stay."""
    return value if value is None or isinstance(value, Dynamic | Static | Fixed) else Dynamic(value)


def _formats_of(rule: Rule) -> Iterable[tuple[str, Any]]:
    """Pairs (setting, format) of every format in the rule, without its source."""
    settings = [(name, getattr(rule, name)) for name in ("weights", "inputs", "outputs")]
    for setting, value in settings + [(f"operands[{name!r}]", v) for name, v in (rule.operands or {}).items()]:
        if value is not None:
            yield setting, value.fmt if isinstance(value, Dynamic | Static | Fixed) else value


def _check_format(fmt: Any, setting: str, refuse: Any) -> None:
    from qjax.formats import Format  # imported by whoever made the format; not by importing qjax

    if not isinstance(fmt, Format):
        raise refuse(f"{setting} is a number format such as Int(8), Float8('e4m3fn') or NF4(), not {fmt!r}")
    if setting == "weights" and fmt.per == "token":
        raise refuse(
            f"{fmt!r} has one scale per token, and weights have no tokens; use per='channel', 'tensor' or group"
        )
    if setting == "inputs" and fmt.per == "channel":
        raise refuse(
            f"{fmt!r} has one scale per output channel of a weight, and inputs have tokens; use per='token' or 'tensor'"
        )
    if setting != "weights" and fmt.weights_only:
        raise refuse(f"{fmt!r} is for weights only; use Int, Float8 or MXFP8 for {setting}")


@dataclass(frozen=True)
class Decision:
    """What a recipe says about one site.

    ``rule`` is the index of the deciding rule, or None where no rule reaches the site. ``weights`` is a format;
    ``weight_observer`` chooses its range where the rule asks for one, ``weight_learned`` says that a training finds its
    scales. ``inputs``, ``outputs`` and ``operands`` hold
    ``Dynamic`` or ``Static``. ``reason`` says why the site stays in float, and is empty where it does not; ``note`` is
    anything else that the report should say of it.
    """

    rule: int | None
    weights: Format | None = None
    weight_observer: Any = None
    weight_learned: bool = False
    inputs: Dynamic | Static | None = None
    outputs: Dynamic | Static | None = None
    operands: Mapping[str, Dynamic | Static | Fixed] = field(default_factory=dict, hash=False)
    rounding: Any = None
    skip: bool = False
    clamp_group: bool = False
    reason: str = ""
    note: str = ""

    @property
    def quantizes(self) -> bool:
        """Whether anything at the site is quantized."""
        return self.rule is not None and not self.skip


def _at_site(decision: Decision, site: Any) -> Decision:
    """The decision at a site, by its op and its shapes."""
    decision = _for_op(decision, site.op)
    if decision.skip or not hasattr(decision.rounding, "for_site"):  # what a rounding does may depend on the shapes
        return decision
    rounding, said = decision.rounding.for_site(site)
    if rounding == decision.rounding and not said:
        return decision
    return replace(decision, rounding=rounding, note="; ".join(filter(None, (decision.note, said))))


def _for_op(decision: Decision, op: str) -> Decision:
    """The decision at a site of this op: what belongs to channels has no place among the pixels of a convolution."""
    if op != "conv" or decision.inputs is None:
        return decision
    if decision.inputs.fmt.per == "group" and decision.clamp_group:  # presets are written without a model in view
        why = f"its inputs stay float: the windows of a convolution read across groups ({decision.inputs.fmt.name})"
        return replace(decision, inputs=None, note=why)
    if not isinstance(decision.inputs, Static) or decision.inputs.smooth is None:
        return decision
    plain = replace(decision.inputs, smooth=None)
    return replace(decision, inputs=plain, note="its inputs are not smoothed, since it is a convolution")


UNREACHED = Decision(None, reason="no rule of the recipe matches its name and op")


@dataclass(frozen=True)
class Recipe:
    """Rules in the order in which they are tried, and passes across sites that run before weights are rounded.

    Args:
        rules: at least one; the first that matches a site decides.
        prepare: passes such as smoothing or rotation, in order.
        name: for reports.
        finish: passes that edit other parameters once a block's weights are rounded, such as `qjax.BiasCorrection`.
        settle: a search such as `qjax.passes.AdaLog`, which replaces the rules by one for each site, with the formats
            and numbers that it has found, and edits parameters. The model's recipe is the settled one.
    """

    rules: tuple[Rule, ...]
    prepare: tuple[Any, ...] = ()
    name: str = ""
    finish: tuple[Any, ...] = ()
    settle: Any = None

    def __init__(
        self,
        rules: Sequence[Rule],
        prepare: Sequence[Any] = (),
        name: str = "",
        *,
        finish: Sequence[Any] = (),
        settle: Any = None,
    ) -> None:
        for what, given in (("rules", rules), ("prepare", prepare), ("finish", finish)):
            if isinstance(given, str | Rule) or not isinstance(given, Iterable):
                raise RecipeError(f"a recipe's {what} is a list, not {given!r}")
        for rule in rules:
            if not isinstance(rule, Rule):
                raise RecipeError(f"a recipe is made of qjax.Rule values, not {rule!r}")
        object.__setattr__(self, "rules", tuple(rules))
        object.__setattr__(self, "prepare", tuple(prepare))
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "finish", tuple(finish))
        if settle is not None and not hasattr(settle, "settled"):
            raise RecipeError(f"settle is a search such as qjax.passes.AdaLog(), not {settle!r}")
        if settle is not None and (self.prepare or self.finish):
            raise RecipeError("a recipe that settles its sites by a search has no prepare or finish passes beside it")
        object.__setattr__(self, "settle", settle)

    @cached_property
    def ops(self) -> frozenset[str]:
        """The ops that some rule names. A composite such as attention is one site only where a rule names its op."""
        return frozenset(op for rule in self.rules for op in rule.ops)

    @cached_property
    def needs_batches(self) -> str | None:
        """Why the recipe cannot be applied without calibration batches, or None if it can."""
        if self.settle is not None:
            return f"{type(self.settle).__name__} searches for formats and scales by what layers put out"
        for index, rule in enumerate(self.rules):
            sources = [("inputs", rule.inputs), ("outputs", rule.outputs), *(rule.operands or {}).items()]
            static_parts = [name for name, source in sources if isinstance(source, Static)]
            if static_parts:
                return f"rule {index} ({rule.title}) has static scales for {', '.join(static_parts)}"
            if getattr(rule.rounding, "needs_batches", False):
                return f"rule {index} ({rule.title}) rounds with {rule.rounding!r}"
        for step in self.prepare:
            if getattr(step, "needs_batches", False):
                return f"the prepare pass {step!r} looks at activations"
        for step in self.finish:
            return f"the finishing pass {step!r} looks at activations"
        return None

    @cached_property
    def rounds_with_data(self) -> bool:
        """Whether some rounding or prepare pass looks at activations: such jobs go block by block."""
        steps = (*(rule.rounding for rule in self.rules), *self.prepare, *self.finish)
        return any(getattr(step, "needs_batches", False) for step in steps)

    @cached_property
    def sequential(self) -> bool:
        """Whether some rounding wants later blocks to see what earlier ones became."""
        steps = (*(rule.rounding for rule in self.rules), *self.finish)
        return any(getattr(step, "sequential", False) for step in steps)

    @cached_property
    def hash(self) -> str:
        """A digest of what the recipe says, its name aside: equal for recipes that decide alike by the same rules."""
        said = {key: value for key, value in self.to_dict().items() if key != "name"}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON-able data (see ``qjax.recipe_toml``)."""
        from qjax.recipe_toml import recipe_to_dict

        return recipe_to_dict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """Return the recipe that the data describes; an unknown key is a RecipeError with the nearest known ones."""
        from qjax.recipe_toml import recipe_from_dict

        return recipe_from_dict(data)

    def to_toml(self) -> str:
        """Return the recipe as the text of a TOML file."""
        from qjax.recipe_toml import recipe_to_toml

        return recipe_to_toml(self)

    @staticmethod
    def from_toml(source: str | Path) -> Recipe:
        """Return the recipe in a file (a path, or a string that ends in ``.toml``) or in the text itself."""
        from qjax.recipe_toml import recipe_from_toml

        return recipe_from_toml(source)

    def decide(self, sites: Iterable[SiteLike], *, strict: bool = True) -> dict[str, Decision]:
        """Return what the recipe says about each site, by the site's name.

        Args:
            sites: each with ``name``, ``op`` and ``reads_parameter``.
            strict: refuse rules that decide nothing. False where the recipe meets a second function over the same
                parameters, which need not contain every site.

        Raises:
            RecipeError: a rule that is not optional matches no site, or only sites that earlier rules decide.
        """
        sites = list(sites)
        matchers = [(compile_pattern(rule.match).fullmatch, frozenset(rule.ops)) for rule in self.rules]
        decisions = [self._decision(index) for index in range(len(self.rules))]
        found: dict[str, Decision] = {}
        for site in sites:
            ops, name = _op_names(site), site.name + "/"
            found[site.name] = UNREACHED
            for index, (matches, wanted) in enumerate(matchers):
                if not wanted.isdisjoint(ops) and matches(name):
                    found[site.name] = _at_site(decisions[index], site)
                    break
        if strict:
            used = {decision.rule for decision in found.values()}
            for index, rule in enumerate(self.rules):
                if index not in used and not rule.optional:
                    raise RecipeError(self._idle(index, sites, found))
        return found

    def _decision(self, index: int) -> Decision:
        rule = self.rules[index]
        weights = rule.weights
        return Decision(
            rule=index,
            weights=weights.fmt if isinstance(weights, Static) else weights,
            weight_observer=weights.observer if isinstance(weights, Static) else None,
            weight_learned=isinstance(weights, Learned),
            inputs=rule.inputs,  # type: ignore[arg-type]  # normalised when the rule was built
            outputs=rule.outputs,  # type: ignore[arg-type]
            operands=dict(rule.operands or {}),
            rounding=rule.rounding,
            skip=rule.skip,
            clamp_group=rule.clamp_group,
            reason=f"skipped by rule {index} ({rule.title})" if rule.skip else "",
        )

    def _idle(self, index: int, sites: Sequence[SiteLike], found: Mapping[str, Decision]) -> str:
        """Say why a rule decides nothing and what would help."""
        rule = self.rules[index]
        matches = compile_pattern(rule.match).fullmatch
        named = [site for site in sites if matches(site.name + "/")]
        same_op = [site for site in named if not _op_names(site).isdisjoint(rule.ops)]
        start = f"rule {index} ({rule.title})"
        if same_op:
            takers = sorted({found[site.name].rule for site in same_op})  # type: ignore[type-var]
            listed = " and ".join(f"{t} ({self.rules[t].title})" for t in takers if t is not None)
            return f"{start} never decides: its {len(same_op)} sites are taken by rule {listed} before it; move it up"
        able = [site.name for site in sites if not _op_names(site).isdisjoint(rule.ops)]
        if not able:
            wanted = {*rule.ops, *(PARAMETER_OPS if "linear" in rule.ops else ())}
            stuck = next((site for site in sites if site.op in wanted and getattr(site, "reason", "")), None)
            if stuck is not None:
                return f"{start} matches no site that can be quantized: {stuck.name}: {stuck.reason}"  # type: ignore[attr-defined]
            ops = sorted({site.op for site in sites})
            return f"{start} matches no site: the program has no site of that op (it has {', '.join(ops) or 'none'})"
        if named:
            ops = sorted({site.op for site in named})
            return (
                f"{start} matches the names of {len(named)} sites, such as {named[0].name!r}, but their op is "
                f"{' or '.join(ops)}; set op={ops[0]!r}, or optional=True"
            )
        return f"{start} matches no site{nearest(rule.match, able)}; or set optional=True"


def _op_names(site: SiteLike) -> frozenset[str]:
    return _OP_NAMES[site.reads_parameter].get(site.op) or frozenset((site.op,))


# The op names of rules that reach a site, beyond its own: by whether it reads a parameter, and its op.
_OP_NAMES = {True: {op: frozenset((op, "linear")) for op in PARAMETER_OPS}, False: {}}


def nearest(pattern: str, names: Sequence[str]) -> str:
    """A hint with the site names that come nearest to a pattern that matches none of them."""
    segments = dict.fromkeys(segment for name in names for segment in name.split("/"))
    for segment in pattern.removeprefix("re:").split("/"):
        if segment and "*" not in segment and segment not in segments and (hint := near(segment, segments)):
            return f"; no site has the segment {segment!r}{hint}"
    hint = near(pattern.replace("**/", "").replace("/**", ""), names)
    return hint or f"; sites are named like {', '.join(map(repr, names[:3]))}"


def recipe(name: str) -> Recipe:
    """Return the preset of that name, in any case, or the recipe in a ``.toml`` file.

    Raises:
        RecipeError: no such preset, with the nearest names; a preset that needs calibration.
    """
    from qjax.recipe_toml import load_preset

    return load_preset(name)


def recipes() -> dict[str, str]:
    """Return the description of every preset, by name."""
    from qjax.recipe_toml import presets

    return {name: preset["description"] for name, preset in presets().items()}


def resolve_recipe(given: Recipe | str) -> Recipe:
    """A recipe, or the preset of that name."""
    if isinstance(given, Recipe):
        return given
    if isinstance(given, str):
        return recipe(given)
    raise RecipeError(f"recipe= takes a qjax.Recipe or the name of a preset, not {type(given).__name__}")
