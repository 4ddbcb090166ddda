"""The images that the supernet benchmarks share: 20,000 CIFAR-10 training images and 2,000 test images."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What the ResNets of the data folder were trained with."""


@dataclasses.dataclass(frozen=True)
class Cifar:
    """Images as bytes, [n, 32, 32, 3], and labels.

    Attributes:
        images, labels: for training, in an order drawn once.
        test_images, test_labels: for testing.
    """

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @classmethod
    def read(cls, data: Path) -> Cifar:
        """The files of the data folder."""
        folder = data / "images" / "cifar10"
        with zipfile.ZipFile(folder / "train-20000.zip") as archive:
            names = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
            classes = sorted({n.split("/")[0] for n in names})
            images = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(n)))) for n in names])
        labels = np.array([classes.index(n.split("/")[0]) for n in names])
        order = np.random.default_rng(0).permutation(len(names))
        with np.load(folder / "test-2000.npz") as file:
            return cls(images[order], labels[order], file["images"], file["labels"])

    def batch(self, step: int, size: int) -> tuple[jax.Array, np.ndarray]:
        """A training batch by its step: another order each epoch, mirrored and moved by up to 4 pixels."""
        epoch, at = divmod(step, len(self.images) // size)
        rows = np.random.default_rng((1, epoch)).permutation(len(self.images))[at * size : (at + 1) * size]
        rng = np.random.default_rng((2, step))
        padded = np.pad(self.images[rows], ((0, 0), (4, 4), (4, 4), (0, 0)))
        corners, mirrored = rng.integers(0, 9, (size, 2)), rng.random(size) < 0.5
        cut = np.stack([im[y : y + 32, x : x + 32] for im, (y, x) in zip(padded, corners, strict=True)])
        return pixels(np.where(mirrored[:, None, None, None], cut[:, :, ::-1], cut)), self.labels[rows]


@jax.jit
def pixels(images: Any) -> jax.Array:
    """Bytes to what the networks take."""
    return (jnp.asarray(images) / 255.0 - jnp.array(MEAN)) / jnp.array(STD)
