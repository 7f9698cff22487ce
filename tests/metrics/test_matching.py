"""Matching the images of two files with different names."""

import pytest
from caption_files import COCO, KARPATHY

from hf_attncap.metrics.files import CaptionFileError, read_predictions, read_references
from hf_attncap.metrics.matching import match

NAMES = {
    "cocoid": ({"391895": "a", "7": "b"}, None),
    "imgid": ({"0": "a", "1": "b"}, "matched by imgid in the references and key in the predictions"),
    "filename": ({"COCO_val2014_000000391895.jpg": "a", "seven.jpg": "b"}, "matched by filename"),
    "path": ({"photos/COCO_val2014_000000391895.jpg": "a", "C:\\photos\\seven.jpg": "b"}, "matched by name without folders in"),
    "stem": ({"COCO_val2014_000000391895": "a", "seven": "b"}, "matched by name without folders and ending"),
    "converted": ({"x/COCO_val2014_000000391895.png": "a", "y/seven.webp": "b"}, "matched by name without folders and ending"),
}


@pytest.mark.parametrize(("captions", "note"), NAMES.values(), ids=NAMES)
def test_karpathy_matches_by_any_of_its_names(write, captions, note):
    references = read_references(write(KARPATHY, name="karpathy.json"))
    matched = match(references, read_predictions(write(captions)))
    assert matched.references == {"391895": ["A man on a bike.", "a bike"], "7": ["A cat."]}
    assert matched.predictions == {"391895": "a", "7": "b"}
    assert [other for other in matched.notes if "matched by" in other and (note or "") in other] or note is None
    assert any(other.startswith(references.path) and other.endswith('left out: 1 ("8")') for other in matched.notes)


def test_coco_matches_by_file_name(write):
    references = read_references(write(COCO, name="coco.json"))
    matched = match(
        references, read_predictions(write({"path": "val/one.jpg", "caption": "x"}, {"path": "val/two.jpg", "caption": "y"}))
    )
    assert matched.references == {"1": ["A cat.", "Cat."], "2": ["A dog."]}
    assert matched.predictions == {"1": "x", "2": "y"}


def test_ids_of_other_types_match_and_are_noted(write):
    references = read_references(write([{"image_id": 1, "caption": "A cat."}], name="references.json"))
    matched = match(references, read_predictions(write([{"image_id": "1", "caption": "A cat."}])))
    assert matched.references == {"1": ["A cat."]}
    assert matched.notes == [
        "image_id is written as numbers in the references, image_id as text in the predictions; compared as text"
    ]
    assert match(references, read_predictions(write({"1": "A cat."}))).notes == []  # a key has no choice


def test_images_in_only_one_file_are_noted(write):
    references = read_references(write({"a": "x", "b": "y"}, name="references.json"))
    predictions = read_predictions(write({"b": "y", "c": "z"}))
    matched, matched_files = match(references, predictions), (predictions.path, references.path)
    assert (matched.references, matched.predictions) == ({"b": ["y"]}, {"b": "y"})
    assert matched.notes == [
        f'{matched_files[0]}: images without references, left out: 1 ("c")',
        f'{matched_files[1]}: images without a caption in {matched_files[0]}, left out: 1 ("a")',
    ]


def test_files_without_common_images(write):
    references = read_references(write(KARPATHY, "", name="references.json"), "test")
    with pytest.raises(CaptionFileError, match='by key \\("other"\\).*references.json by cocoid \\("391895"\\) or imgid'):
        match(references, read_predictions(write({"other": "x"})))


def test_numeric_file_names_are_not_ids(write):
    images = [{"imgid": n, "filename": f"{n + 1}.jpg", "sentences": [{"raw": f"number {n}"}]} for n in range(3)]
    references = read_references(write({"images": images}, name="references.json"))
    for name in ("{}.jpg", "photos/{}.jpg"):
        matched = match(references, read_predictions(write({name.format(1): "x", name.format(2): "y"})))
        assert list(matched.references.values()) == [["number 0"], ["number 1"]]


def test_ambiguous_ids_are_an_error(write):
    images = [{"cocoid": n, "imgid": 2 - n, "sentences": [{"raw": "x"}]} for n in range(3)]
    references = read_references(write({"images": images}, name="references.json"))
    with pytest.raises(CaptionFileError, match="match references by cocoid .* as well as by imgid"):
        match(references, read_predictions(write({"0": "x", "2": "y"})))


def test_ambiguous_short_names_are_not_used(write):
    references = read_references(write({"a/1.jpg": "x", "b/1.jpg": "y"}, name="references.json"))
    with pytest.raises(CaptionFileError, match="no caption of .* has a reference"):
        match(references, read_predictions(write({"1.jpg": "x"})))
