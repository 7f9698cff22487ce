"""Finds the images that a command line names: files, URLs, folders, patterns, lists of names and stdin."""

import fnmatch
import glob
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

from .image_files_attncap import HEIF_BRANDS, PNG_SIGNATURE
from .urls_attncap import MAX_BYTES

STDIN = "-"
SYSTEM_NAMES = {
    "thumbs.db",
    "desktop.ini",
    "__macosx",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "lost+found",
}
SIGNATURES = (
    b"\xff\xd8\xff",  # JPEG
    PNG_SIGNATURE,
    b"GIF87a",
    b"GIF89a",
    b"II*\0",  # TIFF, and BigTIFF in the next line
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    b"\0\0\0\x0cjP  \r\n\x87\n",  # JPEG 2000
    b"\xff\x4f\xff\x51",
    b"8BPS\0\1",  # Photoshop
    b"qoif",
    b"DDS ",
)
WEAK_SIGNATURES = (  # short ones, with what must follow
    re.compile(rb"RIFF....WEBP", re.S),
    re.compile(rb"BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0{3}", re.S),  # Windows bitmap
    re.compile(rb"P[1-6]\s+(#|\d)"),  # Netpbm
    re.compile(rb".{4}ftyp(%b|avif|avis)" % b"|".join(sorted(HEIF_BRANDS)), re.S),
)
HEADER = 32  # bytes that a signature can need
ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".heic", ".heif", ".avif")
ENDINGS += (".jp2", ".ppm", ".pgm", ".pbm", ".tga", ".ico", ".qoi")
Folders = set[tuple[int, int]]  # device and number of each
LIST_HEADER = 2**16  # longer than any path, so a list with NUL bytes has one here


@dataclass(frozen=True)
class Input:
    """One image to caption.

    Attributes:
        name: the path or the URL as it was given or found; "-" for stdin.
        source: what `load_image` reads; None if there is an error.
        error: why there is no image, such as a folder that cannot be listed.
    """

    name: str
    source: str | bytes | None
    error: str | None = None

    @cached_property
    def stamp(self) -> list[int] | str | None:
        """A value that changes with the content: size and time of a file, a digest of stdin, None for anything else."""
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).hexdigest()
        try:
            found = os.stat(self.name)
        except (OSError, ValueError):  # missing, a URL, or with a NUL byte
            return None
        return [found.st_size, found.st_mtime_ns]


def find_inputs(paths: Sequence[str], files_from: str | None = None) -> Iterator[Input]:
    """Yields the images in order, and reads folders and lists only as far as they are needed.

    Args:
        paths: files, URLs, folders, glob patterns or "-" for an image on stdin. Folders are read recursively, in the order of
            their names. A pattern that exists as a path is a path.
        files_from: a file of further paths, one per line, or separated by NUL bytes; "-" is stdin. Its names are not patterns.

    A folder is searched for files that begin like an image or have the ending of one. Hidden files, system files and links to
    folders that were already read are skipped. A folder that cannot be read is an `Input` with an error, and so is a path without
    images.
    """
    for path in paths:
        if path == STDIN:
            yield _read_stdin()
        elif glob.has_magic(path) and "://" not in path and not path.startswith("data:") and not os.path.lexists(path):
            yield from _or_error(_expand(path), path, f"{path} matches no image; check the pattern")
        else:
            yield from _expand_path(path)
    if files_from is not None:
        for path in _read_list(files_from):
            yield from _expand_path(path)


def count_inputs(paths: Sequence[str], files_from: str | None = None) -> int | None:
    """The number of `find_inputs`; None if stdin or a pipe is among them, which can be read only once."""
    if STDIN in paths or (files_from is not None and not os.path.isfile(files_from)):
        return None
    return sum(1 for _ in find_inputs(paths, files_from))


def base_folder(paths: Sequence[str], files_from: str | None = None) -> str:
    """The first path if it is a folder, otherwise its folder; the current folder if it is a URL or stdin."""
    first = paths[0] if paths else str(files_from)
    if os.path.isdir(first):
        return first
    if "://" in first or first == STDIN:
        return os.curdir
    while glob.has_magic(first) and not os.path.lexists(first):
        first = os.path.dirname(first)
    return (first if os.path.isdir(first) else os.path.dirname(first)) or os.curdir


def is_image(path: str) -> bool:
    """Whether a file begins like an image or has the ending of one. A file that cannot be opened is judged by its ending."""
    try:
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            head = file.read(HEADER) or b""
    except OSError:
        head = b""
    found = head.startswith(SIGNATURES) or any(signature.match(head) for signature in WEAK_SIGNATURES)
    return found or path.lower().endswith(ENDINGS)


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would wait for its other end


def _expand_path(path: str) -> Iterator[Input]:
    if os.path.isdir(path):
        return _or_error(_walk(path), path, f"{path} is a folder without images; check the path")
    return iter([Input(path, path)])


def _or_error(found: Iterable[Input], name: str, error: str) -> Iterator[Input]:
    empty = True
    for item in found:
        empty = False
        yield item
    if empty:
        yield Input(name, None, error)


def _read_stdin() -> Input:
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        return Input(STDIN, None, f"the image on stdin is larger than {MAX_BYTES} bytes; save it and give its path")
    return Input(STDIN, data)


def _read_list(name: str) -> Iterator[str]:
    try:
        with nullcontext(sys.stdin.buffer) if name == STDIN else open(name, "rb") as file:
            yield from map(os.fsdecode, _split(file))
    except OSError as error:
        raise OSError(f"{name} cannot be read ({error.strerror}); check --files-from") from error


def _split(file: BinaryIO) -> Iterator[bytes]:
    """The names in a list, without empty ones."""
    rest = file.read(LIST_HEADER).removeprefix(b"\xef\xbb\xbf")
    separator, ends = (b"\0", b"") if b"\0" in rest else (b"\n", b"\r")
    while rest:
        *names, rest = rest.split(separator)
        more = file.read(LIST_HEADER)
        if not more:
            names.append(rest)
        rest = rest + more if more else b""
        yield from (name for name in (name.rstrip(ends) if ends else name for name in names) if name)


def _walk(folder: str) -> Iterator[Input]:
    """The images below a folder. Uses a stack, because folders may be nested deeper than Python can recurse."""
    visited: Folders = set()
    _is_new(folder, visited)
    stack = [iter(_list_folder(folder))]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
        elif isinstance(entry, Input):
            yield entry
        elif entry[1]:
            if _is_new(entry[0], visited):
                stack.append(iter(_list_folder(entry[0])))
        elif is_image(entry[0]):
            yield Input(entry[0], entry[0])


def _list_folder(folder: str) -> list[tuple[str, bool] | Input]:
    """(path, whether it is a folder) of the entries of a folder, sorted."""
    try:
        with os.scandir(folder or os.curdir) as entries:
            found = [(entry.name, _is_folder(entry)) for entry in entries if _is_wanted(entry)]
    except OSError as error:
        return [Input(folder, None, f"{folder} cannot be listed ({error.strerror}); check its permissions")]
    return [(os.path.join(folder, name), is_folder) for name, is_folder in sorted(found)]


def _is_new(folder: str, visited: Folders) -> bool:
    """Whether a folder is not in `visited` yet; adds it. A link may lead to the same folder by another path."""
    try:
        about = os.stat(folder or os.curdir)
    except OSError:  # the error is reported when the folder is listed
        return True
    known = (about.st_dev, about.st_ino) in visited
    visited.add((about.st_dev, about.st_ino))
    return not known


def _is_wanted(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry of a folder is a visible folder or file, or a link that leads to nothing."""
    if entry.name.startswith(".") or entry.name.lower() in SYSTEM_NAMES:
        return False
    try:
        return entry.is_dir() or entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # a link to itself
        return True


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _expand(pattern: str) -> Iterator[Input]:
    """The images that match a pattern. `**` matches any number of folders. Without it, matching folders are read."""
    root, *parts = re.split(rf"[/{re.escape(os.sep)}]", pattern)
    folder, parts = (root + os.sep, parts) if pattern[:1] in ("/", os.sep) else ("", [root, *parts])
    files_only = "**" in parts[:-1]  # the files of the folders that match are matches of their own
    visited: dict[int, Folders] = {}  # by the number of parts that are left
    stack: list[Iterator[Any]] = [iter([(folder, parts)])]
    while stack:
        item = next(stack[-1], None)
        if item is None:
            stack.pop()
        elif isinstance(item, Input):
            yield item
        elif item[1]:
            stack.append(_match_part(item[0], item[1], visited))
        elif os.path.isdir(item[0]):
            yield from () if files_only else _walk(item[0])
        elif is_image(item[0]):
            yield Input(item[0], item[0])


def _match_part(folder: str, parts: list[str], visited: dict[int, Folders]) -> Iterator[tuple[str, list[str]] | Input]:
    """Matches the first part of a pattern in a folder: (path, parts that are left) of each match."""
    first, rest = parts[0], parts[1:]
    literal = os.path.join(folder, first)
    if first == "**":
        if not _is_new(folder, visited.setdefault(len(parts), set())):
            return
        yield folder, rest
        if not rest:  # the folder itself will be read recursively
            return
    elif not glob.has_magic(first) or os.path.lexists(literal):
        if rest or os.path.lexists(literal):
            yield literal, rest
        return
    for entry in _list_folder(folder):
        if isinstance(entry, Input):
            yield entry
        elif first == "**":
            if entry[1]:
                yield entry[0], parts
        elif (entry[1] or not rest) and fnmatch.fnmatch(os.path.basename(entry[0]), first):
            yield entry[0], rest
