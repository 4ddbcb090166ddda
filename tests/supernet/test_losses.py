"""WDR and GPG, against their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import DataError
from qjax.supernet import gpg_loss, moments, wdr_loss


def test_moments_are_those_of_known_distributions():
    rng = np.random.default_rng(0)
    n = 400_000
    for draw, skew, kurt in (
        (rng.uniform(-3, 5, n), 0, 1.8),
        (rng.standard_normal(n), 0, 3),
        (rng.laplace(size=n), 0, 6),
        (rng.choice([-1.0, 1.0], n), 0, 1),
        (rng.exponential(size=n), 2, 9),
    ):
        s, k = moments(jnp.asarray(draw, jnp.float32))
        assert abs(float(s) - skew) < 0.06 and abs(float(k) - kurt) < 0.04 * kurt + 0.01, (s, k, skew, kurt)
    grid = jnp.arange(7.0)
    assert abs(float(moments(grid)[1]) * (7 / 6) ** 2 - 1.8 * (49 - 7 / 3) / 48) < 1e-5
    assert [float(m) for m in moments(jnp.ones(5))] == [0, 0]


def test_wdr_and_its_derivative():
    rng = np.random.default_rng(1)
    weights = [rng.gamma(2.0, size=(4, 5)), rng.standard_normal((3, 3, 2))]

    def by_hand(ws):
        skews, kurts = [], []
        for w in ws:
            unit = (w - w.mean()) / w.std(ddof=1)
            skews.append(np.mean(unit**3))
            kurts.append(np.mean(unit**4))
        return 0.015 * np.mean((np.asarray(kurts) - 1.8) ** 2) + np.mean(np.asarray(skews) ** 2)

    with jax.enable_x64(True):
        loss, grads = jax.value_and_grad(wdr_loss)([jnp.asarray(w) for w in weights])
        moved = wdr_loss([jnp.asarray(3 * w - 2) for w in weights])
    np.testing.assert_allclose(loss, by_hand(weights), rtol=1e-12)
    np.testing.assert_allclose(moved, loss, rtol=1e-9)
    for n, (w, g) in enumerate(zip(weights, map(np.asarray, grads), strict=True)):
        assert abs(g.sum()) < 1e-12 and abs((w * g).sum()) < 1e-12
        direction, h = rng.standard_normal(w.shape), 1e-6
        ends = [by_hand([w + e * h * direction if m == n else v for m, v in enumerate(weights)]) for e in (1, -1)]
        np.testing.assert_allclose((g * direction).sum(), (ends[0] - ends[1]) / (2 * h), rtol=1e-6)
    with pytest.raises(DataError, match="no weights"):
        wdr_loss([])


def test_gpg_is_a_chain_whose_teachers_take_no_derivative():
    rng = np.random.default_rng(2)
    h, r, low = (rng.standard_normal((6, 5)) for _ in range(3))
    y = rng.integers(0, 5, 6)

    def logp(z):
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    def ce(z):
        return -logp(z)[np.arange(6), y].mean()

    def kl(t, z):
        return (np.exp(logp(t)) * (logp(t) - logp(z))).sum(-1).mean()

    lam = 0.3
    want = ce(h) + lam * kl(h, r) + (1 - lam) * ce(r) + lam * kl(r, low) + (1 - lam) * ce(low)
    with jax.enable_x64(True):
        loss, (gh, gr, gl) = jax.value_and_grad(lambda *z: gpg_loss(z, y, lam), (0, 1, 2))(h, r, low)
        alone = [jax.grad(lambda z: gpg_loss([z], y))(a) for a in (h, r)]
        same = gpg_loss([h, h], y) - gpg_loss([h], y)
        masked = gpg_loss([h, r], y, mask=np.arange(6) < 4)
        first = gpg_loss([h[:4], r[:4]], y[:4])
        taught, (gt, *_) = jax.value_and_grad(lambda *z: gpg_loss(z[1:], y, lam, teacher=z[0]), (0, 1, 2))(low, h, r)
        words = gpg_loss([a.reshape(2, 3, 5) for a in (h, r)], y.reshape(2, 3), lam, teacher=low.reshape(2, 3, 5))
    np.testing.assert_allclose(loss, want, rtol=1e-12)
    np.testing.assert_allclose(gh, alone[0], rtol=1e-12)  # nothing as a teacher
    p = np.exp(logp(r))
    np.testing.assert_allclose(gr, lam * (p - np.exp(logp(h))) / 6 + (1 - lam) * np.asarray(alone[1]), atol=1e-12)
    assert np.abs(gl).sum() > 0 and min(kl(h, r), kl(r, low)) >= 0
    np.testing.assert_allclose(same, 0.5 * ce(h), rtol=1e-12)
    np.testing.assert_allclose(masked, first, rtol=1e-12)
    want = lam * kl(low, h) + (1 - lam) * ce(h) + lam * kl(h, r) + (1 - lam) * ce(r)
    np.testing.assert_allclose([taught, words], want, rtol=1e-12)  # labels [batch, length] are as so many examples
    assert not np.abs(gt).any()
    with pytest.raises(DataError, match="no logits"):
        gpg_loss([], y)
    with pytest.raises(DataError, match=r"the teacher's logits are \(4, 5\), and those of the subnets \(6, 5\)"):
        gpg_loss([h], y, teacher=h[:4])
