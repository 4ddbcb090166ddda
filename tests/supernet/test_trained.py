"""What training a supernet has to give, on MNIST: more bits are no worse, and weights become flatter (check 6.10)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.supernet import Schedule, Space, moments, train

BITS = (2, 3, 4, 6, 8)
SPACE = Space(BITS, BITS, (True,), (True,), (True,), ends=None)
WIDTHS = (784, 64, 64, 10)
STEPS = 400


def network(p, x):
    """Three layers."""
    x = jax.nn.relu(x @ p["a"])
    return jax.nn.relu(x @ p["b"]) @ p["c"]


@pytest.mark.slow
def test_more_bits_are_no_worse_and_regularization_flattens_weights(data_dir):
    with np.load(data_dir / "images" / "mnist" / "mnist-8000.npz") as file:
        images, labels = file["images"].reshape(len(file["images"]), -1) / np.float32(255), file["labels"]
    assert images.shape == (8000, 784)
    x_test, y_test = images[6000:], labels[6000:]
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.standard_normal((k, n)) * np.sqrt(2 / k), jnp.float32)
        for name, k, n in zip("abc", WIDTHS[:-1], WIDTHS[1:], strict=True)
    }

    def batches(step):
        at = np.random.default_rng(step).integers(0, 6000, 64)
        return (images[at],), labels[at].astype(np.int32)

    t = qjax.elastic(network, SPACE)
    state, domain = t.init(params, images[:256]), t.domain(params, images[:256])
    run = jax.jit(lambda p, s, c: jnp.argmax(t.apply(p, s, c, x_test)[0], -1))

    def departures(p):
        """Mean |kurtosis - 1.8| of the layers that the loss acts on, all but the first, in float64."""
        out = []
        for w in (np.asarray(p["b"], np.float64), np.asarray(p["c"], np.float64)):
            z = (w - w.mean()) / w.std(ddof=1)
            np.testing.assert_allclose(moments(w)[1], (z**4).mean(), rtol=1e-4)
            out.append(abs((z**4).mean() - 1.8))
        return float(np.mean(out))

    accuracy, departure = {}, {}
    for wdr in (1.0, 0.0):
        done = train(t, params, state, batches, Schedule(STEPS, wdr=wdr))
        accuracy[wdr] = [float(np.mean(run(done.params, done.state, domain.uniform(b)) == y_test)) for b in BITS]
        departure[wdr] = departures(done.params)
    for found in accuracy.values():
        # one standard error of a difference of paired accuracies is below 0.6 points on 2,000 images
        assert found[0] > 0.8 and found[-1] > 0.9
        assert all(b > a - 0.01 for a, b in itertools.pairwise(found)), found
    assert accuracy[1.0][-1] > accuracy[1.0][0]
    assert departure[1.0] < 0.8 * departure[0.0] and departure[1.0] < departures(params), departure
