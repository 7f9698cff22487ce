"""Data formats: what each gives, which errors are reported, and a run from them."""

import csv
import io
import json
import logging
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as Picture
from hf_attncap.training.arguments import DataArguments, SettingError, parse_arguments
from hf_attncap.training.data.checks import check_table
from hf_attncap.training.data.sources import open_source
from hf_attncap.training.data.splits import load_data
from hf_attncap.training.data.table import Table
from hf_attncap.training.train import main
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

TINY = {
    "backbone": "mobilenet_v3_small",
    "encoder_channels": 8,
    "hidden_size": 8,
    "attention_dim": 8,
    "word_embed_dim": 8,
    "alpha_c": 0.0,  # one region at 32 pixels
}
Row = tuple[int, list[str]]  # red of the picture in tens, captions
ROWS: list[Row] = [(n, [f"a dog number {n}", f"the dog of {n}"]) for n in range(1, 7)]
VALIDATION: list[Row] = [(n, [f"a cat number {n}", f"the cat of {n}"]) for n in range(11, 14)]


def picture(red: int, side: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (red * 10, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def put_pictures(folder: Path, rows: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for red, _ in rows:
        (folder / f"{red}.png").write_bytes(picture(red))


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(rows: list[Row]) -> Dataset:
    features = Features({"image": Picture(), "captions": List(Value("string"))})
    columns = {"image": [{"bytes": picture(red), "path": None} for red, _ in rows], "captions": [texts for _, texts in rows]}
    return Dataset.from_dict(columns, features=features)


def as_parquet(folder: Path) -> dict:
    for name, rows in (("train", ROWS), ("validation", VALIDATION)):
        table(rows).to_parquet(str(folder / f"{name}.parquet"))
    return {"train_file": folder / "train.parquet", "validation_file": folder / "validation.parquet"}


def as_sharded_parquet(folder: Path) -> dict:
    for shard in (0, 1):
        table(ROWS[3 * shard : 3 * shard + 3]).to_parquet(str(folder / f"train-{shard}.parquet"))
    table(VALIDATION).to_parquet(str(folder / "validation.parquet"))
    return {"train_file": folder / "train-*.parquet", "validation_file": folder / "validation.parquet"}


def as_parquet_of_single_captions(folder: Path) -> dict:
    """Images as bytes, one caption per row, no ids: only the bytes show which rows have the same image."""
    for name, rows in (("train", ROWS), ("validation", VALIDATION)):
        each = [(red, text) for nth in (0, 1) for red, texts in rows for text in texts[nth : nth + 1]]
        images = [{"bytes": picture(red), "path": "picture.png"} for red, _ in each]  # the same name for all
        columns = {"image": images, "text": [text for _, text in each]}
        features = Features({"image": Picture(), "text": Value("string")})
        Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{name}.parquet"))
    return {
        "train_file": folder / "train.parquet",
        "validation_file": folder / "validation.parquet",
        "captions_column": "text",
    }


def as_parquet_of_paths(folder: Path) -> dict:
    put_pictures(folder / "pictures", ROWS + VALIDATION)
    for name, rows in (("train", ROWS), ("validation", VALIDATION)):
        columns = {"file": [f"pictures/{red}.png" for red, _ in rows], "captions": [texts for _, texts in rows]}
        Dataset.from_dict(columns).to_parquet(str(folder / f"{name}.parquet"))
    return {"train_file": folder / "train.parquet", "validation_file": folder / "validation.parquet", "image_column": "file"}


def as_parquet_of_caption_columns(folder: Path) -> dict:
    """One column per caption, empty if an image has fewer; the last column has lists."""
    for name, rows in (("train", ROWS), ("validation", VALIDATION)):
        images = [{"bytes": picture(red), "path": None} for red, _ in rows]
        columns = {"first": [texts[0] for _, texts in rows], "more": [texts[1:] or None for _, texts in rows]}
        features = Features({"image": Picture(), "first": Value("string"), "more": List(Value("string"))})
        Dataset.from_dict({"image": images, **columns}, features=features).to_parquet(str(folder / f"{name}.parquet"))
    return {
        "train_file": folder / "train.parquet",
        "validation_file": folder / "validation.parquet",
        "captions_column": "first+more",
    }


def as_csv(folder: Path) -> dict:
    put_pictures(folder / "elsewhere", ROWS + VALIDATION)
    for name, rows in (("train", ROWS), ("validation", VALIDATION)):
        with open(folder / f"{name}.csv", "w", newline="") as stream:
            lines = [[f"{red}.png", text] for nth in (0, 1) for red, texts in rows for text in texts[nth : nth + 1]]
            csv.writer(stream).writerows([["path", "caption"], *lines])
    return {
        "train_file": folder / "train.csv",
        "validation_file": folder / "validation.csv",
        "image_dir": folder / "elsewhere",
        "image_column": "path",
        "captions_column": "caption",
    }


def as_jsonl(folder: Path) -> dict:
    for name, rows in (("train", ROWS), ("validation", VALIDATION)):
        put_pictures(folder / name, rows)
        jsonl(folder / name / "list.jsonl", [{"image": f"{red}.png", "captions": texts} for red, texts in rows])
    return {"train_file": folder / "train" / "list.jsonl", "validation_file": folder / "validation" / "list.jsonl"}


def as_karpathy(folder: Path) -> dict:
    splits = {"train": ROWS[:4], "restval": ROWS[4:], "val": VALIDATION, "test": [(20, ["never seen"])]}
    images = []
    for split, rows in splits.items():
        put_pictures(folder / "images" / f"{split}2014", rows)
        for red, texts in rows:
            sentences = [{"raw": text, "tokens": text.split()} for text in texts]
            place = {"filepath": f"{split}2014", "filename": f"{red}.png", "split": split}
            images.append({**place, "cocoid": 1000 + red, "sentences": sentences})
    (folder / "dataset.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return {"train_file": folder / "dataset.json", "image_dir": folder / "images"}


def as_coco(folder: Path) -> dict:
    for name, rows in (("train", ROWS), ("validation", VALIDATION)):
        put_pictures(folder / f"{name}2017", rows)
        images = [{"id": red, "file_name": f"{red}.png"} for red, _ in rows]
        texts = [{"id": n, "image_id": red, "caption": text} for red, texts in rows for n, text in enumerate(texts)]
        (folder / f"{name}.json").write_text(json.dumps({"images": images, "annotations": texts}))
    return {
        "train_file": folder / "train.json",
        "validation_file": folder / "validation.json",
        "image_dir": folder / "train2017",
        "validation_image_dir": folder / "validation2017",
    }


def as_image_folder(folder: Path) -> dict:
    for name, rows in (("train", ROWS), ("validation", VALIDATION)):
        put_pictures(folder / "both" / name, rows)
        lines = [{"file_name": f"{red}.png", "captions": texts} for red, texts in rows]
        jsonl(folder / "both" / name / "metadata.jsonl", lines)
    return {"data_dir": folder / "both"}


def as_saved_dataset(folder: Path) -> dict:
    unseen = table([(20, ["never seen"])])
    DatasetDict({"train": table(ROWS), "val": table(VALIDATION), "test": unseen}).save_to_disk(folder / "set")
    return {"dataset_name": folder / "set"}


def as_dataset_folder(folder: Path) -> dict:
    """Files that `load_dataset` finds by their names, as on the Hub."""
    as_parquet(folder)
    return {"dataset_name": folder}


def tar(path: Path, rows: list[Row], member: str = "json", captions: str = "captions") -> Path:
    with tarfile.open(path, "w") as archive:
        for red, texts in rows:
            text = json.dumps({captions: texts}) if member == "json" else "\n".join(texts)
            for name, data in ((f"{red}.png", picture(red)), (f"{red}.{member}", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def as_shards(folder: Path) -> dict:
    tar(folder / "train-0.tar", ROWS[:3])
    tar(folder / "train-1.tar", ROWS[3:])
    return {"train_file": folder / "train-*.tar", "validation_file": tar(folder / "val.tar", VALIDATION)}


def as_shards_of_text(folder: Path) -> dict:
    train, validation = tar(folder / "train.tar", ROWS, "txt"), tar(folder / "val.tar", VALIDATION, "txt")
    return {"train_file": train, "validation_file": validation}


WHOLE = [
    as_parquet,
    as_sharded_parquet,
    as_parquet_of_single_captions,
    as_parquet_of_paths,
    as_parquet_of_caption_columns,
    as_csv,
    as_jsonl,
    as_karpathy,
    as_coco,
    as_image_folder,
    as_saved_dataset,
    as_dataset_folder,
    as_shards,
    as_shards_of_text,
]
STREAMED = [
    as_parquet,
    as_sharded_parquet,
    as_parquet_of_caption_columns,
    as_image_folder,
    as_dataset_folder,
    as_shards,
    as_shards_of_text,
]


def data_arguments(**values) -> DataArguments:
    return DataArguments(**{key: str(value) if isinstance(value, Path) else value for key, value in values.items()})


def content(rows) -> list[Row]:
    """Rows as they are read in training: the decoded colour of each picture and the captions."""
    found = []
    for row in rows:
        assert row["image"].mode == "RGB" and isinstance(row["image_id"], str)
        found.append((np.asarray(row["image"])[0, 0, 0] // 10, sorted(row["captions"])))
    return found


@pytest.mark.parametrize("make", WHOLE, ids=lambda make: make.__name__)
def test_each_format_gives_one_row_per_image_with_all_captions(make, tmp_path):
    data = load_data(data_arguments(**make(tmp_path)))
    assert sorted(content(data.train)) == ROWS and sorted(content(data.validation)) == VALIDATION
    assert len(set(data.train["image_id"])) == len(ROWS)
    assert data.captions(1) == data.train["captions"][:]


@pytest.mark.parametrize("make", STREAMED, ids=lambda make: make.__name__)
def test_streams_give_the_same_images_in_random_order(make, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)  # 5 s at each end of a Parquet stream
    data = load_data(data_arguments(**make(tmp_path), streaming=True), seed=3)
    rows = content(data.train)
    assert sorted(rows) == ROWS and rows != ROWS and sorted(content(data.validation)) == VALIDATION
    assert [sorted(captions) for captions in data.captions(4)] == [captions for _, captions in rows[:4]]


def test_restval_can_be_excluded(tmp_path):
    data = load_data(data_arguments(**as_karpathy(tmp_path), train_split="train", validation_split="restval+val"))
    assert sorted(content(data.train)) == ROWS[:4] and sorted(content(data.validation)) == ROWS[4:] + VALIDATION
    assert "1001" in data.train["image_id"]


def test_validation_share_selects_the_same_images_in_every_run(tmp_path):
    values = as_csv(tmp_path)
    del values["validation_file"]
    arguments = data_arguments(**values, validation_share=0.34)
    data = load_data(arguments)
    assert len(data.validation) == 2 and sorted(content(data.train) + content(data.validation)) == ROWS
    # In another order, as another stage with another file may have them, they are the same images.
    header, *lines = (tmp_path / "train.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join([header, *reversed(lines)]) + "\n")
    assert sorted(load_data(arguments).validation["image_id"]) == sorted(data.validation["image_id"])


def test_fingerprint_changes_only_with_the_files(tmp_path):
    """What is cached of a dataset is found by its fingerprint."""
    arguments = data_arguments(**as_jsonl(tmp_path))
    first, same = (load_data(arguments).train._fingerprint for _ in range(2))
    (tmp_path / "train" / "3.png").write_bytes(picture(25, 60))
    assert first == same != load_data(arguments).train._fingerprint


def table_of(names: list[str], captions: list[list[str]], single: bool) -> Table:
    size = len(names)
    images = Dataset.from_dict({"image": [{"bytes": b"", "path": None}] * size}, Features({"image": Picture(decode=False)}))
    return Table("here", "row", list(range(size)), images, [None] * size, captions, [single] * size, list(names))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["a dog", "two cats", "", " \n"])), max_size=12))
def test_rows_of_the_same_image_are_merged_without_losing_captions(rows):
    """Each image has all its captions that have a word; an image without one is reported."""
    split = check_table(table_of([name for name, _ in rows], [[text] for _, text in rows], single=True))
    expected = {name: [text for other, text in rows if other == name and text.strip()] for name, _ in rows}
    assert dict(zip(split.rows["image_id"][:], split.rows["captions"][:])) == {k: v for k, v in expected.items() if v}
    bare = sum(not texts for texts in expected.values())
    assert split.broken == [] if not bare else f"{bare} images have no caption" in split.broken[0]
    assert not split.problems


@settings(max_examples=40)
@given(st.lists(st.text("abc", min_size=1, max_size=2), min_size=1, max_size=8))
def test_repeated_images_with_caption_lists_are_a_problem(names):
    repeated = sum(count > 1 for count in Counter(names).values())
    problems = check_table(table_of(names, [["a dog"]] * len(names), single=False)).problems
    assert problems == [] if not repeated else f"{repeated} images are repeated" in problems[0]


def test_captions_without_a_word_are_dropped_and_reported(tmp_path, caplog):
    put_pictures(tmp_path, ROWS[:2])
    path = jsonl(
        tmp_path / "a.jsonl", [{"image": "1.png", "captions": ["a dog", " ", "?!"]}, {"image": "2.png", "captions": "two"}]
    )
    with caplog.at_level(logging.WARNING):
        data = load_data(data_arguments(train_file=path))
    assert data.train["captions"][:] == [["a dog"], ["two"]] and data.validation is None
    assert "captions without a word are left out, rows 1" in caplog.text


def test_csv_values_are_read_as_they_are_written(tmp_path):
    """A number keeps its zeros, "NA" is a word, and a byte order mark is not part of the first column's name."""
    put_pictures(tmp_path, ROWS[:2])
    (tmp_path / "a.csv").write_text("\ufeffimage,image_id,caption\n1.png,007,NA\n2.png,8,a dog\n", encoding="utf-8")
    rows = load_data(data_arguments(train_file=tmp_path / "a.csv")).train
    assert rows["image_id"][:] == ["007", "8"] and rows["captions"][:] == [["NA"], ["a dog"]]


def test_row_without_image_is_reported(tmp_path):
    columns = {"image": [{"bytes": picture(1), "path": None}, None], "captions": [["a dog"], ["a cat"]]}
    features = Features({"image": Picture(), "captions": List(Value("string"))})
    Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "a.parquet"))
    arguments = {"train_file": tmp_path / "a.parquet"}
    with pytest.raises(SettingError, match="1 images do not exist, rows 2"):
        load_data(data_arguments(**arguments))
    assert content(load_data(data_arguments(**arguments, skip_broken_images=True)).train) == [(1, ["a dog"])]


WRONG_FILES = {
    "no object": ("a.jsonl", '{"image": "1.png", "captions": "x"}\n[1]\n', "a.jsonl cannot be read as JSON: JSON parse error"),
    "no JSON": (
        "a.jsonl",
        '{"image": "1.png", "captions": "x"}\n{"image"\n',
        "JSON parse error: Missing a colon after a name of object member. in row 1",
    ),
    "no column": ("a.jsonl", '{"pixels": "1.png", "captions": "x"}\n', "a.jsonl has no column 'image', only pixels, captions"),
    "no path": ("a.jsonl", '{"image": 5, "captions": "x"}\n', "row 1: `image` is 5; expected an image or the path"),
    "no text": ("a.jsonl", '{"image": "1.png", "captions": ["x", 5]}\n', "row 1: the captions hold 5; expected a text or a list"),
    "no caption": ("a.jsonl", '{"image": "1.png", "captions": [null, " ", "... !"]}\n', "1 images have no caption, rows 1"),
    "no picture": ("a.jsonl", '{"image": "no.png", "captions": "x"}\n', "1 images do not exist, rows 1"),
    "twice": ("a.jsonl", '{"image": "1.png", "captions": ["x"]}\n' * 2, "1 images are repeated, rows 2"),
    "one id": (
        "a.jsonl",
        '{"image": "1.png", "image_id": 7, "captions": "x"}\n{"image": "2.png", "image_id": 7, "captions": "x"}\n',
        "1 images have one id but several files, rows 2",
    ),
    "nothing": ("a.jsonl", "\n", "cannot be read as JSON"),
    "list": ("a.json", '[{"image": "no.png", "captions": "x"}]', "1 images do not exist, rows 1"),
    "number": ("a.json", "5", "cannot be read as JSON"),
    "unknown kind": ("a.xyz", "image", "has an unknown format: expected Parquet"),
    "fields": ("a.csv", "image,captions\n1.png,a dog\n1.png,a dog, running\n", "Expected 2 fields in line 3, saw 3"),
    "quotes": ("a.csv", 'image,captions\n1.png,"a dog\n', "a.csv cannot be read as CSV: Error tokenizing data"),
    "Latin": ("a.csv", "image,captions\n1.png,caf\xe9\n", "a.csv cannot be read as CSV: 'utf-8' codec can't decode byte"),
    "no Parquet": ("a.parquet", "image", "cannot be read as Parquet"),
    "no tar": ("a.tar", "image", "cannot be read as WebDataset"),
    "Karpathy": ("a.json", '{"images": [{"split": "train", "filename": "1.png", "sentences": 3}]}', '"sentences" is a number'),
    "no train": ("a.json", '{"images": [{"split": "test", "filename": "1.png"}]}', "no split 'train', only test"),
    "no name": (
        "a.json",
        '{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "x"}]}',
        "1 has no `file_name`",
    ),
}


@pytest.mark.parametrize(("name", "text", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_malformed_files_are_reported_with_the_place(name, text, message, tmp_path):
    put_pictures(tmp_path, ROWS[:2])
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(SettingError) as error:
        load_data(data_arguments(train_file=tmp_path / name))
    assert message in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train_file", "a.csv", "--data_dir", "b"], "`data_dir` and `train_file` both"),
        (["--data_dir", "b", "--validation_file", "a.csv"], "with `data_dir` set `validation_split`"),
        (["--train_file", "a.csv", "--validation_file", "b.csv", "--validation_share", "0.1"], "give one of them"),
        (["--train_file", "a.csv", "--validation_share", "1.5"], "below 1"),
        (["--train_file", "a.csv", "--dataset_config_name", "en"], "`dataset_config_name` is not used"),
        (["--train_file", "a.tar", "--streaming"], "set `--max_steps`"),
        (["--train_file", "a.tar", "--streaming", "--max_steps", "1", "--feature_cache", "c"], "`feature_cache` needs all"),
        (["--train_file", "a.tar", "--streaming", "--max_steps", "1"], "No such data file: a.tar"),
        (["--train_file", "a.csv", "--streaming", "--max_steps", "1"], "a.csv cannot be streamed"),
        (["--data_dir", "nowhere"], "No such folder of images: nowhere"),
        (["--dataset_name", "./nowhere"], "The dataset ./nowhere cannot be loaded"),
    ],
)
def test_contradictory_settings_give_one_sentence(argv, message, capsys, tmp_path):
    assert main([*argv, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_evaluation_without_validation_images_is_refused(tmp_path, capsys):
    argv = [
        "--train_file",
        str(as_jsonl(tmp_path)["train_file"]),
        "--output_dir",
        str(tmp_path / "run"),
        "--eval_strategy",
        "epoch",
    ]
    assert main(argv) == 2
    assert "`eval_strategy` needs validation images and there are none: give `--validation_file`" in capsys.readouterr().err


def test_image_in_both_splits_is_reported(tmp_path):
    values = as_jsonl(tmp_path)
    jsonl(tmp_path / "validation" / "list.jsonl", [{"image": "../train/3.png", "captions": "a dog"}])
    with pytest.raises(SettingError, match="1 images of .*validation.* are also in .*train.*, .*3.png"):
        load_data(data_arguments(**values))


def test_equal_names_in_two_folders_are_two_images(tmp_path):
    for name, red in (("train", 1), ("validation", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(picture(red))
        jsonl(tmp_path / name / "list.jsonl", [{"image": "x.png", "captions": "a dog"}])
    files = {f"{name}_file": tmp_path / name / "list.jsonl" for name in ("train", "validation")}
    assert len(load_data(data_arguments(**files)).validation) == 1


def with_broken_pictures(folder: Path) -> dict:
    values = as_jsonl(folder)
    (folder / "train" / "2.png").write_bytes(picture(2)[:-30])
    (folder / "train" / "4.png").unlink()
    return values


def test_broken_image_raises_with_its_name_when_it_is_read(tmp_path):
    arguments = data_arguments(**as_jsonl(tmp_path))
    (tmp_path / "train" / "2.png").write_bytes(picture(2)[:-30])
    rows = load_data(arguments).train
    assert content([rows[0], rows[2]]) == [ROWS[0], ROWS[2]]
    with pytest.raises(SettingError, match=r"train/2.png: .*--inspect` to list .*`--skip_broken_images"):
        rows[1]


def test_broken_and_missing_images_are_skipped_on_request(tmp_path, caplog):
    values = with_broken_pictures(tmp_path)
    with pytest.raises(SettingError, match="1 images do not exist, rows 4 .*4.png.*`--skip_broken_images"):
        load_data(data_arguments(**values))
    with caplog.at_level(logging.WARNING):
        data = load_data(data_arguments(**values, skip_broken_images=True))
    assert content(data.train) == [row for row in ROWS if row[0] not in (2, 4)]
    assert "1 images do not exist, rows 4" in caplog.text and "1 broken images are left out" in caplog.text


def test_broken_images_of_a_stream_raise_or_are_skipped(tmp_path, caplog):
    path = tmp_path / "a.tar"
    tar(path, [*ROWS, (7, [" "])])
    raw = path.read_bytes()
    path.write_bytes(raw.replace(picture(3)[30:60], bytes(30)))
    stream = load_data(data_arguments(train_file=path, streaming=True), 0)
    with pytest.raises(SettingError, match="image (3|7): .*--inspect`"):
        list(stream.train)
    stream = load_data(data_arguments(train_file=path, streaming=True, skip_broken_images=True), 0)
    with caplog.at_level(logging.WARNING):
        assert sorted(content(stream.train)) == [row for row in ROWS if row[0] != 3]
    assert "image 3: " in caplog.text and "image 7: it has no caption" in caplog.text


def test_images_become_rgb_as_in_inference(tmp_path):
    Image.new("RGBA", (40, 40), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    path = jsonl(tmp_path / "a.jsonl", [{"image": "clear.png", "captions": "nothing"}])
    image = load_data(data_arguments(train_file=path)).train[0]["image"]
    assert image.mode == "RGB" and image.getpixel((5, 5)) == (255, 255, 255)


def inspected(values: dict, capsys, *more: str) -> tuple[int, str]:
    argv = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    code = main([*argv, "--inspect", "--min_count", "3", *more])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("make", [as_jsonl, as_karpathy, as_shards], ids=lambda make: make.__name__)
def test_inspection_of_clean_data(make, tmp_path, capsys):
    code, text = inspected(make(tmp_path), capsys, "--max_caption_words", "3")
    assert code == 0 and "problems: none" in text
    assert "vocabulary: 9 tokens at min_count 3" in text  # a, dog, number, of, the and the four special ones
    assert "6 images" in text and "3 images" in text and "captions: 12; images by number of captions: 2: 6" in text
    assert (
        "words per caption: minimum 4, median 4, 95th percentile 4, maximum 4" in text
        and "longer than 3 words (max_caption_words): 100.00%" in text
    )
    assert "width: 40 to 40 pixels" in text and "modes: RGB 6" in text
    assert "words in the vocabulary: 75.00%" in text and "words in the vocabulary: 50.00%" in text
    assert text.count(" | ") == 5


def test_inspection_lists_every_problem(tmp_path, capsys):
    values = with_broken_pictures(tmp_path)
    (tmp_path / "validation" / "11.png").write_bytes(picture(1))
    (tmp_path / "train" / "5.png").write_bytes(picture(5, 20))
    Image.new("L", (40, 40), 7).save(tmp_path / "train" / "6.png")
    with open(tmp_path / "train" / "list.jsonl", "a") as stream:
        stream.write('{"image": "../validation/12.png", "captions": ["- !"]}\n{"image": "1.png", "captions": ["again"]}\n')
    code, text = inspected(values, capsys)
    problems = text[text.index("problems:") :]
    assert code == 1
    for sentence in (
        "1 images do not exist, rows 4",
        "1 images have no caption, rows 7",
        "1 images are repeated, rows 8",
        "2.png: ",
        "1 images have a side below 32 pixels",
        "The same image occurs 2 times: train",
    ):
        assert sentence in problems
    assert "1 images are not RGB and will be converted: train" in text[: text.index("problems:")]
    assert not (tmp_path / "trainer_output").exists()


def test_inspection_notes_a_missing_validation_split(tmp_path, capsys):
    code, text = inspected({"train_file": as_jsonl(tmp_path)["train_file"]}, capsys)
    assert code == 0 and "There is no validation split." in text


RUNS = {
    "image folder": (as_image_folder, []),
    "Karpathy": (as_karpathy, ["--augment", "True"]),
    "share": (lambda folder: {"train_file": as_jsonl(folder)["train_file"], "validation_share": 0.3}, []),
    "shards": (as_shards, ["--streaming", "True"]),
    "shards, augmented": (as_shards, ["--streaming", "True", "--augment", "True", "--dataloader_num_workers", "1"]),
}


@pytest.mark.parametrize(("make", "more"), RUNS.values(), ids=RUNS)
def test_run_from_each_format(make, more, tmp_path):
    values = {
        **make(tmp_path),
        "output_dir": tmp_path / "run",
        "model_config": json.dumps(TINY),
        "min_count": 1,
        "image_size": 32,
        "captions_per_image": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "predict_with_generate": True,
        "report_to": "none",
        "num_logged_images": 0,
        "use_cpu": True,
    }
    assert main([*(word for key, value in values.items() for word in (f"--{key}", str(value))), *more]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["train_loss"] > 0 and metrics["eval_loss"] > 0 and "eval_cider" in metrics


@pytest.mark.parametrize("workers", ["0", "1"])
def test_broken_image_ends_a_run_with_one_sentence(workers, tmp_path, capsys):
    values = as_jsonl(tmp_path)
    for red, _ in ROWS:
        (tmp_path / "train" / f"{red}.png").write_bytes(b"no picture")
    argv = ["--train_file", values["train_file"], "--output_dir", tmp_path / "run", "--model_config", json.dumps(TINY)]
    argv += [
        "--min_count",
        "1",
        "--max_steps",
        "1",
        "--report_to",
        "none",
        "--use_cpu",
        "True",
        "--dataloader_num_workers",
        workers,
    ]
    assert main([*map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert ".png: " in error and "--inspect" in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["finetune", "flickr8k_mobilenet_v2_decoder", "flickr8k_mobilenet_v2_encoder"])
def test_configs_work_with_parquet_files(name, tmp_path):
    config = Path(__file__).parent.parent / "training" / "configs" / f"{name}.yaml"
    files = {key: str(value) for key, value in as_parquet(tmp_path).items()}
    if "cached_views" in config.read_text():
        files["feature_cache"] = str(tmp_path)
    argv = [word for key, value in files.items() for word in (f"--{key}", value)]
    _, data, _ = parse_arguments(["--config", str(config), *argv, "--output_dir", str(tmp_path)])
    assert len(load_data(data).train) == len(ROWS)


@pytest.mark.parametrize("make", [as_parquet, as_coco], ids=lambda make: make.__name__)
def test_split_of_a_file_without_splits_is_refused(make, tmp_path):
    with pytest.raises(SettingError, match="has no splits: leave out `train_split`"):
        open_source(data_arguments(train_file=make(tmp_path)["train_file"], train_split="train"), "train")


def test_validation_file_replaces_the_split_of_karpathys_file(tmp_path):
    values = as_karpathy(tmp_path)
    put_pictures(tmp_path / "images" / "more", [(9, [])])
    path = jsonl(tmp_path / "a.jsonl", [{"image": "more/9.png", "captions": ["mine"]}])
    data = load_data(data_arguments(**values, train_split="train", validation_file=path))
    assert content(data.validation) == [(9, ["mine"])] and len(data.train) == 4


def test_image_folder_with_one_split_and_one_caption_per_line(tmp_path):
    folder = tmp_path / "pictures"
    put_pictures(folder, ROWS)
    lines = [{"file_name": f"{red}.png", "text": text} for nth in (0, 1) for red, texts in ROWS for text in texts[nth : nth + 1]]
    jsonl(folder / "metadata.jsonl", lines)
    values = {"data_dir": folder, "captions_column": "text"}
    data = load_data(data_arguments(**values))
    assert sorted(content(data.train)) == ROWS and data.validation is None
    jsonl(folder / "metadata.jsonl", [*lines, {"file_name": "no.png", "text": "a dog"}])
    with pytest.raises(SettingError, match="1 images do not exist, rows 13 .*no.png"):
        load_data(data_arguments(**values))
    jsonl(folder / "metadata.jsonl", [{"file_name": "1.png", "words": "a dog"}])
    with pytest.raises(SettingError, match="no column 'captions', only image, words: set `captions_column`"):
        load_data(data_arguments(data_dir=folder))


def test_missing_split_of_a_dataset_is_refused(tmp_path):
    with pytest.raises(SettingError, match="has no split 'training', only train, val, test: set `train_split`"):
        load_data(data_arguments(**as_saved_dataset(tmp_path), train_split="training"))
    with pytest.raises(SettingError, match="is the validation split: leave out `validation_share`"):
        load_data(data_arguments(dataset_name=tmp_path / "set", validation_share=0.5))


def test_missing_caption_column_among_several_is_reported(tmp_path):
    settings = {**as_parquet_of_caption_columns(tmp_path), "captions_column": "first+second"}
    with pytest.raises(SettingError, match="no column 'second', only image, first, more: set `captions_column`"):
        load_data(data_arguments(**settings))


def test_id_column_identifies_images(tmp_path):
    put_pictures(tmp_path, ROWS[:2])
    lines = [{"image": f"{n}.png", "image_id": 5, "number": n, "captions": f"dog {n}"} for n in (1, 2)]
    path = jsonl(tmp_path / "a.jsonl", lines)
    assert load_data(data_arguments(train_file=path, image_id_column="number")).train["image_id"][:] == ["1", "2"]
    ids = load_data(data_arguments(train_file=path, image_id_column="")).train["image_id"][:]
    assert ids == [str(tmp_path / "1.png"), str(tmp_path / "2.png")]
