"""Which columns of captioned images hold the images, the captions and the ids."""

import logging
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from datasets import Features, Image

from ..arguments import DataArguments, SettingError

logger = logging.getLogger(__name__)

# The first name of each is that of the documentation, which is taken whatever else there is.
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "file_name", "filename", "file", "filepath", "file_path", "path")
IMAGE_COLUMNS += ("image_path", "image_file", "image_name", "image_filename", "img_path")
CAPTION_COLUMNS = ("captions", "caption", "text", "texts", "sentences", "sentence", "description", "raw")


def with_columns(name: str, columns: Collection[str], arguments: DataArguments, features: Features | None = None) -> DataArguments:
    """The arguments with `image_column` and `captions_column` set: as they were, or recognised by their usual names.

    Args:
        name: of the file or table, for messages.
        columns: that it has.
        features: their types, where they are known: the only column of images is that of the images.

    Raises:
        SettingError: a column that is set is missing, none has a usual name, or several have one.
    """
    images = [column for column, feature in (features or {}).items() if isinstance(feature, Image)] or list(columns)
    typed = images != list(columns)
    found = {
        "image_column": arguments.image_column or _recognised(name, "image_column", images, IMAGE_COLUMNS),
        "captions_column": arguments.captions_column or _recognised(name, "captions_column", columns, CAPTION_COLUMNS),
    }
    if found["image_column"] is None and typed and len(images) == 1:
        found["image_column"] = images[0]
    _log_recognised(name, arguments, found)
    usual = {"image_column": IMAGE_COLUMNS[0], "captions_column": CAPTION_COLUMNS[0]}
    arguments = replace(arguments, **{setting: column or usual[setting] for setting, column in found.items()})
    check_columns(name, columns, arguments)
    return arguments


def with_shard_columns(path: str, features: Features, arguments: DataArguments) -> DataArguments:
    """As `with_columns`, of the members of WebDataset shards; `captions_column` stays None where text members hold the captions.

    Images are the member of `image_column`, else the only one of a picture's kind. Captions are a member or a field of the JSON
    member: that of `captions_column`, else the one with a usual name.

    Raises:
        SettingError: there is no such member, or there are several.
    """
    pictures = [name for name, feature in features.items() if isinstance(feature, Image)]
    image = arguments.image_column if arguments.image_column in pictures else None
    if arguments.image_column is None and len(pictures) == 1:
        image = pictures[0]
    if image is None:
        raise SettingError(f"{path} has pictures as {', '.join(pictures) or 'no member'}: set `image_column` to one of them.")
    members: Any = features.get("json")
    known = list(members) if isinstance(members, dict) else []
    captions = arguments.captions_column
    if captions is None:
        captions = _recognised(path, "captions_column", known, CAPTION_COLUMNS)
        _log_recognised(path, arguments, {"captions_column": captions})
    elif captions not in features and isinstance(members, dict | None) and captions not in known:
        raise SettingError(
            f"{path} has no member and no JSON field '{captions}', only {', '.join([*features, *known])}: set `captions_column` "
            "to one of them, or leave it out."
        )
    return replace(arguments, image_column=image, captions_column=captions)


def check_columns(name: str, columns: Iterable[str], arguments: DataArguments) -> None:
    wanted = [("image_column", arguments.image_column), ("image_id_column", arguments.image_id_column)]
    wanted += [("captions_column", column) for column in captions_columns(arguments)]
    for setting, column in wanted:
        if column and column not in columns:
            raise SettingError(
                f"{name} has no column '{column}', only {', '.join(map(str, columns))}: set `{setting}` to one of them, or "
                "rename it."
            )


def captions_columns(arguments: DataArguments) -> list[str]:
    """The columns that hold captions, once they are known."""
    return (arguments.captions_column or CAPTION_COLUMNS[0]).split("+")


def id_column_of(columns: Iterable[str], arguments: DataArguments) -> str | None:
    """The column of the ids, if there is any."""
    if arguments.image_id_column is None:
        return "image_id" if "image_id" in columns else None
    return arguments.image_id_column or None


def _recognised(name: str, setting: str, columns: Iterable[str], usual: tuple[str, ...]) -> str | None:
    """The column with a usual name, in upper or lower case; None if there is none."""
    fitting = [column for column in columns if isinstance(column, str) and column.strip().lower() in usual]
    if usual[0] in fitting:
        return usual[0]
    if len(fitting) > 1:
        raise SettingError(
            f"{name} has {len(fitting)} columns that may be meant, {', '.join(fitting)}: set `{setting}` to one of them."
        )
    return fitting[0] if fitting else None


def _log_recognised(name: str, arguments: DataArguments, found: dict[str, str | None]) -> None:
    for setting, column in found.items():
        if getattr(arguments, setting) is None and column not in (None, IMAGE_COLUMNS[0], CAPTION_COLUMNS[0]):
            logger.warning("%s: `%s` is not set; '%s' is taken", name, setting, column)
