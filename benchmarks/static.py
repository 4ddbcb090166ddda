"""Constant activation scales beside dynamic ones: accuracy of int8 and float8 on two real models.

    python -m benchmarks.static [--data ../shared/data]

The language model that comes with the repository (`examples/assets/books-6m`) is calibrated on 8 batches of 4 rows of
256 tokens of the training text and compared with its float self on 30,000 characters of the validation text. ViT-Ti is
calibrated on 32 images of the 500, drawn by seed 0, and scored on the other 468. Data: as `tests/conftest.py` finds it.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from benchmarks import measure
from qjax.evaluate import accuracy, divergence, read_images, text_blocks

ROOT = Path(__file__).parent.parent
TENSOR, TOKEN, WEIGHTS = qjax.Int(8, per="tensor"), qjax.Int(8, per="token"), qjax.Int(8)
HEADS = ("**/lm_head/**", "**/embed*/**")


def recipe(inputs: Any, *first: qjax.Rule) -> qjax.Recipe:
    """int8 weights with these inputs, heads and embeddings in float."""
    keep = [qjax.Rule(match, skip=True, optional=True) for match in HEADS]
    return qjax.Recipe([*keep, *first, qjax.Rule("**", weights=WEIGHTS, inputs=inputs)])


RECIPES: dict[str, qjax.Recipe | str] = {
    "int8 dynamic per token (W8A8)": "W8A8",
    "int8 dynamic per tensor": recipe(TENSOR),
    "int8 static": recipe(qjax.static(TENSOR)),
    "int8 static, MSE range": recipe(qjax.static(TENSOR, qjax.MSE())),
    "int8 static, smooth 0.5": recipe(qjax.static(TENSOR, smooth=0.5)),
    "int8 static, smooth 0.8 (W8A8_STATIC)": "W8A8_STATIC",
    "int8 static, `down` and `fc2` dynamic": recipe(
        qjax.static(TENSOR, smooth=0.5),
        qjax.Rule("**/down/**", weights=WEIGHTS, inputs=TOKEN, optional=True),
        qjax.Rule("**/fc2/**", weights=WEIGHTS, inputs=TOKEN, optional=True),
    ),
    "float8 dynamic per token (FP8_DYNAMIC)": "FP8_DYNAMIC",
    "float8 static (FP8)": "FP8",
    "float4 weights, float activations (NVFP4A16)": "NVFP4A16",
    "float4 weights and activations, static constant (NVFP4)": "NVFP4",
}


def model_of(fn: Any, params: Any, batches: list[Any], how: qjax.Recipe | str) -> qjax.Model:
    """The model quantized so, with data where the recipe wants some."""
    how = qjax.recipe(how) if isinstance(how, str) else how
    if how.needs_batches:
        return qjax.quantize(fn, params, recipe=how, batches=batches)
    return qjax.quantize(fn, params, *batches[0], recipe=how)


def language_model(data: Path) -> tuple[Any, Any, list[Any], Any]:
    """The language model: function, parameters, calibration batches, and blocks of text to score."""
    folder = ROOT / "examples/assets/books-6m"
    fn, params, _ = qjax.models.load(folder)
    tokenizer = qjax.models.tokenizer(folder)
    with gzip.open(data / "text/books/train.txt.gz", "rt") as file:
        ids = np.asarray(tokenizer.encode(file.read()[:200_000], special=False), np.int32)[: 8 * 4 * 255]
    rows = np.concatenate([np.full((32, 1), tokenizer.bos_id, np.int32), ids.reshape(32, 255)], axis=1)
    batches = [(jnp.asarray(part),) for part in np.split(rows, 8)]
    text = (data / "text/books/valid.txt").read_text()[:30_000]
    return fn, params, batches, text_blocks(tokenizer, text, protocol="B", context=256)


def language(data: Path) -> dict[str, float]:
    """KL divergence to float, in nats a token."""
    fn, params, batches, blocks = language_model(data)
    out = {}
    for name, how in RECIPES.items():
        model = model_of(fn, params, batches, how)
        out[name] = divergence(fn, params, model, model.params, blocks, show=False).kl
    return out


def images(data: Path) -> tuple[dict[str, int], int, int]:
    """Right answers of each recipe, of float, and how many images there are."""
    folder = data / "models/vit-tiny-patch16-224"
    fn, params, _ = qjax.models.load(folder)
    found = read_images(data / "images/imagenet-sample-500")
    drawn = set(np.random.default_rng(0).choice(len(found), 32, replace=False).tolist())
    prepare = qjax.models.image_processor(folder)
    pixels = {
        kind: jnp.asarray(prepare(found.only([i for i in range(len(found)) if (i in drawn) == used]).images))
        for kind, used in (("calibration", True), ("test", False))
    }
    labels = np.asarray([int(found.labels[i]) for i in range(len(found)) if i not in drawn])
    batches = [(part,) for part in jnp.split(pixels["calibration"], 4)]
    right = lambda f, p: accuracy(f, p, pixels["test"], labels, show=False).correct  # noqa: E731
    return (
        {name: right(m := model_of(fn, params, batches, how), m.params) for name, how in RECIPES.items()},
        right(fn, params),
        len(labels),
    )


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QJAX_DATA", ROOT.parent / "shared/data")))
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    kl = language(given.data)
    right, of_float, count = images(given.data)
    text = (
        f"KL divergence to float of books-6m in nats; right answers of ViT-Ti, {count} images (float {of_float}).\n\n"
    )
    text += measure.table(["activations", "KL", "right"], [[name, f"{kl[name]:.5f}", right[name]] for name in RECIPES])
    record = {"kl": kl, "right": right, "right_float": of_float, "images": count}
    measure.save("static", record, text, given.out)


if __name__ == "__main__":
    main()
