"""Training pictures changed at random in ways that leave their captions true, or make them so."""

import re
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .randomness import Chance, Moment
from .splits import Decoding

SIDES = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class Augmentation:
    """A row with its picture as `chance` decides: cropped and recoloured mildly, so that most of it stays, or mirrored, or both.

    Args:
        side: of the square that pictures are cropped to, in pixels.
        chance: decides by image id.
        recolour: crop and recolour.
        mirror: mirror half of the pictures; "left" and "right" change places in their captions.
    """

    side: int
    chance: Chance | Moment
    recolour: bool = True
    mirror: bool = False

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        image, name = row["image"], row["image_id"]
        if self.recolour:
            change = v2.Compose(
                [
                    v2.RandomResizedCrop(self.side, scale=(0.7, 1.0), ratio=(0.85, 1.18), antialias=True),
                    v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
                ]
            )
            with self.chance.ruling(name):
                image = change(image)
        if self.mirrors(name):
            image = F.horizontal_flip(image)
        captions, name = self.words(row["captions"], name)
        return {**row, "image": image, "captions": captions, "image_id": name}

    def mirrors(self, image_id: str) -> bool:
        return self.mirror and self.chance.of(f"{image_id} mirrored").random() < 0.5

    def words(self, captions: list[str], image_id: str) -> tuple[list[str], str]:
        """The captions and the id that go with the changed picture."""
        return mirrored(captions, image_id) if self.mirrors(image_id) else (captions, image_id)


def mirrored(captions: list[str], image_id: str) -> tuple[list[str], str]:
    """The captions with "left" and "right" in each other's place, and an id of their own if there are any."""
    swapped = [re.sub(r"\b(?:left|right)\b", _other_side, caption, flags=re.IGNORECASE) for caption in captions]
    return (captions, image_id) if swapped == captions else (swapped, f"{image_id} mirrored")


def with_mirrored(references: dict[str, list[str]]) -> dict[str, list[str]]:
    """The captions by image id, with those of mirrored pictures that have an id of their own."""
    more = (mirrored(captions, name) for name, captions in references.items())
    return references | {name: captions for captions, name in more if name not in references}


def _other_side(word: re.Match) -> str:
    other = SIDES[word[0].lower()]
    return other.capitalize() if word[0][0].isupper() else other


def augmented(dataset: Any, change: Augmentation) -> Any:
    """The same rows, changed when they are read."""
    if isinstance(dataset, IterableDataset):
        return dataset.map(change)
    assert isinstance(dataset, Dataset)
    return dataset.with_transform(Decoding(change))
