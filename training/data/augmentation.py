"""Step 5 of the data flow: the views of an image that training sees, changed at random or read from cached features.

Everything random is a function of the seed, the epoch and the image's id alone.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from transformers import TrainerCallback

from .checks import Decoding

OTHER_SIDE = {"left": "right", "right": "left"}
VIEW_SEED = 0  # of cached views, so that runs with other seeds find them in the cache


@dataclass(frozen=True)
class ImageRandomness:
    """Random numbers per image, for one seed and epoch."""

    seed: int
    epoch: int

    @property
    def now(self) -> "ImageRandomness":
        """Itself: it does not depend on the current epoch, unlike `EpochRandomness.now`."""
        return self

    def generator(self, image_id: str) -> random.Random:
        """A generator for an image."""
        return random.Random(self._number(image_id))

    @contextmanager
    def torch_seed(self, image_id: str) -> Iterator[None]:
        """Seeds torch's CPU generator for an image, and restores its state afterwards."""
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(self._number(image_id))
        try:
            yield
        finally:
            torch.set_rng_state(before)

    def _number(self, image_id: str) -> int:
        text = f"{self.seed} {self.epoch} {image_id}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


class EpochRandomness(TrainerCallback):
    """`ImageRandomness` of the current epoch.

    It does not matter which process or worker reads an image, how far ahead, or whether the run was resumed in between. As a
    callback of the Trainer it learns of each new epoch; the workers of a data loader read the epoch from shared memory.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch.fill_(int(state.epoch or 0) - 1)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Counted, as `state.epoch` is a fraction of `max_steps` where the length of a stream is unknown.
        self._epoch.add_(1)

    @property
    def now(self) -> ImageRandomness:
        return ImageRandomness(self._seed, int(self._epoch))

    def choose_view(self, image_id: str, views: int) -> int:
        """The view of an image in this epoch, 0 to `views` - 1. Each comes once in `views` epochs, from a random first one."""
        return (ImageRandomness(self._seed, -1).generator(image_id).randrange(views) + int(self._epoch)) % views


@dataclass(frozen=True)
class Augmentation:
    """Changes a row's image at random: crops and recolours it mildly, mirrors it, or both.

    Args:
        side: of the square that images are cropped to, in pixels.
        randomness: per image.
        recolour: crop and recolour.
        mirror: mirror half of the images; "left" and "right" are swapped in their captions.
    """

    side: int
    randomness: EpochRandomness | ImageRandomness
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
            with self.randomness.now.torch_seed(name):
                image = change(image)
        if self._mirrors(name):
            image = F.horizontal_flip(image)
        captions, name = self.change_texts(row["captions"], name)
        return {**row, "image": image, "captions": captions, "image_id": name}

    def change_texts(self, captions: list[str], image_id: str) -> tuple[list[str], str]:
        """The captions and the id that belong to the changed image."""
        return mirror_captions(captions, image_id) if self._mirrors(image_id) else (captions, image_id)

    def _mirrors(self, image_id: str) -> bool:
        return self.mirror and self.randomness.now.generator(f"{image_id} mirrored").random() < 0.5


def mirror_captions(captions: list[str], image_id: str) -> tuple[list[str], str]:
    """The captions with "left" and "right" swapped, and an id of their own if that changed any."""
    swapped = [re.sub(r"\b(?:left|right)\b", _swap_side, caption, flags=re.IGNORECASE) for caption in captions]
    return (captions, image_id) if swapped == captions else (swapped, f"{image_id} mirrored")


def add_mirrored_references(references: dict[str, list[str]]) -> dict[str, list[str]]:
    """The captions by image id, and those of mirrored images that have an id of their own."""
    mirrored = (mirror_captions(captions, name) for name, captions in references.items())
    return references | {name: captions for captions, name in mirrored if name not in references}


def _swap_side(word: re.Match) -> str:
    other = OTHER_SIDE[word[0].lower()]
    return other.capitalize() if word[0][0].isupper() else other


def augment_rows(rows: Any, change: Augmentation) -> Any:
    """The rows of a dataset or stream, changed when they are read."""
    return rows.map(change) if isinstance(rows, IterableDataset) else rows.with_transform(Decoding(change))


class CachedView(NamedTuple):
    """`features` (images, D, h, w) of one view of every image, and the captions and ids that belong to it."""

    features: np.ndarray
    captions: Any
    image_ids: Any


class CachedViews(torch.utils.data.Dataset):
    """Rows of `backbone_features`, `captions` and `image_id`. If there are several views of an image, they alternate by epoch.

    Args:
        rows: with `image`, `captions` and `image_id`.
        compute_features: the backbone's features (images, D, h, w) of such rows. A memory map must be of a whole file.
        views: per image. The first is the image itself; the others are changed by `change`, each with randomness of its own.
        change, randomness: needed for more than one view.
    """

    def __init__(
        self,
        rows: Dataset,
        compute_features: Callable[[Dataset], np.ndarray],
        views: int = 1,
        change: Augmentation | None = None,
        randomness: EpochRandomness | None = None,
    ):
        captions, ids = rows["captions"][:], rows["image_id"][:]
        self._randomness = randomness
        self._views = [CachedView(compute_features(rows), captions, ids)]
        for view in range(1, views):
            assert change is not None
            fixed = replace(change, randomness=ImageRandomness(VIEW_SEED, view))
            changed = zip(*map(fixed.change_texts, captions, ids))
            self._views.append(CachedView(compute_features(augment_rows(rows, fixed)), *changed))

    def __len__(self) -> int:
        return len(self._views[0].features)

    def __getstate__(self) -> dict[str, Any]:
        """A spawned worker opens the feature files itself, as pickling an `np.memmap` copies its content."""
        views = [
            view._replace(features=Path(str(view.features.filename))) if isinstance(view.features, np.memmap) else view
            for view in self._views
        ]
        return {**self.__dict__, "_views": views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        views = [
            view._replace(features=np.load(view.features, mmap_mode="r")) if isinstance(view.features, Path) else view
            for view in state["_views"]
        ]
        self.__dict__.update(state, _views=views)

    def __getitem__(self, row: int) -> dict[str, Any]:
        views = len(self._views)
        chosen = self._randomness.choose_view(self._views[0].image_ids[row], views) if self._randomness else 0
        view = self._views[chosen]
        return {"backbone_features": view.features[row], "captions": view.captions[row], "image_id": view.image_ids[row]}
