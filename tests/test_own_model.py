"""The language model that comes with the repository: it loads, and W4A16 is what plain NumPy makes of it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import qjax
from qjax.evaluate import divergence
from qjax.formats import QArray

FOLDER = "examples/assets/books-6m"
GROUP = 128


@pytest.fixture(scope="module")
def loaded(root):
    fn, params, config = qjax.models.load(root / FOLDER)
    text = (root / "examples/assets/passage.txt").read_text(encoding="utf-8")
    tokens = np.asarray([qjax.models.tokenizer(root / FOLDER).encode(text)[:128]], np.int32)
    return fn, params, config, tokens


def round_to_nearest(weight: np.ndarray, divide: bool = False) -> np.ndarray:
    """int4, symmetric, one scale per 128 inputs: written from the definition, in NumPy, with none of qjax.

    The largest number of a group stands exactly half-way between two codes, so the last bit of the quotient decides
    which it gets. qjax documents that it multiplies by reciprocals (as XLA does); ``divide`` divides instead.
    """
    inputs, outputs = weight.shape
    groups = weight.reshape(-1, min(GROUP, inputs), outputs)
    largest, one = np.abs(groups).max(axis=1, keepdims=True), np.float32(1)
    scale = largest / np.float32(7.5) if divide else largest * (one / np.float32(7.5))
    steps = groups / scale if divide else groups * (one / scale)
    return (np.clip(np.round(steps), -8, 7) * scale).reshape(inputs, outputs)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_it_has_the_shape_that_methods_need(loaded):
    _, params, config, _ = loaded
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 5_000_000 <= size <= 8_000_000
    assert config.hidden_size % 128 == config.intermediate_size % 128 == 0 and config.head_dim == 64


def is_kernel(path) -> bool:
    return jax.tree_util.keystr(path).endswith("['kernel']")


@pytest.mark.parametrize(("divide", "tolerance"), [(False, 2e-3), (True, 0.15)])
def test_w4a16_is_round_to_nearest(loaded, divide, tolerance):
    fn, params, _, tokens = loaded
    model = qjax.quantize(fn, params, tokens, recipe="W4A16")
    by_hand = jax.tree_util.tree_map_with_path(
        lambda path, leaf: round_to_nearest(np.asarray(leaf), divide) if is_kernel(path) else leaf, params
    )
    leaves = jax.tree.leaves(model.params, is_leaf=lambda x: isinstance(x, QArray))
    assert sum(isinstance(leaf, QArray) for leaf in leaves) == 42
    a = log_softmax(np.asarray(jax.jit(fn)(params, tokens))[0, :-1])
    b = log_softmax(np.asarray(jax.jit(fn)(by_hand, tokens))[0, :-1])
    kl = float((np.exp(a) * (a - b)).sum(-1).mean())
    measured = divergence(fn, params, model, model.params, [tokens[0]], show=False)
    assert measured.kl == pytest.approx(kl, rel=tolerance) and kl > 1e-4
    if not divide:
        assert measured.agreement == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).mean()), abs=1e-9)


@pytest.mark.slow
def test_constant_scales_of_8_bit_floats_cost_little_more_than_dynamic_ones(loaded):
    fn, params, _, tokens = loaded
    calibration, test = tokens[:, :64], tokens[0, 64:]
    static = qjax.quantize(fn, params, recipe="FP8", batches=[calibration])
    dynamic = qjax.quantize(fn, params, tokens, recipe="FP8_DYNAMIC")
    kl = [divergence(fn, params, m, m.params, [test], show=False).kl for m in (static, dynamic)]
    assert 1e-5 < kl[0] < 2 * kl[1]
