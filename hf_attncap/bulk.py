"""Captions any number of images with constant memory, and writes the captions to a file. A killed run can be continued."""

import filecmp
import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .images import ImageError
from .inputs import STDIN, Input
from .journal import Journal
from .writers import CaptionFiles, Row, Writer

if TYPE_CHECKING:
    from .captioner import Captioner, CaptionResult

Outcome = tuple[Input, "CaptionResult | ImageError"]
INTERNAL = ("stamp", "failed")  # of rows in the journal
WEIGHTS = (".safetensors", ".bin", ".onnx", ".data", ".xml")
SETTINGS = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "export.json",
)


@dataclass
class Totals:
    """How many images are done, in this run and before, and how many of them failed. `complete`: an earlier run had finished."""

    images: int = 0
    failed: int = 0
    complete: bool = False


def caption_inputs(
    captioner: "Captioner", inputs: Iterable[Input], seed: int | None = None, **options: Any
) -> Generator[Outcome, None, None]:
    """Captions images one batch at a time, and yields each input with its result or its error, in order.

    Args:
        seed: for sampled captions that can be repeated: the position of the first image. Each batch is seeded with its position.
        options: those of `Captioner.stream`, with `batch_size`.
    """
    waiting: deque[Input] = deque()

    def sources() -> Iterator[str | bytes]:
        for item in inputs:
            waiting.append(item)
            if item.source is not None:
                yield item.source

    def errors() -> Iterator[Outcome]:
        while waiting and waiting[0].source is None:
            item = waiting.popleft()
            yield item, ImageError(item.error)

    outcomes: Any = captioner.stream(sources(), on_error="yield", **options)
    with closing(outcomes):
        for number in count():
            if seed is not None and number % options["batch_size"] == 0:
                _seed(seed + number)
            outcome = next(outcomes, None)
            yield from errors()
            if outcome is None:
                return
            item = waiting.popleft()
            if item.name == STDIN and isinstance(outcome, ImageError):
                outcome = ImageError(f"stdin: {outcome}")
            yield item, outcome


def _seed(number: int) -> None:
    """Seeds the random numbers of both kinds of models."""
    np.random.seed(number)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(number)


def as_row(item: Input, outcome: "CaptionResult | ImageError", min_confidence: float | None = None) -> Row:
    """The row of an image. A caption with a confidence below `min_confidence` is left out, which is not a failure."""
    row = {"path": item.name, "caption": "", "score": None, "confidence": None, "words": [], "alternatives": [], "error": None}
    if isinstance(outcome, ImageError):
        return row | {"error": str(outcome), "failed": True}
    row |= {"score": outcome.score, "confidence": outcome.confidence, "failed": False}
    if is_doubtful(outcome, min_confidence):
        return row | {"error": f"the confidence is below {min_confidence:g}"}
    alternatives = [{"caption": other.text, "score": other.score} for other in outcome.alternatives]
    return row | {"caption": outcome.text, "words": outcome.words, "alternatives": alternatives}


def is_doubtful(result: "CaptionResult", min_confidence: float | None) -> bool:
    """Whether the confidence of a result is known and below the limit."""
    return min_confidence is not None and result.confidence is not None and result.confidence < min_confidence


def model_digest(folder: str | os.PathLike[str]) -> str:
    """A digest of the files of a checkpoint or an exported folder that determine its captions."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.name in SETTINGS or path.suffix in WEIGHTS:
            with open(path, "rb") as file:
                digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Target:
    """What a run writes, and where.

    Attributes:
        output: the file; None for a caption file beside each image.
        folder: the folder of the journal.
        writer: the format.
    """

    output: Path | None
    folder: Path
    writer: Writer | CaptionFiles

    @property
    def name(self) -> str:
        return f"the caption files beside the images ({self.folder})" if self.output is None else str(self.output)

    @property
    def ways_out(self) -> str:
        """What a user can do if the run cannot be continued."""
        repeat = "Repeat the first command on the same images, or remove"
        if self.output is None:
            return f"{repeat} {self.folder} to begin again."
        return f"{repeat} {self.output} and {self.folder} to begin again, or give another --output."


def caption_to_target(
    target: Target,
    inputs: Iterator[Input],
    settings: dict[str, Any],
    batch_size: int,
    caption: Callable[[Iterator[Input], int], Generator[Outcome, None, None]],
    report: Callable[[Row | None, Totals], None],
    min_confidence: float | None = None,
) -> Totals:
    """Captions images into an output, or continues an unfinished run. A finished run is only checked.

    Args:
        target: the output.
        inputs: all images, those of earlier runs too.
        settings: what determines the captions.
        batch_size: images per batch. A continued run makes the same batches, so that its captions are the same.
        caption: captions the images that are not done yet. It gets these images and the number of images before them. It is not
            called if there are none.
        report: is called with the number of images that earlier runs have done, and then with each new row.
        min_confidence: as for `as_row`.

    Raises:
        OSError: a file cannot be written, or another run writes this output.
        ValueError: the settings, the images or the output differ from those of the run that this one continues.
    """
    with Journal(target.folder, target.name, target.ways_out) as journal:
        _check_output(target, journal)
        journal.start(settings)
        progress = _Progress(target, inputs)
        if journal.finished:
            progress.check_finished(journal.finished)
            return progress.totals
        ended = progress.replay(journal)
        report(None, progress.totals)
        first = next(inputs, None)
        if first is not None and ended:
            raise ValueError(f"{target.name} was begun with fewer images: {first.name} is new. {target.ways_out}")
        if first is not None:
            with closing(caption(_stamped(chain([first], inputs)), progress.batches * batch_size)) as outcomes:
                for rows, last in _batches(outcomes, batch_size, min_confidence):
                    progress.add(journal, rows, last, report)
        size = _write_output(target, journal) if target.output else None
        totals = progress.totals
        journal.finish(images=totals.images, failed=totals.failed, inputs=progress.digest, bytes=size)
        return totals


def _check_output(target: Target, journal: Journal) -> None:
    """Discards the journal of a finished run if its output is gone. Raises a ValueError if the output is not that of the run."""
    if target.output is None:
        return
    exists, finished = os.path.lexists(target.output), journal.finished
    if finished and not exists:
        journal.discard()
    elif exists and not journal.started:
        raise ValueError(f"{target.output} exists and was not written by this command: give another --output, or remove it")
    elif finished and target.output.stat().st_size != finished["bytes"]:
        raise ValueError(f"{target.output} was changed after it was written. {target.ways_out}")


class _Progress:
    """Counts the images and compares them with those of earlier runs."""

    def __init__(self, target: Target, inputs: Iterator[Input]):
        self.totals, self.batches = Totals(), 0
        self._target, self._inputs, self._digest = target, inputs, hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def check_finished(self, finished: dict[str, Any]) -> None:
        """Raises a ValueError if the images are not those of the finished run."""
        for item in self._inputs:
            self._digest.update(_identify(item.name, item.stamp))
        if self.digest != finished["inputs"]:
            raise ValueError(
                f"The images have changed since {self._target.name} was written: one was added, removed or modified. "
                f"{self._target.ways_out}"
            )
        self.totals = Totals(finished["images"], finished["failed"], complete=True)

    def replay(self, journal: Journal) -> bool:
        """Skips the images that are in the journal; returns whether they are all.

        Raises:
            ValueError: the images differ.
        """
        last = False
        for batch in journal.batches():
            for row in batch["rows"]:
                item, name, way_out = next(self._inputs, None), row["path"], self._target.ways_out
                if item is None or item.name != name:
                    now = "missing" if item is None else f"now {item.name}"
                    raise ValueError(
                        f"{self._target.name} was begun with other images: number {self.totals.images + 1} was {name} "
                        f"and is {now}. {way_out}"
                    )
                if item.stamp != row["stamp"]:
                    raise ValueError(f"{name} has changed since {self._target.name} was begun. {way_out}")
                self._count(row)
                if isinstance(self._target.writer, CaptionFiles):
                    self._target.writer.write(row)
            last = batch["last"]
            self.batches += 1
        return last

    def add(self, journal: Journal, rows: list[Row], last: bool, report: Callable[[Row, Totals], None]) -> None:
        """Adds a batch to the journal, and then writes its caption files."""
        if isinstance(self._target.writer, CaptionFiles):
            self._target.writer.claim(rows)
            journal.append(rows, last)
            for row in rows:
                self._target.writer.write(row)
        else:
            journal.append(rows, last)
        for row in rows:
            self._count(row)
            report(row, self.totals)

    def _count(self, row: Row) -> None:
        self._digest.update(_identify(row["path"], row["stamp"]))
        self.totals.images += 1
        self.totals.failed += row["failed"]


def _stamped(inputs: Iterable[Input]) -> Iterator[Input]:
    """Takes the stamp of each image before it is read, so that a later change is noticed."""
    for item in inputs:
        _ = item.stamp
        yield item


def _identify(name: str, stamp: Any) -> bytes:
    return json.dumps([name, stamp]).encode()


def _batches(outcomes: Iterator[Outcome], size: int, min_confidence: float | None) -> Iterator[tuple[list[Row], bool]]:
    """Groups rows into batches of `size` images; inputs with an error do not count. True marks an incomplete batch at the end."""
    rows: list[Row] = []
    images = 0
    for item, outcome in outcomes:
        rows.append(as_row(item, outcome, min_confidence) | {"stamp": item.stamp})
        images += item.source is not None
        if images == size:
            yield rows, False
            rows, images = [], 0
    if rows:
        yield rows, True


def _write_output(target: Target, journal: Journal) -> int:
    """Writes the output from the journal and returns its size."""
    assert target.output is not None and not isinstance(target.writer, CaptionFiles)
    rows = (row for batch in journal.batches() for row in batch["rows"])
    scratch = target.folder / "output"  # a killed run leaves no other file
    try:
        with open(scratch, "wb") as file:
            target.writer.write(({name: row[name] for name in row if name not in INTERNAL} for row in rows), file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{scratch} cannot be written ({error.strerror}); make room, and repeat the command to go on") from error
    if os.path.lexists(target.output) and not filecmp.cmp(scratch, target.output, shallow=False):
        raise ValueError(f"{target.output} was written by another program meanwhile. {target.ways_out}")
    size = scratch.stat().st_size
    scratch.replace(target.output)
    return size
