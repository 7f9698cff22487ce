"""Step 2 of the data flow: find the columns of a source, and read its rows as a table of images, captions and ids."""

import hashlib
import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import Dataset, Features, Image

from ..arguments import DataArguments, SettingError
from .sources import Source

logger = logging.getLogger(__name__)

# The first name of each is the documented one and has precedence.
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "file_name", "filename", "file", "filepath", "file_path", "path")
IMAGE_COLUMNS += ("image_path", "image_file", "image_name", "image_filename", "img_path")
CAPTION_COLUMNS = ("captions", "caption", "text", "texts", "sentences", "sentence", "description", "raw")


class Columns(NamedTuple):
    """The columns of a source.

    `captions` may be several. It is empty for WebDataset shards whose text members hold the captions. `image_id` is None where
    no column has ids.
    """

    image: str
    captions: tuple[str, ...]
    image_id: str | None


def find_columns(source: Source, arguments: DataArguments) -> Columns:
    """The columns that the arguments name, or else those with a usual name.

    Raises:
        SettingError: a named column does not exist, no column has a usual name, or several have one.
    """
    if source.layout == "annotations":
        return Columns("image", ("captions",), "image_id")
    features: Any = source.rows.features
    if source.layout == "shards":
        return _find_members(source.name, features, arguments)
    names = list(features)
    typed = [name for name, feature in features.items() if isinstance(feature, Image)]
    image = arguments.image_column or _find_usual(source.name, "image_column", typed or names, IMAGE_COLUMNS)
    if image is None:
        image = typed[0] if len(typed) == 1 else IMAGE_COLUMNS[0]
    captions = arguments.captions_column or _find_usual(source.name, "captions_column", names, CAPTION_COLUMNS)
    captions = captions or CAPTION_COLUMNS[0]
    image_id = arguments.image_id_column
    if image_id is None:
        image_id = "image_id" if "image_id" in names else ""
    columns = Columns(image, tuple(captions.split("+")), image_id or None)
    _log_chosen(source.name, arguments, image, captions)
    _check_exist(source.name, names, columns)
    return columns


def _find_members(name: str, features: Features, arguments: DataArguments) -> Columns:
    """The members of WebDataset shards: images are the only image member, captions a member or a field of the JSON member."""
    images = [member for member, feature in features.items() if isinstance(feature, Image)]
    image = arguments.image_column or (images[0] if len(images) == 1 else None)
    if image is None or image not in images:
        raise SettingError(f"{name} has images as {', '.join(images) or 'no member'}: set `image_column` to one of them.")
    json: Any = features.get("json")
    fields = list(json) if isinstance(json, dict) else []
    captions = arguments.captions_column
    if captions is None:
        captions = _find_usual(name, "captions_column", fields, CAPTION_COLUMNS)
        _log_chosen(name, arguments, image, captions)
    elif captions not in features and isinstance(json, dict | None) and captions not in fields:
        raise SettingError(
            f"{name} has no member and no JSON field '{captions}', only {', '.join([*features, *fields])}: set `captions_column` "
            "to one of them, or leave it out."
        )
    return Columns(image, (captions,) if captions else (), "__key__")


def _check_exist(name: str, available: Collection[str], columns: Columns) -> None:
    wanted = [("image_column", columns.image), ("image_id_column", columns.image_id)]
    wanted += [("captions_column", column) for column in columns.captions]
    for setting, column in wanted:
        if column and column not in available:
            raise SettingError(
                f"{name} has no column '{column}', only {', '.join(map(str, available))}: set `{setting}` to one of them, or "
                "rename it."
            )


def _find_usual(name: str, setting: str, columns: Iterable[str], usual: tuple[str, ...]) -> str | None:
    """The column with a usual name, in upper or lower case; None if there is none."""
    found = [column for column in columns if column.strip().lower() in usual]
    if usual[0] in found:
        return usual[0]
    if len(found) > 1:
        raise SettingError(f"{name} has {len(found)} possible columns, {', '.join(found)}: set `{setting}` to one of them.")
    return found[0] if found else None


def _log_chosen(name: str, arguments: DataArguments, image: str | None, captions: str | None) -> None:
    for setting, column in (("image_column", image), ("captions_column", captions)):
        if getattr(arguments, setting) is None and column not in (None, IMAGE_COLUMNS[0], CAPTION_COLUMNS[0]):
            logger.warning("%s: `%s` is not set; using '%s'", name, setting, column)


class Table(NamedTuple):
    """Captioned images, one entry per row of the source in each list.

    Attributes:
        name: the source, for messages.
        unit: what `labels` name, "row" (counted from 1) or "image" (by its id).
        labels: where each row stands in the source, for messages.
        images: a dataset with the column `image`, not decoded.
        paths: the file of each image. None where the table holds its bytes, "" where there is no image.
        captions: a list of captions per row.
        single: whether the row holds one caption as text. Such rows of the same image are merged.
        image_ids: None where no column has ids.
        notes: sentences about what was left out.
    """

    name: str
    unit: str
    labels: list[Any]
    images: Dataset
    paths: list[str | None]
    captions: list[list[str]]
    single: list[bool]
    image_ids: list[str | None]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaptionReader:
    """Reads the captions of a row, and whether they are a single text."""

    columns: Columns
    shards: bool

    def __call__(self, row: dict[str, Any], where: str) -> tuple[list[str], bool]:
        """
        Raises:
            SettingError: if a column holds anything other than text, lists of text and None; `where` names the row.
        """
        if self.shards:
            return self._of_shard(row, where), False
        values = [row[column] for column in self.columns.captions]
        if len(values) == 1:
            return _as_list(where, values[0]), isinstance(values[0], str)
        return [caption for value in values for caption in _as_list(where, value)], False

    def _of_shard(self, row: dict[str, Any], where: str) -> list[str]:
        member = row.get("json") or {}
        usual = [name for name in CAPTION_COLUMNS if name in member][:1]  # the fields may differ between examples
        for column in self.columns.captions or usual:
            for holder in (row, member):
                if holder.get(column):
                    return _as_list(where, holder[column])
        return str(row.get("txt") or "").splitlines()


def _as_list(where: str, value: Any) -> list[str]:
    captions = value if isinstance(value, list) else [value]
    if wrong := [caption for caption in captions if not isinstance(caption, str | None)]:
        raise SettingError(f"{where}: the captions hold {wrong[0]!r:.60}; expected a text or a list of texts.")
    return [caption for caption in captions if caption is not None]


def read_table(source: Source, arguments: DataArguments) -> Table:
    """The table of a source that is read whole. Images are neither decoded nor copied.

    Without an id column, images that the table holds have no name of their own; their stored path is only where they came from.
    If there is one caption per row, the digest of their bytes tells which rows show the same image.

    Raises:
        SettingError: columns are missing, or a row holds something other than an image and captions, with the place.
    """
    columns = find_columns(source, arguments)
    read = CaptionReader(columns, source.layout == "shards")
    rows: Any = source.rows
    wanted = {*columns.captions, columns.image_id}
    if source.layout == "shards":
        wanted = {name for name, feature in rows.features.items() if not isinstance(feature, Image)}
    texts = rows.select_columns([name for name in rows.column_names if name in wanted])[:]
    unit = "row" if source.layout == "table" else "image"
    labels = list(range(1, len(rows) + 1)) if unit == "row" else texts[str(columns.image_id)]
    places = [f"{source.name}, {unit} {label}" for label in labels]
    found = [read(dict(zip(texts, values)), place) for values, place in zip(zip(*texts.values()), places)]
    captions, single = [captions for captions, _ in found], [single for _, single in found]
    images, paths = _read_images(source, columns.image, places)
    ids: list[str | None] = [None] * len(rows)
    if columns.image_id:
        ids = [None if value is None else str(value) for value in texts[columns.image_id]]
    elif None in paths and any(single):
        ids = list(_digests(images))
    return Table(source.name, unit, labels, images, paths, captions, single, ids, source.notes)


def _read_images(source: Source, column: str, places: list[str]) -> tuple[Dataset, list[str | None]]:
    """The column of images as `image`, not decoded, and the paths of those that are files."""
    table: Any = source.rows.select_columns([column])
    feature = table.features[column]
    if isinstance(feature, Image | dict) or getattr(feature, "dtype", "") == "binary":
        images = (table if column == "image" else table.rename_column(column, "image")).cast_column("image", Image(decode=False))
        return images, _stored_paths(images)
    paths: list[str | None] = []
    for place, value in zip(places, table[column][:]):
        if value is not None and not isinstance(value, str):
            raise SettingError(f"{place}: `{column}` is {value!r:.60}; expected an image or the path of one.")
        paths.append(str(source.folder / value) if value else "")
    return Dataset.from_dict({"image": paths}, Features({"image": Image(decode=False)})), paths


def _stored_paths(images: Dataset) -> list[str | None]:
    """The paths of images that are files, None for those whose bytes are in the table, and "" for missing ones."""
    arrow: Any = images.with_format("arrow")
    paths: list[str | None] = []
    for start in range(0, len(images), 10_000):
        batch = arrow[start : start + 10_000]["image"].combine_chunks()
        stored = batch.field("bytes").is_valid().to_pylist()
        paths += [None if inside else path or "" for inside, path in zip(stored, batch.field("path").to_pylist())]
    return paths


def _digests(images: Dataset) -> Iterator[str | None]:
    for row in images:
        data = row["image"] and row["image"]["bytes"]  # type: ignore[call-overload]
        yield hashlib.sha256(data).hexdigest()[:32] if data else None
