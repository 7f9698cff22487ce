"""Columns with usual names are found in every data format."""

import csv
import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as Picture
from hf_attncap.training.arguments import SettingError
from hf_attncap.training.data.splits import load_data

from tests.test_data import ROWS, content, data_arguments, jsonl, picture, put_pictures, tar

EACH = [(red, text) for red, texts in ROWS for text in texts]


def as_csv(folder: Path, image: str, captions: str, ending: str = "csv") -> dict:
    put_pictures(folder, ROWS)
    with open(folder / f"train.{ending}", "w", newline="") as stream:
        lines = [[f"{red}.png", text] for red, text in EACH]
        csv.writer(stream, delimiter="\t" if ending == "tsv" else ",").writerows([[image, captions], *lines])
    return {"train_file": folder / f"train.{ending}"}


def as_captions_txt(folder: Path, image: str, captions: str) -> dict:
    """Flickr8k's own file."""
    return as_csv(folder, image, captions, "txt")


def as_tsv(folder: Path, image: str, captions: str) -> dict:
    return as_csv(folder, image, captions, "tsv")


def as_lines(folder: Path, image: str, captions: str) -> dict:
    put_pictures(folder, ROWS)
    return {"train_file": jsonl(folder / "list.jsonl", [{image: f"{red}.png", captions: texts} for red, texts in ROWS])}


def as_list(folder: Path, image: str, captions: str) -> dict:
    put_pictures(folder, ROWS)
    (folder / "list.json").write_text(json.dumps([{image: f"{red}.png", captions: texts} for red, texts in ROWS]))
    return {"train_file": folder / "list.json"}


def parquet(path: Path, image: str, captions: str) -> Path:
    columns = {image: [{"bytes": picture(red), "path": None} for red, _ in EACH], captions: [text for _, text in EACH]}
    Dataset.from_dict(columns, Features({image: Picture(), captions: Value("string")})).to_parquet(str(path))
    return path


def as_parquet(folder: Path, image: str, captions: str) -> dict:
    return {"train_file": parquet(folder / "train.parquet", image, captions)}


def as_dataset(folder: Path, image: str, captions: str) -> dict:
    parquet(folder / "train.parquet", image, captions)
    return {"dataset_name": folder}


def as_image_folder(folder: Path, image: str, captions: str) -> dict:
    put_pictures(folder, ROWS)
    jsonl(folder / "metadata.jsonl", [{"file_name": f"{red}.png", captions: text} for red, text in EACH])
    return {"data_dir": folder}


def as_image_folder_with_csv(folder: Path, image: str, captions: str) -> dict:
    as_csv(folder, "file_name", captions)["train_file"].rename(folder / "metadata.csv")
    return {"data_dir": folder}


def as_shards(folder: Path, image: str, captions: str) -> dict:
    file = tar(folder / "train.tar", ROWS, captions=captions)
    return {"train_file": file}


FORMATS = [as_csv, as_captions_txt, as_tsv, as_lines, as_list, as_parquet, as_dataset, as_image_folder, as_image_folder_with_csv]
FORMATS += [as_shards]
NAMES = [("image", "caption"), ("file_name", "text"), ("Path", "Caption"), ("filename", "raw")]


@pytest.mark.parametrize(("image", "captions"), NAMES)
@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_columns_with_usual_names_are_found_and_logged(make, image, captions, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        data = load_data(data_arguments(**make(tmp_path, image, captions)))
    assert sorted(content(data.train)) == ROWS
    assert f"`captions_column` is not set; using '{captions}'" in caplog.text
    named_by_datasets = make in (as_image_folder, as_image_folder_with_csv, as_shards)
    assert (f"`image_column` is not set; using '{image}'" in caplog.text) is (image != "image" and not named_by_datasets)


@pytest.mark.parametrize("make", [as_parquet, as_dataset, as_shards], ids=lambda make: make.__name__)
def test_columns_of_streams_are_found_and_logged(make, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    with caplog.at_level(logging.WARNING):
        data = load_data(data_arguments(**make(tmp_path, "photo", "caption"), streaming=True), seed=1)
    assert sorted((red, text) for red, texts in content(data.train) for text in texts) == sorted(EACH)
    assert "`captions_column` is not set; using 'caption'" in caplog.text


def test_the_only_image_column_is_used_whatever_its_name(tmp_path):
    path = parquet(tmp_path / "a.parquet", "pixels", "captions")
    assert sorted(content(load_data(data_arguments(train_file=path)).train)) == ROWS


LINE = {"image": "1.png", "captions": ["a dog"]}
SEVERAL = {
    "captions": ({"image": "1.png", "caption": "a dog", "text": "two"}, "captions_column", "caption, text"),
    "images": ({"path": "1.png", "file_name": "2.png", "caption": "a dog"}, "image_column", "path, file_name"),
}


@pytest.mark.parametrize(("line", "setting", "names"), SEVERAL.values(), ids=SEVERAL)
def test_several_possible_columns_are_refused_until_one_is_set(line, setting, names, tmp_path):
    put_pictures(tmp_path, ROWS)
    path = jsonl(tmp_path / "a.jsonl", [line])
    with pytest.raises(SettingError, match=f"2 possible columns, {names}: set `{setting}`"):
        load_data(data_arguments(train_file=path))
    for name in names.split(", "):
        assert len(load_data(data_arguments(train_file=path, **{setting: name})).train) == 1


def test_documented_names_have_precedence(tmp_path):
    put_pictures(tmp_path, ROWS)
    path = jsonl(tmp_path / "a.jsonl", [{**LINE, "path": "2.png", "caption": "not this", "text": "nor this"}])
    assert content(load_data(data_arguments(train_file=path)).train) == [(1, ["a dog"])]


def test_missing_column_of_shards_is_refused(tmp_path):
    values = as_shards(tmp_path, "image", "caption")
    assert sorted(content(load_data(data_arguments(**values, captions_column="caption")).train)) == ROWS
    with pytest.raises(SettingError, match="no member and no JSON field 'texts'.*caption: set `captions_column`"):
        load_data(data_arguments(**values, captions_column="texts"))
