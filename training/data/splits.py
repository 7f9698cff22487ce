"""Captioned pictures for a run: a row an image, its captions checked, its picture decoded when it is read."""

import glob
import hashlib
import io
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import fsspec
import numpy as np
import PIL.Image
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, List, Value, concatenate_datasets, load_from_disk
from datasets import load_dataset as load_from_hub

from hf_attncap.image_files_attncap import open_image
from hf_attncap.images import ImageError, load_image

from ..arguments import DataArguments, SettingError
from ..processes import together
from .sources import Entry, Role, Source, as_pattern, choose_split, from_shards, from_table, has_words, own_splits, read_file

logger = logging.getLogger(__name__)

TABLE = Features({"captions": List(Value("string")), "image_id": Value("string")})
WAY_OUT = (
    "`--inspect` lists all that is wrong with the data, `--skip_broken_images` leaves such images out (both of `attncap train`)."
)
BUSY = 200  # pictures that are worth a process of their own


class CaptionData(NamedTuple):
    """The splits of a run; rows have `image` (RGB, decoded when read), `captions` (at least one) and `image_id` (unique).

    `undecoded` is there for a stream alone: its rows with pictures as stored. A stream has the images of this process alone.
    """

    train: Dataset | IterableDataset
    validation: Dataset | None
    undecoded: IterableDataset | None = None

    def captions(self, images: int) -> list[list[str]]:
        """The captions of the training images, on all processes the same.

        Of all images, or of the first ones that each process reads of a stream, `images` in all: what training begins with.
        """
        if self.undecoded is None:
            return self.train["captions"][:]  # type: ignore[index]
        first = self.undecoded.take(images // PartialState().num_processes)
        return [captions for share in together(lambda: [row["captions"] for row in first]) for captions in share]


@dataclass
class Split:
    """A split as it was found: its usable rows, with pictures not decoded, and what is wrong with the others.

    `broken` are sentences about images that can be left out, `problems` about what the user must mend, `notes` about the rest.
    `keys` tell images apart beyond this split: real ids and the paths of files, with the id that each belongs to.
    """

    name: str
    rows: Dataset
    broken: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)


@dataclass
class Decoding:
    """Transform of rows: stored pictures to RGB images; then each row is changed by `change`, if there is one.

    Raises:
        SettingError: for a picture that cannot be decoded, naming it.
    """

    change: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if "image" not in rows:
            return rows
        names: list[Any] = rows.get("image_id") or [None] * len(rows["image"])
        try:
            images = [decoded(picture, name) for picture, name in zip(rows["image"], names)]
        except ImageError as error:
            raise SettingError(f"{error}. {WAY_OUT}") from error
        rows = {**rows, "image": images}
        if self.change is None:
            return rows
        changed = [self.change(dict(zip(rows, row))) for row in zip(*rows.values())]
        return {column: [row[column] for row in changed] for column in rows}


def decoded(picture: dict[str, Any] | None, name: str | None) -> Any:
    """A stored picture, `bytes` or `path`, as an RGB image.

    Raises:
        ImageError: if it cannot be decoded, with the image's name.
    """
    try:
        return load_image(stored_bytes(picture))
    except Exception as error:  # of many kinds: files, archives, networks
        place = name or (picture and picture.get("path")) or "without a name"
        raise ImageError(f"image {place}: {error}") from error


def stored_bytes(picture: dict[str, Any] | None) -> bytes:
    """The file of a stored picture, `bytes` or `path`, which may also be remote or inside an archive.

    Raises:
        ImageError: if there is none.
        OSError: if it cannot be read.
    """
    data, path = (picture.get("bytes"), picture.get("path")) if picture else (None, None)
    if data is None and path is None:
        raise ImageError("there is no picture in its row")
    if data is None and os.path.isfile(str(path)):
        return Path(str(path)).read_bytes()  # a name is a name here, whatever fsspec would make of "::" in it
    if data is None:
        with fsspec.open(path, "rb") as stream:
            data = stream.read()  # type: ignore[union-attr]
    return data  # type: ignore[return-value]


def load_data(arguments: DataArguments) -> CaptionData:
    """Training and validation images from any of the ways in, whole.

    Raises:
        SettingError: for settings that contradict each other, and for data that cannot be used as they are: missing files and
            columns, malformed rows, images without picture or caption, twice in a split or in both; each with its place.
    """
    train, validation = read_splits(arguments)
    problems = shared_images(train, validation) if validation else []
    return CaptionData(
        ready(train, arguments.skip_broken_images, problems),
        ready(validation, arguments.skip_broken_images) if validation else None,
    )


def read_splits(arguments: DataArguments) -> tuple[Split, Split | None]:
    """Training and validation images as they were found, their faults told but not raised."""
    sources = [file_source(arguments, role) if arguments.train_file else _table_source(arguments, role) for role in get_args(Role)]
    train, validation = [assemble(source) if source else None for source in sources]
    if train is None:
        raise SettingError("No training images: give `--train_file`, `--dataset_name` or `--data_dir`.")
    if not arguments.validation_share:
        return train, validation
    if validation is not None:
        raise SettingError(f"{validation.name} is there to validate on: leave out `validation_share`, which would split off more.")
    return _split_off(train, arguments.validation_share)


def ready(split: Split, skip_broken: bool, problems: Sequence[str] = ()) -> Dataset:
    """The rows of a split for training: checked, and decoded when they are read."""
    problems = [*problems, *split.problems, *([] if skip_broken else split.broken)]
    if problems:
        raise SettingError(" ".join([*problems, *([WAY_OUT] if split.broken and not skip_broken else [])]))
    rows, left_out = _without_broken(split) if skip_broken else (split.rows, [])
    for text in [*split.notes, *split.broken, *left_out]:
        logger.warning("%s", text)
    if not len(rows):
        raise SettingError(f"{split.name} holds no image that can be used.")
    return rows.with_transform(Decoding())


def shared_images(train: Split, validation: Split) -> list[str]:
    """A sentence about the images that are in both splits, by their ids or files, if there are any."""
    shared = list(dict.fromkeys(name for key, name in validation.keys.items() if key in train.keys))
    if not shared:
        return []
    return [
        f"{len(shared)} images of {validation.name} are in {train.name} too, {first(shared)}: take them out of one of them, or, if "
        "they only have the same ids, set another `image_id_column`, or an empty one."
    ]


def assemble(source: Source) -> Split:
    """The entries of a source as a row an image: captions of one image put together, those without a word dropped, faults told."""
    split = Split(source.name, Dataset.from_dict({}), notes=list(source.notes))
    groups: dict[str, list[int]] = {}
    for index, entry in enumerate(source.entries):
        groups.setdefault(entry.image_id or entry.image or f"{source.unit[:-1]} {entry.label}", []).append(index)
    found: dict[str, list[Entry]] = {"twice": [], "other file": [], "missing": [], "bare": [], "blank": []}
    kept: list[tuple[int, str, list[str]]] = []
    for name, indexes in groups.items():
        entries = [source.entries[index] for index in indexes]
        if len(entries) > 1 and not all(entry.single for entry in entries):
            found["twice"].append(entries[1])
        found["other file"] += [entry for entry in entries if entry.image != entries[0].image][:1]
        captions = [caption for entry in entries for caption in entry.captions]
        written = [caption for caption in captions if has_words(caption)]
        path = entries[0].image
        missing = source.pictures is None if path is None else "://" not in path and not os.path.isfile(path)
        if missing or not written:
            found["missing" if missing else "bare"].append(entries[0])
            continue
        found["blank"] += [entry for entry in entries if not all(map(has_words, entry.captions)) or not entry.captions]
        kept.append((indexes[0], name, written))
        if entries[0].image_id is not None:
            split.keys[f"id {name}"] = name
        if path is not None:
            split.keys[f"file {os.path.abspath(path)}"] = name
    _tell(split, source.unit, found)
    split.rows = _rows_of(source, kept)
    return split


def first(names: Sequence[Any], unit: str = "") -> str:
    """The first of many names."""
    shown = ", ".join(map(str, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f"{unit} {shown}".strip()


def examine(rows: Dataset) -> Dataset:
    """What looking at every picture gives, a row an image, without its pixels.

    Columns: `width`, `height`, `mode` as stored, `digest` (of the file's bytes; "" if there are none) and `problem` ("" if none).
    """
    processes = min(os.cpu_count() or 1, 16, len(rows) // BUSY)
    return rows.with_format(None).map(
        _examined,
        remove_columns=rows.column_names,
        num_proc=processes if processes > 1 else None,
        keep_in_memory=True,
        load_from_cache_file=False,
        desc=f"looking at {len(rows)} pictures",
    )


def file_source(arguments: DataArguments, role: Role) -> Source | None:
    """What `train_file` or `validation_file` holds; Karpathy's files hold both."""
    path = arguments.train_file or ""
    if role == "validation":
        inside = own_splits(path) if arguments.validation_file is None else []
        own = inside and choose_split(path, inside, role, arguments)
        path = arguments.validation_file or (path if own else "")
    if not path:
        return None
    return from_shards(path, arguments) if path.endswith(".tar") else read_file(path, arguments, role)


def _table_source(arguments: DataArguments, role: Role) -> Source | None:
    """A split of a dataset on the Hub, of a folder written by `save_to_disk`, or of a folder of pictures."""
    name = arguments.dataset_name or arguments.data_dir or ""
    if not name:
        return None
    try:
        if arguments.data_dir:
            found: Any = load_from_hub("imagefolder", data_dir=as_pattern(_folder(name)))
        elif any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
            found = load_from_disk(name)
        else:
            check_set(name)
            found = load_from_hub(name, arguments.dataset_config_name)
    except SettingError:
        raise
    except Exception as error:  # of many kinds: files, networks, formats
        reason = str(error.__cause__ or error).strip().splitlines()
        raise SettingError(f"The dataset {name} cannot be loaded: {reason[0] if reason else type(error).__name__}") from error
    splits = found if isinstance(found, DatasetDict) else {"train": found}
    wanted = choose_split(name, list(map(str, splits)), role, arguments)
    if wanted is None:
        return None
    table = concatenate_datasets([splits[split] for split in wanted.split("+")])
    folder = Path(arguments.image_dir or (name if os.path.isdir(name) else "."))
    return from_table(table, f"{name} ({wanted})", arguments, folder)


def _folder(path: str) -> str:
    if not os.path.isdir(path):
        raise SettingError(f"No such folder of pictures: {path}.")
    return path


def check_set(name: str) -> None:
    """Raises a SettingError for a folder that `load_dataset` does not find."""
    if os.path.isdir(name) and glob.has_magic(os.path.abspath(name)):
        raise SettingError(
            f"`dataset_name`: `datasets` takes {os.path.abspath(name)} for a pattern, because of the characters *?[ in it: rename "
            "the folder, or give its files as `train_file`."
        )


def _split_off(split: Split, share: float) -> tuple[Split, Split]:
    """A share of the images for validation, and the rest for training.

    Which ones is as good as drawn, but depends on their ids alone: whatever a later stage's seed is, none of them is trained on.
    """
    count = round(share * len(split.rows))
    if not 0 < count < len(split.rows):
        raise SettingError(
            f"`validation_share` {share:g} of {len(split.rows)} images leaves none to train or validate on: give a share between 0 "
            "and 1 that leaves some on both sides."
        )
    marks = [hashlib.sha256(name.encode()).digest() for name in split.rows["image_id"]]
    order = np.array(sorted(range(len(marks)), key=marks.__getitem__))
    train, validation = (split.rows.select(sorted(part.tolist())) for part in (order[count:], order[:count]))
    return replace(split, rows=train), Split(f"{split.name} (validation share)", validation)


def _tell(split: Split, unit: str, found: dict[str, list[Entry]]) -> None:
    """Sentences about the entries that were found wanting, with their places."""
    where = {kind: first([entry.label for entry in entries], unit) for kind, entries in found.items()}
    if entries := found["twice"]:
        split.problems.append(f"{split.name}: {len(entries)} images are there again, {where['twice']}: keep a row an image.")
    if entries := found["other file"]:
        split.problems.append(
            f"{split.name}: {len(entries)} images have one id but several files, {where['other file']}: give each its own id."
        )
    if entries := found["missing"]:
        files = first([entry.image for entry in entries if entry.image])
        split.broken.append(
            f"{split.name}: {len(entries)} images have no picture, {where['missing']}{f' ({files})' if files else ''}: paths are "
            "relative to the file, or to `image_dir`."
        )
    if entries := found["bare"]:
        split.broken.append(f"{split.name}: {len(entries)} images have no caption, {where['bare']}.")
    if entries := found["blank"]:
        split.notes.append(f"{split.name}: captions without a word are left out, {where['blank']}.")


def _rows_of(source: Source, kept: list[tuple[int, str, list[str]]]) -> Dataset:
    """The entries that are kept, (entry, id, captions), as rows; pictures of a table are not copied."""
    if source.pictures is None or not kept:
        paths = [str(source.entries[index].image) for index, _, _ in kept]
        columns = {"image": paths, "captions": [row[2] for row in kept], "image_id": [row[1] for row in kept]}
        rows = Dataset.from_dict(columns, features=Features({"image": Image(decode=False), **TABLE}))
        # Pictures that were exchanged under their names make another dataset.
        states = [(state.st_size, state.st_mtime_ns) for state in map(os.stat, paths)]
        mark = hashlib.sha256(f"{rows._fingerprint} {states}".encode()).hexdigest()[:16]
        return Dataset(rows.data, info=rows.info, fingerprint=mark)
    texts: dict[str, list[Any]] = {"captions": [[]] * len(source.entries), "image_id": [""] * len(source.entries)}
    for index, name, captions in kept:
        texts["captions"][index], texts["image_id"][index] = captions, name
    whole = concatenate_datasets([source.pictures, Dataset.from_dict(texts, features=TABLE)], axis=1)
    return whole if len(kept) == len(whole) else whole.select([index for index, _, _ in kept])


def _without_broken(split: Split) -> tuple[Dataset, list[str]]:
    """The rows whose pictures can be decoded, and a sentence about the others."""
    problems = examine(split.rows)["problem"][:] if len(split.rows) else []
    broken = [(row, problem) for row, problem in enumerate(problems) if problem]
    if not broken:
        return split.rows, []
    names = first([problem for _, problem in broken])
    sound = split.rows.select([row for row, problem in enumerate(problems) if not problem])
    return sound, [f"{split.name}: {len(broken)} broken pictures are left out: {names}."]


def _examined(row: dict[str, Any]) -> dict[str, Any]:
    found = {"width": 0, "height": 0, "mode": "", "digest": "", "problem": ""}
    try:
        data = stored_bytes(row["image"])
        found["digest"] = hashlib.sha256(data).hexdigest()
        image = load_image(data)
        try:
            with PIL.Image.open(io.BytesIO(data)) as stored:
                found["mode"] = stored.mode
        except Exception:  # its metadata are broken
            found["mode"] = open_image(io.BytesIO(data)).mode
        found["width"], found["height"] = image.size
    except Exception as error:  # of many kinds: files, archives, networks
        found["problem"] = f"image {row['image_id']}: {error}"
    return found
