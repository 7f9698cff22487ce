"""What is pickled for the worker processes of a data loader where they are spawned (macOS, Windows, Python 3.14)."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hf_attncap.training.arguments import DataArguments
from hf_attncap.training.data.augmentation import Augmentation, CachedViews, EpochRandomness, augment_rows
from hf_attncap.training.data.checks import Decoding
from hf_attncap.training.data.collator import CaptionCollator
from hf_attncap.training.data.splits import load_data
from PIL import Image
from torch.utils.data import DataLoader

from hf_attncap import AttnCapProcessor

IMAGES = 6
SHAPE = (IMAGES, 16, 40, 40)  # 300 kB in half precision
METHODS = ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)]


def texts() -> Dataset:
    """Without pictures, as maps are there."""
    names = [f"image {row}" for row in range(IMAGES)]
    return Dataset.from_dict({"image": names, "captions": [[f"{name} a", f"{name} b"] for name in names], "image_id": names})


def mapped(folder: Path) -> np.ndarray:
    path = folder / "maps.npy"
    np.save(path, np.random.default_rng(0).normal(size=SHAPE).astype(np.float16))
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("method", METHODS)
def test_workers_open_the_feature_file_themselves(method, tmp_path):
    rows = CachedViews(texts(), lambda _: mapped(tmp_path))
    assert len(pickle.dumps(rows)) < 20_000 < np.prod(SHAPE)
    loader: Any = DataLoader(rows, batch_size=4, collate_fn=list, num_workers=1, multiprocessing_context=method)
    for (number, expected), found in zip(enumerate(rows), [row for batch in loader for row in batch], strict=True):  # type: ignore[arg-type]
        np.testing.assert_array_equal(found["backbone_features"], expected["backbone_features"])
        assert (found["captions"], found["image_id"]) == (expected["captions"], f"image {number}")


def test_features_in_memory_are_pickled(tmp_path):
    rows = CachedViews(texts(), lambda _: np.array(mapped(tmp_path)))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows))[3]["backbone_features"], rows[3]["backbone_features"])


def noise(row: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(row).integers(0, 256, (120, 120, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_images_of_a_table_are_not_pickled(tmp_path):
    pictures = [{"bytes": noise(row), "path": None} for row in range(IMAGES)]
    path = tmp_path / "train.parquet"
    Dataset.from_dict({"image": pictures, "captions": [["a dog"]] * IMAGES}).to_parquet(str(path))
    rows: Any = load_data(DataArguments(train_file=str(path))).train
    assert len(pickle.dumps(rows)) < sum(len(picture["bytes"]) for picture in pictures) / 10
    again = pickle.loads(pickle.dumps(rows))
    assert np.array_equal(np.asarray(again[4]["image"]), np.asarray(rows[4]["image"]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_see_each_new_epoch(method, tiny_checkpoint):
    """Crops and captions of an epoch do not depend on how workers are started, and differ from those of the next one."""
    pictures = [{"bytes": noise(row), "path": None} for row in range(IMAGES)]
    captions = [[f"{size} dogs" for size in ("two", "big", "red", "small", "black")]] * IMAGES
    rows = Dataset.from_dict({"image": pictures, "captions": captions, "image_id": [f"{row}" for row in range(IMAGES)]})
    randomness = EpochRandomness(3)
    collate = CaptionCollator(AttnCapProcessor.from_pretrained(tiny_checkpoint), captions_per_image=3, randomness=randomness)
    change = augment_rows(rows.with_transform(Decoding()), Augmentation(64, randomness))
    workers: dict[str, Any] = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": method}
    here, there = (DataLoader(change, batch_size=IMAGES, collate_fn=collate, **settings) for settings in ({}, workers))
    randomness.on_train_begin(None, type("State", (), {"epoch": 0}), None)
    epochs = []
    for _ in range(2):
        randomness.on_epoch_begin(None, None, None)
        (expected,), (found,) = list(here), list(there)
        assert torch.equal(found["pixel_values"], expected["pixel_values"]) and torch.equal(found["labels"], expected["labels"])
        epochs.append(found)
    assert not torch.equal(epochs[0]["pixel_values"], epochs[1]["pixel_values"])
