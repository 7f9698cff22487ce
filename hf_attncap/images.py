"""Loads images of any source (path, URL, base64, bytes, PIL, array, tensor) as checked, upright RGB images."""

import base64
import contextlib
import http.client
import io
import ipaddress
import os
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from .image_files_attncap import FormatError, open_image, upright

TIMEOUT = 30.0  # seconds for connecting, and again for all that a server sends
MAX_BYTES = 64 * 2**20
MAX_BATCH_PIXELS = 2**26  # all images of a batch are in memory at once
MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_CHANNELS = (1, 2, 3, 4)
_URL_SAFE = "%/:=&?~+!$,;'@()*[]#"  # not changed; spaces and non-ASCII letters are percent-encoded
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_SIX_TO_FOUR = ipaddress.ip_network("2002::/16")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


class ImageError(ValueError):
    """An image that cannot be read. The message names the source and says what to do."""


def load_image(source: Any, *, allow_private_urls: bool = False) -> Image.Image:
    """Reads one image as upright RGB.

    Greyscale, palette, 16-bit, float and CMYK images become 8-bit RGB. Transparent regions become white. EXIF rotation is
    applied. An animation gives its first frame.

    Args:
        source: a path (str or path-like), an http(s) or data: URL, a base64 string, the bytes of an image file, a
            PIL image, or a numpy array or torch tensor of shape (H, W), (H, W, C) or (C, H, W) with C from 1 (grey),
            2 (grey, alpha), 3 (RGB) to 4 (RGBA); uint8 in [0, 255], uint16 in [0, 65535] or float in [0, 1].
        allow_private_urls: also fetch from addresses that are not public (this machine, the local network). Default False, so that
            an untrusted URL cannot reach them, neither directly nor by a redirect or DNS.

    Returns:
        A PIL image in mode RGB without metadata; `source` itself if it already is an upright RGB image in memory. `source` is
        not changed.

    Raises:
        ImageError: the source is missing, empty, truncated, not an image, too large, refused or of an unknown type.

    A URL is fetched directly (proxy settings are not read), within `TIMEOUT`, `MAX_BYTES` and `MAX_REDIRECTS`.
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
    if isinstance(source, str) and not os.path.exists(source):
        return _from_text(source, allow_private_urls)
    if isinstance(source, (str, os.PathLike)):
        return _from_file(os.fsdecode(source))
    raise ImageError(
        f"an image cannot be read from a {type(source).__name__}; "
        "give one path, URL, base64 string, bytes object, PIL image, numpy array or torch tensor at a time"
    )


def is_tensor(source: Any) -> bool:
    """Whether this is a torch tensor. It does not import torch: if nothing has imported torch, there are no tensors."""
    return isinstance(source, getattr(sys.modules.get("torch"), "Tensor", ()))


def make_batches(images: Iterable[tuple[str, Image.Image | ImageError]], batch_size: int) -> Iterator[list[tuple[str, Any]]]:
    """Groups (name, image) into batches of at most `batch_size`, which also end once their images exceed `MAX_BATCH_PIXELS`.

    If `images` raises an error, that is raised after the batch of the images before.
    """
    batch: list[tuple[str, Image.Image | ImageError]] = []
    pixels, iterator = 0, iter(images)
    while True:
        try:
            batch.append(next(iterator))
        except Exception as error:
            failure = error
            break
        image = batch[-1][1]
        pixels += image.width * image.height if isinstance(image, Image.Image) else 0
        if len(batch) == batch_size or pixels > MAX_BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch
    if not isinstance(failure, StopIteration):
        raise failure


def read_image(number: int, source: Any, allow_private_urls: bool) -> tuple[str, Image.Image | ImageError]:
    """The name of image `number`, and the image, or an `ImageError` for one that cannot be read."""
    name = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else f"images[{number}]"
    try:
        return name, load_image(source, allow_private_urls=allow_private_urls)
    except ImageError as error:
        return name, error
    except Exception as error:  # anything: sources of unknown types, memory
        failure = ImageError(f"{name} cannot be read: {describe_error(error)}")
        failure.__cause__ = error
        return name, failure


def describe_error(error: Exception) -> str:
    """The type and message of an error."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _from_file(path: str) -> Image.Image:
    if os.path.isdir(path):
        raise ImageError(f"{path} is a directory; name an image file inside it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ImageError(f"{path} is not a regular file; name an image file")
    try:
        with open(path, "rb") as stream:
            return _decode(stream, path)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path} does not exist; check the path") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} cannot be opened ({error}); check the path and its permissions") from error


def _from_text(text: str, allow_private: bool) -> Image.Image:
    """Reads a string that is not an existing path: a URL, a data: URL, base64, or a mistake."""
    start = text if len(text) <= 100 else f"{text[:60]}..."
    scheme = text[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return _decode(io.BytesIO(_fetch(text, allow_private)), text)
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
    if stream.seek(0, io.SEEK_END) == 0:
        raise ImageError(f"{name} is empty (0 bytes); save or download it again")
    try:
        return _to_rgb(open_image(stream), name)
    except ImageError:
        raise
    except FormatError as error:
        raise ImageError(f"{name} is {error}") from error
    except UnidentifiedImageError as error:
        unknown = unknown or f"{name} is not an image in a known format; save it as JPEG or PNG"
        raise ImageError(unknown) from error
    except Exception as error:
        raise _unreadable(error, name) from error


def _is_ready(image: Image.Image) -> bool:
    return image.mode == "RGB" and 0 not in image.size and not image.has_transparency_data and upright(image) is image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """The image as upright RGB without metadata, so that loading it again does not rotate it again."""
    try:
        image.load()
        if 0 in image.size:
            raise ImageError(f"{name} has no pixels (size {image.size}); give an image of at least 1 x 1")
        image = upright(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            ceilings = {"I": (255, 65535), "F": (1, 255)}.get(image.mode, (65535,))
            return Image.fromarray(_eight_bits(np.asarray(image), ceilings, name)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        image.info = {}
        return image
    except ImageError:
        raise
    except Exception as error:
        raise _unreadable(error, name) from error


def _unreadable(error: Exception, name: str) -> ImageError:
    """An `ImageError` for an error of any type that a Pillow decoder raised on a damaged file."""
    if isinstance(error, Image.DecompressionBombError):
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
    if array.dtype.kind == "f":
        array = _eight_bits(array, (1,), name)
    elif array.dtype == np.uint16:
        array = _eight_bits(array, (65535,), name)
    elif array.dtype != np.uint8:
        raise ImageError(f"{name} has an unclear range; convert it to uint8 in [0, 255] or float in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(array))


def _eight_bits(values: np.ndarray, ceilings: tuple[int, ...], name: str) -> np.ndarray:
    """Scales to uint8; the range is 0 to the smallest of `ceilings` that covers all values. Floats may exceed it by 0.1 %."""
    low, high = float(values.min()), float(values.max())
    for ceiling in ceilings:
        slack = ceiling / 1000 if values.dtype.kind == "f" else 0
        if -slack <= low and high <= ceiling + slack:
            return np.round(values.astype(np.float64) * (255 / ceiling)).clip(0, 255).astype(np.uint8)
    raise ImageError(
        f"{name} has values from {low:g} to {high:g}, outside [0, {ceilings[-1]}]; undo any normalisation, or convert it to uint8"
    )


def _fetch(url: str, allow_private: bool) -> bytes:
    target = first = urllib.parse.quote(url, _URL_SAFE, errors="surrogateescape")
    for _ in range(MAX_REDIRECTS + 1):
        name = url if target == first else f"{url} (redirected to {target})"
        response, body = _get(target, name, allow_private)
        location = response.headers.get("Location")
        if response.status in _REDIRECTS and location:
            # http.client decodes headers as Latin-1
            target = urllib.parse.urljoin(target, urllib.parse.quote(location, _URL_SAFE, "latin-1"))
        elif response.status != 200:
            raise ImageError(f"{name} answered {response.status} {response.reason}; check the address")
        elif len(body) > MAX_BYTES:
            raise ImageError(f"{name} is larger than {MAX_BYTES} bytes; download it and give its path")
        else:
            return body
    raise ImageError(f"{url} redirects more than {MAX_REDIRECTS} times; give the final address")


def _get(url: str, name: str, allow_private: bool) -> tuple[http.client.HTTPResponse, bytes]:
    """One request, without redirects, and at most MAX_BYTES + 1 bytes of its body."""
    deadline = float("inf")
    try:
        parts = urllib.parse.urlsplit(url)
        with closing(_connect(parts, name, allow_private)) as connection:
            deadline = time.monotonic() + TIMEOUT
            # A socket's own timeout restarts with each byte: a slow server could keep the connection open for hours.
            timer = threading.Timer(TIMEOUT, _hang_up, (connection.sock,))
            timer.start()
            try:
                path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
                connection.request("GET", path, headers={"User-Agent": "hf-attncap", "Accept": "image/*"})
                with connection.getresponse() as response:
                    body = response.read(MAX_BYTES + 1)
            finally:
                timer.cancel()
        if time.monotonic() < deadline:
            return response, body
        raise TimeoutError
    except ImageError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        late = isinstance(error, TimeoutError) or time.monotonic() >= deadline
        reason = f"timed out after {TIMEOUT:g} s" if late else error
        raise ImageError(f"{name} could not be fetched ({reason}); check the address and try again") from error


def _connect(parts: urllib.parse.SplitResult, name: str, allow_private: bool) -> http.client.HTTPConnection:
    """Resolves the host once and connects only to the addresses that were checked, so that DNS cannot change in between."""
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ImageError(f"{name} cannot be fetched; give an http:// or https:// URL with a host")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    host, port = _ascii_host(parts.hostname), parts.port or kind.default_port
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    private = [address for address in addresses if not _is_public(address)]
    if private and not allow_private:
        raise ImageError(
            f"{name} is refused: {host} is {private[0]}, not a public address; "
            "set allow_private_urls=True (on the command line --allow-private-urls) if you trust the URL"
        )
    failure = OSError("no address")
    for address in addresses:
        try:
            sock = socket.create_connection((address, port), timeout=TIMEOUT)
        except OSError as error:
            failure = error
            continue
        if parts.scheme == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        connection = kind(host, port, timeout=TIMEOUT)
        connection.sock = sock
        return connection
    raise failure


def _ascii_host(host: str) -> str:
    """A percent-encoded host name of any script in the ASCII form that DNS, TLS and the Host header need.

    Follows UTS 46 and IDNA 2008 as browsers do. Python's own codec implements IDNA 2003, which turns "faß.de" into another host.
    """
    letters = urllib.parse.unquote(host)
    if letters.isascii():
        return host
    import idna  # takes 10 ms and is rarely needed

    return idna.encode(letters, uts46=True).decode()


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed by the server
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # SSLSocket.shutdown would drop state that the reading thread needs


def _is_public(address: str) -> bool:
    """Whether an address belongs to the public internet, including IPv4 addresses inside IPv6 ones."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in _GLOBAL_UNICAST or ip in _SIX_TO_FOUR:
            return False
    return ip.is_global and not ip.is_multicast
