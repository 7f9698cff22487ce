"""`CaptionMetrics` and `compare` give the scores of pycocoevalcap."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scorers import bleu_scores, cider_scores

from hf_attncap.metrics import CaptionMetrics, compare, tokenize
from hf_attncap.metrics.java import JavaMetricError
from hf_attncap.metrics.rouge import RougeL

REFERENCES = {
    "1": ["A man rides a bike.", "A man is on his bike!", "The cyclist's bike is red"],
    "2": ["Two dogs play in the snow.", "Dogs run."],
    "3": ["1 1/2 cups of flour", "Some flour, in a cup"],
}
PREDICTIONS = {"1": "a man on a bike", "2": "Two dogs, playing in the snow .", "3": "1 1/2 cups"}
FIELD = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]


def test_scores_come_from_tokens():
    tokens = [tokenize(PREDICTIONS[name]) for name in REFERENCES]
    references = [[tokenize(caption) for caption in captions] for captions in REFERENCES.values()]
    scores = CaptionMetrics(REFERENCES).score(PREDICTIONS)
    np.testing.assert_allclose(scores["rouge_l"], RougeL(references).score(tokens).mean())
    # To BLEU and CIDEr a number with its fraction is two words, to ROUGE-L one.
    split = [[" ".join(caption).split() for caption in captions] for captions in references]
    words = [" ".join(caption).split() for caption in tokens]
    assert [len(caption) for caption in words] == [5, 6, 3] and len(tokens[2]) == 2
    np.testing.assert_allclose([scores[name] for name in FIELD[:4]], bleu_scores(split, words).corpus)
    np.testing.assert_allclose(scores["cider"], cider_scores(split, words).mean())
    assert list(scores)[:6] == FIELD and scores["mean_length"] == pytest.approx(13 / 3)


def test_the_order_of_the_images_does_not_matter():
    turned = CaptionMetrics(dict(reversed(REFERENCES.items()))).score(PREDICTIONS)
    straight = CaptionMetrics(REFERENCES).score(PREDICTIONS)
    assert dict(turned) == pytest.approx(dict(straight))
    assert sorted(turned.rows(), key=str) == [pytest.approx(row) for row in sorted(straight.rows(), key=str)]


def test_each_image_has_its_scores():
    scores = CaptionMetrics(REFERENCES).score(PREDICTIONS)
    rows = json.loads(json.dumps(list(scores.rows())))
    assert [row["image_id"] for row in rows] == ["1", "2", "3"]
    assert scores["cider"] == pytest.approx(np.mean([row["cider"] for row in rows]))
    assert scores["rouge_l"] == pytest.approx(np.mean([row["rouge_l"] for row in rows]))
    assert set(rows[0]) == {"image_id", *FIELD}


def test_perfect_and_empty_captions():
    metrics = CaptionMetrics(REFERENCES)
    perfect = metrics.score({name: captions[0] for name, captions in REFERENCES.items()})
    assert perfect["bleu_4"] == pytest.approx(1) and perfect["rouge_l"] == 1
    empty = metrics.score(dict.fromkeys(REFERENCES, " ."))
    assert [empty[name] for name in FIELD] == [pytest.approx(0, abs=1e-9)] * 6 and empty["empty"] == 1


def test_captions_of_the_training_set_are_not_novel():
    metrics = CaptionMetrics(REFERENCES, training=["Two dogs playing in the snow", "A cat ."])
    assert metrics.score(PREDICTIONS)["novel"] == pytest.approx(2 / 3)
    assert "novel" not in CaptionMetrics(REFERENCES).score(PREDICTIONS)


def test_ids_are_compared_as_text():
    numbers = {int(name): captions for name, captions in REFERENCES.items()}
    assert dict(CaptionMetrics(numbers).score(PREDICTIONS)) == dict(CaptionMetrics(REFERENCES).score(PREDICTIONS))
    with pytest.raises(ValueError, match="Image '1' occurs twice, as a number and as text"):
        CaptionMetrics({1: ["a dog"], "1": ["a cat"]})
    with pytest.raises(ValueError, match="Image '3' occurs twice"):
        CaptionMetrics(REFERENCES).score({**PREDICTIONS, 3: "a dog"})


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ({}, "no references"),
        ({"a": ["x"], "b": []}, "Image 'b' has no references"),
        ({str(n): [] for n in range(9)}, r"9 images \('0', '1', '2', '3', '4', ...\) have no references"),
    ],
)
def test_references_that_are_missing(references, message):
    with pytest.raises(ValueError, match=message):
        CaptionMetrics(references)


def test_errors_name_predictions_that_do_not_fit():
    metrics = CaptionMetrics(REFERENCES)
    with pytest.raises(ValueError, match="2 images \\('1', '3'\\) have no prediction"):
        metrics.score({"2": "dogs"})
    with pytest.raises(ValueError, match="Image 'x' has no references: leave"):
        metrics.score({**PREDICTIONS, "x": "a dog"})
    with pytest.raises(TypeError, match="prediction of image '2' is not a string"):
        metrics.score({**PREDICTIONS, "2": ["a dog"]})
    with pytest.raises(TypeError, match="references of image 'a' are one string"):
        CaptionMetrics({"a": "a dog"})


def test_a_system_against_itself_gains_nothing():
    scores = CaptionMetrics(REFERENCES).score(PREDICTIONS)
    for comparison in compare(scores, scores, resamples=200).values():
        assert (comparison.difference, comparison.low, comparison.high, comparison.p) == (0, 0, 0, 1)


def test_clear_gain_is_significant():
    references = {
        str(n): [f"a {animal} runs over the {place} at noon", f"one {animal} in the {place}"] for n, (animal, place) in ANIMALS
    }
    metrics = CaptionMetrics(references)
    good = metrics.score({name: captions[0] for name, captions in references.items()})
    bad = metrics.score(dict.fromkeys(references, "a man in a shirt"))
    found = compare(bad, good, resamples=500)
    assert list(found) == FIELD
    for name in FIELD:
        assert found[name].difference == pytest.approx(good[name] - bad[name]) and found[name].low > 0 and found[name].p < 0.01
    with pytest.raises(ValueError, match="different images"):
        compare(good, CaptionMetrics(REFERENCES).score(PREDICTIONS))


ANIMALS = list(enumerate((animal, place) for animal in ("dog", "cat", "horse", "cow") for place in ("beach", "park", "street")))


@given(st.lists(st.text("ab .,'1é", max_size=12), min_size=1, max_size=4), st.text("ab .,'1é", max_size=12))
def test_scores_stay_in_their_range(captions, prediction):
    scores = CaptionMetrics({"x": captions, "y": ["b a b"]}).score({"x": prediction, "y": "a b"})
    for name in FIELD:
        values = [scores[name], *scores.per_image[name]]
        assert all(-1e-12 <= value <= (10 if name == "cider" else 1) + 1e-9 for value in values)


def test_meteor_and_spice_without_java_raise_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JavaMetricError, match="METEOR needs (pycocoevalcap|a Java runtime)"):
        CaptionMetrics(REFERENCES).score(PREDICTIONS, meteor=True)


def test_scores_equal_pycocoevalcap():
    """The captions of the fixture are tokens joined by spaces; tokenising them again changes nothing."""
    content = json.loads((Path(__file__).parents[1] / "data" / "caption_scores.json").read_text(encoding="utf-8"))
    for corpus in content.values():
        images = {image["name"]: image for image in corpus["images"]}
        assert all(" ".join(tokenize(image["prediction"])) == image["prediction"] for image in images.values())
        metrics = CaptionMetrics({name: image["references"] for name, image in images.items()})
        scores = metrics.score({name: image["prediction"] for name, image in images.items()})
        expected = [*corpus["corpus"]["bleu"], corpus["corpus"]["rouge_l"], corpus["corpus"]["cider"]]
        assert [scores[name] for name in FIELD] == pytest.approx(expected, abs=1e-9)
        for row in scores.rows():
            image = images[str(row["image_id"])]
            assert [row[name] for name in FIELD] == pytest.approx([*image["bleu"], image["rouge_l"], image["cider"]], abs=1e-9)
