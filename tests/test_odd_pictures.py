"""Images with valid pixels and damaged metadata are captioned by the captioner and the pipeline."""

import base64
import functools
import http.server
import io
import os
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from odd_pictures import chunk, directory, encode, jpeg_with, odd_metadata, png_with, scene, write_odd_files
from PIL import Image
from transformers import pipeline

from hf_attncap import Captioner
from hf_attncap.cli import main
from hf_attncap.images import ImageError, load_image

ODD = dict(odd_metadata())
FEW = [
    "JPEG exif wrong TIFF header",
    "JPEG exif ratio over 0",
    "JPEG exif cut off after 6 bytes",
    "PNG exif noise",
    "WEBP exif noise",
]
FEW += ["JPEG profile without numbers", "PNG iCCP 3", "TIFF orientation beyond the end"]


def same_pixels(image: Image.Image, name: str) -> bool:
    kind = name.split()[0]
    expected = Image.open(io.BytesIO(encode(scene(), "JPEG", quality=95))) if kind == "JPEG" else scene()
    return image.size == expected.size and np.array_equal(np.asarray(image), np.asarray(expected))


def outcome(source, name: str) -> str:
    try:
        return "sound" if same_pixels(load_image(source), name) else f"{name}: other pixels"
    except ImageError as error:
        return f"{name}: {error}"


@pytest.mark.filterwarnings("ignore")
def test_images_with_broken_metadata_are_read():
    assert len(ODD) > 150
    assert {outcome(data, name) for name, data in ODD.items()} == {"sound"}


@pytest.mark.filterwarnings("ignore")
def test_open_images_with_broken_exif_are_read():
    opened = {name: Image.open(io.BytesIO(data)) for name, data in ODD.items() if " exif " in name}
    assert {outcome(image, name) for name, image in opened.items()} == {"sound"}


@pytest.mark.filterwarnings("ignore")
def test_captioner_reads_images_with_broken_metadata(tiny_checkpoint):
    captioner = Captioner.from_pretrained(tiny_checkpoint)
    results = captioner.caption([load_image(ODD[name]) for name in FEW])
    assert all(same_pixels(result.image, name) for name, result in zip(FEW, results))


@pytest.mark.filterwarnings("ignore")
def test_pipeline_reads_images_with_broken_metadata(tiny_checkpoint, tmp_path):
    captions = pipeline("image-captioning", model=str(tiny_checkpoint), device="cpu")
    files = [tmp_path / f"{number}.img" for number in range(len(FEW))]
    for file, name in zip(files, FEW):
        file.write_bytes(ODD[name])
    texts = [base64.b64encode(ODD[name]).decode() for name in FEW]
    opened = [Image.open(file) for file, name in zip(files, FEW) if " exif " in name]
    sound = captions([scene(), Image.open(io.BytesIO(encode(scene(), "JPEG", quality=95)))])
    for sources in (files, list(map(str, files)), texts, [f"data:image/png;base64,{text}" for text in texts], opened):
        for name, found in zip(FEW, captions(sources), strict=sources is not opened):
            assert found == sound[name.startswith("JPEG")], name


def test_pipeline_reads_urls_with_broken_metadata(tiny_checkpoint, tmp_path):
    (tmp_path / "a.jpg").write_bytes(ODD[FEW[0]])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        captions = pipeline("image-captioning", model=str(tiny_checkpoint), device="cpu")
        url = f"http://127.0.0.1:{server.server_port}"
        found = captions(f"{url}/a.jpg", timeout=20, allow_private_urls=True)
        assert found == captions(str(tmp_path / "a.jpg"))
        with pytest.raises(ImageError, match="missing.jpg answered 404"):
            captions(f"{url}/missing.jpg", allow_private_urls=True)
        with pytest.raises(ImageError, match="a.jpg is refused: 127.0.0.1 is 127.0.0.1, not a public address"):
            captions(f"{url}/a.jpg")
        server.shutdown()


def test_valid_orientation_is_applied_despite_a_broken_profile():
    sideways = directory((0x0112, 3, 1, b"\6\0\0\0"))
    turned = [
        jpeg_with((0xE1, b"Exif\0\0" + sideways), (0xE2, b"ICC_PROFILE\0")),
        png_with(chunk(b"eXIf", sideways) + chunk(b"iCCP", b"")),
    ]
    for data in turned:
        assert load_image(data).size == scene().size[::-1]


def test_transparency_becomes_white_despite_a_broken_chunk():
    data = encode(Image.new("L", (4, 4)), "PNG", transparency=0)
    assert load_image(data[:33] + chunk(b"gAMA", b"") + data[33:]).getpixel((0, 0)) == (255, 255, 255)


def test_damaged_image_with_broken_metadata_is_refused():
    data = jpeg_with((0xE2, b"ICC_PROFILE\0"))
    with pytest.raises(ImageError, match="the bytes object of length"):
        load_image(data[: len(data) // 2])


def heic(**options) -> bytes:
    pytest.importorskip("pillow_heif", reason="the extra heic is not installed").register_heif_opener()
    return encode(scene(64, 48), "HEIF", quality=95, **options)


def test_heic_is_read_and_rotated_once(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright, turned = heic(), heic(exif=exif.tobytes())
    monkeypatch.setattr(Image, "OPEN", {kind: opener for kind, opener in Image.OPEN.items() if kind not in ("HEIF", "AVIF")})
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind not in ("HEIF", "AVIF")])
    image = load_image(upright)
    assert image.size == (64, 48)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(scene(64, 48))).mean() < 8
    assert load_image(turned).size == (48, 64)


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_error_of_heic_names_the_missing_package(monkeypatch, brand):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind not in ("HEIF", "AVIF")])
    data = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(100)
    with pytest.raises(ImageError, match=r'is HEIC, which needs pillow-heif: pip install "hf_attncap\[heic\]"'):
        load_image(data)


def test_video_is_not_read_as_heic(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="is not an image in a known format"):
        load_image(b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(100))


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 3), (1, 100_000), (100_000, 1)])
def test_extreme_shapes_are_captioned_and_plotted(tiny_checkpoint, tmp_path, size):
    result = Captioner.from_pretrained(tiny_checkpoint).caption(Image.new("RGB", size, "teal"))
    assert result.image.size == size
    result.plot_attention(tmp_path / "strip.png")
    drawn = Image.open(tmp_path / "strip.png").size
    assert min(drawn) > 100 and max(drawn) < 10_000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes, pipes")
def test_every_unusual_file_is_captioned_or_reported(tiny_checkpoint, tmp_path, capfdbinary):
    files = write_odd_files(tmp_path / "odd", metadata=8)
    assert len(files) > 200
    assert main(["caption", "--model", str(tiny_checkpoint), *files]) == 1
    captioned, named = accounts(*capfdbinary.readouterr())
    assert {one_line(file) for file in files} == captioned | named and not captioned & named
    assert len(captioned) > 100 and len(named) > 40
    whole = [file for file in files if not re.search(r"cut at|flipped|EPS|\.(svg|mp4|pdf)$", file)]
    refused = {Path(file).name for file in whole if one_line(file) in named}
    assert refused >= {"folder.jpg", "dangling.jpg", "loop.jpg", "pipe.jpg", "missing.jpg", "text.jpg", "empty.jpg"}
    assert not [name for name in refused - {"page.png"} if "exif" in name or "by" in name or "png" in name]


def one_line(file: str) -> bytes:
    return os.fsencode(file).replace(b"\n", b"\\n").replace(b"\t", b"\\t")


def accounts(out: bytes, err: bytes) -> tuple[set[bytes], set[bytes]]:
    """The files that have a caption, and those that are named on stderr, as they are printed there."""
    captioned = {line.split(b"\t")[0] for line in out.splitlines()}
    # stderr shows the bytes of no encoding as \udce9, and a path in quotes with its backslashes doubled
    lines = [line.replace(b"\\udce9", b"\xe9").replace(b"\\\\", b"\\") for line in err.splitlines()]
    named = [re.match(rb"attncap: (?:b?['\"])?(/.*?/odd/.*?)(?:['\"])?(?: is | has | cannot | does )", line) for line in lines]
    assert all(named), [line for line, found in zip(lines, named) if not found]
    assert all(line.split(b"\t")[1].strip() for line in out.splitlines())
    return captioned, {found[1] for found in named if found}
