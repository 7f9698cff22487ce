"""Step 3 of the data flow: from a table to one row per image, with everything that is wrong with the data reported."""

import hashlib
import io
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import PIL.Image
from datasets import Dataset, Features, List, Value, concatenate_datasets

from hf_attncap.image_files_attncap import open_image
from hf_attncap.images import ImageError, load_image

from ..arguments import SettingError
from .table import Table

logger = logging.getLogger(__name__)

TEXTS = Features({"captions": List(Value("string")), "image_id": Value("string")})
WAY_OUT = "Run `attncap train --inspect` to list all problems, or set `--skip_broken_images True` to leave such images out."
IMAGES_PER_PROCESS = 200  # below this, starting a process costs more than it saves


@dataclass
class Split:
    """The usable rows of a split, and what is wrong with the others.

    Attributes:
        name: the source, for messages.
        rows: `image` (not decoded), `captions` (at least one) and `image_id` (unique).
        broken: sentences about images that can be left out.
        problems: sentences about what the user must correct.
        notes: sentences about what is only worth knowing.
        keys: ids and files of the images, to find them in another split, each with its `image_id`.
    """

    name: str
    rows: Dataset
    broken: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)


@dataclass
class Decoding:
    """Transform of a dataset: decodes stored images to RGB, then applies `change` to each row.

    Raises:
        SettingError: an image cannot be decoded, with its name.
    """

    change: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if "image" not in rows:
            return rows
        names: list[Any] = rows.get("image_id") or [None] * len(rows["image"])
        try:
            images = [decode_image(image, name) for image, name in zip(rows["image"], names)]
        except ImageError as error:
            raise SettingError(f"{error}. {WAY_OUT}") from error
        rows = {**rows, "image": images}
        if self.change is None:
            return rows
        changed = [self.change(dict(zip(rows, row))) for row in zip(*rows.values())]
        return {column: [row[column] for row in changed] for column in rows}


def check_table(table: Table) -> Split:
    """One row per image, with all its captions. Captions without a word are dropped, and faults are reported in the result."""
    split = Split(table.name, Dataset.from_dict({}), notes=list(table.notes))
    groups: dict[str, list[int]] = {}
    for row, (image_id, path, label) in enumerate(zip(table.image_ids, table.paths, table.labels)):
        groups.setdefault(image_id or path or f"{table.unit} {label}", []).append(row)
    faults: dict[str, list[int]] = {"repeated": [], "other file": [], "no image": [], "no caption": [], "no word": []}
    kept: dict[int, tuple[str, list[str]]] = {}
    for name, rows in groups.items():
        first = rows[0]
        if len(rows) > 1 and not all(table.single[row] for row in rows):
            faults["repeated"].append(rows[1])
        faults["other file"] += [row for row in rows if table.paths[row] != table.paths[first]][:1]
        captions = [caption for row in rows for caption in table.captions[row] if has_words(caption)]
        path = table.paths[first]
        missing = path is not None and "://" not in path and not os.path.isfile(path)
        if missing or not captions:
            faults["no image" if missing else "no caption"].append(first)
            continue
        faults["no word"] += [row for row in rows if not all(map(has_words, table.captions[row])) or not table.captions[row]]
        kept[first] = name, captions
        if table.image_ids[first] is not None:
            split.keys[f"id {name}"] = name
        if path:
            split.keys[f"file {os.path.abspath(path)}"] = name
    _report_faults(split, table, faults)
    split.rows = _select_rows(table, kept)
    return split


def has_words(caption: str) -> bool:
    """Whether a caption has a letter or a digit. The tokenizer reads nothing in other captions."""
    return any(map(str.isalnum, caption))


def prepare_rows(split: Split, skip_broken: bool, problems: Sequence[str] = ()) -> Dataset:
    """The rows of a split for training, whose images are decoded when they are read.

    Raises:
        SettingError: there are problems, or broken images that are not to be skipped, or no usable image.
    """
    problems = [*problems, *split.problems, *([] if skip_broken else split.broken)]
    if problems:
        raise SettingError(" ".join([*problems, *([WAY_OUT] if split.broken and not skip_broken else [])]))
    for text in [*split.notes, *split.broken]:
        logger.warning("%s", text)
    rows = split.rows
    if skip_broken and len(rows):
        found = examine_images(rows)["problem"][:]
        if broken := [problem for problem in found if problem]:
            rows = rows.select([row for row, problem in enumerate(found) if not problem])
            logger.warning("%s: %d broken images are left out: %s.", split.name, len(broken), list_names(broken))
    if not len(rows):
        raise SettingError(f"{split.name} holds no usable image.")
    return rows.with_transform(Decoding())


def examine_images(rows: Dataset) -> Dataset:
    """Decodes every image.

    Returns:
        One row per image: `width`, `height`, `mode` as stored, `digest` of the file's bytes ("" without any) and `problem` ("" if
        there is none).
    """
    processes = min(os.cpu_count() or 1, 16, len(rows) // IMAGES_PER_PROCESS)
    return rows.with_format(None).map(
        _examine,
        remove_columns=rows.column_names,
        num_proc=processes if processes > 1 else None,
        keep_in_memory=True,
        load_from_cache_file=False,
        desc=f"reading {len(rows)} images",
    )


def decode_image(stored: dict[str, Any] | None, name: str | None) -> Any:
    """A stored image, `bytes` or `path`, as an RGB image.

    Raises:
        ImageError: it cannot be decoded, with the image's name.
    """
    try:
        return load_image(_read_bytes(stored))
    except Exception as error:  # files, archives and networks raise many kinds
        place = name or (stored and stored.get("path")) or "without a name"
        raise ImageError(f"image {place}: {error}") from error


def list_names(names: Sequence[Any], unit: str = "") -> str:
    """The first ten names, and how many more there are."""
    shown = ", ".join(map(str, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f"{unit} {shown}".strip()


def _report_faults(split: Split, table: Table, faults: dict[str, list[int]]) -> None:
    where = {kind: list_names([table.labels[row] for row in rows], f"{table.unit}s") for kind, rows in faults.items()}
    if rows := faults["repeated"]:
        split.problems.append(f"{split.name}: {len(rows)} images are repeated, {where['repeated']}: keep one row per image.")
    if rows := faults["other file"]:
        split.problems.append(
            f"{split.name}: {len(rows)} images have one id but several files, {where['other file']}: give each its own id."
        )
    if rows := faults["no image"]:
        files = list_names([table.paths[row] for row in rows if table.paths[row]])
        split.broken.append(
            f"{split.name}: {len(rows)} images do not exist, {where['no image']}{f' ({files})' if files else ''}: paths are "
            "relative to the file, or to `image_dir`."
        )
    if rows := faults["no caption"]:
        split.broken.append(f"{split.name}: {len(rows)} images have no caption, {where['no caption']}.")
    if rows := faults["no word"]:
        split.notes.append(f"{split.name}: captions without a word are left out, {where['no word']}.")


def _select_rows(table: Table, kept: dict[int, tuple[str, list[str]]]) -> Dataset:
    """The rows that are kept, with their names and captions. Images are not copied."""
    size = len(table.labels)
    captions = [kept[row][1] if row in kept else [] for row in range(size)]
    ids = [kept[row][0] if row in kept else "" for row in range(size)]
    texts = Dataset.from_dict({"captions": captions, "image_id": ids}, features=TEXTS)
    whole = concatenate_datasets([table.images, texts], axis=1) if size else texts
    rows = whole if len(kept) == size else whole.select(list(kept))
    files = [path for path in (table.paths[row] for row in kept) if path and "://" not in path]  # rows are kept only if these exist
    if not files:
        return rows
    # An image that was replaced under its name makes another dataset, whose features are not in the cache yet.
    states = [(state.st_size, state.st_mtime_ns) for state in map(os.stat, files)]
    fingerprint = hashlib.sha256(f"{rows._fingerprint} {states}".encode()).hexdigest()[:16]
    return Dataset(rows.data, info=rows.info, indices_table=rows._indices, fingerprint=fingerprint)


def _examine(row: dict[str, Any]) -> dict[str, Any]:
    found = {"width": 0, "height": 0, "mode": "", "digest": "", "problem": ""}
    try:
        data = _read_bytes(row["image"])
        found["digest"] = hashlib.sha256(data).hexdigest()
        image = load_image(data)
        try:
            with PIL.Image.open(io.BytesIO(data)) as stored:
                found["mode"] = stored.mode
        except Exception:  # its metadata are broken
            found["mode"] = open_image(io.BytesIO(data)).mode
        found["width"], found["height"] = image.size
    except Exception as error:  # files, archives and networks raise many kinds
        found["problem"] = f"image {row['image_id']}: {error}"
    return found


def _read_bytes(stored: dict[str, Any] | None) -> bytes:
    """The file of a stored image, `bytes` or `path`, which may be remote or inside an archive."""
    data, path = (stored.get("bytes"), stored.get("path")) if stored else (None, None)
    if data is None and path is None:
        raise ImageError("its row holds no image")
    if data is None and os.path.isfile(str(path)):
        return Path(str(path)).read_bytes()  # fsspec would read "::" in a name as a chain of file systems
    if data is None:
        with fsspec.open(path, "rb") as stream:
            data = stream.read()  # type: ignore[union-attr]
    return data  # type: ignore[return-value]
