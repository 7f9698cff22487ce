"""Step 2a of the data flow: find which columns hold the images, the captions and the ids."""

import logging
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from datasets import Features, Image

from ..arguments import DataArguments, SettingError
from .sources import Source

logger = logging.getLogger(__name__)

# The first name of each is the documented one; it is used whatever other columns there are.
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
