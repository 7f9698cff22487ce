"""Loads many images in batches. `load_image` and its `ImageError` are in `images_attncap`, which the pipeline also uses."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .image_files_attncap import ImageError
from .images_attncap import is_tensor, load_image

MAX_BATCH_PIXELS = 2**26  # all images of a batch are in memory at once


def make_batches(images: Iterable[tuple[str, Image.Image | ImageError]], batch_size: int) -> Iterator[list[tuple[str, Any]]]:
    """Groups (name, image) into batches of at most `batch_size`, which also end once their images exceed `MAX_BATCH_PIXELS`.

    A batch ends at each multiple of `batch_size`, so those after it do not depend on the images before. If `images` raises an
    error, that is raised after the batch of the images before.
    """
    batch: list[tuple[str, Image.Image | ImageError]] = []
    count, pixels, iterator = 0, 0, iter(images)
    while True:
        try:
            batch.append(next(iterator))
        except Exception as error:
            failure = error
            break
        image = batch[-1][1]
        count += 1
        pixels += image.width * image.height if isinstance(image, Image.Image) else 0
        if count % batch_size == 0 or pixels > MAX_BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch
    if not isinstance(failure, StopIteration):
        raise failure


@dataclass(frozen=True)
class Reading:
    """How images are read; the first option is that of `load_image`.

    Attributes:
        allow_private_urls: also fetch URLs that lead to private addresses.
        scale: the size (width, height) to resize all images to, and Pillow's resampling filter, or None.
    """

    allow_private_urls: bool = False
    scale: tuple[tuple[int, int], int] | None = None

    def read(self, number: int, source: Any) -> tuple[str, Image.Image | ImageError]:
        """The name of image `number`, and the image, or an `ImageError` if it cannot be read."""
        name = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else f"images[{number}]"
        try:
            image = load_image(source, allow_private_urls=self.allow_private_urls)
            return name, image if self.scale is None else image.resize(*self.scale)
        except ImageError as error:
            return name, error
        except Exception as error:  # anything: sources of unknown types, memory
            failure = ImageError(f"{name} cannot be read: {describe_error(error)}")
            failure.__cause__ = error
            return name, failure


def describe_error(error: Exception) -> str:
    """The type and message of an error."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


__all__ = ["MAX_BATCH_PIXELS", "ImageError", "Reading", "describe_error", "is_tensor", "load_image", "make_batches"]
