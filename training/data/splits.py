"""Step 4 of the data flow: the training and validation split of a run, from its settings."""

import hashlib
import logging
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from datasets import Dataset, IterableDataset

from ..arguments import DataArguments, SettingError
from ..processes import run_on_all_ranks
from .checks import Split, check_table, list_names, prepare_rows
from .sources import Role, open_source
from .streaming import decode_stream, open_stream
from .table import read_table

logger = logging.getLogger(__name__)


class CaptionData(NamedTuple):
    """The splits of a run.

    Rows have `image` (RGB, decoded when read), `captions` (at least one) and `image_id` (unique). A stream holds only the images
    of this process; `undecoded` is the same stream with images as stored.
    """

    train: Dataset | IterableDataset
    validation: Dataset | None
    undecoded: IterableDataset | None = None

    def captions(self, images: int) -> list[list[str]]:
        """The captions of the training images, the same on all processes.

        For a stream these are the captions of the first `images` images that all processes together read.
        """
        if self.undecoded is None:
            return self.train["captions"][:]  # type: ignore[index]
        first = self.undecoded.take(images // PartialState().num_processes)
        return [captions for share in run_on_all_ranks(lambda: [row["captions"] for row in first]) for captions in share]


def load_data(arguments: DataArguments, seed: int = 0) -> CaptionData:
    """The training and validation images that the arguments name.

    With `streaming`, the training images come in random order as they are read, and each process gets its own; the validation
    images are read whole. Rows of the same image are then not merged, as this needs all rows.

    Args:
        seed: of the order of a stream.

    Raises:
        SettingError: settings contradict each other, or the data cannot be used: files or columns are missing, rows are malformed,
            images have no file or caption, or occur twice in a split or in both; each with its place.
    """
    skip = arguments.skip_broken_images
    if not arguments.streaming:
        train, validation = read_splits(arguments)
        problems = find_shared_images(train, validation) if validation else []
        return CaptionData(prepare_rows(train, skip, problems), prepare_rows(validation, skip) if validation else None)
    if arguments.validation_share:
        raise SettingError("`validation_share` needs all images at once: give a validation split, or leave out `streaming`.")
    undecoded = open_stream(arguments, seed)
    validation = _read_split(arguments, "validation", streaming=not arguments.train_file)
    return CaptionData(decode_stream(undecoded, skip), prepare_rows(validation, skip) if validation else None, undecoded)


def read_splits(arguments: DataArguments) -> tuple[Split, Split | None]:
    """The training and validation images with their faults reported, not raised."""
    train: Any = _read_split(arguments, "train")
    validation = _read_split(arguments, "validation")
    if not arguments.validation_share:
        return train, validation
    if validation is not None:
        raise SettingError(f"{validation.name} is the validation split: leave out `validation_share`.")
    return _split_off(train, arguments.validation_share)


def find_shared_images(train: Split, validation: Split) -> list[str]:
    """A sentence about the images that are in both splits, by their ids or files; empty if there are none."""
    shared = list(dict.fromkeys(name for key, name in validation.keys.items() if key in train.keys))
    if not shared:
        return []
    return [
        f"{len(shared)} images of {validation.name} are also in {train.name}, {list_names(shared)}: remove them from one of them. "
        "If only their ids are the same, set another `image_id_column`, or an empty one."
    ]


def _read_split(arguments: DataArguments, role: Role, streaming: bool = False) -> Split | None:
    source = open_source(arguments, role, streaming)
    return check_table(read_table(source, arguments)) if source else None


def _split_off(split: Split, share: float) -> tuple[Split, Split]:
    """The training images without a share, and that share for validation.

    The hash of the ids chooses the images, so that later stages with other seeds or files never train on them.
    """
    count = round(share * len(split.rows))
    if not 0 < count < len(split.rows):
        raise SettingError(
            f"`validation_share` {share:g} of {len(split.rows)} images leaves no image to train or to validate on: give a share "
            "between 0 and 1 that leaves some for both."
        )
    digests = [hashlib.sha256(name.encode()).digest() for name in split.rows["image_id"]]
    order = np.array(sorted(range(len(digests)), key=digests.__getitem__))
    train, validation = (split.rows.select(sorted(part.tolist())) for part in (order[count:], order[:count]))
    return replace(split, rows=train), Split(f"{split.name} (validation share)", validation)
