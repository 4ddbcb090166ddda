"""Rules, recipes, what they decide, and the files they are kept in."""

from __future__ import annotations

import dataclasses
import re
import sys
import time

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

import qjax
from qjax.errors import RecipeError
from qjax.recipe import Rule, compile_pattern
from qjax.sources import Dynamic, Static

INT8 = qjax.Int(8)
INT4 = qjax.Int(4, group=32)
TOKEN = qjax.Int(8, per="token")


@dataclasses.dataclass(frozen=True)
class Site:
    name: str
    op: str = "dot"
    reads_parameter: bool = True


LLAMA = [
    Site("embed/embedding", "embedding"),
    *(
        Site(f"layers/{i}/{part}/kernel")
        for i in range(3)
        for part in ("attn/q_proj", "attn/k_proj", "attn/v_proj", "attn/o_proj", "mlp/gate", "mlp/up", "mlp/down")
    ),
    *(Site(f"layers/{i}/attn/scores", "attention", False) for i in range(3)),
    Site("lm_head/kernel"),
]


def decided(recipe: qjax.Recipe, sites=LLAMA, **kwargs) -> dict[str, int | None]:
    return {name: decision.rule for name, decision in recipe.decide(sites, **kwargs).items()}


# Patterns


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("**", "", True),
        ("**", "a/b/c", True),
        ("*", "a", True),
        ("*", "a/b", False),
        ("a/*/c", "a/b/c", True),
        ("a/*/c", "a/c", False),
        ("a/**/c", "a/c", True),
        ("a/**/c", "a/b/b/c", True),
        ("**/mlp/**", "mlp", True),
        ("**/mlp/**", "layers/0/mlp/up/kernel", True),
        ("**/mlp/**", "layers/0/mlp2/up/kernel", False),
        ("layers/[01]/x", "layers/0/x", False),
        ("**/q_*/kernel", "attn/q_proj/kernel", True),
        ("**/kernel", "kernel#1", False),
        ("a.b", "axb", False),
        ("re:layers/[0-3]/.*", "layers/3/up", True),
        ("re:layers/[0-3]", "layers/3/up", False),
        ("re:a|b", "b", True),
    ],
)
def test_a_pattern_matches_by_segments(pattern, name, matches):
    assert bool(compile_pattern(pattern).fullmatch(name + "/")) is matches


def slow_match(pattern: list[str], name: list[str]) -> bool:
    """The definition, word for word."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(slow_match(pattern[1:], name[k:]) for k in range(len(name) + 1))
    fits = name and re.fullmatch(re.escape(pattern[0]).replace(r"\*", "[^/]*"), name[0])
    return bool(fits) and slow_match(pattern[1:], name[1:])


@given(
    st.lists(st.sampled_from(["**", "*", "a", "a*", "*b", "ab"]), min_size=1, max_size=5),
    st.lists(st.sampled_from(["a", "b", "ab", "ba", "c"]), min_size=1, max_size=5),
)
@example(["**", "**", "a"], ["a"])
def test_a_pattern_means_its_definition(pattern, name):
    expected = slow_match(pattern, name)
    assert bool(compile_pattern("/".join(pattern)).fullmatch("/".join(name) + "/")) is expected


def test_bad_patterns_are_refused():
    with pytest.raises(RecipeError, match="whole segments"):
        Rule("layers/a**b", skip=True)
    with pytest.raises(RecipeError, match="regular expression"):
        Rule("re:(", skip=True)
    with pytest.raises(RecipeError, match="pattern for site names"):
        Rule("", skip=True)


# Building rules


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "neither skips nor quantizes"),
        ({"rounding": qjax.RTN()}, "neither skips nor quantizes"),
        ({"skip": True, "weights": INT8}, "skip leaves the sites in float, so weights cannot be set"),
        ({"skip": True, "op": "lineer"}, "unknown op 'lineer' (did you mean 'linear'"),
        ({"skip": True, "op": ()}, "empty tuple"),
        ({"weights": INT8, "op": "attention"}, "a site of op 'attention' has no weights"),
        ({"inputs": TOKEN, "op": "embedding"}, "a site of op 'embedding' has no inputs"),
        ({"inputs": TOKEN, "op": ("linear", "embedding")}, "write one rule for each op"),
        ({"operands": {"k": TOKEN}, "op": "linear"}, "has no operands"),
        ({"operands": {"x": TOKEN}, "op": "attention"}, "has the operands q, k, p, v, not 'x'"),
        ({"inputs": TOKEN, "rounding": qjax.RTN()}, "the rule has no weights"),
        ({"weights": qjax.dynamic(INT8)}, "weights do not change from call to call"),
        ({"weights": "int8"}, "is a number format such as"),
        ({"weights": qjax.Int}, "is a number format such as"),
        ({"weights": TOKEN}, "weights have no tokens"),
        ({"inputs": INT8}, "per='token' or 'tensor'"),
        ({"weights": INT8, "inputs": qjax.NF4()}, "for weights only"),
    ],
)
def test_impossible_rules_are_refused_with_the_reason(settings, why):
    with pytest.raises(RecipeError, match=re.escape(why)):
        Rule("**", **settings)


def test_a_bare_format_is_dynamic_for_inputs_and_constant_for_weights():
    rule = Rule("**", weights=qjax.static(INT8), inputs=TOKEN)
    assert rule.weights == INT8 and rule.inputs == Dynamic(TOKEN)
    assert rule == Rule("**", op=("linear",), weights=INT8, inputs=qjax.dynamic(TOKEN))


def test_rules_are_values():
    rule = Rule("**", op="attention", operands={"k": TOKEN})
    assert hash(rule) == hash(dataclasses.replace(rule)) and rule == dataclasses.replace(rule)
    assert repr(Rule("a", weights=INT8, skip=False)) == f"Rule('a', weights={INT8!r})"
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.skip = True


def test_a_recipe_is_made_of_rules():
    with pytest.raises(RecipeError, match="rules is a list"):
        qjax.Recipe(Rule("**", skip=True))
    with pytest.raises(RecipeError, match="made of qjax.Rule values"):
        qjax.Recipe(["**"])


# Deciding


def test_the_first_matching_rule_decides():
    recipe = qjax.Recipe(
        [
            Rule("lm_head/**", skip=True),
            Rule("**/mlp/**", weights=INT4, rounding=qjax.RTN()),
            Rule("**", weights=qjax.static(INT8, qjax.AbsMax()), inputs=TOKEN),
        ]
    )
    decisions = recipe.decide(LLAMA)
    assert list(decisions) == [site.name for site in LLAMA]
    up, query = decisions["layers/1/mlp/up/kernel"], decisions["layers/1/attn/q_proj/kernel"]
    head, scores = decisions["lm_head/kernel"], decisions["layers/1/attn/scores"]
    assert (up.rule, up.weights, up.inputs, up.rounding, up.quantizes) == (1, INT4, None, qjax.RTN(), True)
    assert (query.weights, query.weight_observer, query.inputs) == (INT8, qjax.AbsMax(), Dynamic(TOKEN))
    assert head.skip and not head.quantizes and head.reason == "skipped by rule 0 ('lm_head/**')"
    assert scores.rule is None and not scores.quantizes and "no rule" in scores.reason


def test_linear_means_products_with_a_parameter():
    sites = [
        Site("a"),
        Site("b", "conv"),
        Site("c", "ragged_dot"),
        Site("d", "dot", False),  # its weight is computed from leaves
        Site("e", "matmul", False),
        Site("f", "embedding"),
    ]
    recipe = qjax.Recipe(
        [Rule("**", op="conv", skip=True), Rule("**", weights=INT8), Rule("**", op="matmul", inputs=TOKEN)]
    )
    assert list(decided(recipe, sites).values()) == [1, 0, 1, None, 2, None]
    assert recipe.ops == {"conv", "linear", "matmul"}


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        (
            [Rule("**/mpl/**", weights=INT8)],
            r"rule 0 \('\*\*/mpl/\*\*'\) matches no site; no site has the segment 'mpl' .did you mean 'mlp'",
        ),
        ([Rule("layers/*/attn/q_prj/kernel", weights=INT8)], "did you mean 'q_proj'"),
        ([Rule("re:layer/1/.*", weights=INT8)], "'layer' .did you mean 'layers'"),
        ([Rule("zzz*", weights=INT8)], "sites are named like 'layers/0"),
        ([Rule("embed/**", weights=INT8)], "names of 1 sites, such as 'embed/embedding', but their op is embedding"),
        ([Rule("**", op="softmax", outputs=TOKEN)], "no site of that op .it has attention, dot, embedding"),
        (
            [Rule("**", weights=INT8), Rule("**/mlp/**", weights=INT4)],
            r"rule 1 \('\*\*/mlp/\*\*'\) never decides: its 9 sites are taken by rule 0 \('\*\*'\) before it",
        ),
        (
            [Rule("**/attn/**", weights=INT8), Rule("**/mlp/**", weights=INT8), Rule("layers/**", weights=INT4)],
            r"taken by rule 0 \('\*\*/attn/\*\*'\) and 1 \('\*\*/mlp/\*\*'\)",
        ),
    ],
)
def test_a_rule_that_decides_nothing_is_an_error_with_a_hint(rules, why):
    recipe = qjax.Recipe(rules)
    with pytest.raises(RecipeError, match=why):
        recipe.decide(LLAMA)
    assert set(recipe.decide(LLAMA, strict=False)) == {site.name for site in LLAMA}


def test_an_optional_rule_may_decide_nothing():
    rules = [Rule("**", weights=INT8), Rule("nowhere", skip=True, optional=True)]
    assert set(decided(qjax.Recipe(rules)).values()) == {0, None}
    assert decided(qjax.Recipe([Rule("**", skip=True, optional=True)]), []) == {}


def test_needs_batches_says_why():
    assert qjax.Recipe([Rule("**", weights=INT8, inputs=TOKEN)]).needs_batches is None
    still = qjax.Recipe([Rule("**", inputs=qjax.static(qjax.Int(8, per="tensor")), weights=INT8)])
    assert still.needs_batches == "rule 0 ('**') has static scales for inputs"


def test_deciding_is_fast():
    sites = [Site(f"decoder/layers/{i}/{part}/kernel") for i in range(100) for part in ("q", "k", "v", "o", "mlp")]
    rules = [Rule(f"**/layers/{i}/q/**", weights=INT8) for i in range(9)] + [Rule("**", weights=INT4)]
    recipe = qjax.Recipe(rules)
    best = min(_seconds(lambda: recipe.decide(sites)) for _ in range(5))
    assert best < 0.05  # about 5 ms on one core; the margin is for a busy machine


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# On disk

FORMATS = [INT8, INT4, qjax.Float8("e4m3fn"), qjax.NF4(), qjax.MXFP4(), qjax.NVFP4(), qjax.Int(3, symmetric=False)]
WHOLE = qjax.Recipe(
    [
        Rule('a "quoted"\\ name\n\x7fé/**', skip=True, optional=True),
        *(Rule(f"layer/{i}", weights=fmt) for i, fmt in enumerate(FORMATS)),
        Rule("obs", weights=Static(INT8, qjax.AbsMax()), rounding=qjax.RTN()),
        Rule("io/**", weights=INT8, inputs=TOKEN, outputs=Static(qjax.Int(8, per="tensor"), qjax.AbsMax())),
        Rule("**", op=("attention", "matmul"), outputs=qjax.Int(8, per="tensor"), clamp_group=True),
        Rule("**", op="attention", operands={"q": TOKEN, "k": TOKEN}),
    ],
    name="everything",
)


def test_a_recipe_survives_the_disk(tmp_path):
    assert qjax.Recipe.from_dict(WHOLE.to_dict()) == WHOLE
    assert qjax.Recipe.from_toml(WHOLE.to_toml()) == WHOLE
    path = tmp_path / "mine.toml"
    path.write_text(WHOLE.to_toml(), encoding="utf-8")
    assert qjax.Recipe.from_toml(path) == qjax.Recipe.from_toml(str(path)) == qjax.recipe(str(path)) == WHOLE


def test_the_hash_is_of_what_is_said():
    renamed = qjax.Recipe(WHOLE.rules, name="other")
    assert WHOLE.hash == renamed.hash == qjax.Recipe.from_toml(WHOLE.to_toml()).hash
    assert WHOLE.hash != qjax.Recipe(WHOLE.rules[1:]).hash


@dataclasses.dataclass(frozen=True)
class Stochastic:
    """A rounding of another package."""

    seed: int = 0


def test_roundings_of_other_packages_are_found_where_they_are_loaded():
    recipe = qjax.Recipe([Rule("**", weights=INT8, rounding=Stochastic(3))])
    text = recipe.to_toml()
    assert f'rounding = "{__name__}:Stochastic", seed = 3' in text and qjax.Recipe.from_toml(text) == recipe
    with pytest.raises(RecipeError, match="import antigravity first"):
        qjax.Recipe.from_toml(text.replace(__name__, "antigravity"))
    assert "antigravity" not in sys.modules


def test_settings_of_roundings_and_observers_survive():
    rounding = qjax.RTN(observer=qjax.Percentile(99.5))
    recipe = qjax.Recipe([Rule("**", weights=INT8, rounding=rounding)])
    assert qjax.Recipe.from_toml(recipe.to_toml()) == recipe and "99.5" in recipe.to_toml()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nam = 'x'", "the recipe has the unknown key 'nam' .did you mean 'name'"),
        ("name = 'x'", "has no rules"),
        ("rules = 3\n", "has no rules"),
        ("[[rules]]\nskip = true", "rule 0 has no match"),
        ("[[rules]]\nmatch = '**'\nwieghts = {}", "rule 0 has the unknown key 'wieghts' .did you mean 'weights'"),
        ("[[rules]]\nmatch = '**'\nskip = 'yes'", "skip is true or false, not 'yes'"),
        ("[[rules]]\nmatch = '**'\nop = 3\nskip = true", "op is a name or a list of names"),
        ("[[rules]]\nmatch = '**'\nweights = 'int8'", "rule 0: weights is a table"),
        ("[[rules]]\nmatch = '**'\nweights = { format = 'imt', bits = 8 }", "rule 0: weights: .*'int'"),
        ("[[rules]]\nmatch = '**'\nweights = { format = 'int', bitz = 8 }", "rule 0: weights: .*bitz"),
        ("[[rules]]\nmatch = '**'\ninputs = { dynamic = { format = 'int', bits = 8 }, x = 1 }", "unknown key 'x'"),
        ("[[rules]]\nmatch = '**'\nweights = { format = 'int', bits = 8 }\nrounding = { rounding = 'RTM' }", "'RTN'"),
        ("rules = [", "the recipe is not TOML"),
    ],
)
def test_mistakes_in_a_file_are_named(text, why):
    with pytest.raises(RecipeError, match=why):
        qjax.Recipe.from_toml(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"missing\.toml: No such file"):
        qjax.recipe(str(tmp_path / "missing.toml"))
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    with pytest.raises(RecipeError, match="latin.toml: it is not UTF-8"):
        qjax.recipe(str(tmp_path / "latin.toml"))


# Presets


ADALOG = ("ADALOG_W3A3", "ADALOG_W4A4", "ADALOG_W6A6", "ADALOG_W8A8")
ROTATED = ("W4A16_ROTATED", "W3A16_ROTATED", "W2A16_ROTATED", "W4A8_ROTATED", "W4A4_ROTATED")


def test_every_preset_can_be_made_in_any_case():
    names = [name for name, description in qjax.recipes().items() if description]
    assert names == [
        *("W8A16", "W8A8", "FP8_DYNAMIC", "FP8", "W8A8_STATIC"),
        *("W4A16", "W3A16", "W2A16", "NF4", "PTQTP", "MXFP4A16", "NVFP4", "NVFP4A16"),
        *("W8A8_FP", "W8A8_INT", "W8A8_INT_SMOOTH", "W4A16_INT"),
        *("W4A8", "DGQ", "QOQ_G128", "QOQ"),
        *ROTATED,
        *ADALOG,
    ]
    with_data = {"FP8", "W8A8_STATIC", "NVFP4", "W8A8_INT", "W8A8_INT_SMOOTH", "W4A16_INT", "DGQ", "QOQ_G128", "QOQ"}
    with_data |= {*ROTATED, *ADALOG}
    for name in names:
        recipe = qjax.recipe(name.lower())
        assert recipe.name == name and recipe == qjax.recipe(name)
        assert (recipe.needs_batches is not None) == (name in with_data)
        assert ("needs calibration data" in qjax.recipes()[name]) == (name in with_data)
        assert qjax.Recipe.from_toml(recipe.to_toml()) == recipe


def test_a_preset_quantizes_the_blocks_and_keeps_embedding_and_head():
    sites = [*LLAMA, Site("embed/embedding#1")]
    decisions = qjax.recipe("W4A16").decide(sites)
    kept = {name for name, decision in decisions.items() if decision.skip}
    assert kept == {"embed/embedding", "embed/embedding#1", "lm_head/kernel"}
    block = decisions["layers/0/mlp/up/kernel"]
    assert block.weights == qjax.Int(4, group=128) and block.inputs is None and block.clamp_group


def test_preset_settings():
    def last(name):
        return qjax.recipe(name).rules[-1]

    assert last("W8A8").weights == qjax.Int(8) and last("W8A8").inputs == Dynamic(TOKEN)
    assert last("FP8_DYNAMIC").inputs == Dynamic(qjax.Float8("e4m3fn", per="token"))
    assert last("NVFP4A16").weights == qjax.NVFP4() and last("MXFP4A16").weights == qjax.MXFP4()


def test_the_presets_of_the_study_of_formats():
    """Section "Algorithm" of arXiv 2411.02355 and the published cards, setting by setting."""
    assert qjax.recipe("W8A8-FP").rules == qjax.recipe("FP8_DYNAMIC").rules
    int8, int4 = (qjax.recipe(name).rules[-1] for name in ("W8A8-INT", "W4A16-INT"))
    assert int8.weights == qjax.Int(8, per="channel", scale="qmax") and int8.weights.code_range == (-127, 127)
    assert int8.inputs == Dynamic(qjax.Int(8, per="token", scale="qmax"))
    assert int8.rounding == qjax.GPTQ(dampening_frac=0.1, block_size=128)
    smooth = qjax.recipe("W8A8-INT-smooth")
    assert smooth.rules[-1] == int8 and smooth.prepare == (qjax.passes.SmoothQuant(0.8),)
    assert int4.weights == qjax.Int(4, group=128) and int4.weights.code_range == (-8, 7) and int4.inputs is None
    assert int4.rounding == qjax.GPTQ(dampening_frac=0.1, block_size=128, actorder="static", observer=qjax.MSE())
    assert (qjax.MSE().grid, qjax.MSE().maxshrink, qjax.MSE().norm) == (100, 0.2, 2.4)


def test_a_preset_may_have_prepare_passes(monkeypatch):
    from qjax import recipe_toml

    step = {"pass": f"{__name__}:Doubled", "by": 3.0}
    table = {"MINE": {"description": "", "weights": {"format": "int", "bits": 8}, "prepare": [step]}}
    monkeypatch.setattr(recipe_toml, "presets", lambda: table)
    recipe = qjax.recipe("mine")
    assert recipe.prepare == (Doubled(3.0),) and qjax.Recipe.from_toml(recipe.to_toml()) == recipe


@dataclasses.dataclass(frozen=True)
class Doubled:
    """A pass of another package."""

    by: float = 2.0


def test_unknown_presets_and_those_that_need_calibration():
    with pytest.raises(RecipeError, match="no preset is named 'W4A17' .did you mean 'W4A16'"):
        qjax.recipe("W4A17")
    with pytest.raises(RecipeError, match="there are W8A16, W8A8"):
        qjax.recipe("zzzzz")
    assert "static scales for inputs" in qjax.recipe("fp8").needs_batches
    assert "static scales for inputs" in qjax.recipe("nvfp4").needs_batches
