import base64
import http.server
import io
import socket
import subprocess
import sys
import threading
import time
import zlib
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_attncap import urls_attncap as urls
from hf_attncap.images import ImageError, load_image


def scene(width: int = 24, height: int = 16) -> Image.Image:
    """An image that changes under each rotation and reflection: a red corner on a grey ramp."""
    ramp = np.linspace(0, 200, width * height).reshape(height, width, 1).repeat(3, axis=2).astype(np.uint8)
    ramp[: height // 2, : width // 2] = (255, 0, 0)
    return Image.fromarray(ramp)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def close(image: Image.Image, expected: Image.Image, tolerance: int = 0) -> bool:
    assert image.mode == "RGB" and image.size == expected.size
    difference = np.asarray(image).astype(int) - np.asarray(expected.convert("RGB")).astype(int)
    return bool(np.abs(difference).max() <= tolerance)


# ---------------------------------------------------------------------------------------------- sources


def test_all_kinds_of_sources_give_the_same_image(tmp_path):
    data = encode(scene())
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    lines = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    array = np.asarray(scene())
    tensor = torch.from_numpy(array.copy())
    sources = [
        path,
        str(path),
        data,
        bytearray(data),
        memoryview(data),
        scene(),
        Image.open(path),
        text,
        lines,
    ]
    sources += [f"data:image/png;base64,{text}", "DATA:image/png;base64," + text.replace("+", "%2B")]
    sources += ["data:image/png," + "".join(f"%{byte:02x}" for byte in data)]
    sources += [array, array.transpose(2, 0, 1), array / 255, tensor, tensor.permute(2, 0, 1) / 255]
    sources += [tensor.double().requires_grad_() / 255]
    for source in sources:
        assert close(load_image(source), scene()), str(source)[:60]


def test_reads_what_transformers_reads(tmp_path):
    reference = pytest.importorskip("transformers.image_utils").load_image
    data = encode(scene(), "JPEG", quality=90)
    (tmp_path / "photo.jpg").write_bytes(data)
    text = base64.b64encode(data).decode()
    for source in (str(tmp_path / "photo.jpg"), text, f"data:image/jpeg;base64,{text}", scene()):
        assert close(load_image(source), reference(source))


def test_jpeg_base64_that_looks_like_an_absolute_path():
    text = base64.b64encode(encode(scene(), "JPEG")).decode()
    assert text.startswith("/9j/")
    assert load_image(text).size == scene().size


def test_upright_rgb_image_in_memory_is_returned_unchanged():
    source = scene()
    assert load_image(source) is source
    assert load_image(load_image(encode(source))) is not source


@pytest.mark.parametrize("make", [lambda: scene().convert("L"), lambda: Image.open(io.BytesIO(encode(scene())))])
def test_other_pil_images_are_neither_changed_nor_shared(make):
    source = make()
    load_image(source).paste((0, 255, 0), (0, 0, 24, 16))
    assert np.array_equal(np.asarray(source), np.asarray(make()))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_loading_twice_does_not_rotate_twice(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    once = load_image(encode(scene(24, 16), kind, exif=exif))
    assert once.size == (16, 24) and not once.info
    assert load_image(once) is once


# ---------------------------------------------------------------------------------------------- colour modes


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP", "BMP", "GIF"])
def test_greyscale_becomes_three_equal_channels(kind):
    grey = Image.fromarray(np.full((8, 10), 77, np.uint8))
    assert close(load_image(encode(grey, kind)), grey, tolerance=2)


def test_one_bit_images_are_black_and_white():
    bits = Image.new("1", (4, 2))
    bits.putpixel((1, 1), 1)
    result = load_image(encode(bits))
    assert result.getpixel((1, 1)) == (255, 255, 255) and result.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_greyscale_is_scaled_not_clipped(kind):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    result = load_image(encode(Image.fromarray(values), kind))
    assert [result.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]
    assert close(load_image(values), result)


def test_big_endian_sixteen_bit():
    big = Image.frombytes("I;16B", (2, 1), bytes([0x80, 0x80, 0xFF, 0xFF]))
    assert [load_image(big).getpixel((x, 0)) for x in (0, 1)] == [(128,) * 3, (255,) * 3]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 255]], np.int32), 255),
        (np.array([[0, 65535]], np.int32), 255),
        (np.array([[0, 0.5]], np.float32), 128),
        (np.array([[0, 200]], np.float32), 200),
    ],
)
def test_range_of_integer_and_float_images_is_detected(values, expected):
    result = load_image(encode(Image.fromarray(values), "TIFF"))
    assert result.getpixel((0, 0)) == (0, 0, 0)
    assert result.getpixel((1, 0)) == (expected,) * 3


@pytest.mark.parametrize("values", [np.array([[-5, 9]], np.int32), np.array([[0, 1e6]], np.float32)])
def test_integer_and_float_images_out_of_range_are_refused(values):
    with pytest.raises(ImageError, match="the PIL image has values from .*undo any normalisation"):
        load_image(Image.fromarray(values))


def test_palette_without_transparency():
    palette = scene().convert("P", palette=Image.Palette.ADAPTIVE)
    assert close(load_image(encode(palette)), palette)


def half_clear(mode: str) -> Image.Image:
    """Black: the left third opaque, the middle half clear, the right third clear."""
    alpha = np.repeat(np.array([255, 128, 0], np.uint8), 3)[None].repeat(9, axis=0)
    rgba = np.dstack([np.zeros((9, 9, 3), np.uint8), alpha])
    return Image.fromarray(rgba).convert(mode)


@pytest.mark.parametrize(
    "source",
    [
        encode(half_clear("RGBA")),
        encode(half_clear("LA")),
        encode(half_clear("RGBA"), "WEBP", lossless=True, exact=True),
        half_clear("RGBa"),
        np.asarray(half_clear("RGBA")),
        np.asarray(half_clear("LA")),
        np.asarray(half_clear("RGBA")).transpose(2, 0, 1).astype(np.float32) / 255,
    ],
    ids=["png", "png-la", "webp", "premultiplied", "array", "array-la", "chw-float"],
)
def test_transparent_regions_become_white(source):
    result = load_image(source)
    assert [result.getpixel((x, 8)) for x in (0, 4, 8)] == [(0, 0, 0), (127, 127, 127), (255, 255, 255)]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_entry_is_white(kind):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 0), 1)
    result = load_image(encode(image, kind, transparency=0))
    assert [result.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]


@pytest.mark.parametrize(("mode", "clear"), [("RGB", (0, 0, 0)), ("L", 0)])
def test_png_transparent_colour_is_white(mode, clear):
    result = load_image(encode(Image.new(mode, (2, 2)), transparency=clear))
    assert result.getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_jpeg_is_not_a_negative():
    data = encode(scene(48, 32).convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data  # libjpeg marks CMYK so, and the inks are stored inverted
    assert close(load_image(data), scene(48, 32), tolerance=40)


def test_ycck_jpeg_is_not_a_negative():
    # Stored inverted, these inks read as YCC (200, 128, 128): inverted inks of 55 each, and no black.
    data = encode(Image.new("CMYK", (16, 16), (55, 127, 127, 0)), "JPEG", quality=95)
    transform = data.index(b"Adobe") + 11
    ycck = data[:transform] + b"\x02" + data[transform + 1 :]
    assert close(load_image(ycck), Image.new("RGB", (16, 16), (55, 55, 55)), tolerance=3)


# ---------------------------------------------------------------------------------------------- orientation, frames

TURNS = {
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_90],
    6: [Image.Transpose.ROTATE_270],
    7: [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_270],
    8: [Image.Transpose.ROTATE_90],
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_rotation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = scene(48, 32)
    for turn in TURNS[orientation]:
        expected = expected.transpose(turn)
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    data = encode(scene(48, 32), kind, exif=exif, **lossless)
    assert close(load_image(data), expected, tolerance=40 if kind == "JPEG" else 0)
    assert load_image(Image.open(io.BytesIO(data))).size == expected.size


def test_rotation_is_applied_despite_a_malformed_tag():
    orientation = b"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00"
    width_as_text = b"\x1a\x01\x02\x00\x04\x00\x00\x00abc\x00"  # XResolution, a ratio, given as text
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + orientation + width_as_text + b"\0\0\0\0"
    assert load_image(encode(scene(24, 16), "JPEG", exif=exif)).size == (16, 24)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(kind):
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    data = encode(first, kind, save_all=True, append_images=[second])
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert close(load_image(data), first, tolerance=3)


# ---------------------------------------------------------------------------------------------- bad files


def test_missing_file(tmp_path):
    with pytest.raises(ImageError, match=r"nothing\.jpg' is neither an existing file.*check the path"):
        load_image(str(tmp_path / "nothing.jpg"))
    with pytest.raises(ImageError, match=r"nothing\.jpg does not exist; check the path"):
        load_image(tmp_path / "nothing.jpg")


def test_missing_file_whose_name_could_be_base64():
    with pytest.raises(ImageError, match="'photos/cats' is neither an existing file"):
        load_image("photos/cats")


def test_directory(tmp_path):
    for source in (tmp_path, str(tmp_path)):
        with pytest.raises(ImageError, match="is a directory; name an image file inside it"):
            load_image(source)


def test_empty_file_and_empty_bytes(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ImageError, match=r"photo\.jpg is empty \(0 bytes\); save or download it again"):
        load_image(tmp_path / "photo.jpg")
    with pytest.raises(ImageError, match="bytes object of length 0 is empty"):
        load_image(b"")


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_file(tmp_path, kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encode(noise, kind)
    path = tmp_path / "photo.img"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=r"photo\.img is (truncated|damaged or incomplete).*download it again"):
        load_image(path)


def test_truncated_jpeg_is_called_truncated(tmp_path):
    data = encode(scene(200, 200), "JPEG")
    with pytest.raises(ImageError, match="is truncated: .*; save or download it again"):
        load_image(data[: len(data) // 2])
    with pytest.raises(ImageError, match="the text 'data:image.* is truncated"):
        load_image("data:image/jpeg;base64," + base64.b64encode(data[: len(data) // 2]).decode())


def test_file_that_is_not_an_image(tmp_path):
    (tmp_path / "notes.txt").write_text("a dog runs")
    with pytest.raises(ImageError, match=r"notes\.txt is not an image in a known format; save it as JPEG or PNG"):
        load_image(tmp_path / "notes.txt")


@pytest.mark.parametrize("text", ["", "a dog", "data:image/png;base64,", "data:image/png;base64,a*b", "data:", "a\0b", "\udcff"])
def test_text_that_is_not_a_source(text):
    with pytest.raises(ImageError, match="neither an existing file nor a URL"):
        load_image(text)


@pytest.mark.parametrize("source", [None, 3, [scene()], {"path": "x"}])
def test_unknown_type_of_source(source):
    with pytest.raises(ImageError, match=f"read from a {type(source).__name__}; give one path"):
        load_image(source)


def test_postscript_is_never_interpreted():
    with pytest.raises(ImageError, match="is PostScript"):
        load_image(encode(scene(), "EPS"))


def test_absurd_pixel_count():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    size = (100_000).to_bytes(4, "big")
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + size + b"\x08\x02\0\0\0") + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="bytes object .* has far too many pixels.*scale it down"):
        load_image(bomb)


def test_an_image_without_pixels():
    with pytest.raises(ImageError, match=r"the PIL image has no pixels \(size \(0, 5\)\)"):
        load_image(Image.new("RGB", (0, 5)))


@settings(max_examples=150)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_an_image_or_an_image_error(data, kind):
    content = bytearray(encode(scene(), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(len(content) - 1, 120)))] = data.draw(st.integers(0, 255))
    try:
        assert load_image(bytes(content)).mode == "RGB"
    except ImageError as error:
        assert str(error).startswith("the bytes object of length")


# ---------------------------------------------------------------------------------------------- arrays


@settings(max_examples=60)
@given(
    height=st.integers(5, 12),
    width=st.integers(5, 12),
    channels=st.sampled_from([0, 1, 3]),
    first=st.booleans(),
    kind=st.sampled_from(["uint8", "uint16", "float16", "float32", "float64"]),
    tensor=st.booleans(),
    seed=st.integers(0, 9),
)
def test_arrays_keep_their_pixels(height, width, channels, first, kind, tensor, seed):
    shape = (height, width, channels) if channels else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    expected = np.broadcast_to(pixels.reshape(height, width, -1), (height, width, 3))
    scale = {"uint8": 1, "uint16": 257}.get(kind)
    array = pixels.astype(kind) * np.dtype(kind).type(scale) if scale else (pixels / 255).astype(kind)
    array = np.moveaxis(array, -1, 0) if first and channels else array
    source = torch.from_numpy(np.ascontiguousarray(array)) if tensor else array
    assert np.array_equal(np.asarray(load_image(source)), expected)


def test_bfloat16_tensor():
    assert load_image(torch.ones(3, 8, 8, dtype=torch.bfloat16)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((0,), np.float32), "no pixels"),
        (np.zeros((3, 9, 3), np.uint8), r"could be \(H, W, C\) or \(C, H, W\)"),
        (np.zeros((9, 9, 5), np.uint8), "no axis of 1 to 4 channels"),
        (np.zeros((1, 3, 9, 9), np.uint8), "not one image"),
        (np.zeros(9, np.uint8), "not one image"),
        (np.full((9, 9), 255.0), r"values from 255 to 255, outside \[0, 1\]"),
        (np.full((9, 9), -0.5), r"values from -0.5 .*undo any normalisation"),
        (np.full((9, 9), np.nan), "values from nan"),
        (np.full((9, 9), np.inf), "values from inf"),
        (np.zeros((9, 9), np.int64), "unclear range; convert it to uint8"),
        (np.zeros((9, 9), np.complex64), "unclear range"),
        (np.full((9, 9), None), "unclear range"),
    ],
)
def test_bad_arrays(array, problem):
    with pytest.raises(ImageError, match=rf"the array of shape .* {problem}"):
        load_image(array)


def test_bad_tensors():
    with pytest.raises(ImageError, match=r"the array of shape \(3, 0, 8\) and type float32 has no pixels"):
        load_image(torch.zeros(3, 0, 8))
    with pytest.raises(ImageError, match="undo any normalisation"):
        load_image(torch.randn(3, 8, 8))


# ---------------------------------------------------------------------------------------------- URLs


class Pages(http.server.BaseHTTPRequestHandler):
    """A small web of pictures, redirects and faults; `asked` counts what was requested."""

    asked: ClassVar[list[str]] = []
    hosts: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        self.hosts.append(self.headers["Host"])
        picture = encode(scene())
        redirect = {"/moved": "/picture.png?size=1", "/loop": "/loop", "/to-file": "file:///etc/hostname"}
        redirect |= {"/to-other-script": "http://bücher.example/picture.png".encode().decode("latin-1")}
        redirect |= {"/to-private": f"http://127.0.0.1:{self.server.server_port}/picture.png"}  # pyright: ignore
        status, body = 200, picture
        if self.path == "/missing":
            status = 404
        elif self.path in redirect:
            status, body = 302, b""
        elif self.path == "/page":
            body = b"<html>a dog</html>"
        elif self.path == "/empty":
            body = b""
        elif self.path == "/cut":
            body = picture[: len(picture) // 2]
        self.send_response(status)
        if self.path == "/drip-headers":
            self.drip(b"X-Slow: " + b"a" * 100)
        if self.path in redirect:
            self.send_header("Location", redirect[self.path])
        self.send_header("Content-Length", str(len(picture if self.path == "/cut" else body)))
        self.end_headers()
        if self.path == "/drip":
            self.drip(body)
        self.wfile.write(body)

    def drip(self, body: bytes):
        self.flush_headers()
        for byte in body[:40]:
            self.wfile.write(bytes([byte]))
            time.sleep(0.1)

    def log_message(self, format, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass  # the reader hung up, as some tests want


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(Pages, "asked", [])
    monkeypatch.setattr(Pages, "hosts", [])
    with Server(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


PUBLIC = "93.184.216.34"
IN_LETTERS = "xn--bcher-kva.example"  # bücher.example, as DNS has it


@pytest.fixture
def public_site(site, monkeypatch):
    """The same site as http://pictures.example on a public address, with a record of the addresses dialled."""
    port, dialled = int(site.rsplit(":", 1)[1]), []
    resolve, dial = socket.getaddrinfo, socket.create_connection

    def fake_resolve(host, *args, **kwargs):
        return resolve(PUBLIC if host in ("pictures.example", IN_LETTERS) else host, *args, **kwargs)

    def fake_dial(address, timeout):
        dialled.append(address[0])
        assert address == (PUBLIC, 80)
        return dial(("127.0.0.1", port), timeout)

    monkeypatch.setattr(socket, "getaddrinfo", fake_resolve)
    monkeypatch.setattr(urls.socket, "create_connection", fake_dial)
    return dialled


def test_url(site):
    assert close(load_image(f"{site}/picture.png", allow_private_urls=True), scene())
    assert close(load_image(f"{site}/an image ü.png?a=b c#top", allow_private_urls=True), scene())
    assert Pages.asked == ["/picture.png", "/an%20image%20%C3%BC.png?a=b%20c"]


def test_url_redirect_is_followed(site):
    assert close(load_image(f"{site}/moved", allow_private_urls=True), scene())
    assert Pages.asked == ["/moved", "/picture.png?size=1"]


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("missing", "answered 404 Not Found; check the address"),
        ("loop", "redirects more than 5 times"),
        ("page", "is not an image in a known format"),
        ("empty", "is empty"),
        ("cut", "is truncated"),
        ("to-file", r"\(redirected to file:///etc/hostname\) cannot be fetched"),
    ],
)
def test_url_errors_name_the_url(site, page, problem):
    with pytest.raises(ImageError, match=f"{site}/{page} .*{problem}|{site}/{page} {problem}"):
        load_image(f"{site}/{page}", allow_private_urls=True)


def test_url_that_refuses_the_connection():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.png"
        with pytest.raises(ImageError, match=f"{url} could not be fetched .*refused"):
            load_image(url, allow_private_urls=True)


def test_https_requires_a_valid_certificate(site):
    url = site.replace("http:", "https:")
    with pytest.raises(ImageError, match=f"{url}/a.png could not be fetched .*SSL"):
        load_image(f"{url}/a.png", allow_private_urls=True)


def test_url_byte_limit(site, monkeypatch):
    monkeypatch.setattr(urls, "MAX_BYTES", 50)
    with pytest.raises(ImageError, match=r"picture\.png is larger than 50 bytes; download it and give its path"):
        load_image(f"{site}/picture.png", allow_private_urls=True)


@pytest.mark.parametrize("page", ["drip", "drip-headers"])
def test_slow_server_is_disconnected(site, monkeypatch, page):
    monkeypatch.setattr(urls, "TIMEOUT", 0.4)
    start = time.monotonic()
    with pytest.raises(ImageError, match=rf"{page} could not be fetched \(timed out after 0.4 s\)"):
        load_image(f"{site}/{page}", allow_private_urls=True)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("url", ["ftp://example.com/a.png", "file:///etc/hostname", "gopher://x/1", "s3://b/a.png"])
def test_other_schemes_are_refused(url):
    with pytest.raises(ImageError, match=f"{url} cannot be fetched; give an http:// or https:// URL or a path"):
        load_image(url)


@pytest.mark.parametrize("url", ["http://", "http:///a.png", "http://[::1/a.png", "http://h:port/a.png", "http://" + "a" * 70])
def test_malformed_urls(url):
    with pytest.raises(ImageError, match="(cannot|could not) be fetched"):
        load_image(url)


PRIVATE_HOSTS = [
    "127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0.0.0.0", "10.0.0.1", "172.16.9.9",
    "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "[::1]", "[::]",
    "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[::127.0.0.1]", "[fe80::1]", "[fd00::1]", "[fec0::1]", "[ff02::1]",
    "[2002:7f00:1::]", "[2001:0:1::1]", "[64:ff9b::7f00:1]", "[2001:db8::1]",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_private_addresses_are_never_connected_to(host, monkeypatch):
    monkeypatch.setattr(urls.socket, "create_connection", lambda *a, **k: pytest.fail("dialled"))
    with pytest.raises(ImageError, match="is refused: .* not a public address; set allow_private_urls=True"):
        load_image(f"http://{host}/a.png")


@pytest.mark.parametrize("address", ["8.8.8.8", PUBLIC, "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_pass(address):
    assert urls._is_public(address)


def test_private_url_is_refused_by_default(site):
    with pytest.raises(ImageError, match="is refused: 127.0.0.1 is 127.0.0.1, not a public address"):
        load_image(f"{site}/picture.png")
    assert Pages.asked == []


def test_public_url_connects_to_the_checked_address(public_site):
    assert close(load_image("http://pictures.example/moved"), scene())
    assert public_site == [PUBLIC, PUBLIC]


def test_redirect_to_a_private_address_is_refused(public_site):
    with pytest.raises(ImageError, match=r"pictures\.example/to-private \(redirected to http://127.* is refused"):
        load_image("http://pictures.example/to-private")
    assert public_site == [PUBLIC] and Pages.asked == ["/to-private"]


def test_changing_dns_cannot_reach_a_private_address(public_site, monkeypatch):
    answers = iter([PUBLIC, "127.0.0.1", "127.0.0.1"])
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(*entry, (next(answers), 80))])
    # only the first answer is checked and dialled; had the name been resolved again, it would be 127.0.0.1
    monkeypatch.setattr(urls.socket, "create_connection", lambda address, timeout: pytest.fail(address[0]))
    with pytest.raises(pytest.fail.Exception, match=PUBLIC):
        load_image("http://pictures.example/picture.png")


def test_host_with_one_private_address_is_refused(monkeypatch):
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    found = [(*entry, (PUBLIC, 80)), (*entry, ("10.0.0.7", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: found)
    monkeypatch.setattr(urls.socket, "create_connection", lambda *a, **k: pytest.fail("dialled"))
    with pytest.raises(ImageError, match=r"pictures\.example is 10\.0\.0\.7, not a public address"):
        load_image("http://pictures.example/a.png")


@pytest.mark.parametrize(
    "host", ["bücher.example", "BÜCHER.example", "b%C3%BCcher.example", "xn--bcher-kva.example", "bücher。example"]
)
def test_host_names_of_other_scripts(public_site, host):
    assert close(load_image(f"http://{host}/picture.png"), scene())
    assert public_site == [PUBLIC] and Pages.hosts == [IN_LETTERS]


def test_redirect_to_a_host_name_of_another_script(public_site):
    assert close(load_image("http://pictures.example/to-other-script"), scene())
    assert Pages.hosts == ["pictures.example", IN_LETTERS]


def test_host_names_are_encoded_as_browsers_do():
    assert urls._ascii_host("faß.de", "") == "xn--fa-hia.de"
    assert urls._ascii_host("fe80::1%25eth0", "") == "fe80::1%25eth0"


def test_tls_uses_the_encoded_host_name(public_site, monkeypatch):
    names = []
    monkeypatch.setattr(urls.socket, "create_connection", lambda *args, **kwargs: socket.socket())

    class Context:
        def wrap_socket(self, sock, server_hostname, do_handshake_on_connect):
            names.append(server_hostname)
            sock.close()
            raise OSError("no TLS in this test")

    monkeypatch.setattr(urls.ssl, "create_default_context", Context)
    with pytest.raises(ImageError, match=r"https://bücher\.example/a\.png could not be fetched \(no TLS in this test\)"):
        load_image("https://bücher.example/a.png")
    assert names == [IN_LETTERS]


@pytest.mark.parametrize(
    "url", ["http://\udcff/a.png", "http://a℀b.example/a.png", "http://-ü-.example/", f"http://{'ü' * 70}.example/"]
)
def test_invalid_host_names(url):
    with pytest.raises(ImageError, match="(cannot|could not) be fetched"):
        load_image(url)


@settings(max_examples=100)
@given(st.text(max_size=20))
def test_any_text_after_http_raises_an_image_error(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [])
        with pytest.raises(ImageError):
            load_image(f"http://{text}/a.png")


def test_importing_needs_no_torch():
    script = "import hf_attncap.images, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
