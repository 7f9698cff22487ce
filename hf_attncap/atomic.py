"""Atomic writes: files and folders appear complete or not at all, even if the program is killed or the disk fills up."""

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a file that takes the place of `path` when the block ends, and leaves nothing behind if it fails.

    Args:
        path: the file. Its folder must be there. One that is there already is replaced; a device or a pipe is written to.
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
    # A name of fixed length, since that of `path` may be as long as a name can be; made by `open`, for the mode of a new file.
    scratch = target.with_name(f".attncap-{secrets.token_hex(8)}.part")
    try:
        with open(scratch, mode.replace("w", "x"), encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(target)  # after it was closed, as Windows wants it
    except OSError as error:
        reason = error.strerror if target.parent.is_dir() else f"there is no folder {target.parent}"
        raise type(error)(f"{path} cannot be written ({reason or error})") from error
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends, and leaves nothing behind if it fails.

    Args:
        path: the folder to make, with its parents. It may exist if it is empty.

    Raises:
        FileExistsError: `path` is there already and is not an empty folder.
    """
    refuse_occupied(path)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".attncap-") as scratch:
        folder = Path(scratch) / "new"  # the scratch folder itself may be read by its owner alone
        folder.mkdir()
        yield folder
        for file in folder.rglob("*"):
            flush_to_disk(file)
        if target.exists():
            target.rmdir()  # Windows renames a folder to no name that is taken
        folder.rename(target)


def refuse_occupied(path: str | os.PathLike[str]) -> None:
    """Raises FileExistsError if something is there that is not an empty folder."""
    target = Path(path)
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"'{target}' is there already and is not an empty folder: name another, or remove it first.")


def flush_to_disk(file: Path) -> None:
    """Flushes a file that another library wrote to disk; folders are skipped."""
    if file.is_file():
        with open(file, "rb+") as stream:  # Windows flushes no file that is open for reading alone
            os.fsync(stream.fileno())
