"""Checkpoints and results of a run that are there whole or not at all, also if it is killed while it writes them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from hf_attncap.atomic import flush_to_disk

from ..arguments import SettingError

# Inside `output_dir`, so that what is whole needs no copy; pushes to the Hub leave out names that begin so.
UNFINISHED = "_unfinished"


def last_checkpoint(output: Path) -> Path | None:
    """The checkpoint of the latest step in a run's folder; all of them are whole."""
    found = get_last_checkpoint(str(output)) if output.is_dir() else None
    return Path(found) if found else None


def clear(output: Path) -> None:
    """Remove what a killed run left unfinished."""
    shutil.rmtree(output / UNFINISHED, ignore_errors=True)


def appear(unfinished: Path, checkpoint: Path) -> None:
    """Give a whole checkpoint its name; one that had it is removed."""
    for file in unfinished.rglob("*"):
        flush_to_disk(file)
    discard(checkpoint)
    unfinished.replace(checkpoint)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint, so that not even for a moment half of it is there under its name."""
    if checkpoint.exists():
        dying = checkpoint.parent / UNFINISHED / f"old-{checkpoint.name}"
        dying.parent.mkdir(exist_ok=True)
        shutil.rmtree(dying, ignore_errors=True)
        checkpoint.replace(dying)
        shutil.rmtree(dying, ignore_errors=True)


def rotate(output: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints but `limit`; the newest and the best one stay in any case."""
    checkpoints = [Path(path) for path in sort_checkpoints(str(output), use_mtime=True)]
    kept = {*checkpoints[-1:], *([Path(best)] if best else [])}
    surplus = len(checkpoints) - max(limit, len(kept)) if limit and limit > 0 else 0
    for checkpoint in [path for path in checkpoints if path not in kept][: max(surplus, 0)]:
        discard(checkpoint)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder for files, each of which takes its place in `folder` at once, when all of them are written."""
    unfinished = folder / UNFINISHED / "files"
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        for file in sorted(unfinished.rglob("*")):
            if file.is_file():
                flush_to_disk(file)
                place = folder / file.relative_to(unfinished)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
    finally:
        clear(folder)


@contextmanager
def writing(output: Path, what: str, needed: int) -> Iterator[None]:
    """While `what`, of about `needed` bytes, is written to a run's folder, errors of the disk become one sentence.

    Raises:
        SettingError: naming the folder, the reason and the room.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's writer of archives says so alone; other errors at run time are not the disk's.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        clear(output)
        free = shutil.disk_usage(output).free
        last = last_checkpoint(output)
        raise SettingError(
            f"{what} cannot be written to {output}, which takes {needed / 1e6:.3g} MB where {free / 1e6:.3g} MB are free "
            f"({str(error).splitlines()[0]}): make room or set `save_total_limit`; {going_on(last)}."
        ) from error


def going_on(last: Path | None) -> str:
    """How a run that ended goes on."""
    return f"`--resume_from_checkpoint last` goes on from {last}" if last else "there is no checkpoint yet to go on from"
