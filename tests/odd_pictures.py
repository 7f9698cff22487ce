"""Damaged and unusual image files, and files with valid pixels and damaged metadata, by a name that describes the defect."""

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION, EXIF_POINTER, RATIONAL = 0x0112, 0x8769, 0x011A
# (name, field type, count, value field) of an orientation tag that says "6" in a way of its own, or nonsense.
ORIENTATIONS = [
    ("as bytes", 1, 4, b"\6\0\0\0"),
    ("as text", 2, 4, b"six\0"),
    ("0", 3, 1, b"\0\0\0\0"),
    ("9", 3, 1, b"\x09\0\0\0"),
    ("huge", 4, 1, b"\xff\xff\xff\xff"),
    ("undefined bytes", 7, 4, b"\6\6\6\6"),
    ("float", 11, 1, struct.pack("<f", 6.5)),
    ("float that is not a number", 11, 1, struct.pack("<f", float("nan"))),
    ("of an unknown type", 99, 1, b"\6\0\0\0"),
    ("without a value", 3, 0, b"\0\0\0\0"),
    ("beyond the end", 5, 1, b"\xff\xff\0\0"),
]


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """An image that changes under each rotation and reflection: a red corner on a grey ramp."""
    ramp = np.linspace(0, 200, width * height).reshape(height, width, 1).repeat(3, axis=2).astype(np.uint8)
    ramp[: height // 2, : width // 2] = (255, 0, 0)
    return Image.fromarray(ramp)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def directory(*tags: tuple[int, int, int, bytes], after: bytes = b"\0\0\0\0") -> bytes:
    """A little-endian TIFF block with one directory of tags (tag, field type, count, value field)."""
    entries = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + after


def exif_blocks() -> Iterator[tuple[str, bytes]]:
    """EXIF blocks without their "Exif" mark, none of which rotates the image."""
    for name, kind, count, value in ORIENTATIONS:
        yield f"orientation {name}", directory((ORIENTATION, kind, count, value))
    whole = directory((RATIONAL, 5, 1, struct.pack("<I", 26)), after=b"\0\0\0\0" + struct.pack("<II", 72, 0))
    yield "ratio over 0", whole
    for length in (2, 6, 9, 15, 20):
        yield f"cut off after {length} bytes", whole[:length]
    yield "wrong TIFF header", b"XX" + whole[2:]
    yield "wrong version of TIFF", whole[:2] + b"\x63\0" + whole[4:]
    yield "directory beyond the end", b"II*\0\xff\xff\xff\x7f"
    yield "directory in itself", directory((EXIF_POINTER, 4, 1, b"\x08\0\0\0"), after=b"\x08\0\0\0")
    yield "65535 tags", b"II*\0\x08\0\0\0\xff\xff"
    yield "nothing", b""
    yield "noise", bytes(range(256))


def chunk(kind: bytes, body: bytes, wrong_sum: bool = False) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ wrong_sum)


def png_with(extra: bytes) -> bytes:
    data = encode(scene(), "PNG")
    return data[:33] + extra + data[33:]  # behind the signature and IHDR


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    data = encode(scene(), "JPEG", quality=95)
    extra = b"".join(bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments)
    return data[:2] + extra + data[2:]


def webp_with(kind: bytes, body: bytes, flag: int) -> bytes:
    """A lossless WebP with one more chunk and its flag in the header."""
    frame = encode(scene(), "WEBP", lossless=True)[12:]
    size = struct.pack("<I", scene().width - 1)[:3] + struct.pack("<I", scene().height - 1)[:3]
    parts = b"VP8X" + struct.pack("<I", 10) + bytes([flag, 0, 0, 0]) + size + frame
    parts += kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    return b"RIFF" + struct.pack("<I", len(parts) + 4) + b"WEBP" + parts


def tiff_with(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """An uncompressed RGB TIFF with one more, odd tag."""
    picture = scene()
    pixels = picture.tobytes()

    def long(number: int) -> bytes:
        return struct.pack("<I", number)

    tags = [(256, picture.width), (257, picture.height), (259, 1), (262, 2), (277, 3), (278, picture.height), (279, len(pixels))]
    entries = [(number, 4, 1, long(content)) for number, content in tags]
    ends = 8 + 2 + 12 * (len(entries) + 3) + 4
    entries += [(258, 3, 3, long(ends)), (273, 4, 1, long(ends + 6)), (tag, kind, count, value)]
    return directory(*sorted(entries), after=b"\0\0\0\0" + struct.pack("<HHH", 8, 8, 8) + pixels)


def odd_metadata() -> Iterator[tuple[str, bytes]]:
    """Valid images of `scene`, each with one defect in its metadata."""
    for name, block in exif_blocks():
        yield f"JPEG exif {name}", jpeg_with((0xE1, b"Exif\0\0" + block))
        yield f"PNG exif {name}", png_with(chunk(b"eXIf", block))
        yield f"WEBP exif {name}", webp_with(b"EXIF", block, 0x08)
    bodies = {
        "iCCP": (b"", b"p\0\0not deflated", b"p\0\x07" + zlib.compress(b"x"), b"p\0\0" + zlib.compress(bytes(2**21))),
        "tEXt": (b"", b"no separator", b"a\0" + b"\xff" * 9),
        "zTXt": (b"", b"k\0\0not deflated", b"k\0\x09x", b"k\0\0" + zlib.compress(bytes(2**21)), b"key"),
        "iTXt": (b"", b"k\0\1\0\0\0not", b"k\0\1\x09\0\0x", b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta", b"k\0\0\0\xff\0\xff\0\xff"),
        "pHYs": (b"", b"\0" * 3),
        "gAMA": (b"", b"\0"),
        "cHRM": (b"", b"\0" * 7),
        "sRGB": (b"", b"\xff\xff"),
        "sBIT": (b"",),
        "tIME": (b"",),
        "acTL": (b"", b"\0" * 8, b"\xff" * 8),
        "fcTL": (b"", b"\0" * 26),
        "zZzz": (b"x",),
    }  # fmt: skip
    for kind, contents in bodies.items():
        for number, body in enumerate(contents):
            yield f"PNG {kind} {number}", png_with(chunk(kind.encode(), body))
        yield f"PNG {kind} with a wrong check sum", png_with(chunk(kind.encode(), contents[0], wrong_sum=True))
    yield "PNG raw exif profile", png_with(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nxyz\n"))
    photoshop = b"Photoshop 3.0\0"
    segments = {
        "multi-picture format": [(0xE2, b"MPF\0" + directory((0xB000, 7, 4, b"0100"), (0xB001, 4, 1, b"\xff\xff\xff\xff")))],
        "multi-picture format of noise": [(0xE2, b"MPF\0noise")],
        "multi-picture format cut": [(0xE2, b"MPF\0II*\0\x08\0\0\0\x05\0")],
        "profile": [(0xE2, b"ICC_PROFILE\0\1\1garbage")],
        "profile without its parts": [(0xE2, b"ICC_PROFILE\0\1\5garbage")],
        "profile without numbers": [(0xE2, b"ICC_PROFILE\0")],
        "photoshop": [(0xED, photoshop + b"8BIM\3\xed\0\0\0\0\0\xff")],
        "photoshop cut": [(0xED, photoshop + b"8BIM")],
        "photoshop of noise": [(0xED, photoshop + b"8BIM\4\4\xff")],
        "JFIF cut": [(0xE0, b"JFIF")],
        "JFIF of one byte": [(0xE0, b"JFIF\0\1")],
        "Adobe cut": [(0xEE, b"Adobe")],
        "XMP": [(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation=\"9\"")],
        "XMP of noise": [(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe\0")],
        "comment": [(0xFE, b"\xff\0\xff")],
        "empty segments": [(marker, b"") for marker in range(0xE0, 0xF0)],
    }  # fmt: skip
    for name, parts in segments.items():
        yield f"JPEG {name}", jpeg_with(*parts)
    yield "WEBP profile", webp_with(b"ICCP", b"garbage", 0x20)
    yield "WEBP XMP", webp_with(b"XMP ", b"\xff<x:", 0x04)
    for name, kind, count, value in ORIENTATIONS:
        yield f"TIFF orientation {name}", tiff_with(ORIENTATION, kind, count, value)
    for name, tag, kind, count, value in [
        ("XMP of noise", 700, 1, 4, b"\xff\xff<x"),
        ("XMP beyond the end", 700, 1, 900, b"\xff\xff\xff\x7f"),
        ("profile", 34675, 7, 4, b"junk"),
        ("profile beyond the end", 34675, 7, 900, b"\xff\xff\xff\x7f"),
        ("resolution over 0", 282, 5, 1, b"\x08\0\0\0"),
        ("resolution beyond the end", 282, 5, 1, b"\xff\xff\xff\x7f"),
        ("description of noise", 270, 2, 4, b"\xff\xfe\0\xff"),
        ("unit as text", 296, 2, 4, b"in\0\0"),
        ("EXIF directory beyond the end", EXIF_POINTER, 4, 1, b"\xff\xff\xff\x7f"),
        ("GPS directory in itself", 34853, 4, 1, b"\x08\0\0\0"),
        ("private tag of an unknown type", 50000, 99, 9, b"abcd"),
        ("private tag beyond the end", 50000, 7, 2**31 - 1, b"\xff\xff\xff\x7f"),
    ]:
        yield f"TIFF {name}", tiff_with(tag, kind, count, value)


def odd_contents() -> Iterator[tuple[str, bytes]]:
    """File names and contents: every format and mode of Pillow, valid, truncated and damaged; and files that are no images."""
    picture = scene()
    grey = np.linspace(0, 65535, 48 * 32).reshape(32, 48)
    images = {mode: picture.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F")}
    images |= {
        "LAB": Image.new("LAB", (48, 32)),
        "PA": picture.convert("LA").convert("PA"),
        "I;16": Image.fromarray(grey.astype(np.uint16)),
    }
    Image.init()
    for kind in sorted(Image.SAVE):
        for mode, image in images.items():
            with contextlib.suppress(Exception):  # most formats take few modes
                yield f"{kind}-{mode.replace(';', '')}.{kind.lower()}", encode(image, kind)
    clear = images["P"].copy()
    clear.info["transparency"] = 0
    frames = {"save_all": True, "append_images": [picture.transpose(Image.Transpose.ROTATE_180), Image.new("RGB", (48, 32))]}
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "MPO", "ICO", "TGA", "PPM"):
        if kind not in Image.SAVE:
            continue
        data = encode(picture, kind)
        with contextlib.suppress(Exception):
            yield f"frames-{kind}.img", encode(picture, kind, **frames)
        with contextlib.suppress(Exception):
            yield f"palette with transparency-{kind}.img", encode(clear, kind, transparency=0)
        for share in (0.02, 0.2, 0.5, 0.8, 0.98):
            yield f"cut at {share}-{kind}.img", data[: int(share * len(data))]
        for number in range(4):
            wrong = bytearray(data)
            for place in random.integers(0, len(data) if number % 2 else min(len(data), 100), 3):
                wrong[place] ^= int(random.integers(1, 256))
            yield f"flipped {number}-{kind}.img", bytes(wrong)
    yield "a png.jpg", encode(picture, "PNG")
    yield "no ending", encode(picture, "JPEG")
    yield "text.jpg", b"a dog runs"
    yield "page.png", b"<!DOCTYPE html><html></html>"
    yield "vector.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    yield "film.mp4", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(200)
    yield "empty.jpg", b""
    yield "zeros.jpg", bytes(1000)
    for size in ((1, 1), (1, 50_000), (50_000, 1), (3, 3)):
        yield f"{size[0]} by {size[1]}.png", encode(Image.new("RGB", size, "teal"), "PNG")
    for name in (
        "two  spaces",
        "[set] 1",
        "*",
        "line\nbreak",
        "tab\t",
        "-dash",
        "--model",
        "ümlaut",
        "a'b\"c",
        "%41",
        os.fsdecode(b"caf\xe9"),
    ):
        yield f"{name}.png", encode(picture, "PNG")


def write_odd_files(folder: Path, metadata: int = 1) -> list[str]:
    """Writes `odd_contents`, every `metadata`-th picture of `odd_metadata` and what is no file; gives all paths."""
    folder.mkdir()
    files = dict(odd_contents())
    files |= {f"{name}.img": data for name, data in list(odd_metadata())[::metadata]}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "link.jpg").symlink_to(folder / "a png.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "secret.png").write_bytes(files["a png.jpg"])
    (folder / "secret.png").chmod(0)
    return [*sorted(map(str, folder.iterdir())), str(folder / "missing.jpg")]
