"""The journal of `attncap caption --output`: records what is done, so that a killed run can be continued.

A folder next to the output holds:

- `run.json`: the settings, and at the end the number of images and a digest of the inputs
- `rows.jsonl`: one line per batch, a JSON object with its rows. Without a line break at its end, the line is incomplete.
- `lock`: locked while a run writes; the lock ends with the process
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from .atomic import write_json

VERSION = 1  # of the folder's layout
Row = dict[str, Any]


class Journal:
    """The journal in a folder, locked until `close`.

    Args:
        folder: created if it is missing.
        output: how messages name the output.
        ways_out: a sentence for messages: what a user can do if the run cannot be continued.

    Raises:
        OSError: the folder cannot be created, or another run has locked it.
        ValueError: the folder is damaged.
    """

    def __init__(self, folder: Path, output: str, ways_out: str):
        from filelock import FileLock, Timeout  # takes 40 ms

        self.folder, self._output, self._ways_out = folder, output, ways_out
        self._rows, self._about = folder / "rows.jsonl", folder / "run.json"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OSError(f"{folder} cannot be created ({error.strerror}); check the folder and its permissions") from error
        self._lock = FileLock(folder / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise OSError(f"{output} is being written by another run: wait until it ends") from error
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()
        empty = not (self._has_rows or self.finished)
        if empty:
            self.discard()
        self._lock.release()
        if empty:
            with suppress(OSError):  # another run may have begun
                (self.folder / "lock").unlink(missing_ok=True)
                self.folder.rmdir()

    @property
    def started(self) -> bool:
        """Whether this run, or an earlier one that it continues, has saved its settings."""
        return self._about.is_file()

    @property
    def _has_rows(self) -> bool:
        return self._rows.exists() and self._rows.stat().st_size > 0

    @property
    def finished(self) -> dict[str, Any] | None:
        """What `finish` saved; None if the run has not finished."""
        return self._read_about()["finished"] if self.started else None

    def start(self, settings: dict[str, Any]) -> None:
        """Saves the settings of a new run, or compares them with those of the run that this one continues.

        Raises:
            ValueError: the settings differ; the message says in what.
        """
        if not self.started or not (self._has_rows or self.finished):
            self._rows.unlink(missing_ok=True)
            write_json(self._about, {"version": VERSION, "settings": settings, "finished": None})
            return
        before = self._read_about()["settings"]
        changes = [
            f"{name} was {json.dumps(before.get(name))} and is now {json.dumps(settings.get(name))}"
            for name in {**before, **settings}
            if before.get(name) != settings.get(name)
        ]
        if changes:
            raise ValueError(f"{self._output} was begun with other settings: {'; '.join(changes)}. {self._ways_out}")

    def batches(self) -> Iterator[dict[str, Any]]:
        """The batches so far, as they were given to `append`. An incomplete last line is removed."""
        if not self._rows.exists():
            return
        with open(self._rows, "rb+") as file:
            place = 0
            for number, line in enumerate(file, 1):
                batch = _parse(line)
                if batch is None and file.read(1):
                    raise ValueError(f"{self._rows}, line {number} is damaged. {self._ways_out}")
                if batch is None:
                    file.truncate(place)
                    return
                place += len(line)
                yield batch

    def append(self, rows: list[Row], last: bool) -> None:
        """Adds a batch. It survives a crash of this process, but not always one of the machine: it is then captioned again."""
        line = json.dumps({"rows": rows, "last": last}).encode() + b"\n"
        try:
            if self._file is None:
                self._file = open(self._rows, "ab", buffering=0)  # noqa: SIM115
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(
                f"{self._rows} cannot be written ({error.strerror}); make room, and repeat the command to go on"
            ) from error

    def finish(self, **about: Any) -> None:
        """Records that the output is complete, and removes the rows."""
        write_json(self._about, self._read_about() | {"finished": about})
        self._rows.unlink(missing_ok=True)

    def discard(self) -> None:
        """Deletes the records of the run, so that it can begin again."""
        self._about.unlink(missing_ok=True)
        self._rows.unlink(missing_ok=True)

    def _read_about(self) -> dict[str, Any]:
        try:
            about = json.loads(self._about.read_text(encoding="utf-8"))
            if about["version"] != VERSION or not isinstance(about["settings"], dict):
                raise ValueError(f"version {about['version']}")
            return about
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._about} is damaged or of another version ({error}). {self._ways_out}") from error


def _parse(line: bytes) -> dict[str, Any] | None:
    """The batch in a line; None if the line is incomplete."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None
