"""Residual networks for CIFAR: the real weights, both forms of batch normalisation, folders."""

from __future__ import annotations

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import models
from qjax.errors import ModelError
from qjax.models import CifarClassifier, CifarResNetConfig
from qjax.models.resnet import BatchNorm

TINY = {"model_type": "cifar_resnet", "blocks_per_stage": 2, "widths": [4, 8], "image_size": 8, "num_classes": 3}


@pytest.fixture(scope="module")
def tiny():
    fn = CifarClassifier(CifarResNetConfig.from_hf(TINY))
    return fn, fn.init(0)


@pytest.mark.every(2)
@pytest.mark.parametrize(("depth", "correct"), [(20, 1627), (56, 1663)])
def test_real_accuracy(data_dir, depth, correct):
    folder = data_dir / "models" / f"resnet{depth}-cifar10"
    fn, params, config = models.load(folder)
    assert config.labels[3] == "cat" and sum(x.size for x in jax.tree.leaves(params)) == {20: 271098, 56: 857082}[depth]
    data = qjax.evaluate.read_images(data_dir / "images" / "cifar10" / "test-2000.npz")
    prepare = models.image_processor(folder)
    score = qjax.evaluate.accuracy(fn, params, data.images, data.labels, prepare=prepare, batch_size=250)
    assert (score.correct, score.images) == (correct, 2000)


def test_quantize_finds_every_product(data_dir):
    folder = data_dir / "models" / "resnet20-cifar10"
    fn, params, _ = models.load(folder)
    data = qjax.evaluate.read_images(data_dir / "images" / "cifar10" / "test-2000.npz").first(100)
    x = models.image_processor(folder)(data.images)
    model = qjax.quantize(fn, params, x, recipe="W8A16")
    assert sorted(row.op for row in model.report.quantized) == ["conv"] * 19 + ["dot"]
    same = np.argmax(model(model.params, x), -1) == np.argmax(fn(params, x), -1)
    assert same.mean() >= 0.97


@pytest.mark.torch
def test_batch_norm_is_torchs():
    torch = importlib.import_module("torch")
    rng = np.random.default_rng(0)
    x = rng.normal(2.0, 3.0, (5, 4, 6, 7)).astype(np.float32)
    scale, bias, mean = (rng.normal(size=7).astype(np.float32) for _ in range(3))
    var = rng.uniform(0.5, 2.0, 7).astype(np.float32)
    for momentum in (None, 0.3):
        ours = BatchNorm(7, 1e-5)
        ours.scale[...], ours.bias[...], ours.mean[...], ours.var[...] = map(jnp.asarray, (scale, bias, mean, var))
        running = torch.from_numpy(mean.copy()), torch.from_numpy(var.copy())
        wanted = torch.nn.functional.batch_norm(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
            *running,
            torch.from_numpy(scale),
            torch.from_numpy(bias),
            training=momentum is not None,
            momentum=momentum or 0.0,
        )
        np.testing.assert_allclose(ours(jnp.asarray(x), momentum), wanted.numpy().transpose(0, 2, 3, 1), atol=2e-5)
        np.testing.assert_allclose(ours.mean[...], running[0].numpy(), rtol=1e-5)
        np.testing.assert_allclose(ours.var[...], running[1].numpy(), rtol=1e-5)


def test_training_form(tiny):
    fn, params = tiny
    pixels = jax.random.normal(jax.random.key(0), (16, 8, 8, 3)) * 2 + 1
    before = jax.tree.map(np.array, params)
    logits, moved = jax.jit(fn.train_step_stats, static_argnames="momentum")(params, pixels, momentum=1.0)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, params, before)  # nothing is changed in place
    for path, new in jax.tree_util.tree_leaves_with_path(moved):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        old = before
        for key in path:
            old = old[getattr(key, "key", getattr(key, "idx", None))]
        assert np.array_equal(new, old) != name.endswith(("/mean", "/var")), name
    # Statistics moved all the way are those of this batch, up to n / (n - 1) in the variance.
    np.testing.assert_allclose(fn(moved, pixels), logits, rtol=0.02, atol=0.02)
    assert np.abs(np.asarray(fn(params, pixels)) - np.asarray(logits)).max() > 0.1


def test_training_learns_and_statistics_pass_no_gradient(tiny):
    fn, params = tiny
    pixels = jax.random.normal(jax.random.key(1), (12, 8, 8, 3))
    labels = jnp.arange(12) % 3

    @jax.jit
    @lambda loss: jax.value_and_grad(loss, has_aux=True)
    def step(params):
        logits, new = fn.train_step_stats(params, pixels)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean(), new

    first = None
    for _ in range(15):
        (loss, params), slopes = step(params)
        first = loss if first is None else first
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, slopes)
    assert loss < first / 2
    assert not np.asarray(slopes["bn1"]["mean"]).any() and np.asarray(slopes["conv1"]["kernel"]).any()


def test_folder_round_trip(tmp_path, tiny):
    fn, params = tiny
    params = jax.tree.map(lambda x: x + 0.25, params)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 4]}))
    models.save_weights(tmp_path / "model.safetensors", params, fn.config, dtype=np.float32)
    again, read, config = models.load(tmp_path)
    assert config == fn.config and again == fn
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert models.hf.checkpoint_names(config, "stage2/1/bn2/var") == ["layer2.1.bn2.running_var"]
    process = models.image_processor(tmp_path)
    assert (process.size, process.mean, process.std) == ((8, 8), (0.1, 0.2, 0.3), (1, 2, 4))
    with pytest.raises(ModelError, match=r"\[B, 8, 8, 3\]"):
        fn(params, jnp.ones((1, 3, 8, 8)))
    with pytest.raises(ModelError, match="scan_layers is for decoders"):
        models.load(tmp_path, scan_layers=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shortcut": "B (1x1 convolutions)"}, "shortcut is 'B.*only A"),
        ({"depth": 20}, "depth is 20, but 2 stages of 2 blocks make 10"),
        ({"blocks_per_stage": None}, "lacks blocks_per_stage"),
        ({"blocks_per_stage": 0, "depth": None}, "blocks_per_stage is 0"),
        ({"widths": [4, 7]}, "grow by even numbers"),
        ({"widths": []}, "must list positive integers"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(ModelError, match=words):
        CifarResNetConfig.from_hf({**TINY, **change})
