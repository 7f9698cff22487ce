"""Loads images of any source (path, URL, base64, bytes, PIL, array, tensor) as checked, upright RGB images."""

import base64
import errno
import io
import os
import stat
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from .image_files_attncap import FormatError, ImageError, open_image, upright
from .urls_attncap import fetch

MAX_FILE_BYTES = 2**30
STRIP_PIXELS = 2**21  # of images that are converted in strips
_CHANNELS = (1, 2, 3, 4)


def load_image(source: Any, *, allow_private_urls: bool = False, timeout: float | None = None) -> Image.Image:
    """Reads one image as upright RGB.

    Greyscale, palette, 16-bit, float and CMYK images become 8-bit RGB. Transparent regions become white. EXIF rotation is
    applied. An animation gives its first frame.

    Args:
        source: a path (str or path-like), an http(s) or data: URL, a base64 string, the bytes of an image file, a
            PIL image, or a numpy array or torch tensor of shape (H, W), (H, W, C) or (C, H, W) with C from 1 (grey),
            2 (grey, alpha), 3 (RGB) to 4 (RGBA); uint8 in [0, 255], uint16 in [0, 65535] or float in [0, 1].
        allow_private_urls: also fetch from addresses that are not public (this machine, the local network). Default False, so that
            an untrusted URL cannot reach them, neither directly nor by a redirect or DNS.
        timeout: of a download, in seconds. Default: 30.

    Returns:
        A PIL image in mode RGB without metadata; `source` itself if it already is an upright RGB image in memory. `source` is
        not changed.

    Raises:
        ImageError: the source is missing, empty, truncated, not an image, too large, refused or of an unknown type.

    Images of up to `MAX_PIXELS` (179 megapixels) and `MAX_FILE_BYTES` (1 GiB) are read. A URL is fetched directly (proxy settings
    are not read), with at most 64 MiB and 5 redirects.
    """
    if isinstance(source, Image.Image):
        if type(source) is Image.Image and _is_ready(source):
            return source
        name = getattr(source, "filename", "")
        return _to_rgb(source, f"the PIL image {name}" if name else "the PIL image")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), f"the bytes object of length {len(source)}")
    if is_tensor(source):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    if isinstance(source, np.ndarray):
        name = f"the array of shape {source.shape} and type {source.dtype}"
        return _to_rgb(_from_array(source, name), name)
    if isinstance(source, str) and not _is_in_file_system(source):
        return _from_text(source, allow_private_urls, timeout)
    if isinstance(source, (str, os.PathLike)):
        return _from_file(os.fsdecode(source))
    raise ImageError(
        f"an image cannot be read from a {type(source).__name__}; "
        "give one path, URL, base64 string, bytes object, PIL image, numpy array or torch tensor at a time"
    )


def is_tensor(source: Any) -> bool:
    """Whether this is a torch tensor. It does not import torch: if nothing has imported torch, there are no tensors."""
    return isinstance(source, getattr(sys.modules.get("torch"), "Tensor", ()))


def _is_in_file_system(text: str) -> bool:
    """Whether a text is the path of something that exists, readable or not."""
    try:
        os.lstat(text)
    except OSError as error:
        return isinstance(error, PermissionError) or error.errno == errno.ELOOP
    except ValueError:  # a null byte
        return False
    return True


def _from_file(path: str) -> Image.Image:
    try:
        if os.path.isdir(path):
            raise ImageError(f"{path} is a directory; name an image file inside it")
        # Opening a pipe for reading would otherwise wait for a program that writes to it.
        with open(path, "rb", opener=lambda file, flags: os.open(file, flags | getattr(os, "O_NONBLOCK", 0))) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ImageError(f"{path} is not a regular file; name an image file")
            return _decode(stream, path)
    except ImageError:
        raise
    except FileNotFoundError as error:
        problem = "is a symbolic link to a file that does not exist" if os.path.islink(path) else "does not exist"
        raise ImageError(f"{path} {problem}; check the path") from error
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENXIO:
            raise ImageError(f"{path} is not a regular file; name an image file") from error
        raise ImageError(f"{path} cannot be opened ({error}); check the path and its permissions") from error


def _from_text(text: str, allow_private: bool, timeout: float | None) -> Image.Image:
    """Reads a string that is not an existing path: a URL, a data: URL, base64, or a mistake."""
    start = text if len(text) <= 100 else f"{text[:60]}..."
    scheme = text[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return _decode(io.BytesIO(fetch(text, allow_private=allow_private, timeout=timeout)), text)
    is_data = scheme.startswith("data:")
    if "://" in text and not is_data:
        raise ImageError(f"{start} cannot be fetched; give an http:// or https:// URL or a path")
    mistake = f"{start!r} is neither an existing file nor a URL nor an image in base64; check the path"
    header, _, payload = text.partition(",") if is_data else (";base64", "", text)
    try:
        data = urllib.parse.unquote_to_bytes(payload) if is_data else payload.encode()
        if header.endswith(";base64"):
            data = b"".join(data.split())
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        raise ImageError(mistake) from error
    if not data:
        raise ImageError(mistake)
    return _decode(io.BytesIO(data), f"the text {start!r}", unknown=mistake)


def _decode(stream: BinaryIO, name: str, unknown: str = "") -> Image.Image:
    """Decodes an image file; `unknown` replaces the message for an unknown format."""
    size = stream.seek(0, io.SEEK_END)
    if size == 0:
        raise ImageError(f"{name} is empty (0 bytes); save or download it again")
    if size > MAX_FILE_BYTES:
        raise ImageError(f"{name} has {size} bytes, more than {MAX_FILE_BYTES}; scale it down and save it again")
    try:
        return _to_rgb(open_image(stream), name, owned=True)
    except ImageError:
        raise
    except FormatError as error:
        raise ImageError(f"{name} {error}") from error
    except UnidentifiedImageError as error:
        unknown = unknown or f"{name} is not an image in a known format; save it as JPEG or PNG"
        raise ImageError(unknown) from error
    except Exception as error:
        raise _unreadable(error, name) from error


def _is_ready(image: Image.Image) -> bool:
    return image.mode == "RGB" and 0 not in image.size and not image.has_transparency_data and upright(image) is image


def _to_rgb(image: Image.Image, name: str, owned: bool = False) -> Image.Image:
    """The image as upright RGB without metadata, so that loading it again does not rotate it again.

    If nobody else has the image (`owned`), its pixels are not copied where they can stay as they are.
    """
    try:
        image.load()
        if 0 in image.size:
            raise ImageError(f"{name} has no pixels (size {image.size}); give an image of at least 1 x 1")
        image = upright(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return _scale(image, {"I": (255, 65535), "F": (1, 255)}.get(image.mode, (65535,)), name)
        if image.has_transparency_data:
            image = _convert(image, _on_white)
        elif image.mode != "RGB" or not owned:
            image = image.convert("RGB")
        elif type(image) is not Image.Image:  # an image of a file, which would read the file's metadata again
            image = Image.Image()._new(image.im)
        image.info = {}
        return image
    except ImageError:
        raise
    except Exception as error:
        raise _unreadable(error, name) from error


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The first row and the pixels of each horizontal strip. Converting one at a time needs little memory."""
    rows = max(STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _convert(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The RGB image of converted strips."""
    result = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        result.paste(convert(strip), (0, top))
    return result


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _scale(image: Image.Image, ceilings: tuple[int, ...], name: str) -> Image.Image:
    """RGB of an integer or float image."""
    extremes = [(values.min(), values.max()) for values in (np.asarray(strip) for _, strip in _strips(image))]
    low, high = (float(extreme) for extreme in (np.min(extremes), np.max(extremes)))
    ceiling = _ceiling(low, high, ceilings, image.mode == "F", name)
    return _convert(image, lambda strip: Image.fromarray(_eight_bits(np.asarray(strip), ceiling)).convert("RGB"))


def _unreadable(error: Exception, name: str) -> ImageError:
    """An `ImageError` for an error of any type that a Pillow decoder raised on a damaged file."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return ImageError(f"{name} has far too many pixels to decode safely; scale it down and save it again")
    if isinstance(error, MemoryError):
        return ImageError(f"{name} needs more memory than is available; scale it down and save it again")
    problem = "truncated" if "truncated" in str(error).lower() else "damaged or incomplete"
    return ImageError(f"{name} is {problem}: {error}; save or download it again")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.size == 0:
        raise ImageError(f"{name} has no pixels; give an image of at least 1 x 1")
    if array.ndim not in (2, 3):
        raise ImageError(f"{name} is not one image; give (H, W), (H, W, C) or (C, H, W), one image at a time")
    if array.ndim == 3:
        first, last = array.shape[0] in _CHANNELS, array.shape[2] in _CHANNELS
        if first == last:
            problem = "could be (H, W, C) or (C, H, W)" if first else "has no axis of 1 to 4 channels"
            raise ImageError(f"{name} {problem}; give a PIL image or an (H, W, C) array with C from 1 to 4")
        array = np.moveaxis(array, 0, -1) if first else array  # (H, W, C)
        array = array[..., 0] if array.shape[2] == 1 else array
    if array.dtype.kind == "f" or array.dtype == np.uint16:
        fractions = array.dtype.kind == "f"
        ceiling = _ceiling(float(array.min()), float(array.max()), (1,) if fractions else (65535,), fractions, name)
        rows = max(STRIP_PIXELS // max(array[0].size, 1), 1)
        array = np.concatenate([_eight_bits(array[top : top + rows], ceiling) for top in range(0, len(array), rows)])
    elif array.dtype != np.uint8:
        raise ImageError(f"{name} has an unclear range; convert it to uint8 in [0, 255] or float in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(array))


def _ceiling(low: float, high: float, ceilings: tuple[int, ...], fractions: bool, name: str) -> int:
    """The smallest of `ceilings` that covers values from `low` to `high`. Floats may exceed it by 0.1 %."""
    for ceiling in ceilings:
        slack = ceiling / 1000 if fractions else 0
        if -slack <= low and high <= ceiling + slack:
            return ceiling
    raise ImageError(
        f"{name} has values from {low:g} to {high:g}, outside [0, {ceilings[-1]}]; undo any normalisation, or convert it to uint8"
    )


def _eight_bits(values: np.ndarray, ceiling: int) -> np.ndarray:
    """Values from 0 to `ceiling` as uint8."""
    return np.round(values.astype(np.float64) * (255 / ceiling)).clip(0, 255).astype(np.uint8)


__all__ = ["ImageError", "is_tensor", "load_image"]
