"""Output formats of `attncap caption`: one class per format. A row is a dictionary with the keys of `COLUMNS` and `words`."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from .inputs import ENDINGS

Row = dict[str, Any]
COLUMNS = ("path", "caption", "score", "confidence", "alternatives", "error")
ROW_GROUP = 10_000  # rows of a Parquet file that are in memory at once
COCO_NAME = re.compile(r"(?:^|_)(\d{12})$")  # COCO_val2014_000000000042.jpg, and 000000000042.jpg


class Writer:
    """Writes all rows to one file, without keeping them in memory."""

    suffixes: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises an ImportError if a package is missing."""

    def write(self, rows: Iterable[Row], file: BinaryIO) -> None:
        raise NotImplementedError


class JsonLines(Writer):
    """One JSON object per line, with all keys."""

    suffixes = (".jsonl", ".ndjson")

    def write(self, rows: Iterable[Row], file: BinaryIO) -> None:
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")


class Csv(Writer):
    """RFC 4180 in UTF-8 with a header. The alternatives are JSON."""

    suffixes = (".csv",)

    def write(self, rows: Iterable[Row], file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text)  # its lines end in CR LF, so it also quotes a lone CR
        writer.writerow(COLUMNS)
        for row in rows:
            flat = row | _printable_texts(row) | {"alternatives": json.dumps(row["alternatives"])}
            writer.writerow([flat[name] for name in COLUMNS])
        text.detach()


class Parquet(Writer):
    """A table of `COLUMNS`, with the alternatives as a list of (caption, score)."""

    suffixes = (".parquet",)

    def check(self) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f'Parquet needs pyarrow: pip install "hf_attncap[parquet]", or use --format jsonl ({error})'
            ) from error

    def write(self, rows: Iterable[Row], file: BinaryIO) -> None:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        alternative = pa.struct([("caption", pa.string()), ("score", pa.float64())])
        kinds = {"score": pa.float64(), "confidence": pa.float64(), "alternatives": pa.list_(alternative)}
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
        flat = ({name: row[name] for name in COLUMNS} | _printable_texts(row) for row in rows)
        with ParquetWriter(file, schema) as writer:
            while group := list(islice(flat, ROW_GROUP)):
                writer.write_table(pa.Table.from_pylist(group, schema))


class CocoResults(Writer):
    """COCO results: a JSON list for pycocotools' `COCO(references).loadRes(file)` and `attncap evaluate --predictions`.

    `image_id` is the number in a COCO file name; for other images it is the path.
    """

    def write(self, rows: Iterable[Row], file: BinaryIO) -> None:
        separator = b"[\n"
        for row in rows:
            number = COCO_NAME.search(Path(row["path"]).stem)
            found = {"image_id": int(number[1]) if number else row["path"], "caption": row["caption"], "file_name": row["path"]}
            file.write(separator + json.dumps(found | ({"error": row["error"]} if row["error"] else {})).encode())
            separator = b",\n"
        file.write(b"\n]\n" if separator == b",\n" else b"[]\n")


WRITERS: dict[str, type[Writer]] = {"jsonl": JsonLines, "csv": Csv, "parquet": Parquet, "coco": CocoResults}


def find_format(path: str) -> str:
    """The format of an output file, from its ending.

    Raises:
        ValueError: no format has this ending.
    """
    ending = Path(path).suffix.lower()
    for name, writer in WRITERS.items():
        if ending in writer.suffixes:
            return name
    raise ValueError(f"the format of {path} is unclear from its ending: give --format {', '.join(WRITERS)}")


class CaptionFiles:
    """A caption file next to each image: photo.txt for photo.jpg, with one line per caption. Existing files are kept.

    The rows of a batch are claimed before they are added to the journal, and written after that. So a file that exists before its
    row is in the journal was not written by this run.
    """

    def claim(self, rows: Iterable[Row]) -> None:
        """Adds an error to each row whose caption file cannot be written; `failed` is False if the file already exists."""
        taken: dict[str, str] = {}  # files of this batch, which are not written yet
        for row in rows:
            if row["error"]:
                continue
            image, file = row["path"], self._file(row)
            if row["stamp"] is None or isinstance(row["stamp"], str):
                row |= {"error": f"{image} has no folder for a caption file; save the image first", "failed": True}
            elif other := taken.get(file) or self._same_stem(image, file):
                row |= {"error": f"{file} is the caption file of {other} too; rename {image}", "failed": True}
            elif os.path.lexists(file):
                row |= {
                    "error": f"{file} exists and is kept; for a new caption of {image}, remove it and the folder .attncap-txt",
                    "failed": False,
                }
            taken.setdefault(file, image)

    def write(self, row: Row) -> None:
        """Writes the caption file of a row if it is missing, or empty as after a crash; a second call changes nothing."""
        file = self._file(row)
        if row["error"] or (os.path.exists(file) and os.path.getsize(file)):
            return
        captions = [row["caption"], *(other["caption"] for other in row["alternatives"])]
        with open(file, "wb", buffering=0) as stream:
            stream.write("".join(f"{caption}\n" for caption in captions).encode())

    def _file(self, row: Row) -> str:
        return os.path.splitext(row["path"])[0] + ".txt"

    def _same_stem(self, image: str, file: str) -> str | None:
        """Another image with the same caption file, if that file exists."""
        if not os.path.lexists(file):
            return None
        others = (os.path.splitext(image)[0] + ending for ending in ("", *ENDINGS))
        return next((other for other in others if other != image and os.path.isfile(other)), None)


def printable(path: str) -> str:
    r"""A path as valid text: bytes that are not UTF-8 become `\xe9` and the like."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _printable_texts(row: Row) -> Row:
    return {name: row[name] and printable(row[name]) for name in ("path", "error")}
