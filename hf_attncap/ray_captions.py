"""Captions the images of folders, Parquet files and WebDataset shards with Ray Data, on one machine or a cluster.

Ray Data distributes the work, moves the images and repeats the unfinished work of lost nodes. Each output shard belongs to fixed
inputs. It is written under a temporary name once all of its captions have arrived, and then renamed. So a shard is either complete
or absent. A second run with the same inputs and settings writes the missing shards.
"""

import hashlib
import io
import json
import logging
import os
import posixpath
import re
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    import ray.data
    from pyarrow import fs
except ImportError as error:
    raise ImportError(f'captions with Ray need Ray Data: pip install "hf_attncap[ray]" ({error})') from error

from .batches import ERROR_COLUMN, BatchCaptioner
from .captioner import CHECKPOINT
from .images import describe_error

PLAN_FILE = "attncap_run.json"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".ppm")
EMPTY = -1  # the row of an input without images
UNKNOWN = -1  # how many rows an input has
CPUS_PER_MODEL, CPUS_PER_READER = 0.75, 0.25  # a machine with one CPU has room for both
BLOCKS_PER_CPU = 4  # tasks of the readers, so that those that begin late find work
COLUMNS = pa.schema(
    [("path", pa.string()), ("row", pa.int64()), ("key", pa.string()), ("caption", pa.string()), ("error", pa.string())]
)


@dataclass
class Unit:
    """An input file: an image, a Parquet file or a tar file.

    Attributes:
        root: the path or URI that was given; its file system is that of the file.
        path: of the file in that file system.
        shard: number of the output shard.
    """

    root: str
    path: str
    shard: int


class Shard:
    """The rows of an output shard that have arrived.

    Attributes:
        places: the inputs of the shard in order.
        rows: by input and row.
    """

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}
        self._totals: dict[str, int] = {}  # rows of the inputs whose last row has arrived
        self._expected = 0  # their sum

    def add(self, row: dict[str, Any]) -> bool:
        """Adds a row and returns whether the shard is complete. The same row may arrive again after a failure."""
        if row["row"] != EMPTY:
            self.rows[row["path"], row["row"]] = row
        if row["total"] != UNKNOWN and row["path"] not in self._totals:
            self._totals[row["path"]] = row["total"]
            self._expected += row["total"]
        return len(self._totals) == len(self.places) and len(self.rows) == self._expected


def caption_dataset(
    dataset: "ray.data.Dataset",
    model: str | os.PathLike | None = None,
    *,
    image_column: str = "image",
    batch_size: int = 32,
    concurrency: int | tuple[int, int] | None = None,
    num_gpus: float | None = None,
    **options: Any,
) -> "ray.data.Dataset":
    """Adds captions to a Ray dataset.

    ```python
    rows = ray.data.read_parquet("s3://bucket/photos/")
    caption_dataset(rows, image_column="photo").write_parquet("s3://bucket/captions/")
    ```

    Args:
        dataset: has a column of images: bytes of image files, arrays, paths or URLs.
        model: a folder that all nodes can read, or a Hub repository. Default: the checkpoint in this package.
        image_column: the column of images.
        batch_size: images per forward pass.
        concurrency: the number of actors, each with its own model, or the minimum and maximum number. Default: from 1 to one per
            GPU, or without GPUs one per CPU.
        num_gpus: GPUs per actor. Default: 1 if the cluster has any, else 0.
        options: those of `BatchCaptioner`, such as `output_column`, `num_beams` and `dtype`.

    Returns:
        The dataset with two more columns: "caption", and "error", which is "" or says why an image has no caption.
    """
    return _map_captions(dataset, _Captions, model, {"image_column": image_column, **options}, batch_size, concurrency, num_gpus)


def _map_captions(
    dataset: "ray.data.Dataset",
    captioner: type[BatchCaptioner],
    model: str | os.PathLike | None,
    options: dict[str, Any],
    batch_size: int,
    concurrency: int | tuple[int, int] | None,
    num_gpus: float | None,
) -> "ray.data.Dataset":
    """Captions a dataset in actors."""
    resources = ray.cluster_resources()
    if num_gpus is None:
        num_gpus = 1 if resources.get("GPU") else 0
    if concurrency is None:
        concurrency = 1, max(int(resources["GPU"] / num_gpus if num_gpus else resources.get("CPU", 1)), 1)
    least, most = (concurrency, concurrency) if isinstance(concurrency, int) else concurrency
    return dataset.map_batches(
        captioner,  # pyright: ignore[reportArgumentType]
        fn_constructor_args=(None if model is None else str(model),),
        fn_constructor_kwargs={**options, "batch_size": batch_size},
        batch_size=batch_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
        num_gpus=num_gpus,
        num_cpus=None if num_gpus else CPUS_PER_MODEL,
    )


class _Captions(BatchCaptioner):
    """`BatchCaptioner` for batches of arrays."""

    def __call__(self, batch: Any) -> Any:
        return super().__call__(dict(batch))


class _NamedCaptions(BatchCaptioner):
    """Captions the rows of `_read`, and returns them without the images. Errors name the input and not the bytes."""

    def __call__(self, batch: Any) -> Any:
        unread = list(batch[ERROR_COLUMN])
        found = super().__call__({name: values for name, values in batch.items() if name != ERROR_COLUMN})
        errors = []
        for path, key, reading, captioning in zip(found["path"], found["key"], unread, found[ERROR_COLUMN]):
            name = f"{path}: {key}" if key else path
            errors.append(
                reading or re.sub(r"^(the bytes object of length \d+|images\[\d+\])", lambda _, name=name: name, captioning)
            )
        del found[self.image_column]
        return {**found, ERROR_COLUMN: errors}


def caption_with_ray(
    inputs: list[str],
    output: str,
    model: str | None = None,
    *,
    image_column: str = "image",
    shard_size: int = 10_000,
    batch_size: int = 32,
    concurrency: int | None = None,
    num_gpus: float | None = None,
    **options: Any,
) -> int:
    """Captions images and writes Parquet shards with the columns `path`, `row`, `key`, `caption` and `error`.

    Args:
        inputs: image files, Parquet files (.parquet), WebDataset shards (.tar) and folders of these: paths or URIs of file systems
            that pyarrow reads, such as s3:// and gs://. All nodes must have access to them.
        output: the folder of the shards: a path or URI that this process can write. `part-00000.parquet` has the captions
            of one Parquet or tar file, or of `shard_size` image files. Rows are in the order of the inputs. `row` counts
            the images of an input from 0; `key` is the name in a tar file.
        model: as for `caption_dataset`.
        image_column: of Parquet inputs: bytes, or what `datasets` stores for images.
        shard_size: image files per output shard.
        batch_size, concurrency, num_gpus: as for `caption_dataset`.
        options: arguments of `Captioner.from_pretrained` and `Captioner.caption`.

    Returns:
        0, or 1 if an image has no caption; its row has the reason.

    Raises:
        ValueError: there are no inputs, or `output` belongs to a run with other inputs or settings.
        OSError: an input or the output cannot be listed or written.
    """
    system, folder = _file_system(output)
    units = find_units(inputs, shard_size)
    count = units[-1].shard + 1
    settings = {"model": _model_digest(model), "image_column": image_column, "shard_size": shard_size, **options}
    _check_plan(system, folder, output, units, settings)
    finished = {posixpath.basename(info.path) for info in system.get_file_info(fs.FileSelector(folder))}
    open_units = [unit for unit in units if _shard_name(unit.shard) not in finished]
    shards: dict[int, Shard] = {}
    for unit in open_units:
        places = shards.setdefault(unit.shard, Shard()).places
        places[_name(unit)] = len(places)
    print(f"attncap: {len(units)} input files; {count - len(shards)} of {count} shards are finished", file=sys.stderr)
    earlier = sum(_count_errors(system, folder, number) for number in range(count) if number not in shards)
    if not shards:
        return int(earlier > 0)
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # stderr is for errors and the progress bar
    blocks = min(len(open_units), max(int(BLOCKS_PER_CPU * ray.cluster_resources().get("CPU", 1)), len(shards)))
    read = ray.data.from_items([asdict(unit) for unit in open_units], override_num_blocks=blocks).flat_map(
        _read,  # pyright: ignore[reportArgumentType]
        fn_kwargs={"image_column": image_column},
        num_cpus=CPUS_PER_READER,
    )
    rows = _map_captions(read, _NamedCaptions, model, options, batch_size, concurrency, num_gpus)
    start, images, broken = time.monotonic(), 0, 0
    for row in rows.iter_rows():
        shard = shards[row["shard"]]
        if shard.add(row):
            table = _write_shard(system, folder, row["shard"], shard)
            images, broken = images + len(table), broken + sum(1 for error in table["error"].to_pylist() if error)
            del shards[row["shard"]]
    if shards:
        raise OSError(f"{output}: {len(shards)} shards are incomplete, as inputs changed while they were read: run it again.")
    seconds = time.monotonic() - start
    print(
        f"attncap: {images} images in {seconds:.0f} s, {images / seconds:.1f} per second; {broken} without caption", file=sys.stderr
    )
    return int(earlier + broken > 0)


def _count_errors(system: fs.FileSystem, folder: str, shard: int) -> int:
    """The number of images without a caption in a finished shard."""
    errors = pq.read_table(posixpath.join(folder, _shard_name(shard)), columns=["error"], filesystem=system)["error"]
    return sum(1 for error in errors if error.as_py())


def find_units(inputs: list[str], shard_size: int) -> list[Unit]:
    """The input files in a fixed order, with the number of the output shard of each."""
    found: dict[str, Unit] = {}
    for root in inputs:
        system, path = _file_system(root)
        info = system.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise ValueError(f"{root} does not exist: give image, Parquet or tar files, or a folder of these.")
        files = [info] if info.is_file else system.get_file_info(fs.FileSelector(path, recursive=True))
        names = [file.path for file in files if file.is_file and _is_input(file.path.removeprefix(path))]
        for name in [path] if info.is_file else sorted(names):
            unit = Unit(root, name, 0)
            found.setdefault(_name(unit), unit)
    if not found:
        raise ValueError(f"There is no image, Parquet or tar file in {', '.join(inputs)}: give a folder that has some.")
    shard, in_shard = 0, 0
    for unit in found.values():
        alone = unit.path.endswith((".parquet", ".tar"))
        if in_shard and (alone or in_shard == shard_size):
            shard, in_shard = shard + 1, 0
        unit.shard = shard
        in_shard += 1
        if alone:
            shard, in_shard = shard + 1, 0
    return list(found.values())


def _is_input(path: str) -> bool:
    """Whether a file of a folder is captioned. Only its ending counts: reading every file of a bucket would take too long."""
    return path.lower().endswith((*IMAGE_ENDINGS, ".parquet", ".tar")) and "/." not in f"/{path}"


def _file_system(path: str) -> tuple[Any, str]:
    """The file system of a path or URI, and the path in it."""
    if "://" not in path:
        return fs.LocalFileSystem(), os.path.abspath(path)
    try:
        return fs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is not a location that pyarrow reads ({error}): give a path or a URI such as s3://bucket/a."
        ) from error


def _name(unit: Unit) -> str:
    """What the output calls an input: a path, or the URI of a file elsewhere."""
    scheme, separator, _ = unit.root.partition("://")
    return f"{scheme}://{unit.path}" if separator and scheme != "file" else unit.path


def _read(unit: dict[str, Any], image_column: str) -> Iterator[dict[str, Any]]:
    """The images of an input as rows. The last one has the number of rows in `total`."""
    held: dict[str, Any] | None = None
    number = 0
    one = Unit(**unit)
    common = {"shard": one.shard, "path": _name(one)}
    for key, image, error in _images(one, image_column):
        if held is not None:
            yield held
        held = {**common, "row": number, "key": key, "image": image, "error": error, "total": UNKNOWN}
        number += 1
    yield {**(held or {**common, "row": EMPTY, "key": "", "image": b"", "error": "no images"}), "total": number}


def _images(unit: Unit, image_column: str) -> Iterator[tuple[str, bytes, str]]:
    """The key, bytes and error of each image of an input. An input that cannot be read further ends with an error."""
    system, path = _file_system(unit.root)[0], unit.path
    try:
        if path.endswith(".parquet"):
            yield from _parquet_images(system, path, image_column)
        elif path.endswith(".tar"):
            yield from _tar_images(system, path)
        else:
            with system.open_input_stream(path) as stream:
                yield "", stream.read(), ""
    except Exception as error:  # of any kind: file systems, damaged files; the other inputs go on
        yield "", b"", f"{_name(unit)} cannot be read ({describe_error(error)}); check or replace it"


def _parquet_images(system: Any, path: str, column: str) -> Iterator[tuple[str, bytes, str]]:
    with system.open_input_file(path) as stream, pq.ParquetFile(stream) as file:
        if column not in file.schema_arrow.names:
            raise ValueError(f"there is no column '{column}' but {', '.join(file.schema_arrow.names)}; give `image_column`")
        for batch in file.iter_batches(batch_size=64, columns=[column]):
            for value in batch.column(0).to_pylist():
                value = value.get("bytes") if isinstance(value, dict) else value
                yield (
                    "",
                    value if isinstance(value, bytes) else b"",
                    "" if isinstance(value, bytes) else "the row has no bytes of an image",
                )


def _tar_images(system: Any, path: str) -> Iterator[tuple[str, bytes, str]]:
    with system.open_input_stream(path) as stream, tarfile.open(fileobj=io.BufferedReader(stream), mode="r|") as file:
        for member in file:
            content = file.extractfile(member) if member.isfile() else None
            if content is not None and member.name.lower().endswith(IMAGE_ENDINGS):
                yield member.name, content.read(), ""


def _model_digest(model: str | None) -> str:
    """A digest of a model's files, or the name of a Hub repository."""
    folder = CHECKPOINT if model is None else Path(model)
    if not folder.is_dir():
        return str(model)
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".onnx", ".xml", ".bin") and file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _check_plan(system: Any, folder: str, output: str, units: list[Unit], settings: dict[str, Any]) -> None:
    """Writes inputs and settings to the output; raises a ValueError if they differ from those of an earlier run."""
    listed = hashlib.sha256(json.dumps([asdict(unit) for unit in units]).encode()).hexdigest()
    plan = {"version": 1, "inputs": listed, "settings": {name: value for name, value in settings.items() if value is not None}}
    plan = json.loads(json.dumps(plan, default=str))
    system.create_dir(folder)
    path = posixpath.join(folder, PLAN_FILE)
    if system.get_file_info(path).is_file:
        with system.open_input_stream(path) as stream:
            earlier = json.loads(stream.read())
        if earlier != plan:
            old, new = earlier.get("settings", {}), plan["settings"]
            changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name)) or ["the input files"]
            raise ValueError(
                f"{output} has shards of a run with other values of {', '.join(changed)}: give another folder, or remove it."
            )
        return
    if any(True for _ in system.get_file_info(fs.FileSelector(folder))):
        raise ValueError(f"{output} has files that `attncap caption --engine ray` did not write: give another folder.")
    _write(system, path, json.dumps(plan, indent=2).encode())


def _shard_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _write_shard(system: Any, folder: str, number: int, shard: Shard) -> pa.Table:
    rows = sorted(shard.rows.values(), key=lambda row: (shard.places[row["path"]], row["row"]))
    table = pa.Table.from_pylist([{name: row[name] for name in COLUMNS.names} for row in rows], COLUMNS)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    _write(system, posixpath.join(folder, _shard_name(number)), buffer.getvalue())
    return table


def _write(system: Any, path: str, content: bytes) -> None:
    """Writes a file under a temporary name and then renames it, so that it is either complete or absent."""
    temporary = posixpath.join(posixpath.dirname(path), f".{posixpath.basename(path)}.tmp")
    with system.open_output_stream(temporary) as stream:
        stream.write(content)
    system.move(temporary, path)


__all__ = ["caption_dataset", "caption_with_ray"]
