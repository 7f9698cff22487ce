"""The feature cache: its content, resuming, several processes, and errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from filelock import FileLock
from hf_attncap.training.arguments import SettingError
from hf_attncap.training.data import feature_cache as features
from hf_attncap.training.data.checks import Decoding
from hf_attncap.training.data.feature_cache import cached_features
from PIL import Image

from hf_attncap import AttnCapConfig, AttnCapImageProcessor
from hf_attncap.encoder_attncap import GridEncoder

ROOT = Path(__file__).parent.parent
IMAGES = 11
SIZE = {"height": 32, "width": 48}


@pytest.fixture
def small_blocks(monkeypatch):
    """Four images per block, two per pass."""
    monkeypatch.setattr(features, "BATCH", 2)
    monkeypatch.setattr(features, "BLOCK", 4)


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = random.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def rows_of(folder: Path) -> Dataset:
    files = sorted(folder.iterdir())
    columns = {"image": [str(file) for file in files], "image_id": [f"id-{file.stem}" for file in files]}
    return Dataset.from_dict(columns).cast_column("image", ImageColumn(decode=False)).with_transform(Decoding())


def tiny_encoder(seed: int = 0) -> GridEncoder:
    torch.manual_seed(seed)
    return GridEncoder(AttnCapConfig(backbone="squeezenet1_1", encoder_channels=8, vocab_size=9))


@pytest.fixture
def counted(monkeypatch):
    """How many images each pass through a backbone took."""
    passes: list[int] = []
    direct = GridEncoder.features
    monkeypatch.setattr(GridEncoder, "features", lambda self, x: passes.append(len(x)) or direct(self, x))
    return passes


def direct_maps(encoder: GridEncoder, processor: AttnCapImageProcessor, rows: Dataset) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([encoder.features(processor(row["image"], return_tensors="pt")["pixel_values"]) for row in rows])


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_holds_the_features_of_all_images_in_order(pictures, tmp_path, small_blocks, workers):
    rows, processor, encoder = rows_of(pictures), AttnCapImageProcessor(size=SIZE), tiny_encoder()
    maps = cached_features(encoder, processor, rows, str(tmp_path / "cache"), workers)
    expected = direct_maps(encoder, processor, rows)
    assert maps.dtype == np.float16 and maps.shape == expected.shape
    torch.testing.assert_close(torch.from_numpy(maps.copy()).float(), expected, rtol=1e-3, atol=1e-3)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".npy"], "something else was left behind"
    with pytest.raises(ValueError, match="read-only"):
        maps[0] = 0


def test_complete_cache_is_reused_and_uses_no_random_numbers(pictures, tmp_path, small_blocks, counted):
    rows, processor, encoder = rows_of(pictures), AttnCapImageProcessor(size=SIZE), tiny_encoder()
    after = []
    for _ in range(2):
        torch.manual_seed(0)
        cached_features(encoder, processor, rows, str(tmp_path / "cache"))
        after.append(torch.rand(1).item())
    assert sum(counted) == IMAGES + 1, "each image once, and one more for the shape"
    assert after[0] == after[1], "a run with the same seed would draw other random numbers"


def test_encoder_mode_and_device_are_restored(pictures, tmp_path):
    encoder = tiny_encoder()
    encoder.frozen = False
    encoder.train()
    cached_features(encoder, AttnCapImageProcessor(size=SIZE), rows_of(pictures), str(tmp_path / "cache"))
    assert encoder.training and encoder.backbone.training
    encoder.backbone.requires_grad_(True)
    encoder(torch.rand(1, 3, 32, 48)).last_hidden_state.sum().backward()  # raises for weights made in inference mode
    assert next(encoder.parameters()).device.type == "cpu"


# Run by a Python of its own: folders of the pictures and of the cache, and what to write about it.
SCRIPT = """
import json, sys, time
from pathlib import Path

from accelerate import PartialState

from tests.test_features import *


def run(pictures, cache):
    return cached_features(tiny_encoder(), AttnCapImageProcessor(size=SIZE), rows_of(Path(pictures)), cache)


if __name__ == "__main__":
    state = PartialState(cpu=True)
    features.BATCH, features.BLOCK = 2, 4
    passes = []
    direct = GridEncoder.features
    GridEncoder.features = lambda self, x: passes.append(len(x)) or direct(self, x)
    pictures, cache, report = sys.argv[1:4]
"""
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def script(folder: Path, body: str) -> str:
    file = folder / "script.py"
    file.write_text(SCRIPT + textwrap.indent(textwrap.dedent(body), "    "))
    return str(file)


@pytest.fixture
def one_thread():
    """As in the processes that the tests start, so that sums come in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_killed_run_resumes_after_the_last_finished_block(pictures, tmp_path, small_blocks, counted, one_thread):
    """SIGKILL in the second block; the final file equals that of an uninterrupted run, byte for byte."""
    whole, cut, reached = tmp_path / "whole", tmp_path / "cut", tmp_path / "reached"
    body = """
    def stopping(self, x):
        passes.append(len(x))
        if sum(passes) > 7:  # one for the shape, a block of four, and half of the next
            Path(report).touch()
            time.sleep(600)
        return direct(self, x)
    GridEncoder.features = stopping
    run(pictures, cache)
    """
    command = [sys.executable, script(tmp_path, body), str(pictures), str(cut), str(reached)]
    process = subprocess.Popen(command, env=ENV, cwd=ROOT)
    until = time.monotonic() + 120
    while not reached.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL and reached.exists()
    assert not list(cut.glob("*.npy")) and len(list(cut.glob("*.partial"))) == 1
    (record,) = cut.glob("*.done-*.json")
    assert json.loads(record.read_text())["done"] == [0]

    arguments = (tiny_encoder(), AttnCapImageProcessor(size=SIZE), rows_of(pictures))
    cached_features(*arguments, str(cut))
    assert counted == [2, 2, 2, 1], "only the unfinished blocks are computed"
    cached_features(*arguments, str(whole))
    assert sum(counted[4:]) == IMAGES + 1
    (first,), (second,) = whole.iterdir(), cut.iterdir()
    assert first.read_bytes() == second.read_bytes() and first.name == second.name


@pytest.mark.slow
def test_two_processes_share_the_work_and_its_errors(pictures, tmp_path, small_blocks, counted, one_thread):
    one, two, broken, report = (tmp_path / name for name in ("one", "two", "broken", "report"))
    shutil.copytree(pictures, broken)
    (broken / "05.png").write_bytes(b"no picture")
    body = """
    refusals = []
    run(pictures, cache)
    shared = sum(passes)
    for folder in ("broken", "broken" if state.process_index else "pictures"):
        try:
            run(Path(pictures).parent / folder, str(Path(cache).parent / "refused"))
        except SettingError as error:
            refusals.append(str(error))
    Path(f"{report}-{state.process_index}").write_text(json.dumps([shared, *refusals]))
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script(tmp_path, body)]
    command += [str(pictures), str(two), str(report)]
    done = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (shared, *refusals), (other, *others) = (json.loads(Path(f"{report}-{process}").read_text()) for process in (0, 1))
    assert (shared, other) == (1 + IMAGES - 4, 4), "blocks 0 and 2 with the picture for the shape, and block 1"
    assert refusals == others and len(refusals) == 2
    assert "image id-05: " in refusals[0]
    assert "the processes of this run see different images" in refusals[1]

    arguments = (tiny_encoder(), AttnCapImageProcessor(size=SIZE))
    cached_features(*arguments, rows_of(pictures), str(one))
    (first,), (second,) = one.iterdir(), two.iterdir()
    assert first.name == second.name and first.read_bytes() == second.read_bytes()

    counted.clear()
    (broken / "05.png").write_bytes((pictures / "05.png").read_bytes())
    cached_features(*arguments, rows_of(broken), str(tmp_path / "refused"))
    assert counted == [2, 2], "one process computes only the block that two processes did not finish"


def test_a_second_run_waits_for_the_first_and_uses_its_file(pictures, tmp_path, small_blocks, counted):
    arguments = (tiny_encoder(), AttnCapImageProcessor(size=SIZE), rows_of(pictures))
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    cached_features(*arguments, str(whole))
    (file,) = whole.iterdir()
    counted.clear()
    cache.mkdir()
    with FileLock(cache / file.with_suffix(".lock").name):
        second = Thread(target=cached_features, args=(*arguments, str(cache)), daemon=True)
        second.start()
        second.join(0.5)
        assert second.is_alive() and not counted
        shutil.copy(file, cache)
    second.join(30)
    assert not second.is_alive() and not counted
    assert [found.name for found in cache.iterdir()] == [file.name]


def test_broken_image_is_reported_and_the_next_run_resumes(pictures, tmp_path, small_blocks, counted):
    broken = pictures / "09.png"
    kept = broken.read_bytes()
    broken.write_bytes(kept[: len(kept) // 2])
    arguments = (tiny_encoder(), AttnCapImageProcessor(size=SIZE), rows_of(pictures), str(tmp_path / "cache"))
    for workers in (0, 1):
        with pytest.raises(SettingError, match="image id-09: "):
            cached_features(*arguments, workers)
    assert counted == [1, 2, 2, 2, 2]
    broken.write_bytes(kept)
    cached_features(*arguments)
    assert counted[5:] == [2, 1], "blocks done before the broken picture were computed again"


def test_a_partial_file_without_a_record_is_computed_again(pictures, tmp_path, small_blocks, counted):
    encoder, processor, cache = tiny_encoder(), AttnCapImageProcessor(size=SIZE), tmp_path / "cache"
    expected = cached_features(encoder, processor, rows_of(pictures), str(cache)).copy()
    (whole,) = cache.iterdir()
    whole.rename(whole.with_suffix(".partial"))
    counted.clear()
    np.testing.assert_array_equal(cached_features(encoder, processor, rows_of(pictures), str(cache)), expected)
    assert sum(counted) == IMAGES + 1


def change_nothing(encoder, settings, folder):
    pass


def change_weights(encoder, settings, folder):
    with torch.no_grad():
        next(encoder.backbone.parameters()).mul_(1.5)


def change_size(encoder, settings, folder):
    settings["size"] = {"height": 48, "width": 48}


def change_mean(encoder, settings, folder):
    settings["image_mean"] = [0.5, 0.5, 0.5]


def change_pictures(encoder, settings, folder):
    (folder / "10.png").unlink()


def change_window(encoder, settings, folder):
    """The windows come after the cache: theirs are not the backbone's weights."""
    with torch.no_grad():
        encoder.windows.weight.mul_(1.5)


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        (change_nothing, False),
        (change_window, False),
        (change_weights, True),
        (change_size, True),
        (change_mean, True),
        (change_pictures, True),
    ],
)
@pytest.mark.parametrize("begun", [False, True], ids=["whole", "begun"])
def test_features_of_other_weights_processing_or_images_are_not_used(
    pictures, tmp_path, monkeypatch, small_blocks, change, stale, begun
):
    encoder, settings, cache = tiny_encoder(), {"size": SIZE}, tmp_path / "cache"
    if begun:
        with monkeypatch.context() as patch:
            patch.setattr(features, "_finish", lambda path: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                cached_features(encoder, AttnCapImageProcessor(**settings), rows_of(pictures), str(cache))
    else:
        cached_features(encoder, AttnCapImageProcessor(**settings), rows_of(pictures), str(cache))
    change(encoder, settings, pictures)
    rows, processor = rows_of(pictures), AttnCapImageProcessor(**settings)
    with monkeypatch.context() as patch:
        passes: list[int] = []
        direct = GridEncoder.features
        patch.setattr(GridEncoder, "features", lambda self, x: passes.append(len(x)) or direct(self, x))
        maps = cached_features(encoder, processor, rows, str(cache))
    assert sum(passes) == (len(rows) + 1 if stale else 0)
    torch.testing.assert_close(torch.from_numpy(maps.copy()).float(), direct_maps(encoder, processor, rows), rtol=1e-3, atol=1e-3)


def test_too_little_disk_space_is_reported_first(pictures, tmp_path, monkeypatch, small_blocks, counted):
    usage = shutil.disk_usage(tmp_path)
    arguments = (tiny_encoder(), AttnCapImageProcessor(size=SIZE), rows_of(pictures), str(tmp_path / "cache"))
    needed = IMAGES * 512 * 1 * 2 * 2  # images * D * h * w * 2 bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed - 1))
    with pytest.raises(SettingError, match=f"need {needed / 1e9:.3g} GB more in .*cache, which has .* GB free: make room"):
        cached_features(*arguments)
    assert counted == [1] and not list((tmp_path / "cache").glob("*.partial"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed))
    cached_features(*arguments)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
def test_a_full_disk_gives_one_sentence(pictures, tmp_path, monkeypatch, small_blocks):
    arguments = (tiny_encoder(), AttnCapImageProcessor(size=SIZE), rows_of(pictures), str(tmp_path / "cache"))
    fsync = os.fsync
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 3:  # the record of the start, then a block and its record
            Path("/dev/full").write_text("no room")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SettingError, match="cannot be written: .*No space left.* Make room"):
            cached_features(*arguments)
    maps = cached_features(*arguments)
    torch.testing.assert_close(torch.from_numpy(maps.copy()).float(), direct_maps(*arguments[:3]), rtol=1e-3, atol=1e-3)


def test_features_beyond_half_precision_are_refused(pictures, tmp_path):
    encoder = tiny_encoder()
    with torch.no_grad():
        for parameter in encoder.backbone.parameters():
            parameter.mul_(4)
    with pytest.raises(SettingError, match="The features of .* exceed the range of half precision: train without `feature_cache`"):
        cached_features(encoder, AttnCapImageProcessor(size=SIZE), rows_of(pictures), str(tmp_path / "cache"))
