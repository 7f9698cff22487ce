"""Paths with the characters of glob patterns are read as paths, in every setting that names a file or folder."""

import glob
import json

import pytest
from hf_attncap.training.arguments import SettingError
from hf_attncap.training.data.splits import load_data
from hf_attncap.training.train import main

from tests.test_data import (
    ROWS,
    TINY,
    VALIDATION,
    as_coco,
    as_csv,
    as_image_folder,
    as_jsonl,
    as_parquet,
    as_parquet_of_paths,
    as_saved_dataset,
    as_shards,
    content,
    data_arguments,
    picture,
)

STRANGE = ["[set] 1", "a*b", "is it?", "{a,b}", "x[!y]"]
WHOLE = [as_parquet, as_parquet_of_paths, as_csv, as_jsonl, as_coco, as_image_folder, as_saved_dataset, as_shards]


def decoy(folder, name):
    """A folder beside the one that is meant, which its name as a pattern matches, with pictures of another set."""
    for other in ("s 1", "axb", "is it!", "a", "xz"):
        (folder / other).mkdir()
        (folder / other / "train.parquet").write_bytes(b"not this one")
    (folder / name).mkdir()
    return folder / name


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("make", WHOLE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", STRANGE)
def test_data_are_found_in_folders_with_pattern_characters(make, name, relative, tmp_path, monkeypatch):
    folder = decoy(tmp_path, name)
    values = make(folder)
    if relative:
        monkeypatch.chdir(folder)
        values = {key: value.relative_to(folder) if hasattr(value, "parts") else value for key, value in values.items()}
    data = load_data(data_arguments(**values))
    assert sorted(content(data.train)) == ROWS and sorted(content(data.validation)) == VALIDATION


@pytest.mark.parametrize("make", [as_parquet, as_image_folder, as_shards], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", STRANGE[:2])
def test_data_are_streamed_from_folders_with_pattern_characters(make, name, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    data = load_data(data_arguments(**make(decoy(tmp_path, name)), streaming=True), seed=1)
    assert sorted(content(data.train)) == ROWS and sorted(content(data.validation)) == VALIDATION


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_file_named_like_a_pattern_is_read_alone(streaming, tmp_path):
    values = as_shards(tmp_path)
    (tmp_path / "train-0.tar").rename(tmp_path / "train-*.tar")
    rows = load_data(data_arguments(**values, streaming=streaming), seed=1).train
    assert sorted(content(rows)) == ROWS[:3]


def test_dataset_folder_with_pattern_characters_is_refused(tmp_path):
    folder = decoy(tmp_path, "[set] 1")
    as_parquet(folder)
    for streaming in (False, True):
        arguments = data_arguments(dataset_name=folder, streaming=streaming)
        with pytest.raises(SettingError, match=r"`dataset_name`: .*\[set\] 1 as a pattern.*rename the folder"):
            load_data(arguments)


def test_a_run_reads_and_writes_in_folders_with_pattern_characters(tmp_path):
    """Pictures, cached maps, checkpoints to go on from, and the captioner at the end."""
    folder = tmp_path / "[run] 1 {a}?*"
    folder.mkdir()
    values = as_csv(folder)
    values |= {"feature_cache": folder / "maps", "output_dir": folder / "out", "model_config": json.dumps(TINY)}
    values |= {"image_size": 32, "min_count": 1, "use_cpu": True, "report_to": "none", "save_steps": 1, "save_total_limit": 1}
    values |= {"num_logged_images": 1, "per_device_train_batch_size": 3}
    argv = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    assert main([*argv, "--max_steps", "1"]) == 0
    assert main([*argv, "--max_steps", "2", "--resume_from_checkpoint", "last"]) == 0
    out, escaped = folder / "out", glob.escape(str(folder))
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (out / "samples" / "final").is_dir() and len(glob.glob(f"{escaped}/maps/*.npy")) == 2
    again = {**values, "model_name_or_path": out, "output_dir": folder / "more"}
    assert main([word for key, value in again.items() for word in (f"--{key}", str(value))] + ["--max_steps", "1"]) == 0
    assert (folder / "more" / "model.safetensors").exists()


def test_image_with_colons_in_its_name_is_read(tmp_path):
    (tmp_path / "1::2.png").write_bytes(picture(1))
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "1::2.png", "captions": "x"}))
    assert content(load_data(data_arguments(train_file=tmp_path / "a.jsonl")).train) == [(1, ["x"])]
