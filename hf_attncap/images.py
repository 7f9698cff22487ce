"""Loads many images in batches. `load_image` and its `ImageError` are in `images_attncap`, which the pipeline also uses."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image

from .image_files_attncap import ImageError
from .images_attncap import is_tensor, load_image

MAX_BATCH_PIXELS = 2**26  # all images of a batch are in memory at once


def load_batches(
    sources: Iterable[Any], batch_size: int, allow_private_urls: bool
) -> Iterator[list[tuple[str, Image.Image | ImageError]]]:
    """Yields batches of (name, image); an `ImageError` replaces an image that cannot be read.

    A batch has at most `batch_size` images and ends once they exceed `MAX_BATCH_PIXELS`.
    """
    batch: list[tuple[str, Image.Image | ImageError]] = []
    pixels = 0
    for number, source in enumerate(sources):
        name = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else f"images[{number}]"
        try:
            image = load_image(source, allow_private_urls=allow_private_urls)
            pixels += image.width * image.height
        except ImageError as error:
            image = error
        except Exception as error:  # anything: sources of unknown types, memory
            image = ImageError(f"{name} cannot be read: {describe_error(error)}")
            image.__cause__ = error
        batch.append((name, image))
        if len(batch) == batch_size or pixels > MAX_BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def describe_error(error: Exception) -> str:
    """The type and message of an error."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


__all__ = ["MAX_BATCH_PIXELS", "ImageError", "describe_error", "is_tensor", "load_batches", "load_image"]
