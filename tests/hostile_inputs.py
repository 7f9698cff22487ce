"""Pictures and paths that are made to harm the program that reads them: what they are, what happens, memory and time.

`python -m tests.hostile_inputs` prints the table of docs/inputs.md. With an empty folder and numbers of inputs as its arguments, it
reads these inputs in this process and prints one JSON object per input: source, outcome, peak memory and time.
"""

import http.server
import json
import os
import re
import resource
import signal
import socket
import struct
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from hf_attncap import image_files_attncap
from hf_attncap.images import ImageError, load_image
from tests.odd_pictures import chunk, encode, scene

READ = "is read"
SMALL, LARGE, HUGE = 150, 1600, 3000  # MB
QUICK, SLOW = 5, 60  # seconds
MEMORY = 4 * 2**30  # of the process that reads the inputs
SIDE = 13_377  # of a square image just below the limit of pixels


@dataclass
class Input:
    """One kind of hostile input.

    Attributes:
        make: writes it to a folder and returns the path or URL to read.
        outcome: `READ`, or a pattern of what the message says after the input's name.
        megabytes, seconds: what reading it may take: the time of the processor, for downloads the elapsed time.
        during: is called with the path once the file's header has been read.
        options: of `load_image`.
    """

    name: str
    make: Callable[[Path], str]
    outcome: str
    megabytes: int = SMALL
    seconds: int = QUICK
    during: Callable[[str], Any] | None = None
    options: dict[str, Any] | None = None


def file(content: Callable[[], bytes] | bytes, name: str = "input.jpg") -> Callable[[Path], str]:
    """Writes bytes to a file."""

    def make(folder: Path) -> str:
        (folder / name).write_bytes(content() if callable(content) else content)
        return str(folder / name)

    return make


def sparse(start: bytes, size: int) -> Callable[[Path], str]:
    """A file that has a size, but needs no room on the disk."""

    def make(folder: Path) -> str:
        with open(folder / "input.jpg", "wb") as stream:
            stream.write(start)
            stream.truncate(size)
        return str(folder / "input.jpg")

    return make


def in_folder(action: Callable[[Path], Any]) -> Callable[[Path], str]:
    """Lets an action make something that is not an ordinary file."""

    def make(folder: Path) -> str:
        action(folder / "input.jpg")
        return str(folder / "input.jpg")

    return make


def png(width: int, height: int, colour: int = 2, bits: int = 8, extra: bytes = b"", pixels: bool = True) -> bytes:
    """A black PNG that is much smaller than its pixels."""
    row = bytes(1 + width * {0: 1, 2: 3, 6: 4}[colour] * bits // 8)
    packer = zlib.compressobj(1)
    data = b"".join([*(packer.compress(row) for _ in range(height if pixels else 1)), packer.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def scans(count: int, side: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encode(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * count + data[-2:]


def text_chunks() -> bytes:
    return b"".join(chunk(b"zTXt", b"k%d\0\0" % number + zlib.compress(bytes(2**20))) for number in range(300))


def gif_with_comments() -> bytes:
    data = encode(scene(), "GIF")
    start = 13 + 3 * (2 << (data[10] & 7))
    return data[:start] + b"\x21\xfe" + (b"\xff" + b"a" * 255) * 40_000 + b"\0" + data[start:]


def gif_frame() -> bytes:
    """A canvas of 48 x 32 pixels, and a frame that goes far beyond it."""
    data = bytearray(encode(scene(), "GIF"))
    frame = data.rindex(b"\x2c\0\0\0\0\x30\0\x20\0")
    data[frame + 5 : frame + 9] = b"\xff" * 4
    return bytes(data)


def tiff_tags() -> bytes:
    """60,000 tags, each of which has the whole file of 1 MB as its value."""
    needed = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 1)]
    tags = [(tag, 4, 1, value) for tag, value in needed] + [(tag, 1, 1_000_000, 0) for tag in range(1000, 61_000)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries).ljust(1_000_000, b"\0")


def frames(kind: str, **options: Any) -> Callable[[], bytes]:
    """Many frames of other pixels after the first one."""
    others = [Image.new("RGB", (48, 32), (number % 256, 0, 0)) for number in range(200)]
    return lambda: encode(scene(), kind, save_all=True, append_images=others, **options)


class Server(http.server.BaseHTTPRequestHandler):
    """Answers that never end, come slowly, are compressed or lead elsewhere."""

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        place = {"/private": f"http://127.0.0.1:{port}/picture", "/file": "file:///etc/passwd", "/again": "/again"}.get(self.path)
        self.send_response(302 if place else 200)
        if place:
            self.send_header("Location", place)
        if self.path == "/gzip":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            while self.path in ("/endless", "/drip"):
                self.wfile.write(bytes(2**20) if self.path == "/endless" else b"a")
                time.sleep(0 if self.path == "/endless" else 0.1)
        except OSError:
            return  # the reader hung up
        self.wfile.write(b"" if place else encode(scene(), "PNG"))

    def log_message(self, format: str, *args: Any) -> None:
        pass


def url(path: str) -> Callable[[Path], str]:
    """An address of a server on this machine."""

    def make(folder: Path) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}{path}"

    return make


def slow_handshake(folder: Path) -> str:
    """A server that begins a TLS handshake and sends one byte of it at a time."""
    server = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = server.accept()
        for byte in b"\x16\x03\x03\x40\x00\x02" + bytes(200):
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                return
            time.sleep(0.1)

    threading.Thread(target=drip, daemon=True).start()
    return f"https://127.0.0.1:{server.getsockname()[1]}/a.png"


def shrink(path: str) -> None:
    os.truncate(path, 2000)


OPEN = {"allow_private_urls": True, "timeout": 1.0}
REFUSED = r"is refused: \S+ is \S+, not a public address; set allow_private_urls=True .* if you trust the URL"
UNKNOWN = "is not an image in a known format; save it as JPEG or PNG"
TOO_MANY = "has far too many pixels to decode safely; scale it down and save it again"
BROKEN = r"is (truncated|damaged or incomplete): .*; save or download it again"
LATE = r"could not be fetched \(timed out after 1 s\); check the address and try again"
TOO_LONG = r"has \d+ bytes, more than \d+ in this format; save it as JPEG"
IRREGULAR = "is not a regular file; name an image file"
BMP = b"BM" + bytes(8) + struct.pack("<IIiiHHIIIIII", 54, 40, 2 * 10**9, 2, 1, 24, *[0] * 6)
NOISE = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)

INPUTS = [
    # Decompression bombs.
    Input("PNG of 100,000 x 100,000 declared pixels", file(lambda: png(10**5, 10**5, pixels=False)), TOO_MANY),
    Input("GIF of 65,535 x 65,535 declared pixels", file(gif_frame), TOO_MANY),
    Input("BMP of 2,000,000,000 x 2 declared pixels", file(BMP), TOO_MANY),
    Input("PNG with 300 text chunks of 1 MB in 1 KB each", file(lambda: png(8, 8, extra=text_chunks())), READ),
    Input(
        "PNG with a colour profile that unpacks to 200 MB",
        file(lambda: png(8, 8, extra=chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2 * 10**8))))),
        READ,
    ),
    Input(
        "PNG with 100,000 text chunks",
        file(lambda: png(8, 8, extra=b"".join(chunk(b"tEXt", b"k%d\0x" % n) for n in range(10**5)))),
        READ,
    ),
    Input("GIF with 10 MB of comments", file(gif_with_comments), READ),
    Input("TIFF with 60,000 tags of the whole file each", file(tiff_tags), READ),
    Input(
        "progressive JPEG of 20,000 scans",
        file(lambda: scans(20_000, 100)),
        "is a JPEG of more than 100 scans, which take too long to decode; save it again",
    ),
    Input(
        "PPM of 16 megapixels, which Pillow decodes in Python",
        file(lambda: b"P6 4096 4096 65535\n" + bytes(6 * 2**24)),
        "is a PPM of 4096 x 4096 pixels, which takes too long to decode; save it as JPEG or PNG",
    ),
    # Large images.
    Input("JPEG of 100 megapixels", file(lambda: encode(Image.new("RGB", (10_000, 10_000), "teal"), "JPEG")), READ, LARGE, SLOW),
    Input(
        "progressive JPEG of 100 megapixels",
        file(lambda: encode(Image.new("RGB", (10_000, 10_000), "teal"), "JPEG", progressive=True)),
        READ,
        LARGE,
        SLOW,
    ),
    Input("PNG of 179 megapixels", file(lambda: png(SIDE, SIDE)), READ, LARGE, SLOW),
    Input("transparent PNG of 179 megapixels", file(lambda: png(SIDE, SIDE, 6)), READ, LARGE, SLOW),
    Input("16-bit grey PNG of 179 megapixels", file(lambda: png(SIDE, SIDE, 0, 16)), READ, LARGE, SLOW),
    Input(
        "float TIFF of 179 megapixels",
        file(lambda: encode(Image.new("F", (SIDE, SIDE)), "TIFF", compression="tiff_adobe_deflate")),
        READ,
        LARGE,
        SLOW,
    ),
    Input("GIF of 179 megapixels", file(lambda: encode(Image.new("P", (SIDE, SIDE)), "GIF")), READ, LARGE, SLOW),
    Input("WebP of 179 megapixels", file(lambda: encode(Image.new("RGB", (SIDE, SIDE)), "WEBP", method=0)), READ, HUGE, SLOW),
    Input("JPEG 2000 of 49 megapixels", file(lambda: encode(Image.new("RGB", (7000, 7000)), "JPEG2000")), READ, HUGE, SLOW),
    Input("AVIF of 100 megapixels", file(lambda: encode(Image.new("RGB", (10_000, 10_000)), "AVIF", speed=10)), READ, LARGE, SLOW),
    # Lying and broken files.
    Input("PNG that ends in the middle", file(lambda: encode(Image.fromarray(NOISE), "PNG")[:100_000]), BROKEN),
    Input("JPEG that ends in the middle", file(lambda: encode(Image.fromarray(NOISE), "JPEG")[:20_000]), BROKEN),
    Input("PNG with the ending .jpg", file(lambda: encode(scene(), "PNG")), READ),
    Input("JPEG followed by a ZIP archive", file(lambda: encode(scene(), "JPEG") + b"PK\3\4" + bytes(1000)), READ),
    Input("text", file(b"a dog runs"), UNKNOWN),
    Input("HTML page", file(b"<!DOCTYPE html><html><body>Not found</body></html>"), UNKNOWN),
    Input("SVG", file(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'), UNKNOWN),
    Input("PDF", file(b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"), UNKNOWN),
    Input("PostScript, a program", file(lambda: encode(scene(), "EPS")), "is PostScript, not an image; save it as JPEG or PNG"),
    Input("MP4 film of 500 MB", sparse(b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", 5 * 10**8), UNKNOWN),
    Input("WebP of 500 MB", sparse(b"RIFF" + struct.pack("<I", 5 * 10**8) + b"WEBPVP8 ", 5 * 10**8), TOO_LONG),
    Input("file of 500 MB of zeros", sparse(b"", 5 * 10**8), UNKNOWN),
    Input(
        "file of 10 TB", sparse(b"BM", 10**13), r"has 10000000000000 bytes, more than 1073741824; scale it down and save it again"
    ),
    Input("empty file", file(b""), r"is empty \(0 bytes\); save or download it again"),
    # Several frames or pages: the first one counts.
    Input("GIF of 201 frames", file(frames("GIF")), READ),
    Input("WebP of 201 frames", file(frames("WEBP", lossless=True)), READ),
    Input("PNG of 201 frames", file(frames("PNG")), READ),
    Input("TIFF of 201 pages", file(frames("TIFF")), READ),
    Input("MPO of 201 pictures", file(frames("MPO")), READ),
    Input("icon of several sizes", file(lambda: encode(scene(256, 256), "ICO")), READ),
    # The file system.
    Input("named pipe that nobody writes to", in_folder(os.mkfifo), IRREGULAR),
    Input("endless device", in_folder(lambda path: path.symlink_to("/dev/zero")), IRREGULAR),
    Input("socket", in_folder(lambda path: socket.socket(socket.AF_UNIX).bind(str(path))), IRREGULAR),
    Input(
        "symbolic link to itself",
        in_folder(lambda path: path.symlink_to(path)),
        r"cannot be opened \(.*Too many levels.*\); check the path and its permissions",
    ),
    Input(
        "symbolic link to nothing",
        in_folder(lambda path: path.symlink_to("nowhere")),
        "is a symbolic link to a file that does not exist; check the path",
    ),
    Input("folder", in_folder(Path.mkdir), "is a directory; name an image file inside it"),
    Input("name with a line break", file(lambda: encode(scene(), "PNG"), "a\nb.png"), READ),
    Input("name that is not UTF-8", file(lambda: encode(scene(), "PNG"), os.fsdecode(b"caf\xe9.png")), READ),
    Input("file that shrinks while it is read", file(lambda: encode(Image.fromarray(NOISE), "BMP")), BROKEN, during=shrink),
    Input("file that is removed while it is read", file(lambda: encode(scene(), "PNG")), READ, during=os.remove),
    # Addresses.
    Input("URL of this machine", url("/picture"), REFUSED),
    Input("URL of the local network", lambda folder: "http://192.168.0.1/a.png", REFUSED),
    Input("URL of a cloud's metadata", lambda folder: "http://169.254.169.254/latest/meta-data/", REFUSED),
    Input("IPv6 form of this machine", lambda folder: "http://[::ffff:127.0.0.1]/a.png", REFUSED),
    Input(
        "URL of another scheme", lambda folder: "file:///etc/passwd", "cannot be fetched; give an http:// or https:// URL or a path"
    ),
    Input(
        "redirect to a file",
        url("/file"),
        r"\(redirected to file:///etc/passwd\) cannot be fetched; give an http:// or https:// URL with a host",
        options=OPEN,
    ),
    Input("redirect without end", url("/again"), "redirects more than 5 times; give the final address", options=OPEN),
    Input(
        "body without end",
        url("/endless"),
        "is larger than 67108864 bytes; download it and give its path",
        200,
        options={**OPEN, "timeout": 5.0},
    ),
    Input("body of one byte per 0.1 s", url("/drip"), LATE, options=OPEN),
    Input("TLS handshake of one byte per 0.1 s", slow_handshake, LATE, options=OPEN),
    Input(
        "body compressed with gzip",
        url("/gzip"),
        "was sent with the compression 'gzip', which was not asked for; download it",
        options=OPEN,
    ),
]


def table() -> str:
    """The table of docs/inputs.md."""
    rows = ["| input | what happens | memory, at most | time, at most |", "|---|---|---|---|"]
    for item in INPUTS:
        outcome = re.sub(r"\\(.)", r"\1", re.sub(r"\\[Sd]\+|\.\*", "...", item.outcome))
        message = "the first picture is read" if item.outcome == READ else f'"... {outcome.replace("|", " or ")}"'
        rows.append(f"| {item.name} | {message} | {item.megabytes} MB | {item.seconds} s |")
    return "\n".join(rows) + "\n"


def measure(item: Input, folder: Path) -> dict[str, Any]:
    """Reads an input: its source, outcome, peak memory in MB and seconds."""
    folder.mkdir()
    source = item.make(folder)
    opened = Image.open

    def open_and_disturb(*args: Any, **options: Any) -> Image.Image:
        image = opened(*args, **options)
        if item.during:
            item.during(source)
        return image

    Path("/proc/self/clear_refs").write_text("5")  # the peak of the memory starts again
    clock = time.monotonic if item.options else time.process_time  # downloads wait
    before, start = memory("VmRSS"), clock()
    signal.alarm(6 * item.seconds)  # ends this process
    try:
        with mock.patch.object(image_files_attncap.Image, "open", open_and_disturb):
            load_image(source, **(item.options or {}))
        outcome = READ
    except ImageError as error:
        outcome = str(error)
    signal.alarm(0)
    seconds = clock() - start
    return {"name": item.name, "source": source, "outcome": outcome, "megabytes": memory("VmHWM") - before, "seconds": seconds}


def memory(name: str) -> float:
    """A figure of /proc/self/status, in MB."""
    return int(re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1000


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(table(), end="")
        raise SystemExit
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number in map(int, sys.argv[2:]):
        print(json.dumps(measure(INPUTS[number], Path(sys.argv[1]) / str(number))), flush=True)
