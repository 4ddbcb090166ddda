"""ResNet, MobileNetV2 and EfficientNet: against transformers, timm and torchvision, and as supernets."""

from __future__ import annotations

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import qjax
from qjax import models
from qjax.errors import ModelError, SearchError
from qjax.models import (
    EfficientNetClassifier,
    EfficientNetConfig,
    MobileNetV2Classifier,
    MobileNetV2Config,
    ResNetClassifier,
    ResNetConfig,
)
from qjax.models.convolutional import ConvClassifier
from qjax.supernet import Space, compression, encode_choice, recalibrate, sizes

TINY = {"num_labels": 5, "num_channels": 3}
CASES = {
    "resnet-basic": ("ResNet", {"layer_type": "basic", "embedding_size": 6, "hidden_sizes": [6, 8], "depths": [2, 1]}),
    "resnet-bottleneck": (
        "ResNet",
        {"embedding_size": 6, "hidden_sizes": [8, 16], "depths": [1, 2], "downsample_in_bottleneck": True},
    ),
    "resnet-first": (
        "ResNet",
        {"embedding_size": 4, "hidden_sizes": [8], "depths": [2], "downsample_in_first_stage": True},
    ),
    "mobilenet": (
        "MobileNetV2",
        {"depth_multiplier": 0.2, "expand_ratio": 2.0, "min_depth": 4, "depth_divisible_by": 4},
    ),
    "mobilenet-torch": (
        "MobileNetV2",
        {"depth_multiplier": 0.2, "expand_ratio": 2.0, "tf_padding": False, "layer_norm_eps": 1e-5},
    ),
    "efficientnet": (
        "EfficientNet",
        {"width_coefficient": 0.25, "depth_coefficient": 1.2, "hidden_dim": 320, "kernel_sizes": [3, 5, 3],
         "in_channels": [32, 16, 40], "out_channels": [16, 40, 64], "strides": [1, 2, 2],
         "num_block_repeats": [1, 2, 1],
         "expand_ratios": [1, 3, 6], "depthwise_padding": [3]},
    ),
}  # fmt: skip


def randomized(model, torch):
    """Norms and biases away from ones and zeros, as trained ones are."""
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.dtype.is_floating_point and value.ndim == 1:
                value.normal_(float(name.endswith("weight")), 0.2)
            elif value.ndim > 1:
                value.normal_(0, (2 / value[0].numel()) ** 0.5)
    return model.eval()


def agree(fn, params, pixels, theirs):
    ours = np.asarray(jax.jit(fn)(params, pixels))
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max() and np.abs(theirs).max() > 0.1


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.every(3)
@pytest.mark.parametrize("case", CASES)
def test_transformers(case, tmp_path, transformers):
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    family, settings = CASES[case]
    config = getattr(transformers, f"{family}Config")(**TINY, **settings)
    model = randomized(getattr(transformers, f"{family}ForImageClassification")(config), torch)
    model.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).standard_normal((2, 36, 48, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).logits.numpy()
    fn, params, config = models.load(tmp_path)
    agree(fn, params, pixels, theirs)
    models.save_weights(tmp_path / "model.safetensors", params, config, dtype=np.float32)
    again = models.load(tmp_path)[1]
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, again)), strict=True))


VISION = {
    "resnet18": {"architectures": ["ResNetForImageClassification"], "layer_type": "basic", "depths": [2, 2, 2, 2],
                 "hidden_sizes": [64, 128, 256, 512]},
    "mobilenet_v2": {"architectures": ["MobileNetV2ForImageClassification"], "tf_padding": False,
                     "layer_norm_eps": 1e-5},
    "efficientnet_b0": {"architectures": ["EfficientNetForImageClassification"], "width_coefficient": 1.0,
                        "symmetric_padding": True, "batch_norm_eps": 1e-5},
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*VISION, "timm/resnet50", "timm/mobilenetv2_100", "timm/efficientnet_b0"])
def test_timm_and_torchvision(name, tmp_path):
    library = "timm" if name.startswith("timm/") else "torchvision"
    torch = pytest.importorskip("torch")
    try:
        made = importlib.import_module(library)
    except Exception as error:  # a torchvision for another torch breaks as it is imported
        pytest.skip(f"no working {library}: {error}")
    torch.manual_seed(0)
    short = name.removeprefix("timm/")
    model = made.create_model(short) if library == "timm" else getattr(made.models, short)()
    randomized(model, torch)
    save_file({k: v.contiguous().numpy() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    config = {**VISION.get(short, {}), "num_labels": 1000} if library == "torchvision" else {"architecture": short}
    (tmp_path / "config.json").write_text(json.dumps(config))
    pixels = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).numpy()
    fn, params, _ = models.load(tmp_path)
    agree(fn, params, pixels, theirs)


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        (
            {"architecture": "resnet18.a1_in1k"},
            {"conv1.weight": (64, 3, 7, 7), "layer2.0.downsample.0.weight": (128, 64, 1, 1),
             "layer4.1.bn2.running_var": (512,), "fc.bias": (1000,)},
        ),
        (
            {"architecture": "mobilenetv2_100", "num_classes": 7},
            {"conv_stem.weight": (32, 3, 3, 3), "blocks.0.0.conv_dw.weight": (32, 1, 3, 3),
             "blocks.0.0.conv_pw.weight": (16, 32, 1, 1), "blocks.2.1.conv_pwl.weight": (32, 192, 1, 1),
             "blocks.6.0.bn3.running_mean": (320,), "bn2.weight": (1280,), "classifier.weight": (7, 1280)},
        ),
        (
            {"architecture": "efficientnet_b0"},
            {"blocks.0.0.se.conv_reduce.bias": (8,), "blocks.0.0.bn2.weight": (16,),
             "blocks.2.1.conv_dw.weight": (240, 1, 5, 5), "blocks.6.0.conv_pwl.weight": (320, 1152, 1, 1)},
        ),
        (
            {**VISION["mobilenet_v2"], "num_labels": 3},
            {"features.1.conv.0.0.weight": (32, 1, 3, 3), "features.1.conv.2.running_var": (16,),
             "features.17.conv.1.0.weight": (960, 1, 3, 3), "features.18.0.weight": (1280, 320, 1, 1),
             "classifier.1.weight": (3, 1280)},
        ),
        (
            VISION["efficientnet_b0"],
            {"features.1.0.block.1.fc1.weight": (8, 32, 1, 1), "features.1.0.block.2.1.weight": (16,),
             "features.3.1.block.1.0.weight": (240, 1, 5, 5), "features.8.0.weight": (1280, 320, 1, 1)},
        ),
    ],
)  # fmt: skip
def test_names_of_timm_and_torchvision(raw, names, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = models.abstract(tmp_path)[2]
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(models.abstract(tmp_path)[1]):
        ours = jax.tree_util.keystr(path, simple=True, separator="/")
        for theirs in models.hf.checkpoint_names(config, ours):
            assert theirs not in found, theirs
            found[theirs] = (
                models.hf.REGISTRY[config.architecture].to_checkpoint(np.zeros(leaf.shape, bool), ours).shape
            )
    assert {name: found.get(name) for name in names} == names


SMALL: dict[str, ConvClassifier] = {
    "resnet": ResNetClassifier(ResNetConfig(8, (8, 16), (1, 1), num_labels=4)),
    "mobilenet": MobileNetV2Classifier(MobileNetV2Config(0.2, 4, 4, 2.0, num_labels=4)),
    "efficientnet": EfficientNetClassifier(
        EfficientNetConfig(
            0.25, 1.0, 8, (3, 5), (32, 16), (16, 24), (1, 2), (1, 2), (1, 6), hidden_dim=320, num_labels=4
        )
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_as_a_supernet(name):
    model = SMALL[name]
    params = model.init(0)
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    space = Space((2, 4, 8), (4, 8))
    t, evaluated = qjax.elastic(model.train_step_stats, space), qjax.elastic(model, space)
    state, domain = t.init(params, x), t.domain(params, x)
    choice = domain.uniform(4, 8, (True, True, False))
    own = jax.jit(lambda c, x: recalibrate(t, params, state, c, x))(choice, x[None])
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (own, params)), strict=True)]
    assert max(moved) > 0.01
    want = jax.jit(lambda c: evaluated.apply(own, state, c, x)[0])(choice)
    packed = evaluated.convert(own, state, choice, x)
    np.testing.assert_allclose(packed(packed.params, x), want, atol=2e-3 * np.abs(want).max())
    quantized = qjax.quantize(model, params, x, recipe="W8A8")  # own are the statistics of four images at 4 bits
    near, exact = quantized(quantized.params, x), model(params, x)
    assert np.linalg.norm(near - exact) < 0.1 * np.linalg.norm(exact)


def test_the_stages_are_those_of_the_papers():
    sites = {}
    for model in (
        ResNetClassifier(ResNetConfig(64, (64, 128, 256, 512), (2, 2, 2, 2), layer_type="basic")),
        ResNetClassifier(ResNetConfig()),
        MobileNetV2Classifier(MobileNetV2Config(num_labels=1000)),
        EfficientNetClassifier(EfficientNetConfig()),
    ):
        params = model.abstract_params()
        out = jax.eval_shape(model, params, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
        assert out.shape == (1, 1000)
        weights = [a for p, a in jax.tree_util.tree_leaves_with_path(params) if p[-1].key not in ("mean", "var")]
        sites[type(model).__name__ + model.config.__dict__.get("layer_type", "")] = sum(a.size for a in weights)
    assert sites == {
        "ResNetClassifierbasic": 11_689_512,
        "ResNetClassifierbottleneck": 25_557_032,
        "MobileNetV2Classifier": 3_504_872,
        "EfficientNetClassifier": 5_288_548,
    }


@pytest.mark.parametrize(
    ("config", "count", "length", "weights", "inputs"),
    [
        (
            ResNetConfig(64, (64, 128, 256, 512), (2, 2, 2, 2), layer_type="basic"),
            21,
            300,
            (14.11, 9.93),
            (13.25, 9.56),
        ),
        (ResNetConfig(), 54, 762, (12.88,), (15.34,)),
        (MobileNetV2Config(num_labels=1000), 53, 748, (), ()),
    ],
)
def test_compression_is_that_of_the_papers_table(config, count, length, weights, inputs):
    model = (ResNetClassifier if isinstance(config, ResNetConfig) else MobileNetV2Classifier)(config)
    args = model.abstract_params(), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    t = qjax.elastic(model)
    domain, found = t.domain(*args), sizes(t, *args)
    choice = domain.uniform(2)
    assert len(domain.sites) == count and encode_choice(choice, (True, True, True)).shape == (length,)
    if count == 21:
        assert sum(found.inputs) == 2_183_168
    for n, (w, a) in enumerate(zip(weights, inputs, strict=True)):
        ours = compression(domain.uniform(2 + n), found)
        assert tuple(round(v, 2) for v in ours) == (w, a)
    with pytest.raises(SearchError, match=f"{count} sites"):
        compression(choice[1:], found)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ResNetConfig(layer_type="basics"), "did you mean 'basic'"),
        (lambda: ResNetConfig(depths=(1, 1)), "one number, 1 or more, for each stage"),
        (lambda: ResNetConfig(hidden_act="swoosh"), "hidden_act"),
        (lambda: MobileNetV2Config(depth_multiplier=0.0), "above 0"),
        (lambda: MobileNetV2Config(hidden_act="swoosh"), "hidden_act"),
        (lambda: MobileNetV2Config.from_hf({"output_stride": 16}), "output_stride"),
        (lambda: MobileNetV2Config.from_hf({"first_layer_is_expansion": False}), "first_layer_is_expansion"),
        (lambda: EfficientNetConfig(strides=(1, 2)), "strides 2"),
        (lambda: EfficientNetConfig(hidden_dim=100), "hidden_dim is 100"),
        (lambda: EfficientNetConfig(hidden_act="swoosh"), "hidden_act"),
        (lambda: EfficientNetConfig.from_hf({}), "lacks width_coefficient"),
        (lambda: EfficientNetConfig.from_hf({"pooling_type": "max"}), "pooling_type"),
        (lambda: SMALL["resnet"](SMALL["resnet"].init(), jnp.ones((2, 32, 32, 1))), r"\[B, H, W, 3\]"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ModelError, match=words):
        make()


def test_a_timm_folder_says_how_images_are_prepared(tmp_path):
    made = {
        "input_size": [3, 224, 224],
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": [0.4] * 3,
        "std": [0.2] * 3,
    }
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50", "pretrained_cfg": made}))
    found = models.image_processor(tmp_path)
    assert (found.size, found.crop, found.resample, found.mean, found.std) == (
        235,
        (224, 224),
        3,
        (0.4,) * 3,
        (0.2,) * 3,
    )
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {**made, "interpolation": "nearest"}}))
    with pytest.raises(ModelError, match="nearest"):
        models.image_processor(tmp_path)


def test_unknown_timm_names(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "convnext_tiny.fb_in22k"}))
    with pytest.raises(ModelError, match="convnext_tiny"):
        models.abstract(tmp_path)
