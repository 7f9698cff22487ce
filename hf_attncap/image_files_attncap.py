"""Decodes image files and applies their EXIF orientation; damaged metadata is ignored."""

import io
import re
import struct
import zlib
from typing import BinaryIO

from PIL import ExifTags, Image, UnidentifiedImageError

# By EXIF orientation. ImageOps.exif_transpose also rewrites the EXIF block, and fails if another tag is malformed.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The tags that a TIFF decoder needs to read the pixels. Orientation is kept only if its type is valid.
TIFF_TAGS = {*range(254, 260), 262, 263, 266, *range(273, 285), 292, 293, 297, 301, 317, 318, 319, *range(320, 326), 332, 338, 339}
TIFF_TAGS |= {347, *range(512, 522), *range(529, 533)}
TIFF_ORIENTATION, TIFF_SHORT = 274, 3
MAX_PIXELS = 2 * 89_478_485  # Pillow's limit, which some programs turn off for their whole process
MAX_SCANS = 100  # of a JPEG, each of which takes as long as a whole image; real files have up to about 20
JPEG_SCAN, JPEG_END = 0xDA, 0xD9
JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # not those within a scan
MAX_SLOW_PIXELS = 2**22  # of formats that Pillow decodes in Python, at about 2 microseconds per pixel
MAX_WHOLE_BYTES = 2**26  # of files that are read as a whole
WHOLE_HEADERS = {b"ftyp" + brand for brand in (*HEIF_BRANDS, b"avif", b"avis")}


class ImageError(ValueError):
    """An image that cannot be read. The message names the source and says what to do."""


class FormatError(ValueError):
    """A file that is not decoded. The message continues the file's name and says what to do."""


def open_image(stream: BinaryIO) -> Image.Image:
    """Decodes the image file in a seekable stream. If that fails, it tries again without the file's metadata.

    Returns:
        The image, or the first frame of an animation, neither rotated nor converted.

    Raises:
        FormatError: PostScript, HEIC without `pillow-heif`, or a file that takes too long to decode.
        PIL.Image.DecompressionBombError: more than `MAX_PIXELS` pixels.
        PIL.UnidentifiedImageError: not an image, or an unknown format.
        Exception: any type, from Pillow's decoders, for damaged files.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    header = stream.read(12)
    if size > MAX_WHOLE_BYTES and (header[8:] == b"WEBP" or header[4:] in WHOLE_HEADERS):
        raise FormatError(f"has {size} bytes, more than {MAX_WHOLE_BYTES} in this format; save it as JPEG")
    try:
        return _loaded(stream)
    except (FormatError, Image.DecompressionBombError):
        raise
    except Exception:
        if size > MAX_WHOLE_BYTES:
            raise
        stream.seek(0)
        data = stream.read()
        stripped = without_metadata(data)
        if stripped != data:
            try:
                return _loaded(io.BytesIO(stripped))
            except Exception:
                pass  # the first error is more informative
        raise


def upright(image: Image.Image) -> Image.Image:
    """The image rotated or flipped by its EXIF orientation; the image itself if that is missing or invalid."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises errors of any type on damaged EXIF
        return image
    transposition = TRANSPOSITIONS.get(orientation) if isinstance(orientation, int) else None
    return image if transposition is None else image.transpose(transposition)


def _loaded(stream: BinaryIO) -> Image.Image:
    stream.seek(0)
    try:
        image = Image.open(stream)
    except UnidentifiedImageError:
        stream.seek(0)
        if not _reads_heif(stream.read(12)):
            raise
        stream.seek(0)
        image = Image.open(stream)
    with image:
        if image.format == "EPS":  # Pillow would run Ghostscript, which executes the file's program
            raise FormatError("is PostScript, not an image; save it as JPEG or PNG")
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        _check_time(image, stream)
        image.load()
        return image


def _check_time(image: Image.Image, stream: BinaryIO) -> None:
    """Raises a FormatError for an image, opened from a stream, that would take long to decode."""
    tiles = getattr(image, "tile", [])
    if image.width * image.height > MAX_SLOW_PIXELS and any(tile[0] in Image.DECODERS for tile in tiles):  # those in Python
        raise FormatError(
            f"is a {image.format} of {image.width} x {image.height} pixels, which takes too long to decode; save it as JPEG or PNG"
        )
    if image.format not in ("JPEG", "MPO"):
        return
    start, scans = stream.tell(), 0
    stream.seek(2)
    while (marker := _next_marker(stream)) != JPEG_END:
        scans += marker == JPEG_SCAN
        if scans > MAX_SCANS:
            raise FormatError(f"is a JPEG of more than {MAX_SCANS} scans, which take too long to decode; save it again")
        stream.seek(int.from_bytes(stream.read(2)) - 2, io.SEEK_CUR)
    stream.seek(start)


def _next_marker(stream: BinaryIO) -> int:
    """Moves a stream of a JPEG behind the next marker that has a length, or behind the end of the image."""
    while block := stream.read(2**16):
        if found := JPEG_MARKER.search(block):
            stream.seek(found.end() - len(block), io.SEEK_CUR)
            return found[1][0]
        if block == b"\xff":
            break
        stream.seek(-block.endswith(b"\xff"), io.SEEK_CUR)
    return JPEG_END


def _reads_heif(header: bytes) -> bool:
    """Whether a file starts like HEIC or HEIF; if so, registers the decoder with Pillow."""
    if header[4:8] != b"ftyp" or header[8:12] not in HEIF_BRANDS:
        return False
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise FormatError('is HEIC, which needs pillow-heif: pip install "hf_attncap[heic]", or save it as JPEG') from error
    register_heif_opener()
    return True


def without_metadata(data: bytes) -> bytes:
    """A PNG, JPEG or TIFF file reduced to what its pixels need, and valid EXIF; other files unchanged."""
    try:
        if data.startswith(PNG_SIGNATURE):
            return _strip_png(data)
        if data.startswith(b"\xff\xd8\xff"):
            return _strip_jpeg(data)
        if data.startswith((b"II*\0", b"MM\0*")):
            return _strip_tiff(data)
    except (struct.error, IndexError):  # truncated inside the metadata
        pass
    return data


def _strip_png(data: bytes) -> bytes:
    kept, place = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        whole = data[place : place + length + 12]
        kind, end = whole[4:8], whole[-4:]
        valid = zlib.crc32(whole[4:-4]).to_bytes(4, "big") == end
        # An upper-case first letter marks a chunk as critical.
        if kind[:1].isupper() or (kind in (b"tRNS", b"eXIf") and valid):
            kept.append(whole)
        place += length + 12
    return b"".join(kept)


def _strip_jpeg(data: bytes) -> bytes:
    kept, place = [data[:2]], 2
    while data[place] == 0xFF and data[place + 1] != 0xDA:  # up to the first scan
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        (length,) = struct.unpack_from(">H", data, place + 2)
        body = data[place + 4 : place + 2 + length]
        # The Adobe segment defines the colour encoding.
        needed = (marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12) or (
            marker == 0xE1 and body.startswith(b"Exif\0\0")
        )
        if needed or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[place : place + 2 + length])
        place += 2 + length
    return b"".join([*kept, data[place:]])


def _strip_tiff(data: bytes) -> bytes:
    order = "<" if data.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    kept = []
    for place in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(f"{order}HH", data, place)
        if tag in TIFF_TAGS and (tag != TIFF_ORIENTATION or kind == TIFF_SHORT):
            kept.append(data[place : place + 12])
    entries = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)  # only the first image
    return data[:start] + entries + data[start + len(entries) :]


__all__ = ["FormatError", "ImageError", "open_image", "upright", "without_metadata"]
