"""Augmented training images, their captions, and cached views that alternate by epoch."""

from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from hf_attncap.training.arguments import SettingError, parse_arguments
from hf_attncap.training.data.augmentation import (
    Augmentation,
    CachedViews,
    EpochRandomness,
    ImageRandomness,
    add_mirrored_references,
    augment_rows,
    mirror_captions,
)
from hf_attncap.training.data.checks import Decoding
from hf_attncap.training.data.feature_cache import cached_features
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hf_attncap import AttnCapConfig, AttnCapImageProcessor
from hf_attncap.encoder_attncap import GridEncoder

IMAGES = 12
CAPTIONS = ["A dog to the Left of a man", "two dogs"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Dataset:
    """Pictures whose left half is black; half of the captions name a side."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(IMAGES):
        pixels = np.zeros((40, 40, 3), dtype=np.uint8)
        pixels[:, 20:] = 80 + 10 * number
        Image.fromarray(pixels).save(folder / f"{number}.png")
    columns = {
        "image": [str(folder / f"{number}.png") for number in range(IMAGES)],
        "captions": [CAPTIONS if number % 2 else ["a dog"] for number in range(IMAGES)],
        "image_id": [str(number) for number in range(IMAGES)],
    }
    return Dataset.from_dict(columns).cast_column("image", ImageColumn(decode=False)).with_transform(Decoding())


def test_augmented_images_differ_between_epochs_with_equal_captions(rows):
    first, second, again = (augment_rows(rows, Augmentation(32, ImageRandomness(1, epoch)))[1] for epoch in (0, 1, 0))
    assert first["captions"] == second["captions"] == CAPTIONS and first["image_id"] == "1"
    assert np.asarray(first["image"]).shape == (32, 32, 3)
    assert not np.array_equal(np.asarray(first["image"]), np.asarray(second["image"]))
    assert np.array_equal(np.asarray(first["image"]), np.asarray(again["image"]))


def test_left_and_right_are_swapped_only_for_mirrored_images(rows):
    changed = augment_rows(rows, Augmentation(32, ImageRandomness(1, 0), recolour=False, mirror=True))
    seen = Counter()
    for number in range(IMAGES):
        row = changed[number]
        left, right = np.asarray(row["image"])[:, [0, -1]].mean(axis=(0, 2))
        if not (is_mirrored := left > right):
            assert (row["captions"], row["image_id"]) == (rows[number]["captions"], str(number))
        elif number % 2:
            assert row["captions"] == ["A dog to the Right of a man", "two dogs"]
            assert row["image_id"] == f"{number} mirrored"
        else:
            assert (row["captions"], row["image_id"]) == (["a dog"], str(number))
        seen[is_mirrored] += 1
    assert min(seen[True], seen[False]) >= 2


pieces = st.sampled_from(["left", "right", "Left", "Right", "leftright", "a", " ", "-", ","])


@given(st.lists(st.lists(pieces, max_size=12).map("".join), min_size=1))
def test_mirroring_captions_twice_restores_them(captions):
    assert mirror_captions(mirror_captions(captions, "a")[0], "a")[0] == captions


def test_only_whole_words_are_swapped():
    assert mirror_captions(["leftover bright RIGHT, left"], "a") == (["leftover bright Left, right"], "a mirrored")
    assert mirror_captions(["leftover"], "a") == (["leftover"], "a")


def test_references_include_mirrored_captions_that_differ():
    references = {"a": ["a dog"], "b": ["left", "x"]}
    assert add_mirrored_references(references) == {**references, "b mirrored": ["right", "x"]}


def test_cached_views_alternate_by_epoch(rows, tmp_path):
    """Each view once in so many epochs; the first is the picture itself; others have the captions that go with them."""
    torch.manual_seed(0)
    encoder = GridEncoder(AttnCapConfig(backbone="squeezenet1_1", encoder_channels=8, vocab_size=9)).eval()
    processor = AttnCapImageProcessor(size={"height": 32, "width": 32})
    randomness = EpochRandomness(1)
    change = Augmentation(32, randomness, mirror=True)

    def maps(images):
        return cached_features(encoder, processor, images, str(tmp_path))

    views = CachedViews(rows, maps, 3, change, randomness)
    assert len(list(tmp_path.glob("*.npy"))) == 3
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.npy")}
    CachedViews(rows, maps, 3, Augmentation(32, EpochRandomness(2), mirror=True), EpochRandomness(2))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.npy")} == before  # whatever the seed of a run

    def direct(dataset):
        return encoder.features(processor(dataset["image"], return_tensors="pt")["pixel_values"])[0]

    randomness.on_train_begin(None, type("State", (), {"epoch": 0}), None)
    for number in range(IMAGES):
        expected = [
            rows[number],
            *(augment_rows(rows, Augmentation(32, ImageRandomness(0, view), mirror=True))[number] for view in (1, 2)),
        ]
        expected = [(row["captions"], row["image_id"], direct(row)) for row in expected]
        met = []
        for _ in range(3):
            randomness.on_epoch_begin(None, None, None)
            got = views[number]
            features = torch.from_numpy(got["backbone_features"].astype(np.float32))
            met += [
                view
                for view, (captions, name, map_) in enumerate(expected)
                if torch.allclose(features, map_, atol=1e-2) and got["captions"] == captions and got["image_id"] == name
            ]
        assert sorted(met) == [0, 1, 2]


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (["--cached_views", "0"], "at least 1"),
        (["--cached_views", "2", "--augment", "True"], "needs `feature_cache`"),
        (["--cached_views", "2", "--feature_cache", "x"], "and `augment` or `mirror`"),
        (["--augment", "True", "--feature_cache", "x"], "set `cached_views: 4`"),
        (["--mirror", "True", "--feature_cache", "x"], "`mirror` changes images"),
    ],
)
def test_contradictory_augmentation_settings_are_refused(tmp_path, given_, message):
    with pytest.raises(SettingError, match=message):
        parse_arguments(["--train_file", "a.json", "--output_dir", str(tmp_path), *given_])
