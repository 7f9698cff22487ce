"""What a run on cached features iterates over: each picture's maps, of one or several views of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from .augmentation import Augmentation, augmented
from .randomness import Chance, Moment

SEED = 0  # of the views: runs with other seeds find them in the cache


class FeatureRows(torch.utils.data.Dataset):
    """Cached maps with the captions and ids of their images; where a picture has several views, they take turns by epoch.

    Args:
        dataset: rows with `image`, `captions` and `image_id`.
        maps: the backbone's maps (images, D, h, w) of such rows; if they are mapped from a file, all that it holds.
        views: of a picture; the first is itself, the others are changed as `change` does in as many epochs.
    """

    def __init__(
        self,
        dataset: Dataset,
        maps: Callable[[Dataset], np.ndarray],
        views: int = 1,
        change: Augmentation | None = None,
        chance: Chance | None = None,
    ):
        captions, ids = dataset["captions"][:], dataset["image_id"][:]
        self._chance = chance
        self._views: list[tuple[np.ndarray, Any, Any]] = [(maps(dataset), captions, ids)]
        for view in range(1, views):
            assert change is not None
            fixed = replace(change, chance=Moment(SEED, view))
            new_captions, new_ids = zip(*map(fixed.words, captions, ids))
            self._views.append((maps(augmented(dataset, fixed)), new_captions, new_ids))

    def __len__(self) -> int:
        return len(self._views[0][0])

    def __getstate__(self) -> dict[str, Any]:
        """A worker that is spawned opens the files of the maps itself; `np.memmap` would be pickled with all that is in them."""
        views = [(Path(str(maps.filename)) if isinstance(maps, np.memmap) else maps, *texts) for maps, *texts in self._views]
        return {**self.__dict__, "_views": views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        views = [(np.load(maps, mmap_mode="r") if isinstance(maps, Path) else maps, *texts) for maps, *texts in state["_views"]]
        self.__dict__.update(state, _views=views)

    def __getitem__(self, row: int) -> dict[str, Any]:
        turn = self._chance.turn(self._views[0][2][row], len(self._views)) if self._chance else 0
        features, captions, ids = self._views[turn]
        return {"backbone_features": features[row], "captions": captions[row], "image_id": ids[row]}
