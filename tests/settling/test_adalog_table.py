"""The table of `benchmarks.adalog`."""

from __future__ import annotations

import numpy as np

from benchmarks.adalog import summary


def row(method, seed, shift):
    rng = np.random.default_rng(seed)
    right = rng.random(60) < 0.8 - shift
    return {
        "method": method,
        "bits": 4,
        "seed": seed,
        "seconds": 10.0,
        "right": right.tolist(),
        "float_right": [True] * 60,
        "kl": (rng.random(60) + shift).tolist(),
        "error": (0.1 * rng.random(60) + shift).tolist(),
    }


def test_methods_are_compared_image_by_image():
    found, text = summary([row(m, seed, shift) for seed in (0, 1) for m, shift in (("adalog", 0.0), ("minmax", 0.5))])
    ours, other = found
    assert ours["seeds"] == 2 and "kl_more" not in ours
    np.testing.assert_allclose([other["kl_more"], other["error_more"]], 0.5, rtol=1e-9)
    assert other["right_more"] < 0 and other["right_p"] < 1e-6
    lines = text.splitlines()
    assert len(lines) == 4 and "±" in lines[2] and "+0.500 (p" in lines[3]
