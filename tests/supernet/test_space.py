"""Spaces, domains, sampling and the predictor's encoding."""

import jax
import numpy as np
import pytest

from qjax.errors import RecipeError, SearchError
from qjax.supernet import At, Space, encode_choice, sample_choice

SITES = ("stem/kernel", "a/q", "a/k", "b/conv", "head/kernel")


def test_choices_keep_to_the_rules_of_their_sites():
    space = Space(
        (2, 4, 8),
        (0, 3, 8),
        at=(At("b/*", weight_bits=(4,), per_channel=(True,)), At("a/k", weight_bits=(2, 4))),
        tied=(("a/q", "a/k"),),
    )
    domain = space.domain(SITES)
    assert domain.shape == (5, 5) and domain.sites == SITES
    draw = jax.jit(jax.vmap(lambda key: sample_choice(key, domain)))
    choices = np.asarray(draw(jax.random.split(jax.random.key(0), 400)))
    for choice in choices[:40]:
        assert (domain.check(choice) == choice).all()
    seen = [[set(choices[:, n, c].tolist()) for c in range(5)] for n in range(5)]
    both = {0, 1}
    assert seen[0] == seen[4] == [{8}, {8}, both, both, both]
    assert seen[1] == seen[2] == [{2, 4}, {0, 3, 8}, both, both, both]  # what the tied sites have in common
    assert seen[3] == [{4}, {0, 3, 8}, {1}, both, both]
    assert (choices[:, 1] == choices[:, 2]).all()
    form = (False, True, False)
    low, high = (np.asarray(sample_choice(jax.random.key(1), domain, k, form)) for k in ("lowest", "highest"))
    assert low[:, 0].tolist() == [8, 2, 2, 4, 8] and low[:, 1].tolist() == [8, 3, 3, 3, 8]
    assert high[:, 0].tolist() == [8, 4, 4, 4, 8] and high[:, 1].tolist() == [8, 0, 0, 0, 8]
    assert low[:, 2].tolist() == [0, 0, 0, 1, 0] and (low[:, 3] == 1).all() and (low[:, 4] == 0).all()
    # ends: 2^3 forms each; tied: 2 * (1 + 2*2) * 2 * 2; b/conv: (1 + 2*2) * 2
    assert domain.size == 8 * 8 * 40 * 10
    uniform = domain.uniform(3, 5, (True, False, True))
    assert uniform[:, 0].tolist() == [8, 4, 4, 4, 8] and uniform[:, 1].tolist() == [8, 3, 3, 3, 8]
    assert Space.from_dict(space.to_dict()) == space
    with pytest.raises(SearchError, match="a/k: the choice says weight_bits = 8, and the space allows 2, 4"):
        domain.check(np.where(np.arange(5)[:, None] == 2, [[8, 8, 1, 1, 1]], uniform))
    broken = uniform.copy()
    broken[2, 0] = 2
    with pytest.raises(SearchError, match="a/k is tied to a/q"):
        domain.check(broken)


def test_a_pattern_may_be_optional():
    assert Space(at=(At("b/konv", skip=True, optional=True),)).domain(SITES).sites == Space().domain(SITES).sites
    space = Space(at=(At("b/konv", optional=True),))
    assert Space.from_dict(space.to_dict()) == space


def test_groups_have_a_column_of_their_own():
    domain = Space((4,), (0,), groups=(32, 64), ends=None).domain(SITES[:2])
    assert domain.shape == (2, 6) and domain.size == 2**2 * 2**2
    choices = jax.vmap(lambda key: sample_choice(key, domain))(jax.random.split(jax.random.key(0), 50))
    assert set(np.asarray(choices)[..., 5].ravel().tolist()) == {0, 1}
    assert domain.uniform(4, 0, group=64)[:, 5].tolist() == [1, 1] and domain.space.per_channel == (True,)
    with pytest.raises(SearchError, match="group=16; the space has 32, 64"):
        domain.uniform(4, 0, group=16)
    with pytest.raises(RecipeError, match="per_channel has no meaning"):
        Space(groups=(32,), at=(At("**", per_channel=(True,)),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Space((1, 4)), "bit widths are 2 to 8"),
        (lambda: Space((4, 9)), "bit widths are 2 to 8"),
        (lambda: Space((0, 4)), "bit widths are 2 to 8"),
        (lambda: Space((4, 4)), "names a value twice"),
        (lambda: Space(()), "is empty"),
        (lambda: Space((4,), (4,), (True,), (True,), (True,)).domain(SITES), "it has 1 choices over 5 sites"),
        (lambda: Space(at=(At("b/konv"),)).domain(SITES), "no site matches 'b/konv' in at .did you mean 'b/conv'"),
        (lambda: Space((4, 8), groups=(8,), at=(At("**", groups=(16,)),)), "the space has .8,."),
        (lambda: Space.from_dict({"weight_bit": [4]}), "did you mean 'weight_bits'"),
        (
            lambda: Space(at=(At("a/q", weight_bits=(2,)), At("a/k", weight_bits=(3,))), tied=(("a/*",),)).domain(
                SITES
            ),
            "tied sites a/q, a/k have no weight_bits in common",
        ),
        (lambda: sample_choice(jax.random.key(0), Space().domain(SITES), "higest"), "did you mean 'highest'"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def test_encoding_is_that_of_the_predictor():
    forms = ((True, True, True), (False, False, True), (True, False, False))
    for (n, length), form in zip(((21, 300), (54, 762), (53, 748)), forms, strict=True):  # ResNet18, 50, MobileNetV2
        choice = Space().domain([f"layer{i}" for i in range(n)]).uniform(2, 5, form)
        choice[1:-1, 0] += np.arange(n - 2) % 7
        code = np.asarray(encode_choice(choice, form))
        assert code.shape == (length,)
        assert code.sum() == 2 * (n - 2) + 1 + form[1] + form[2]
        assert code[:2].tolist() == [form[0], not form[0]]
        rows = code[6:].reshape(2, n, 7)
        assert not rows[:, [0, -1]].any()
        assert (rows[:, 1:-1].argmax(-1) + 2 == choice[1:-1, :2].T).all()
    pair = np.stack([choice, choice])
    assert encode_choice(pair, np.asarray([form, form])).shape == (2, length)
