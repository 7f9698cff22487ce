"""Atomic writes: a file or a folder appears complete or not at all, even if the program is killed or the disk is full."""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

UNFINISHED = "_unfinished"  # subfolder for unfinished files: renaming is atomic only within one file system


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` when the block ends; after an error, `path` is unchanged.

    Args:
        path: the file to write. Its folder must exist. A device or a pipe is written directly.
        mode: "w" for text in UTF-8, "wb" for bytes.

    Raises:
        OSError: the file cannot be written; the message names it and the reason.
    """
    given, target = Path(path), Path(os.path.realpath(path))
    encoding = None if "b" in mode else "utf-8"
    if given.exists() and not (given.is_file() or given.is_dir()):
        with open(given, mode, encoding=encoding) as file:
            yield file
        return
    # The name has a fixed length because the name of `path` may already have the maximum length. `open` creates the file, so it
    # gets the usual permissions.
    scratch = target.with_name(f".attncap-{secrets.token_hex(8)}.part")
    try:
        with open(scratch, mode.replace("w", "x"), encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(target)  # Windows renames only closed files
    except OSError as error:
        reason = error.strerror if target.parent.is_dir() else f"there is no folder {target.parent}"
        raise type(error)(f"{path} cannot be written ({reason or error})") from error
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` to `path` as indented JSON, with `atomic_write`."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends; after an error, nothing remains.

    Args:
        path: the folder to create, with its parents. It may exist if it is empty.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
    """
    refuse_occupied(path)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".attncap-") as scratch:
        folder = Path(scratch) / "new"  # only the owner can read the scratch folder itself
        folder.mkdir()
        yield folder
        _flush_to_disk(folder)
        if target.exists():
            target.rmdir()  # Windows does not rename a folder to an existing name
        folder.rename(target)


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Yield a folder whose files move to `folder` when the block ends, each of them at once; after an error, none does."""
    scratch = folder / UNFINISHED / "files"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        yield scratch
        _flush_to_disk(scratch)
        for file in sorted(path for path in scratch.rglob("*") if path.is_file()):
            place = folder / file.relative_to(scratch)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
    finally:
        remove_unfinished(folder)


def replace_folder(complete: Path, target: Path) -> None:
    """Rename a complete folder to `target`, and remove the folder that had this name."""
    _flush_to_disk(complete)
    remove_folder(target)
    complete.replace(target)


def remove_folder(path: Path) -> None:
    """Remove a folder if it exists. It is renamed first, so a part of it never has its name."""
    if path.exists():
        scratch = path.parent / UNFINISHED / f"old-{path.name}"
        scratch.parent.mkdir(exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        path.replace(scratch)
        shutil.rmtree(scratch, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed program left unfinished in `folder`."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def refuse_occupied(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError if `path` exists and is not an empty folder."""
    target = Path(path)
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"'{target}' exists and is not an empty folder: choose another name, or remove it first.")


def _flush_to_disk(folder: Path) -> None:
    """Flush the files of a folder, which other libraries wrote, to disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as stream:  # Windows flushes only files that are open for writing
                os.fsync(stream.fileno())
