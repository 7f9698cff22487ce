"""Captioned pictures in the forms that people have them, read as entries that say where they stand."""

import csv
import glob
import hashlib
import io
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from datasets import Dataset, Image, Value, load_dataset

from hf_attncap.metrics.files import CaptionFileError, JsonLines, read_json, read_references, read_text

from ..arguments import DataArguments, SettingError
from .columns import CAPTION_COLUMNS, captions_columns, check_columns, id_column_of, with_columns, with_shard_columns

logger = logging.getLogger(__name__)

Role = Literal["train", "validation"]
KINDS = "Parquet (.parquet), CSV (.csv, .tsv, .txt), JSON lines (.jsonl), Karpathy's splits or COCO's annotations (.json), "
KINDS += "or WebDataset (.tar)"


class Entry(NamedTuple):
    """One row, line or image of a file.

    `image` is the path of its picture, None where the bytes are in the table. `image_id` is None where nothing but the path
    names the image. `single` says that it holds one caption as text: several such entries of one image belong together.
    """

    label: int | str
    image: str | None
    image_id: str | None
    captions: list[str]
    single: bool


@dataclass
class Source:
    """All entries of a file or table; `pictures`, where there is one, has an `image` an entry, not decoded."""

    name: str
    unit: str
    entries: list[Entry]
    pictures: Dataset | None = None
    notes: list[str] = field(default_factory=list)


def choose_split(name: str, available: Collection[str], role: Role, arguments: DataArguments) -> str | None:
    """The split(s) for a role, joined by a plus, of those in a dataset or file; None if there is nothing to validate on.

    Raises:
        SettingError: for a split that is not there.
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


def own_splits(path: str) -> list[str]:
    """The splits inside a file, which only Karpathy's have."""
    return _karpathy_splits(_json(path)) if path.endswith(".json") else []


def read_file(path: str, arguments: DataArguments, role: Role) -> Source:
    """The entries of a Parquet, CSV or JSON file; paths in it are relative to the image folder or else to the file.

    Raises:
        SettingError: for a file that is missing or malformed, naming the place and what is expected there.
    """
    if not Path(path).is_file():
        raise SettingError(f"No such data file: {path}.")
    folder = image_folder(path, arguments, role)
    ending = Path(path).suffix.lower()
    content = _json(path) if ending in (".json", ".jsonl") else None
    if isinstance(content, dict) and "images" in content:
        return _from_references(path, content, arguments, role, folder)
    _refuse_split(path, arguments, role)
    if ending == ".parquet":
        try:
            table = load_dataset("parquet", data_files=as_pattern(path), split="train")
        except Exception as error:  # pyarrow and datasets raise many kinds
            raise SettingError(f"{path} cannot be read as Parquet: {str(error.__cause__ or error).rstrip('.')}.") from error
        return from_table(table, path, arguments, folder)
    if ending in (".csv", ".tsv", ".txt"):
        return _from_records(path, _csv(path, "\t" if ending == ".tsv" else ","), arguments, folder, "lines")
    if isinstance(content, JsonLines):
        return _from_records(path, content, arguments, folder, "lines")
    if isinstance(content, list):
        return _from_records(path, enumerate(content, 1), arguments, folder, "rows")
    raise SettingError(f"{path} is of no kind that is known here: {KINDS}.")


def as_pattern(path: str) -> str:
    """A path for `datasets`, which takes all paths for patterns: what is there under its own name is meant literally.

    Thus of "[set] 1/*.tar" the folder is escaped and the rest is a pattern. Addresses stay as they are.
    """
    if "://" in path:
        return path
    found = Path(path).absolute()  # `datasets` would put a folder whose name is not escaped before a relative one
    parents = (parent for parent in (found, *found.parents) if parent.exists())
    there = next(parents)
    return str(Path(glob.escape(str(there))) / found.relative_to(there))


def image_folder(path: str, arguments: DataArguments, role: Role) -> Path:
    """Where the relative paths of a file begin."""
    given = (arguments.validation_image_dir if role == "validation" else None) or arguments.image_dir
    return Path(given) if given else Path(path).parent


def from_table(table: Dataset, name: str, arguments: DataArguments, folder: Path) -> Source:
    """The entries of a `datasets.Dataset`, whose pictures stay where they are.

    Without an id column, pictures inside the table have no name of their own (a path beside the bytes is what they were called
    once): where they have one caption a row, their bytes tell which are the same.
    """
    columns = table.column_names
    arguments = with_columns(name, columns, arguments, table.features)
    image_column = str(arguments.image_column)
    ids: list[Any] = [None] * len(table)
    if id_column := id_column_of(columns, arguments):
        ids = [None if value is None else str(value) for value in table[id_column][:]]
    texts = zip(*(table[column][:] for column in captions_columns(arguments)))
    captions = [row_captions(f"{name}, row {row}", values) for row, values in enumerate(texts)]
    pictures = None
    if isinstance(feature := table.features[image_column], Value) and feature.dtype in ("string", "large_string"):
        paths = [value and str(folder / value) for value in table[image_column][:]]
    else:
        pictures, paths = _pictures(table, name, image_column)
        if arguments.image_dir:
            logger.warning("`image_dir` is not used: %s holds the images themselves", name)
        if not id_column and None in paths and any(single for _, single in captions):
            ids = list(_digests(pictures))
    entries = [Entry(row, paths[row], ids[row], *captions[row]) for row in range(len(table))]
    return Source(name, "rows", entries, pictures)


def from_shards(path: str, arguments: DataArguments) -> Source:
    """The entries of WebDataset tar files, a pattern of which `path` may be, copied into the cache of `datasets`."""
    table = load_shards(path, streaming=False)
    arguments = with_shard_columns(path, table.features, arguments)
    image_column = str(arguments.image_column)
    pictures, _ = _pictures(table, path, image_column)
    entries = [
        Entry(row["__key__"], None, row["__key__"], shard_captions(row, arguments), False)
        for row in table.remove_columns([image_column])
    ]
    return Source(path, "images", entries, pictures)


def load_shards(path: str, streaming: bool) -> Any:
    """The members of tar files as columns.

    Raises:
        SettingError: if there are no such files, or they are no WebDataset.
    """
    pattern = as_pattern(path)
    if "://" not in path and not glob.glob(pattern):
        raise SettingError(f"No such data file: {path}.")
    try:
        return load_dataset("webdataset", data_files=pattern, split="train", streaming=streaming)
    except Exception as error:  # tarfile, json and datasets raise many kinds
        raise SettingError(f"{path} cannot be read as WebDataset: {str(error.__cause__ or error).rstrip('.')}.") from error


def shard_captions(row: dict[str, Any], arguments: DataArguments) -> list[str]:
    """The captions of an example: its `captions_column`, that of its JSON member, or the lines of its text member."""
    member = row.get("json") or {}
    usual = next((name for name in CAPTION_COLUMNS if name in member), None)  # where members differ between examples
    column = arguments.captions_column or usual or ""
    for holder in (row, member):
        if holder.get(column):
            return caption_list(f"image {row['__key__']}", holder[column])[0]
    return str(row.get("txt") or "").splitlines()


def row_captions(where: str, values: Sequence[Any]) -> tuple[list[str], bool]:
    """The captions in a row's caption columns, and whether they are one text.

    Raises:
        SettingError: if a column holds anything else than text, lists of text and nothing.
    """
    if len(values) == 1:
        return caption_list(where, values[0])
    return [caption for value in values for caption in caption_list(where, value)[0]], False


def caption_list(where: str, value: Any) -> tuple[list[str], bool]:
    """The captions in a field, and whether it is a single text.

    Raises:
        SettingError: if it holds anything else than text, lists of text and nothing.
    """
    captions = value if isinstance(value, list) else [value]
    if wrong := [caption for caption in captions if not isinstance(caption, str | None)]:
        raise SettingError(f"{where}: the captions hold {wrong[0]!r:.60}; expected a text or a list of texts.")
    return [caption for caption in captions if caption is not None], isinstance(value, str)


def has_words(caption: str) -> bool:
    """Whether a caption has a letter or a digit: a tokenizer leaves nothing of one that does not."""
    return any(map(str.isalnum, caption))


def _pictures(table: Dataset, name: str, column: str) -> tuple[Dataset, list[str | None]]:
    """The column of pictures as `image`, not decoded, and the paths of those that are files."""
    table = table.select_columns([column])
    try:
        pictures = (table if column == "image" else table.rename_column(column, "image")).cast_column("image", Image(decode=False))
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"{name}: the column '{column}' holds no pictures but {table.features[column]}: expected pictures or paths of files."
        ) from error
    arrow: Any = pictures.with_format("arrow")
    paths: list[str | None] = []
    for start in range(0, len(pictures), 10_000):
        batch = arrow[start : start + 10_000]["image"].combine_chunks()
        stored = batch.field("bytes").is_valid().to_pylist()
        paths += [None if inside else path for inside, path in zip(stored, batch.field("path").to_pylist())]
    return pictures, paths


def _digests(pictures: Dataset) -> Iterator[str | None]:
    for row in pictures:
        data = row["image"] and row["image"]["bytes"]  # type: ignore[call-overload]
        yield hashlib.sha256(data).hexdigest()[:32] if data else None


def _from_records(path: str, records: Iterable[tuple[int, Any]], arguments: DataArguments, folder: Path, unit: str) -> Source:
    """The entries of objects with the columns that are set, or of which the first object has usual ones."""
    entries = []
    for number, record in records:
        where = f"{path}, {unit[:-1]} {number}"
        if not isinstance(record, dict):
            wanted = arguments.image_column or "image", arguments.captions_column or "captions"
            raise SettingError(f"{where} is no object: expected `{wanted[0]}` and `{wanted[1]}`.")
        if entries:
            check_columns(where, record, arguments)
        else:
            arguments = with_columns(where, record, arguments)
        image = record[arguments.image_column]
        if not isinstance(image, str) or not image:
            raise SettingError(f"{where}: `{arguments.image_column}` is {image!r:.60}; expected the path of a picture.")
        id_column = id_column_of(record, arguments)
        image_id = record[id_column] if id_column else None
        captions, single = row_captions(where, [record[column] for column in captions_columns(arguments)])
        entries.append(Entry(number, str(folder / image), None if image_id is None else str(image_id), captions, single))
    return Source(path, unit, entries)


def _from_references(path: str, content: dict[str, Any], arguments: DataArguments, role: Role, folder: Path) -> Source:
    """The entries of Karpathy's file or COCO's annotations, as the scores read them too."""
    splits = _karpathy_splits(content)
    split = choose_split(path, splits, role, arguments) if splits else _refuse_split(path, arguments, role)
    if splits and split is None:
        raise SettingError(f"{path} has no split for {role}, only {', '.join(splits)}: set `{role}_split` to one of them.")
    for setting in ("image_column", "captions_column", "image_id_column"):
        if getattr(arguments, setting):
            logger.warning("`%s` is not used: %s has the form of Karpathy's or COCO's files", setting, path)
    with _faults_told():
        references = read_references(path, split)
    key = "filename" if splits else "file_name"
    files = {image_id: name for name, image_id in references.names[key].ids.items()} if key in references.names else {}
    if missing := [image_id for image_id in references.captions if image_id not in files]:
        raise SettingError(f"{path}: image {missing[0]} has no `{key}` of its own; expected the name of its picture.")
    wanted = (split or "").split("+")
    folders = {
        image["filename"]: image.get("filepath") or "" for image in content["images"] if splits and image.get("split") in wanted
    }
    entries = [
        Entry(image_id, str(folder / folders.get(files[image_id], "") / files[image_id]), image_id, captions, False)
        for image_id, captions in references.captions.items()
    ]
    notes = [text for text in references.notes if "empty caption" not in text]  # which are counted one by one, later
    return Source(path, "images", entries, notes=notes)


def _refuse_split(path: str, arguments: DataArguments, role: Role) -> None:
    if arguments.train_split if role == "train" else arguments.validation_split:
        raise SettingError(f"{path} has no splits to choose from: leave out `{role}_split`.")


def _karpathy_splits(content: Any) -> list[str]:
    """The names of the splits in Karpathy's file; none in another."""
    images = content.get("images") if isinstance(content, dict) and "annotations" not in content else None
    named = [image["split"] for image in images or [] if isinstance(image, dict) and isinstance(image.get("split"), str)]
    return list(dict.fromkeys(named))


@contextmanager
def _faults_told() -> Iterator[None]:
    """A file that cannot be read is for the user to change."""
    try:
        yield
    except CaptionFileError as error:
        raise SettingError(f"{error}.") from error


def _json(path: str) -> Any:
    """The JSON in a file, or its `JsonLines`."""
    with _faults_told():
        value = read_json(path, "rows with a picture and its captions, Karpathy's splits or COCO's annotations")
    return JsonLines([(1, value)]) if isinstance(value, dict) and "images" not in value else value


def _csv(path: str, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    with _faults_told():
        text = read_text(path)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                raise SettingError(
                    f"{path}, line {reader.line_num} has not the {len(reader.fieldnames or [])} fields that the first line names: "
                    "put captions with commas in double quotes."
                )
            yield reader.line_num, record
    except csv.Error as error:
        raise SettingError(f"{path}, line {reader.line_num} is not well-formed CSV: {error}.") from error
