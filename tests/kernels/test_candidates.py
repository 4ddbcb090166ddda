"""The compiled losses of candidates against sums in float64, of numbers in bfloat16 where the kernel has them so."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest

from qjax.kernels.cpu import candidates
from qjax.passes import fpcs_losses

F = np.float32


@pytest.fixture(autouse=True)
def there(native):
    if missing := candidates.available():
        pytest.skip(missing)


def near(x):
    """Numbers rounded to bfloat16, in float64."""
    return x.astype(F).astype(ml_dtypes.bfloat16).astype(np.float64)


def summed(e, unit, form, matrix, rest):
    """Losses of errors e [S, M, K] in units [S, M, 1], row by row: [S, M]."""
    e = near(e) if form != "own" else e.astype(np.float64)
    if form == "own":
        return ((e * unit) ** 2).sum(-1)
    moved = np.einsum("smk,spk->smp", e, near(matrix)) * unit + rest
    return (moved**2 if form == "product" else moved * e * unit).sum(-1)


@pytest.mark.parametrize("form", candidates.FORMS)
@pytest.mark.parametrize("shape", [(4, 37, 45, 50), (2, 70, 97, 33), (1, 5, 8, 3), (2, 16, 64, 16)])
def test_even_quantizers(form, shape):
    s, m, k, p = shape
    p = k if form == "quadratic" else p
    rng = np.random.default_rng(m)
    x, rest = rng.standard_normal((s, m, k)).astype(F), rng.standard_normal((s, m, p)).astype(F)
    matrix = rng.standard_normal((s, p, k)).astype(F)
    both = {} if form == "own" else {"matrix": matrix, "rest": rest}
    for rows in (False, True) if s == 1 else (False,):
        settings = m if rows else max(1, s // 2)  # slices in turn
        scale, zero = rng.uniform(0.1, 0.5, (settings, 3)).astype(F), rng.integers(0, 16, (settings, 3)).astype(F)
        ours = candidates.losses(x, scale, zero, form=form, top=15, by_row=rows, **both)
        assert ours.shape == ((m if rows else s), 3)
        for c in range(3):
            of = scale[:, c].reshape(1, -1, 1) if rows else np.tile(scale[:, c], s // settings)[:, None, None]
            z = zero[:, c].reshape(1, -1, 1) if rows else np.tile(zero[:, c], s // settings)[:, None, None]
            t = x * (F(1) / of)
            want = summed(np.clip(np.rint(t), -z, 15 - z) - t, of, form, matrix, rest)
            want = want[0] if rows else want.sum(-1)
            np.testing.assert_allclose(ours[:, c], want, rtol=2e-4, atol=2e-4 * np.abs(want).mean())


@pytest.mark.parametrize("bits, zero", [(4, "mask"), (3, "clamp"), (5, "reserve"), (6, "mask"), (8, "clamp")])
def test_tables(bits, zero):
    rng = np.random.default_rng(bits)
    number = (rng.random((2, 41, 39)) ** 6).astype(F)
    number[0, 0, :3] = 0, 1, 2
    matrix, rest = rng.standard_normal((2, 20, 39)).astype(F), rng.standard_normal((2, 41, 20)).astype(F)
    logs = np.asarray(fpcs_losses.logs_of(number, F(0)).log2)
    scale, q = F([1, 0.7]), F([12, 55])
    table = np.stack(
        [
            np.asarray(
                fpcs_losses.logarithmic(
                    F(-np.arange(2**bits + 1) * q[c] / 37 + np.log2(scale[c])), scale[c], q[c], bits, zero
                )
            )
            for c in range(2)
        ]
    )
    table = table[:, : 2**bits + (zero != "clamp") - (zero == "reserve")]
    for form in ("product", "quadratic"):
        m = matrix if form == "product" else np.einsum("spk,spl->skl", matrix, matrix)
        r = rest if form == "product" else np.repeat(rest, 2, axis=-1)[..., :39]
        ours = candidates.losses(
            logs, np.log2(scale)[None], 37 / q[None], form=form, matrix=m, rest=r, number=number, table=table, least=-50
        )
        for c in range(2):
            rounded = fpcs_losses.logarithmic(logs, scale[c], q[c], bits, zero)
            want = summed(np.asarray(rounded) - number, 1.0, form, m, r).sum(-1)
            np.testing.assert_allclose(ours[:, c], want, rtol=1e-3)


def test_blocks_of_rows_add_up_and_wrong_shapes_are_refused():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((1, 300, 64)).astype(F), rng.standard_normal((1, 8, 64)).astype(F)
    rest, scale = rng.standard_normal((1, 300, 8)).astype(F), np.full((1, 4), 0.3, F)

    def run(**change):
        return candidates.losses(
            **dict(x=x, scale=scale, other=8 * scale, form="product", matrix=w, rest=rest, top=15) | change
        )

    first = np.asarray(run())
    for _ in range(3):
        np.testing.assert_array_equal(run(), first)
    alone = sum(np.asarray(run(x=x[:, n : n + 32], rest=rest[:, n : n + 32]), np.float64) for n in range(0, 300, 32))
    np.testing.assert_allclose(alone, first, rtol=1e-6)
    for wrong, words in (
        ({"rest": rest[:, :5]}, "do not fit numbers"),
        ({"form": "quadratic"}, "do not fit numbers"),
        ({"other": scale[:, :2]}, "settings have to be"),
        ({"scale": np.ones((2, 4), F), "other": np.ones((2, 4), F)}, "do not fit numbers"),
        ({"table": np.ones((4, 3), F)}, "of the shape of the numbers"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=words):
            jax.block_until_ready(run(**wrong))
