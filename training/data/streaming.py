"""Captioned pictures that are read as they come: shards and datasets too large to be there whole."""

import logging
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Image, IterableDataset, get_dataset_split_names, load_dataset
from datasets.distributed import split_dataset_by_node

from hf_attncap.images import ImageError

from ..arguments import DataArguments, SettingError
from .columns import captions_columns, id_column_of, with_columns, with_shard_columns
from .sources import (
    Source,
    as_pattern,
    choose_split,
    from_table,
    has_words,
    image_folder,
    load_shards,
    row_captions,
    shard_captions,
)
from .splits import WAY_OUT, CaptionData, assemble, check_set, decoded, file_source, ready

logger = logging.getLogger(__name__)

SHUFFLED = 1000  # images among which the next is drawn; shards are shuffled as well


@dataclass
class Reading:
    """A row of a stream to `image` as stored, `captions` that have a word, and `image_id`.

    Raises:
        SettingError: if captions are neither text nor a list of texts, or there are none and `skip` is not set.
    """

    arguments: DataArguments
    image_column: str
    id_column: str | None
    shards: bool
    skip: bool

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        image = row[self.image_column]
        name = str(row[self.id_column] if self.id_column else (image or {}).get("path") or "without a name")
        if self.shards:
            captions = shard_captions(row, self.arguments)
        else:
            captions, _ = row_captions(f"image {name}", [row[column] for column in captions_columns(self.arguments)])
        captions = [caption for caption in captions if has_words(caption)]
        if not captions:
            self.leave_out(f"image {name}: there is no caption")
        return {"image": image, "captions": captions, "image_id": name}

    def decode(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"image": decoded(row["image"], row["image_id"])}
        except ImageError as error:
            self.leave_out(str(error))
            return {"image": None}

    def leave_out(self, problem: str) -> None:
        if not self.skip:
            raise SettingError(f"{problem}. {WAY_OUT}")
        logger.warning("%s; left out", problem)


def load_stream(arguments: DataArguments, seed: int) -> CaptionData:
    """The training images as a stream in random order, the validation images whole; as `load_data` otherwise.

    Of several processes each gets its own training images, those of `share_of`, and all get all validation images.

    An image without caption or with a picture that cannot be decoded ends the run when it is met, with its name; with
    `skip_broken_images` it is left out, with a warning. Rows of one image are not put together: that would take all of them.

    Raises:
        SettingError: for what is not there or cannot be streamed.
    """
    if arguments.validation_share:
        raise SettingError("`validation_share` needs all images at hand, which `streaming` does not: give a validation split.")
    undecoded, reading = open_stream(arguments, seed, arguments.skip_broken_images)
    train = undecoded.map(reading.decode).filter(_has_image)
    source = file_source(arguments, "validation") if arguments.train_file else _validation_source(arguments)
    validation = ready(assemble(source), arguments.skip_broken_images) if source else None
    return CaptionData(train, validation, undecoded)


def open_stream(arguments: DataArguments, seed: int, skip: bool) -> tuple[IterableDataset, Reading]:
    """This process's training images in random order with captions and ids, pictures as stored, and what decodes them."""
    path = arguments.train_file or ""
    if path.endswith(".tar"):
        name, rows = path, load_shards(path, streaming=True)
        arguments, id_column = with_shard_columns(path, rows.features, arguments), "__key__"
    else:
        name, rows = _open_table(arguments)
        arguments = with_columns(name, rows.column_names or (), arguments, rows.features)
        id_column = id_column_of(rows.column_names or (), arguments)
    image_column = str(arguments.image_column)
    reading = Reading(arguments, image_column, id_column, path.endswith(".tar"), skip)
    state = PartialState()
    rows = share_of(_stored(name, rows, image_column), state.process_index, state.num_processes)
    rows = rows.shuffle(seed=seed, buffer_size=SHUFFLED)
    others = [column for column in rows.column_names or () if column not in ("image", "captions", "image_id")]
    return rows.map(reading, remove_columns=others).filter(_has_captions), reading


@dataclass
class _RowFilter:
    """Whether a row, by its number, is one of this process's."""

    rank: int
    processes: int

    def __call__(self, row: dict[str, Any], number: int) -> bool:
        return number % self.processes == self.rank


def share_of(rows: IterableDataset, rank: int, processes: int) -> IterableDataset:
    """The rows of one process; each row belongs to exactly one process.

    With at least one shard per process, each process reads whole shards. With fewer, every process reads all rows and keeps every
    n-th one, before images are decoded.
    Shuffle afterwards, with the same seed on all processes.
    """
    if processes == 1:
        return rows
    if rows.num_shards % processes == 0:
        return split_dataset_by_node(rows, rank, processes)
    if rows.num_shards > processes:
        return rows.shard(processes, rank)
    return rows.filter(_RowFilter(rank, processes), with_indices=True)


def _open_table(arguments: DataArguments) -> tuple[str, IterableDataset]:
    path = arguments.train_file
    if path and not path.endswith(".parquet"):
        raise SettingError(f"{path} cannot be streamed, only .tar and .parquet: pictures are read when they are needed anyway.")
    if path:
        return path, _loaded(path, "parquet", data_files=as_pattern(path), split="train")
    return _split_of(arguments, "train")  # type: ignore[return-value]


def _validation_source(arguments: DataArguments) -> Source | None:
    """The validation split of a dataset that is streamed, copied into the cache of `datasets`."""
    found = _split_of(arguments, "validation")
    if found is None:
        return None
    name, rows = found
    arguments = with_columns(name, rows.column_names or (), arguments, rows.features)
    rows = _stored(name, rows, str(arguments.image_column))
    table: Any = Dataset.from_generator(lambda: iter(rows), features=rows.features)
    return from_table(table, name, arguments, image_folder(name, arguments, "validation"))


def _split_of(arguments: DataArguments, role: Any) -> tuple[str, IterableDataset] | None:
    name = arguments.dataset_name or arguments.data_dir or ""
    if arguments.dataset_name:
        check_set(name)
    path, config = ("imagefolder", None) if arguments.data_dir else (name, arguments.dataset_config_name)
    folder: dict[str, Any] = {"data_dir": as_pattern(name)} if arguments.data_dir else {}
    try:
        available = get_dataset_split_names(path, config, **folder)
    except Exception as error:  # of many kinds: files, networks, formats
        raise SettingError(f"The dataset {name} cannot be streamed: {error}") from error
    wanted = choose_split(name, available, role, arguments)
    return None if wanted is None else (f"{name} ({wanted})", _loaded(name, path, name=config, split=wanted, **folder))


def _loaded(label: str, path: str, **settings: Any) -> IterableDataset:
    try:
        rows: Any = load_dataset(path, streaming=True, **settings)
    except Exception as error:  # of many kinds: files, networks, formats
        raise SettingError(f"{label} cannot be streamed: {error}") from error
    if rows.features is None:
        raise SettingError(f"The columns of {label} are not known before it is read: leave out `streaming`.")
    return rows


def _stored(name: str, rows: IterableDataset, column: str) -> IterableDataset:
    """The stream with pictures as they are stored."""
    features: Any = rows.features
    if not isinstance(features[column], Image):
        raise SettingError(f"{name}: the column '{column}' holds {features[column]}: only pictures themselves can be streamed.")
    return rows.cast_column(column, Image(decode=False))


def _has_captions(row: dict[str, Any]) -> bool:
    return bool(row["captions"])


def _has_image(row: dict[str, Any]) -> bool:
    return row["image"] is not None
