"""A format as a third party would write it: nothing in qjax is touched, and everything works on it.

Ternary weights: codes -1, 0, 1 in two bits and one scale per row or group, the mean magnitude of the elements that
are not rounded to zero (Li et al. 2016, "Ternary Weight Networks").
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import Format, format_from_dict, quantize_array, register_format, stack_slices
from qjax.passes import RTN
from qjax.testing import check_format


@register_format("ternary")
@dataclasses.dataclass(frozen=True)
class Ternary(Format):
    group: int | None = None

    code_bits = 2
    code_dtype = np.dtype(np.int8)
    affine = True

    @property
    def per(self):
        return "channel" if self.group is None else "group"

    def fit(self, x, weight=None):
        low, high = self.range_of(x)  # also refuses a group that is too long
        # Of the numbers scale * {-1, 0, 1}, magnitudes above half a scale are not zero; one step from the mean.
        size = jnp.where(jnp.isfinite(x), jnp.abs(x), 0)
        top = self.spread(jnp.maximum(high, -low), x.shape[-1])
        kept = size > 0.35 * top
        total, count = self.reduce(jnp.where(kept, size, 0), jnp.sum), self.reduce(kept.astype(jnp.float32), jnp.sum)
        return {"scale": jnp.where(count > 0, total / jnp.maximum(count, 1), 1.0)}

    def encode(self, x, aux):
        scale = self.spread(aux["scale"], x.shape[-1])
        return (x > 0.5 * scale).astype(jnp.int8) - (x < -0.5 * scale).astype(jnp.int8)

    def decode(self, codes, aux):
        return codes.astype(jnp.float32) * self.spread(aux["scale"], codes.shape[-1])


@dataclasses.dataclass(frozen=True)
class Careless(Ternary):
    """The same with a mistake in it, chosen by name."""

    mistake: str = ""

    def fit(self, x, weight=None):
        aux = super().fit(x, weight)
        if self.mistake == "scale is not blocked":
            return {"scale": aux["scale"][..., 0]}
        if self.mistake == "zero scale":
            return {"scale": aux["scale"] * 0 / 0}
        return aux

    def encode(self, x, aux):
        if self.mistake == "rounds down":
            return jnp.clip(jnp.floor(x / self.spread(aux["scale"], x.shape[-1])), -1, 1).astype(jnp.int8)
        if self.mistake == "wide codes":
            return jnp.round(jnp.nan_to_num(x / self.spread(aux["scale"], x.shape[-1]))).astype(jnp.int8)
        codes = super().encode(x, aux)
        return codes.astype(jnp.int32) if self.mistake == "code dtype" else codes


register_format("careless", Careless)


def test_it_passes_the_property_suite():
    # Code -2 is representable in two bits and never used: -2 * scale may be nearer to an outlier than -scale.
    check_format(Ternary(group=24), examples=10, nearest=False)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("scale is not blocked", "aux 'scale' has shape"),
        ("zero scale", "NaN or infinity"),
        ("wide codes", "packing loses bits|do not encode to themselves"),
        ("code dtype", "encode gives int32"),
    ],
)
def test_the_property_suite_finds_mistakes(mistake, words):
    with pytest.raises(AssertionError, match=words):
        check_format(Careless(mistake=mistake), examples=5, nearest=False)


def test_the_property_suite_finds_roundings_that_are_not_nearest():
    with pytest.raises(AssertionError, match="misses the nearest"):
        check_format(Careless(mistake="rounds down"), examples=5)


def test_it_is_stored_sliced_and_described_like_any_other():
    w = np.random.default_rng(0).standard_normal((3, 48, 5)).astype(np.float32)
    fmt = Ternary(group=24)
    q = quantize_array(w, fmt, in_axes=1, stack_axes=0)
    assert q.codes.shape == (3, 5, 12) and q.nbytes == 3 * 5 * (12 + 4 * 2)
    assert format_from_dict(fmt.to_dict()) == fmt and fmt.name == "ternary g24"
    np.testing.assert_array_equal(q[1].dequantize(), q.dequantize()[1])
    assert np.corrcoef(np.asarray(q.dequantize()).ravel(), w.ravel())[0, 1] > 0.85
    codes, aux = jax.jit(lambda x: RTN().round(x, fmt))(w[0].T)
    np.testing.assert_array_equal(fmt.decode(codes, aux).T, q.dequantize()[0])
    mixed = stack_slices([q[0], jnp.asarray(w[1])])
    assert mixed.shape == (2, 48, 5)
