"""Step 5b of the data flow: the features of the backbone's frozen blocks, computed once and kept on disk in half precision."""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_attncap.atomic import write_json

from ..arguments import SettingError
from ..processes import run_on_all_ranks, run_on_main_rank

logger = logging.getLogger(__name__)

BATCH = 32  # images per pass through the backbone
BLOCK = 4 * BATCH  # images between two records of progress


def cached_features(encoder, image_processor, dataset: Dataset, folder: str, workers: int = 0) -> np.ndarray:
    """The output of the encoder's frozen blocks for all images.

    Each process computes its share on its device; all processes must make this call and share `folder`.

    The file is named by a hash of the frozen weights, the image processing and the dataset's fingerprint, so a change of any of
    them computes new features. It has its name only when it is complete. Until then it is a `.partial` file with a record of its
    finished blocks of 128 images, and a later call resumes it, with any number of processes. A call that finds another run at
    work on the same file waits for it.

    Args:
        encoder: a `GridEncoder`.
        dataset: rows with `image`. An image that cannot be read must raise a `SettingError` that names it.
        folder: created if it does not exist.
        workers: processes that read images ahead, per process.

    Returns:
        (images, D', h', w') float16, memory-mapped, read-only; one entry per image.

    Raises:
        SettingError: on all processes, if one of them lacks disk space, cannot read an image, has features beyond the range of
            half precision, or sees other images or weights than the first. Finished blocks are kept. If a process is killed, the
            others end after the time-out of their process group (`ddp_timeout`).
    """
    state = PartialState()
    names = run_on_all_ranks(lambda: _fingerprint(encoder, image_processor, dataset))
    if len(set(names)) > 1:
        raise SettingError(
            "`feature_cache`: the processes of this run see different images or backbone weights: give all of them the same files, "
            "on a shared file system, and the same `seed`."
        )
    path = Path(folder) / f"{names[0]}.npy"
    with _lock(path), _moved_to(encoder, state.device):

        def missing_blocks() -> list[int]:
            return [] if path.exists() else _begin(encoder, image_processor, dataset, path)

        def compute_share() -> None:
            share = missing[state.process_index :: state.num_processes]
            _compute(encoder, image_processor, dataset, path, share, workers)

        missing = run_on_main_rank(missing_blocks)
        run_on_all_ranks(compute_share)
        run_on_main_rank(lambda: _finish(path))
    return np.load(path, mmap_mode="r")


def _fingerprint(encoder, image_processor, dataset: Dataset) -> str:
    frozen = torch.nn.Sequential(*encoder.blocks()[: encoder.frozen_blocks])
    digest = hashlib.sha256(json.dumps(image_processor.to_dict(), sort_keys=True, default=str).encode())
    digest.update(dataset._fingerprint.encode())
    digest.update(str(frozen).encode())  # padding is not among the weights
    for name, tensor in sorted(frozen.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, since numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Locks the file against other runs while this one computes it. The main process holds the lock for all."""
    lock = FileLock(path.with_suffix(".lock"))

    def acquire() -> None:
        if path.exists():
            return
        with _explain_disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.warning("feature cache: waiting for another run that computes %s", path)
                lock.acquire()

    run_on_main_rank(acquire)
    try:
        yield
        if lock.is_locked:
            # The file is complete: a run that still waits for this lock finds nothing left to do.
            Path(lock.lock_file).unlink(missing_ok=True)
    finally:
        lock.release()


@contextmanager
def _moved_to(encoder, device: torch.device | None) -> Iterator[None]:
    """Moves the encoder to the device in evaluation mode, and restores both afterwards."""
    before, mode = next(encoder.parameters()).device, encoder.training
    encoder.to(device).eval()
    try:
        yield
    finally:
        encoder.to(before).train(mode)


@contextmanager
def _explain_disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingError(
            f"`feature_cache`: {folder} cannot be written: {error}. Make room or give another folder; finished features are kept."
        ) from error


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


def _record(path: Path, process: int) -> Path:
    """The record of the blocks that a process has finished."""
    return path.with_suffix(f".done-{process}.json")


def _write_record(record: Path, done: list[int]) -> None:
    write_json(record, {"images_per_block": BLOCK, "done": sorted(done)})


def _read_records(path: Path) -> set[int] | None:
    """The blocks that earlier processes have finished; None if there is no partial file to resume."""
    records = [json.loads(record.read_text(encoding="utf-8")) for record in path.parent.glob(f"{path.stem}.done-*.json")]
    if not records or not _partial(path).exists() or any(record["images_per_block"] != BLOCK for record in records):
        return None
    return {block for record in records for block in record["done"]}


def _block_rows(block: int, images: int) -> range:
    return range(block * BLOCK, min((block + 1) * BLOCK, images))


def _begin(encoder, image_processor, dataset: Dataset, path: Path) -> list[int]:
    """Creates or finds the partial file, and returns the blocks that it lacks."""
    images, done = len(dataset), _read_records(path)
    if done is None:
        shape = (images, *_compute_batch(encoder, _process_images([dataset[0]], image_processor), "image 0").shape[1:])
    else:
        shape = np.load(_partial(path), mmap_mode="r").shape
    missing = [block for block in range(-(-images // BLOCK)) if done is None or block not in done]
    lacking = sum(len(_block_rows(block, images)) for block in missing)
    _check_space(path.parent, 2 * lacking * math.prod(shape[1:]))
    with _explain_disk_errors(path.parent):
        if done is None:
            # In this order: records must never describe a partial file that they were not written for.
            _remove(path.parent.glob(f"{path.stem}.done-*"))
            np.lib.format.open_memmap(_partial(path), mode="w+", dtype=np.float16, shape=shape).flush()
        else:
            logger.warning("feature cache: %d of %d images are already computed", images - lacking, images)
        _write_record(_record(path, 0), sorted(done or []))
        _remove(record for record in path.parent.glob(f"{path.stem}.done-*") if record != _record(path, 0))
    return missing


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink()


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SettingError(
            f"`feature_cache`: the features need {needed / 1e9:.3g} GB more in {folder}, which has {free / 1e9:.3g} GB free: make "
            "room, give another folder, or train without the cache. Finished features are kept."
        )


def _compute(encoder, image_processor, dataset: Dataset, path: Path, blocks: list[int], workers: int) -> None:
    """Writes blocks of images to the partial file, and records each once it is on the disk."""
    if not blocks:
        return
    state, images = PartialState(), len(dataset)
    record = _record(path, state.process_index)
    done = json.loads(record.read_text(encoding="utf-8"))["done"] if record.exists() else []
    mapped: Any = np.load(_partial(path), mmap_mode="r")
    starts = [start for block in blocks for start in _block_rows(block, images)[::BATCH]]
    # A generator of its own, so that a run draws the same random numbers whether or not the features are cached already.
    batches = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=[list(range(start, min(start + BATCH, images))) for start in starts],
        collate_fn=partial(_process_images, image_processor=image_processor),
        num_workers=workers,
        generator=torch.Generator(),
    )
    share = sum(len(_block_rows(block, images)) for block in blocks)
    bar = tqdm(total=share, desc="backbone features", unit="images", mininterval=10, disable=not state.is_main_process)
    # Written, not memory-mapped: a full disk is then an error and not a crash, and blocks of two machines share no pages.
    with open(_partial(path), "r+b") as file, bar:
        for start, pixel_values in zip(starts, batches):
            features = _compute_batch(encoder, pixel_values, f"images {start} to {min(start + BATCH, images) - 1}")  # (B, D, h, w)
            with _explain_disk_errors(path.parent):
                file.seek(mapped.offset + start * features[0].nbytes)
                file.write(features.tobytes())
                if start + len(features) == _block_rows(start // BLOCK, images).stop:
                    file.flush()
                    os.fsync(file.fileno())
                    done.append(start // BLOCK)
                    _write_record(record, done)
            bar.update(len(features))


def _finish(path: Path) -> None:
    if not path.exists():
        _partial(path).replace(path)
        _remove(path.parent.glob(f"{path.stem}.done-*"))


def _process_images(rows: list[dict[str, Any]], image_processor) -> torch.Tensor:
    """The pixel values (B, 3, height, width) of rows."""
    return image_processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]


def _compute_batch(encoder, pixel_values: torch.Tensor, images: str) -> np.ndarray:
    """The features (B, D, h, w) float16 of images (B, 3, height, width); `images` names them in errors."""
    with torch.inference_mode():
        features = encoder.features(pixel_values.to(next(encoder.parameters()).device))  # (B, D, h, w)
    if not features.abs().max() < torch.finfo(torch.float16).max:
        raise SettingError(f"The features of {images} exceed the range of half precision: train without `feature_cache`.")
    return features.half().cpu().contiguous().numpy()
