"""Step 6 of the data flow: rows to a batch, in which every tensor has the image as its first axis."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_attncap.processing_attncap import AttnCapProcessor

from .augmentation import EpochRandomness


@dataclass
class CaptionCollator:
    """Rows of `image` (or `backbone_features`) and `captions` to a batch of B images.

    Returns `pixel_values` (B, 3, height, width) or `backbone_features` (B, D, h, w), and `labels` (B, k, T) int64: tokens, the end
    token and -100.

    Args:
        captions_per_image: k. An image with more captions gives a random sample of them; one with fewer repeats them.
        max_words: longer captions are truncated.
        with_image_ids: also return the ids of the images as a list `image_ids`.
        randomness: makes the sample depend on image and epoch alone, and needs `image_id` in the rows. Default: Python's generator.
    """

    processor: AttnCapProcessor
    captions_per_image: int = 5
    max_words: int = 20
    with_image_ids: bool = False
    randomness: EpochRandomness | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        if "backbone_features" in rows[0]:
            features = np.stack([row["backbone_features"] for row in rows])
            batch["backbone_features"] = torch.from_numpy(features).float()  # (B, D, h, w)
        else:
            images = [row["image"] for row in rows]
            batch.update(self.processor(images=images, return_tensors="pt"))  # (B, 3, height, width)
        captions = [caption for row in rows for caption in self._sample_captions(row)]
        labels = self.processor(text_target=captions, max_target_length=self.max_words, return_tensors="pt")["labels"]
        batch["labels"] = labels.unflatten(0, (len(rows), -1))  # (B, k, T)
        if self.with_image_ids:
            batch["image_ids"] = [row["image_id"] for row in rows]
        return batch

    def _sample_captions(self, row: dict[str, Any]) -> list[str]:
        captions = row["captions"]
        repeats, rest = divmod(self.captions_per_image, len(captions))
        generator: Any = self.randomness.now.generator(row["image_id"]) if self.randomness else random
        return captions * repeats + generator.sample(captions, rest)
