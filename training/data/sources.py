"""Step 1 of the data flow: open captioned images in any format, whole or as a stream, with the columns that they have."""

import glob
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    Value,
    concatenate_datasets,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)

from hf_attncap.metrics.files import CaptionFileError, read_json, read_references

from ..arguments import DataArguments, SettingError

logger = logging.getLogger(__name__)

Role = Literal["train", "validation"]
Rows = Dataset | IterableDataset
# What `datasets` calls the format of a file, by its ending.
BUILDERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".tar": "webdataset",
}
FORMATS = {"parquet": "Parquet", "csv": "CSV", "json": "JSON", "webdataset": "WebDataset"}
EXPECTED = "Parquet (.parquet), CSV (.csv, .tsv, .txt), JSON (.jsonl, .json), Karpathy's splits or COCO's annotations (.json), "
EXPECTED += "or WebDataset (.tar)"


class Source(NamedTuple):
    """Captioned images as they are stored.

    Attributes:
        name: the file or dataset, for messages.
        rows: all columns; images are not decoded.
        folder: the folder that relative image paths refer to.
        layout: "shards" for WebDataset, whose captions are members or JSON fields; "annotations" for Karpathy's and COCO's files,
            whose columns are always `image`, `captions` and `image_id`; otherwise "table".
        notes: sentences about what was left out.
    """

    name: str
    rows: Rows
    folder: Path
    layout: Literal["table", "shards", "annotations"] = "table"
    notes: tuple[str, ...] = ()


def open_source(arguments: DataArguments, role: Role, streaming: bool = False) -> Source | None:
    """The training or validation images.

    Args:
        streaming: give the training images as an `IterableDataset`. Of a dataset, only the wanted split is then read.

    Returns:
        None if there are no validation images.

    Raises:
        SettingError: a file, dataset or split does not exist, cannot be read, or cannot be streamed.
    """
    if not arguments.train_file:
        return _open_dataset(arguments, role, streaming)
    path = arguments.train_file
    if role == "validation":
        if arguments.validation_file:
            path = arguments.validation_file
        elif not (splits := _karpathy_splits(_json(path))) or choose_split(path, splits, role, arguments) is None:
            return None
    return _open_file(path, arguments, role, streaming)


def choose_split(name: str, available: Collection[str], role: Role, arguments: DataArguments) -> str | None:
    """The name of the split for a role, or several names joined by "+". None if there is no split for validation.

    Raises:
        SettingError: the split does not exist.
    """
    wanted = arguments.train_split if role == "train" else arguments.validation_split
    if wanted is None and role == "train":
        wanted = "train+restval" if {"train", "restval"} <= set(available) else "train"
    elif wanted is None:
        wanted = next((split for split in ("validation", "val") if split in available), None)
    missing = [split for split in (wanted or "").split("+") if wanted and split not in available]
    if missing:
        raise SettingError(
            f"{name} has no split '{missing[0]}', only {', '.join(map(str, available))}: set `{role}_split` to one of them."
        )
    return wanted


def escape_pattern(path: str) -> str:
    """A path for `datasets`, which reads every path as a glob pattern. The part of it that exists is escaped; URLs are not changed.

    Of "[set] 1/*.tar" the folder is escaped and the rest remains a pattern.
    """
    if "://" in path:
        return path
    found = Path(path).absolute()  # `datasets` would put an unescaped working directory before a relative path
    existing = next(parent for parent in (found, *found.parents) if parent.exists())
    return str(Path(glob.escape(str(existing))) / found.relative_to(existing))


def _open_file(path: str, arguments: DataArguments, role: Role, streaming: bool) -> Source:
    kind = BUILDERS.get(Path(path).suffix.lower())
    if kind is None:
        raise SettingError(f"{path} has an unknown format: expected {EXPECTED}.")
    if streaming and kind not in ("parquet", "webdataset"):
        raise SettingError(f"{path} cannot be streamed: only .tar and .parquet files can.")
    pattern = escape_pattern(path)
    files = [path] if "://" in path else sorted(glob.glob(pattern))
    if not files:
        raise SettingError(f"No such data file: {path}.")
    folder = _image_folder(arguments, role) or Path(path).parent
    content = _json(path)
    splits = _karpathy_splits(content)
    if not splits and (arguments.train_split if role == "train" else arguments.validation_split):
        raise SettingError(f"{path} has no splits: leave out `{role}_split`.")
    if isinstance(content, dict) and "images" in content:
        return _read_annotations(path, content, splits, arguments, role, folder)
    options: dict[str, Any] = {}
    try:
        if kind == "csv":
            separator = "\t" if path.endswith(".tsv") else ","
            header = pandas.read_csv(files[0], sep=separator, nrows=0, encoding="utf-8-sig").columns
            # Text as written: "007" is no number and "NA" is not missing.
            options = {"sep": separator, "keep_default_na": False, "features": Features(dict.fromkeys(header, Value("string")))}
        rows: Any = load_dataset(kind, data_files=pattern, split="train", streaming=streaming, **options)
    except Exception as error:  # pandas, pyarrow, tarfile and datasets raise many kinds
        raise SettingError(f"{path} cannot be read as {FORMATS[kind]}: {_reason(error)}.") from error
    return Source(path, _not_decoded(path, rows), folder, "shards" if kind == "webdataset" else "table")


def _open_dataset(arguments: DataArguments, role: Role, streaming: bool) -> Source | None:
    """A split of a dataset on the Hub, of a folder that `save_to_disk` wrote, or of an image folder."""
    name = arguments.dataset_name or arguments.data_dir or ""
    if arguments.data_dir and not os.path.isdir(name):
        raise SettingError(f"No such folder of images: {name}.")
    saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
    if arguments.dataset_name and not saved and os.path.isdir(name) and glob.has_magic(os.path.abspath(name)):
        raise SettingError(
            f"`dataset_name`: `datasets` reads {os.path.abspath(name)} as a pattern, because of the characters *?[ in it: rename "
            "the folder, or give its files as `train_file`."
        )
    config = arguments.dataset_config_name
    source: dict[str, Any] = {"path": name}
    if arguments.data_dir:
        source, config = {"path": "imagefolder", "data_dir": escape_pattern(name)}, None
    try:
        if streaming:
            available = get_dataset_split_names(config_name=config, **source)
            wanted = choose_split(name, available, role, arguments)
            rows: Any = wanted and load_dataset(name=config, split=wanted, streaming=True, **source)
        else:
            loaded: Any = load_from_disk(name) if saved else load_dataset(name=config, **source)
            splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
            wanted = choose_split(name, list(map(str, splits)), role, arguments)
            rows = wanted and concatenate_datasets([splits[split] for split in wanted.split("+")])
    except SettingError:
        raise
    except Exception as error:  # files, networks and formats raise many kinds
        raise SettingError(f"The dataset {name} cannot be {'streamed' if streaming else 'loaded'}: {_reason(error)}.") from error
    if wanted is None:
        return None
    rows = _not_decoded(name, rows)
    if streaming and role == "validation":
        stream = rows
        rows = Dataset.from_generator(lambda: iter(stream), features=stream.features)
    folder = _image_folder(arguments, role) or Path(name if os.path.isdir(name) else ".")
    return Source(f"{name} ({wanted})", rows, folder)


def _image_folder(arguments: DataArguments, role: Role) -> Path | None:
    given = (arguments.validation_image_dir if role == "validation" else None) or arguments.image_dir
    return Path(given) if given else None


def _not_decoded(name: str, rows: Any) -> Any:
    """The rows with images as stored, so that nothing before training decodes or copies them."""
    if rows.features is None:
        raise SettingError(f"The columns of {name} are not known before it is read: leave out `streaming`.")
    for column, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
    return rows


def _read_annotations(
    path: str, content: dict[str, Any], splits: list[str], arguments: DataArguments, role: Role, folder: Path
) -> Source:
    """Karpathy's or COCO's JSON file (without `splits`), read by the code that reads it for the metrics."""
    split = choose_split(path, splits, role, arguments) if splits else None
    if splits and split is None:
        raise SettingError(f"{path} has no split for {role}, only {', '.join(splits)}: set `{role}_split` to one of them.")
    for setting in ("image_column", "captions_column", "image_id_column"):
        if getattr(arguments, setting):
            logger.warning("`%s` is not used: %s is a Karpathy or COCO file", setting, path)
    try:
        references = read_references(path, split)
    except CaptionFileError as error:
        raise SettingError(f"{error}.") from error
    key = "filename" if splits else "file_name"
    files = {image_id: name for name, image_id in references.names[key].ids.items()} if key in references.names else {}
    if missing := [image_id for image_id in references.captions if image_id not in files]:
        raise SettingError(f"{path}: image {missing[0]} has no `{key}` of its own; expected the name of its file.")
    subfolders = {image["filename"]: image.get("filepath") or "" for image in content["images"] if splits and "filename" in image}
    rows = {
        "image": [os.path.join(subfolders.get(files[image_id], ""), files[image_id]) for image_id in references.captions],
        "captions": list(references.captions.values()),
        "image_id": list(references.captions),
    }
    notes = tuple(text for text in references.notes if "empty caption" not in text)  # step 3 counts those
    return Source(path, Dataset.from_dict(rows), folder, "annotations", notes)


def _karpathy_splits(content: Any) -> list[str]:
    """The names of the splits in Karpathy's file; empty for any other file."""
    images = content.get("images") if isinstance(content, dict) and "annotations" not in content else None
    named = [image["split"] for image in images or [] if isinstance(image, dict) and isinstance(image.get("split"), str)]
    return list(dict.fromkeys(named))


def _json(path: str) -> Any:
    """The content of a .json file; None for other files."""
    if not (path.endswith(".json") and os.path.isfile(path)):
        return None
    try:
        return read_json(path, EXPECTED)
    except CaptionFileError as error:
        raise SettingError(f"{error}.") from error


def _reason(error: Exception) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
