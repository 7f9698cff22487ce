"""Captioned pictures: a row an image, its captions checked."""

from pathlib import Path
from typing import Any

from datasets import Dataset, Image, load_dataset
from torchvision.transforms import v2

from .arguments import DataArguments, SettingError


def load_split(path: str, arguments: DataArguments) -> Dataset:
    """A Parquet file of images and their captions as rows `image`, `captions`.

    Raises:
        SettingError: for a missing file or column, or images without captions, naming them.
    """
    if not Path(path).is_file():
        raise SettingError(f"No such data file: {path}.")
    dataset = load_dataset("parquet", data_files=path, split="train")
    for column in (arguments.image_column, arguments.captions_column):
        if column not in dataset.column_names:
            raise SettingError(f"{path} has no column '{column}', only {', '.join(dataset.column_names)}.")
    empty = [str(row) for row, captions in enumerate(dataset[arguments.captions_column]) if not any(c.strip() for c in captions)]
    if empty:
        raise SettingError(f"{path}: {len(empty)} images have no caption, rows {', '.join(empty[:10])}.")
    dataset = dataset.select_columns([arguments.image_column, arguments.captions_column])
    names = {arguments.image_column: "image", arguments.captions_column: "captions"}
    dataset = dataset.rename_columns({old: new for old, new in names.items() if old != new})
    return dataset.cast_column("image", Image(mode="RGB"))


def augmented(dataset: Dataset, side: int) -> Dataset:
    """The same rows, their pictures cropped and recoloured anew at every reading.

    The changes leave captions true: most of the picture stays and nothing is mirrored.
    """
    change = v2.Compose(
        [
            v2.RandomResizedCrop(side, scale=(0.7, 1.0), ratio=(0.85, 1.18), antialias=True),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
        ]
    )

    def change_images(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**rows, "image": [change(image) for image in rows["image"]]}

    return dataset.with_transform(change_images)
