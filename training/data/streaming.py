"""Steps 2 and 3 of the data flow for a stream: each row is read, checked and decoded when it is needed."""

import logging
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from datasets import Image, IterableDataset
from datasets.distributed import split_dataset_by_node

from hf_attncap.images import ImageError

from ..arguments import DataArguments, SettingError
from .checks import WAY_OUT, decode_image, has_words
from .columns import find_columns
from .sources import open_source
from .table import CaptionReader

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 1000  # images from which the next is chosen; the order of shards is random as well


def open_stream(arguments: DataArguments, seed: int) -> IterableDataset:
    """This process's training images in random order: `image` as stored, `captions` with a word, and `image_id`.

    Raises:
        SettingError: there are no training images, or they cannot be streamed. While rows are read: a row without captions, unless
            `skip_broken_images` is set.
    """
    source = open_source(arguments, "train", streaming=True)
    if source is None:
        raise SettingError("No training images: give `--train_file`, `--dataset_name` or `--data_dir`.")
    columns = find_columns(source, arguments)
    rows: Any = source.rows
    if not isinstance(rows.features[columns.image], Image):
        raise SettingError(
            f"{source.name}: the column '{columns.image}' holds {rows.features[columns.image]}: only images that the file holds "
            "can be streamed."
        )
    reader = CaptionReader(columns, source.layout == "shards")
    state = PartialState()
    rows = select_share(rows, state.process_index, state.num_processes).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    others = [column for column in rows.column_names or () if column not in ("image", "captions", "image_id")]
    return rows.map(_StreamReader(reader, arguments.skip_broken_images), remove_columns=others).filter(_has_captions)


def decode_stream(rows: IterableDataset, skip_broken: bool) -> IterableDataset:
    """The stream with decoded images. A broken image raises a `SettingError`, or is left out with a warning."""
    return rows.map(_StreamDecoder(skip_broken)).filter(_has_image)


def select_share(rows: IterableDataset, rank: int, processes: int) -> IterableDataset:
    """The rows of one process; each row belongs to exactly one process.

    With at least one shard per process, each process reads whole shards. With fewer, every process reads all rows and keeps every
    n-th one, before images are decoded. Shuffle afterwards, with the same seed on all processes.
    """
    if processes == 1:
        return rows
    if rows.num_shards % processes == 0:
        return split_dataset_by_node(rows, rank, processes)
    if rows.num_shards > processes:
        return rows.shard(processes, rank)
    return rows.filter(_RowFilter(rank, processes), with_indices=True)


# Classes, as functions with settings of their own must survive pickling for the workers of a data loader.
@dataclass
class _StreamReader:
    read: CaptionReader
    skip_broken: bool

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        columns = self.read.columns
        image = row[columns.image]
        name = str(row[columns.image_id] if columns.image_id else (image or {}).get("path") or "without a name")
        captions = [caption for caption in self.read(row, f"image {name}")[0] if has_words(caption)]
        if not captions:
            _leave_out(f"image {name}: it has no caption", self.skip_broken)
        return {"image": image, "captions": captions, "image_id": name}


@dataclass
class _StreamDecoder:
    skip_broken: bool

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"image": decode_image(row["image"], row["image_id"])}
        except ImageError as error:
            _leave_out(str(error), self.skip_broken)
            return {"image": None}


@dataclass
class _RowFilter:
    rank: int
    processes: int

    def __call__(self, row: dict[str, Any], number: int) -> bool:
        return number % self.processes == self.rank


def _leave_out(problem: str, skip_broken: bool) -> None:
    if not skip_broken:
        raise SettingError(f"{problem}. {WAY_OUT}")
    logger.warning("%s; it is left out", problem)


def _has_captions(row: dict[str, Any]) -> bool:
    return bool(row["captions"])


def _has_image(row: dict[str, Any]) -> bool:
    return row["image"] is not None
