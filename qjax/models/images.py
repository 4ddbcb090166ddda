"""From photographs to the pixels that a classifier was trained on, as ``preprocessor_config.json`` describes it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import DataError, ModelError


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Resize, crop, scale and normalise.

    Attributes:
        size: (height, width) to resize to, or one number: the short side; None leaves the size.
        crop: (height, width) of the centre crop, or None.
        resample: Pillow's filter number (2 bilinear, 3 bicubic).
        scale: factor on the 0..255 values.
        mean, std: per channel, after scaling.
    """

    size: tuple[int, int] | int | None = (224, 224)
    crop: tuple[int, int] | None = None
    resample: int = 3
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ImageProcessor:
        """Read a parsed ``preprocessor_config.json``."""
        size: Any = config.get("size", 224) if config.get("do_resize", True) else None
        if isinstance(size, dict):
            size = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
        elif isinstance(size, int):  # before 2022 a plain number meant a square
            size = (size, size)
        crop: Any = config.get("crop_size", 224) if config.get("do_center_crop", False) else None
        if isinstance(crop, dict):
            crop = (crop["height"], crop["width"])
        elif isinstance(crop, int):
            crop = (crop, crop)
        normalise = config.get("do_normalize", True)
        return cls(
            size=size,
            crop=crop,
            resample=int(config.get("resample", 2)),
            scale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
            mean=tuple(config.get("image_mean", (0.5, 0.5, 0.5))) if normalise else (0.0, 0.0, 0.0),
            std=tuple(config.get("image_std", (0.5, 0.5, 0.5))) if normalise else (1.0, 1.0, 1.0),
        )

    @classmethod
    def from_timm(cls, config: dict[str, Any]) -> ImageProcessor:
        """Read the ``pretrained_cfg`` of a timm model's ``config.json``: the short side, then the centre."""
        _, height, width = config["input_size"]
        return cls(
            size=int(min(height, width) / config.get("crop_pct", 0.875)),
            crop=(height, width),
            resample={"bilinear": 2, "bicubic": 3}[config.get("interpolation", "bicubic")],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )

    def __call__(self, images: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Prepare images.

        Args:
            images: paths, Pillow images, or uint8 arrays [H, W, 3]; one array [B, H, W, 3] will do.

        Returns:
            float32 [B, H, W, 3].

        Raises:
            DataError: a file that is no image; ModelError: Pillow is not installed.
        """
        return np.stack([self._one(image) for image in images])

    def _one(self, image: Any) -> np.ndarray:
        try:
            from PIL import Image
        except ImportError:
            raise ModelError("reading images needs Pillow; install it with: pip install 'qjax[hf]'.") from None
        if isinstance(image, (str, Path)):
            try:
                with Image.open(image) as file:
                    image = file.convert("RGB")
            except OSError as error:
                raise DataError(f"{image} cannot be read as an image ({error}); remove or replace it.") from None
        elif isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        image = image.convert("RGB")
        width, height = image.size
        if isinstance(self.size, int):
            short = min(width, height)
            goal = (self.size * height // short, self.size * width // short)
        else:
            goal = self.size or (height, width)
        if goal != (height, width):
            image = image.resize((goal[1], goal[0]), resample=self.resample)
        if self.crop is not None:
            top, left = (goal[0] - self.crop[0]) // 2, (goal[1] - self.crop[1]) // 2
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))  # outside is black
        pixels = np.asarray(image, np.float32) * np.float32(self.scale)
        return (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def image_processor(folder: str | Path) -> ImageProcessor:
    """Read how a folder's model wants its images.

    That is its ``preprocessor_config.json``; without one, the ``pretrained_cfg`` of a timm model's ``config.json``, or
    ``image_size``, ``image_mean`` and ``image_std`` there if it names a mean; else 224 x 224 pixels from -1 to 1, as
    ViT has them.

    Raises:
        ModelError: the file is damaged.
    """
    path = Path(folder) / "preprocessor_config.json"
    try:
        if path.is_file():
            return ImageProcessor.from_hf(json.loads(path.read_text("utf-8")))
        path = Path(folder) / "config.json"
        config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if "pretrained_cfg" in config:
            return ImageProcessor.from_timm(config["pretrained_cfg"])
        if "image_mean" not in config:
            return ImageProcessor()
        given = {k: config[k] for k in ("image_mean", "image_std") if k in config}
        return ImageProcessor.from_hf({"size": config.get("image_size", 224), **given})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read ({error!r}); take the one that came with the checkpoint.") from None
