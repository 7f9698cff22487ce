"""Images with their captions to a batch, in which the image is the first axis of every tensor."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_attncap.processing_attncap import AttnCapProcessor

from .randomness import Chance


@dataclass
class CaptionCollator:
    """Rows of `image` (or `backbone_features`) and `captions` to a batch of B images.

    Returns `pixel_values` (B, 3, height, width) or `backbone_features` (B, D, h, w), and `labels` (B, k, T) int64 with words,
    end token and -100; k = `captions_per_image`, drawn at random where an image has more and repeated where it has fewer. With
    `with_image_ids` also the images' own `image_id`s, as a list `image_ids`. With `chance`, which needs ids as well, it decides
    what is drawn, else Python's own generator.
    """

    processor: AttnCapProcessor
    captions_per_image: int = 5
    max_words: int = 20
    with_image_ids: bool = False
    chance: Chance | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        if "backbone_features" in rows[0]:
            features = np.stack([row["backbone_features"] for row in rows])
            batch["backbone_features"] = torch.from_numpy(features).float()  # (B, D, h, w)
        else:
            images = [row["image"] for row in rows]
            batch.update(self.processor(images=images, return_tensors="pt"))  # (B, 3, height, width)
        captions = [caption for row in rows for caption in self._draw(row)]
        labels = self.processor(text_target=captions, max_target_length=self.max_words, return_tensors="pt")["labels"]
        batch["labels"] = labels.unflatten(0, (len(rows), -1))  # (B, k, T)
        if self.with_image_ids:
            batch["image_ids"] = [row["image_id"] for row in rows]
        return batch

    def _draw(self, row: dict[str, Any]) -> list[str]:
        captions = [caption for caption in row["captions"] if caption.strip()]
        whole, rest = divmod(self.captions_per_image, len(captions))
        generator: Any = self.chance.of(row["image_id"]) if self.chance else random
        return captions * whole + generator.sample(captions, rest)
