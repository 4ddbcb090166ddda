"""Folders: round trip, shards, dtypes, and every way in which a folder can be wrong."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qjax
from qjax import models
from qjax.errors import DataError, ModelError
from qjax.models import ImageClassifier, LanguageModel, LlamaConfig, VitConfig

HF = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama folder, untied, in float32."""
    config = LlamaConfig.from_hf(HF)
    (tmp_path / "config.json").write_text(json.dumps(HF))
    params = LanguageModel(config).init(0)
    models.save_weights(tmp_path / "model.safetensors", params, config, dtype=np.float32)
    return tmp_path


def reconfigure(folder, **changes):
    config = {k: v for k, v in {**HF, **changes}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_round_trip(folder):
    fn, params, config = models.load(folder)
    assert config == LlamaConfig.from_hf(HF)
    same = jax.tree.map(np.array_equal, params, fn.init(0))
    assert all(jax.tree.leaves(same))
    stored = load_file(folder / "model.safetensors")
    assert stored["model.layers.1.mlp.up_proj.weight"].shape == (24, 16), "torch keeps [out, in]"
    scanned, stacked, _ = models.load(folder, scan_layers=True)
    text = jnp.arange(6)[None]
    np.testing.assert_allclose(scanned(stacked, text), fn(params, text), rtol=1e-5, atol=1e-6)


def test_abstract_reads_no_weights(folder):
    (folder / "model.safetensors").unlink()
    fn, params, _ = models.abstract(folder)
    assert jax.eval_shape(fn, params, jax.ShapeDtypeStruct((2, 5), jnp.int32)).shape == (2, 5, 40)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_dtypes(folder, stored):
    rewrite(folder, lambda t: t.update({k: v.astype(stored) for k, v in t.items()}))
    assert models.load(folder)[1]["norm"]["scale"].dtype == jnp.float32
    assert models.load(folder, dtype=jnp.bfloat16)[1]["norm"]["scale"].dtype == jnp.bfloat16
    assert models.load(folder, dtype=None)[1]["norm"]["scale"].dtype == stored


def test_shards(folder):
    whole = models.load(folder)[1]
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {n: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    same = jax.tree.map(np.array_equal, models.load(folder)[1], whole)
    assert all(jax.tree.leaves(same))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks model-00002-of-00002.safetensors"):
        models.load(folder)


def test_tied_embeddings(folder):
    reconfigure(folder, tie_word_embeddings=True)
    params = models.load(folder)[1]  # the file's own lm_head is what transformers ignores too
    assert "lm_head" not in params
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    models.load(folder)
    reconfigure(folder)
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        models.load(folder)


def test_architecture_from_model_type(folder):
    reconfigure(folder, architectures=None, model_type="llama")
    models.load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["T5Model"]}, "'T5Model', which is not supported.*bring your own"),
        ({"architectures": ["Qwen2ForCausalLn"]}, "did you mean 'Qwen2ForCausalLM'"),
        ({"architectures": ...}, "none named"),
        ({"quantization_config": {"bits": 4}}, "quantized already"),
        ({"num_hidden_layers": 3}, r"no tensor 'model\.layers\.2\..* same checkpoint"),
        ({"num_hidden_layers": 1}, r"does not account for: 'model\.layers\.1\..* more"),
        ({"hidden_size": 32, "head_dim": 8}, r"shape \(40, 16\), but config.json asks for \(40, 32\)"),
    ],
)
def test_wrong_config(folder, change, words):
    reconfigure(folder, **change)
    with pytest.raises(ModelError, match=words):
        models.load(folder)


def test_bias_that_config_does_not_name(folder):
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float32)}))
    with pytest.raises(ModelError, match=r"q_proj\.bias"):
        models.load(folder)
    rewrite(folder, lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"))
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    models.load(folder)


def test_integer_weights(folder):
    rewrite(folder, lambda t: t.update({"model.norm.weight": np.ones(16, np.int8)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*I8"):
        models.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 60, -7], ids=["empty", "header", "metadata", "tail"])
def test_damaged_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"damaged or cut short.*download it again"):
        models.load(folder)


def test_missing_files(folder, tmp_path):
    with pytest.raises(ModelError, match="not a folder"):
        models.load(tmp_path / "nowhere")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safe_serialization"):
        models.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        models.load(folder)
    (folder / "checkpoint").mkdir()  # as `qjax quantize` writes it
    with pytest.raises(ModelError, match=r"quantized model.*qjax\.models\.abstract"):
        models.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        models.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        models.load(folder)


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"]
)
def test_classifiers(tmp_path, name):
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
    raw = {"architectures": [name], **sizes, "image_size": [8, 12], "patch_size": 4, "num_labels": 5}
    config = VitConfig.from_hf(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    fn = ImageClassifier(config)
    models.save_weights(tmp_path / "model.safetensors", fn.init(), config, dtype=np.float32)
    fn, params, _ = models.load(tmp_path)
    logits = fn(params, jnp.ones((2, 8, 12, 3)))
    assert logits.shape == (2, 5) and params["layers"][1]["attn"]["q_proj"]["kernel"].shape == (12, 12)
    with pytest.raises(ModelError, match=r"\[B, 8, 12, 3\]"):
        fn(params, jnp.ones((2, 12, 8, 3)))
    with pytest.raises(ModelError, match="scan_layers"):
        models.load(tmp_path, scan_layers=True)


def test_tokenizer(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers import models as raw_models

    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        models.tokenizer(tmp_path)
    raw = Tokenizer(raw_models.BPE({"<s>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    raw.add_special_tokens(["<s>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    plain = models.tokenizer(tmp_path)
    assert plain.encode("aba") == [3, 1] and plain.bos_id is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": True}))
    tok = models.tokenizer(tmp_path)
    assert tok.encode("aba") == [0, 3, 1] and tok.encode("aba", special=False) == [3, 1]
    assert tok.bos_id == 0 and tok.vocab_size == 4
    assert "<s>" not in tok.decode([0, 3]) and "<s>" in tok.decode([0, 3], special=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="download it again"):
        models.tokenizer(tmp_path)


def test_image_processor(tmp_path):
    image = pytest.importorskip("PIL.Image")
    photo = image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    photo.save(tmp_path / "photo.png")
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"shortest_edge": 20},
                "do_center_crop": True,
                "crop_size": 16,
                "resample": 3,
                "image_mean": [0.1, 0.2, 0.3],
                "image_std": [1.0, 2.0, 4.0],
            }
        )
    )
    pixels = models.image_processor(tmp_path)([tmp_path / "photo.png", photo, np.asarray(photo)])
    assert pixels.shape == (3, 16, 16, 3) and pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels[0], pixels[1])
    np.testing.assert_array_equal(pixels[0], pixels[2])
    expected = np.asarray(photo.resize((30, 20), resample=3).crop((7, 2, 23, 18)), np.float32) / 255
    np.testing.assert_allclose(pixels[0], (expected - [0.1, 0.2, 0.3]) / [1, 2, 4], atol=1e-6)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        models.image_processor(tmp_path)([tmp_path / "broken.jpg"])


@pytest.mark.every(2)
@pytest.mark.parametrize("scan", [False, True])
def test_lazy_parameters(folder, scan, monkeypatch):
    """Nothing is read before quantize needs it; then the same codes as from the loaded model."""
    fn, params, _ = models.load(folder, scan_layers=scan)
    read = []
    monkeypatch.setattr("qjax.models.weights.Checkpoint._read", _recording(read))
    lazy_fn, lazy, config = models.load(folder, scan_layers=scan, lazy=True)
    assert not read and config == LlamaConfig.from_hf(HF)
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)  # noqa: E731
    assert shapes(lazy) == shapes(params)
    text = jnp.arange(12).reshape(2, 6)
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4), rounding=qjax.GPTQ())])
    want = qjax.quantize(fn, params, recipe=recipe, batches=[text], blocks="layers/*")
    got = qjax.quantize(lazy_fn, lazy, recipe=recipe, batches=[text])
    assert max(map(read.count, set(read))) <= 4
    for a, b in zip(jax.tree.leaves(want.params), jax.tree.leaves(got.params), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(want(want.params, text), got(got.params, text))


def _recording(read):
    original = models.weights.Checkpoint._read

    def recorded(self, ours, theirs, shape):
        read.append(theirs[0])
        return original(self, ours, theirs, shape)

    return recorded


def test_what_is_wrong_with_a_folder_is_said_before_anything_is_read(folder):
    rewrite(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ModelError, match="no tensor 'model.norm.weight'"):
        models.load(folder, lazy=True)
    rewrite(folder, lambda t: t.update({"model.norm.weight": np.ones(3, np.float32)}))
    with pytest.raises(ModelError, match="but config.json asks"):
        models.load(folder, lazy=True)
    rewrite(folder, lambda t: t.update({"model.norm.weight": np.ones(16, np.int8)}))
    with pytest.raises(ModelError, match="stored as I8"):
        models.load(folder, lazy=True)
