"""Caption files of every format, valid and broken."""

import gzip
import json

import pytest
from caption_files import COCO, KARPATHY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_attncap.metrics.files import CaptionFileError, read_predictions, read_references, read_training

PREDICTIONS = {"12": "A dog.", "x/y.jpg": ""}
PREDICTION_FILES = {
    "coco results": [[{"image_id": 12, "caption": "A dog."}, {"image_id": "x/y.jpg", "caption": ""}]],
    "json lines": [{"image_id": 12, "caption": "A dog."}, {"image_id": "x/y.jpg", "captions": [""]}],
    "attncap caption --json": [
        {"path": "12", "caption": "A dog.", "score": -0.5, "words": [], "alternatives": []},
        {"path": "x/y.jpg", "caption": "", "score": -1.0, "words": [], "alternatives": []},
    ],
    "mapping": [PREDICTIONS],
    "mapping to lists": [{"12": ["A dog."], "x/y.jpg": [""]}],
    "indented": [json.dumps(PREDICTIONS, indent=2)],
    "blank lines and Windows ends": ['\n{"image_id": 12, "caption": "A dog."}\r\n\r\n{"image_id": "x/y.jpg", "caption": ""}\r\n'],
    "byte order mark": ["\ufeff" + json.dumps(PREDICTIONS)],
}


@pytest.mark.parametrize("values", PREDICTION_FILES.values(), ids=PREDICTION_FILES)
def test_predictions_in_every_format(write, values):
    predictions = read_predictions(write(*values))
    assert predictions.captions == PREDICTIONS
    assert list(predictions.captions) == list(PREDICTIONS)
    assert len(predictions.notes) == 1
    assert 'captions without a word: 1 ("x/y.jpg")' in predictions.notes[0]


def test_single_json_line(write):
    assert read_predictions(write({"path": "a.jpg", "caption": "A dog.", "score": -1.0})).captions == {"a.jpg": "A dog."}


REFERENCES = {"1": ["A cat.", "Cat."], "2": ["A dog."]}
REFERENCE_FILES = {
    "coco annotations": [{**COCO, "images": COCO["images"][:2]}],
    "annotations alone": [{"annotations": COCO["annotations"]}],
    "rows": [[{"image_id": 1, "caption": "A cat."}, {"image_id": 2, "caption": "A dog."}, {"image_id": 1, "caption": "Cat."}]],
    "json lines": [{"image_id": 1, "captions": ["A cat.", "Cat."]}, {"image_id": 2, "caption": "A dog."}],
    "mapping": [{"1": ["A cat.", "Cat."], "2": "A dog."}],
}


@pytest.mark.parametrize("values", REFERENCE_FILES.values(), ids=REFERENCE_FILES)
def test_references_in_every_format(write, values):
    references = read_references(write(*values))
    assert references.captions == REFERENCES
    assert references.notes == []


def test_karpathy_splits(write):
    path = write(KARPATHY)
    assert read_references(path, "test").captions == {"391895": ["A man on a bike.", "a bike"]}
    assert read_references(path, "val").captions == read_references(path, "validation").captions == {"7": ["A cat."]}
    assert list(read_references(path, "val+restval").captions) == ["7", "8"]
    assert read_references(path, "test").notes == []
    everything = read_references(path)
    assert len(everything.captions) == 3
    assert "all splits are read, test (1 images), val (1 images), restval (1 images)" in everything.notes[0]
    with pytest.raises(CaptionFileError, match="no split dev; it has test"):
        read_references(path, "dev")
    with pytest.raises(CaptionFileError, match="no splits to take 'test' from"):
        read_references(write(COCO), "test")


def test_karpathy_without_coco_ids(write):
    images = [{key: value for key, value in image.items() if key != "cocoid"} for image in KARPATHY["images"]]
    assert list(read_references(write({"images": images})).captions) == ["0", "1", "2"]
    for image in images:
        image["imgid"] = 5
    assert "seven.jpg" in read_references(write({"images": images})).captions


def test_everything_left_out_is_noted(write):
    references = read_references(write({**COCO, "annotations": [*COCO["annotations"], {"image_id": 2, "caption": " "}]}))
    assert references.captions["2"] == ["A dog.", " "]
    assert "3" not in references.captions
    assert 'images without a caption, left out: 1 ("3")' in references.notes[0]
    assert 'images with an empty caption: 1 ("2")' in references.notes[1]


def test_the_same_caption_twice_is_noted(write):
    rows = [{"image_id": 1, "caption": "A cat."}, {"image_id": 1, "caption": "A cat."}]
    predictions = read_predictions(write(*rows))
    assert predictions.captions == {"1": "A cat."}
    assert 'the same caption more than once: 1 ("1")' in predictions.notes[0]


def test_long_lists_of_ids_are_shortened(write):
    notes = read_predictions(write({str(number): "" for number in range(9)})).notes
    assert notes[0].endswith('captions without a word: 9 ("0", "1", "2", "3", "4" and 4 more)')


BROKEN = {
    "different captions": (
        [[{"image_id": 1, "caption": "A cat."}, {"image_id": 1, "caption": "A dog."}]],
        'different captions for one image: "1"; keep one caption per image',
    ),
    "number and text": (
        [{"image_id": 12, "caption": "a"}, {"image_id": "12", "caption": "b"}],
        'line 1 has the id 12 and .*line 2 the id "12", .*write all ids as numbers or all as text',
    ),
    "several": ([{"image_id": 1, "captions": ["a", "b"]}], "line 1 has 2 captions; a prediction is exactly one"),
    "none": ([{"1": []}], 'key "1" has 0 captions'),
    "caption a number": ([{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": 5}], 'line 2, "caption" is a number'),
    "caption null": ([[{"image_id": 1, "caption": None}]], 'row 1, "caption" is null; a caption is text'),
    "list of numbers": ([{"1": [5]}], 'key "1" holds a number'),
    "no caption": ([[{"image_id": 1, "text": "a"}]], r'row 1 has no "caption" \(or "captions"\), only "image_id", "text"'),
    "no id": ([[{"caption": "a"}]], r'row 1 has no "image_id" \(or "path" or "file_name"\)'),
    "id a list": ([[{"image_id": [1], "caption": "a"}]], 'row 1: "image_id" is a list; expected a whole number or text'),
    "id a fraction": ([[{"image_id": 1.0, "caption": "a"}]], '"image_id" is a number, 1.0; expected a whole number'),
    "id a truth": ([[{"image_id": True, "caption": "a"}]], '"image_id" is true or false'),
    "row a text": ([["a dog"]], "row 1 is text; expected an object"),
    "a number": (["5"], "holds a number; expected COCO results"),
    "broken line": (
        ['{"image_id": 1, "caption": "a"}', '{"image_id": 2, "caption'],
        "line 2 is not well-formed JSON: Unterminated",
    ),
    "broken file": (['[{"image_id": 1,\n "caption": "a"'], "not well-formed JSON: .*line 2 column"),
    "plain text": (["a dog runs\na cat sits"], "not well-formed JSON"),
    "empty": ([""], "is empty; expected"),
    "empty list": ([[]], "holds no captions"),
    "key twice": (['{"1": "a", "1": "b"}'], 'one object has a key more than once: "1"'),
    "too deep": (["[" * 200_000], "not well-formed JSON"),
    "latin-1": (['{\n"1": "caf\xe9"}'.encode("latin-1")], "line 2 is not UTF-8"),
    "zip": ([b"PK\x03\x04\xff\xfe"], "line 1 is not UTF-8 text; save the file as UTF-8, uncompressed"),
    "unlike annotations": ([{"annotations": {"1": "a"}}], '"annotations" is an object; expected a list'),
    "instances": ([{"annotations": [{"image_id": 1, "bbox": []}]}], 'annotation 1 has no "caption"'),
    "images alone": ([{"images": [{"filename": "a.jpg"}]}], 'image 1: "sentences" is null; expected a list'),
    "image a text": ([{"images": ["a.jpg"]}], 'number 1 of "images" is text'),
    "no names": ([{"images": [{"sentences": []}]}], "every image needs a unique cocoid, imgid or filename"),
    "sentence": ([{"images": [{"imgid": 1, "sentences": [{"raw": 5}]}]}], 'image 1, sentence 1 needs a string "raw"'),
}


@pytest.mark.parametrize(("values", "message"), BROKEN.values(), ids=BROKEN)
def test_errors_name_the_position_in_a_broken_file(write, values, message):
    path = write(*values, name="broken.json")
    with pytest.raises(CaptionFileError, match=message) as error:
        read_predictions(path)
    assert str(path) in str(error.value)


def test_metadata_of_a_folder_of_pictures_are_references(write):
    """An ImageFolder of `datasets`; predictions may have the paths of its images."""
    path = write(
        {"file_name": "1.jpg", "captions": ["a dog", "it runs"]}, {"file_name": "2.jpg", "captions": ["a cat"]}, name="m.jsonl"
    )
    found = read_references(path)
    assert found.captions == {"1.jpg": ["a dog", "it runs"], "2.jpg": ["a cat"]} and "file_name" in found.names


def test_broken_references(write):
    with pytest.raises(CaptionFileError, match="no captions for any of its 3 images"):
        read_references(write({**COCO, "annotations": []}))
    with pytest.raises(CaptionFileError, match='row 1 has the id 12 and .*row 2 the id "12"'):
        read_references(write([{"image_id": 12, "caption": "a"}, {"image_id": "12", "caption": "a"}]))


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(CaptionFileError, match="absent.json cannot be read .*check the path"):
        read_predictions(tmp_path / "absent.json")
    with pytest.raises(CaptionFileError, match="cannot be read"):
        read_references(tmp_path)


# An image named thus, in a mapping, would make the file look like another kind.
TELLING = {"images", "annotations", "image_id", "path", "file_name"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(min_size=1).filter(lambda id: id not in TELLING), st.text(), min_size=1))
def test_all_formats_give_the_same_captions(write, captions):
    """Any ids and captions, including Unicode line separators, are read unchanged from each format."""
    rows = [{"image_id": id, "caption": caption} for id, caption in captions.items()]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    kinds = [
        json.dumps(captions, ensure_ascii=False),
        json.dumps(rows, ensure_ascii=False),
        lines,
        json.dumps({"annotations": rows}),
    ]
    for kind in kinds:
        path = write(kind.encode())
        assert read_predictions(path).captions == captions
        assert read_references(path).captions == {id: [caption] for id, caption in captions.items()}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["images", "annotations", "image_id", "caption", "sentences", "split", "1"]), inner)
        ),
    )
)
def test_any_json_is_read_or_rejected_with_its_name(write, value):
    path = write(json.dumps(value))
    for read in (read_predictions, read_references):
        try:
            read(path)
        except CaptionFileError as error:
            assert str(path) in str(error)


def test_training_captions_of_a_karpathy_file(write):
    images = [{"imgid": n, "split": s, "sentences": [{"raw": s}]} for n, s in enumerate(["train", "restval", "val", "test"])]
    assert read_training(write({"images": images}, name="all.json")) == ["train", "restval"]
    assert read_training(write({"images": images[:1] + images[2:]}, name="some.json")) == ["train"]
    assert read_training(write({"a": ["x", "y"], "b": "z"}, name="plain.json")) == ["x", "y", "z"]
    with pytest.raises(CaptionFileError, match=r"no split restval and train; it has val \(1 images\)"):
        read_training(write({"images": images[2:3]}, name="none.json"))


def test_error_of_a_compressed_file(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(CaptionFileError, match=r"a.json.gz is compressed; unpack it with gunzip first"):
        read_predictions(tmp_path / "a.json.gz")


def test_a_row_may_have_an_id_and_a_path(write):
    predictions = read_predictions(write([{"image_id": 7, "path": "photos/1.jpg", "caption": "a dog"}]))
    assert predictions.captions == {"7": "a dog"} and predictions.names["path"].ids == {"photos/1.jpg": "7"}
