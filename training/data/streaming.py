"""Steps 2 and 3 of the data flow for a stream: each row is read, checked and decoded when it is needed."""

import logging
from typing import Any

from accelerate import PartialState
from datasets import Image, IterableDataset
from datasets.distributed import split_dataset_by_node

from hf_attncap.images import ImageError

from ..arguments import DataArguments, SettingError
from .checks import WAY_OUT, decode_image, has_words
from .sources import open_source
from .table import CaptionReader, find_columns

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 1000  # images from which the next is chosen; the order of shards is random as well


def open_stream(arguments: DataArguments, seed: int) -> IterableDataset:
    """This process's training images in random order: `image` as stored, `captions` with a word, and `image_id`.

    Raises:
        SettingError: the training images cannot be streamed. While rows are read: a row without captions, unless
            `skip_broken_images` is set.
    """
    source: Any = open_source(arguments, "train", streaming=True)
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
    settings = {"read": reader, "skip_broken": arguments.skip_broken_images}
    return rows.map(_read_row, fn_kwargs=settings, remove_columns=others).filter(_has_captions)


def decode_stream(rows: IterableDataset, skip_broken: bool) -> IterableDataset:
    """The stream with decoded images. A broken image raises a `SettingError`, or is left out with a warning."""
    return rows.map(_decode_row, fn_kwargs={"skip_broken": skip_broken}).filter(_has_image)


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
    return rows.filter(_belongs_to, with_indices=True, fn_kwargs={"rank": rank, "processes": processes})


# No lambdas: the workers of a data loader must be able to unpickle these functions.
def _belongs_to(row: dict[str, Any], number: int, rank: int, processes: int) -> bool:
    return number % processes == rank


def _read_row(row: dict[str, Any], read: CaptionReader, skip_broken: bool) -> dict[str, Any]:
    columns = read.columns
    image = row[columns.image]
    name = str(row[columns.image_id] if columns.image_id else (image or {}).get("path") or "without a name")
    captions = [caption for caption in read(row, f"image {name}")[0] if has_words(caption)]
    if not captions:
        _leave_out(f"image {name}: it has no caption", skip_broken)
    return {"image": image, "captions": captions, "image_id": name}


def _has_captions(row: dict[str, Any]) -> bool:
    return bool(row["captions"])


def _decode_row(row: dict[str, Any], skip_broken: bool) -> dict[str, Any]:
    try:
        return {"image": decode_image(row["image"], row["image_id"])}
    except ImageError as error:
        _leave_out(str(error), skip_broken)
        return {"image": None}


def _has_image(row: dict[str, Any]) -> bool:
    return row["image"] is not None


def _leave_out(problem: str, skip_broken: bool) -> None:
    if not skip_broken:
        raise SettingError(f"{problem}. {WAY_OUT}")
    logger.warning("%s; it is left out", problem)
