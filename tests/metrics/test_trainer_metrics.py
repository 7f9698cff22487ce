"""`caption_compute_metrics` on padded predictions of the Trainer."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_attncap.metrics import CaptionMetrics, caption_compute_metrics

WORDS = ["<pad>", "<s>", "</s>", "a", "dog", "cat", "runs", "sits", "on", "grass", "two"]
REFERENCES = [["A dog runs on grass .", "a dog on grass"], ["Two cats", "a cat sits", "a cat"], ["two dogs"]]
IDS = [[1, 3, 4, 6, 8, 9, 2], [1, 3, 5, 2], [1, 10, 4, 2]]


def decode(rows):
    assert all(isinstance(word, int) and word >= 0 for row in rows for word in row), "padding reached the tokenizer"
    return [" ".join(WORDS[word] for word in row if word > 2) for row in rows]


def padded(rows, length=9, fill=-100):
    return np.array([[*row, *[fill] * (length - len(row))] for row in rows], dtype=np.int64)


def evaluation(predictions):
    return SimpleNamespace(predictions=predictions, label_ids=np.zeros((15, 4)))


def expected(captions):
    return dict(CaptionMetrics(dict(enumerate(REFERENCES))).score(dict(enumerate(captions))))


@pytest.fixture(scope="module")
def compute():
    return caption_compute_metrics(REFERENCES, decode)


def test_scores_are_those_of_the_decoded_captions(compute):
    wanted = expected(["a dog runs on grass", "a cat", "two dog"])
    for predictions in (padded(IDS), padded(IDS, fill=0), (padded(IDS), np.zeros((3, 2))), padded(IDS).astype(np.int32)):
        found = compute(evaluation(predictions))
        assert found == wanted
        assert all(type(value) is float for value in found.values())
    assert {"bleu_1", "bleu_4", "rouge_l", "cider", "distinct_1", "mean_length"} <= set(wanted)
    assert wanted["cider"] > 0


@given(captions=st.lists(st.lists(st.integers(3, len(WORDS) - 1), max_size=6), min_size=3, max_size=3), extra=st.integers(0, 3))
def test_padding_rows_of_the_last_batch_are_ignored(captions, extra):
    compute = caption_compute_metrics(REFERENCES, decode)
    rows = [[1, *caption, 2] for caption in captions]
    assert compute(evaluation(padded(rows + rows[:extra]))) == expected(decode(captions))


def test_references_are_prepared_once(monkeypatch):
    """Evaluation runs every epoch; thousands of references must not be counted again."""
    compute = caption_compute_metrics(REFERENCES, decode)
    first = compute(evaluation(padded(IDS)))

    def refuse(*args, **kwargs):
        raise AssertionError("references are counted again")

    monkeypatch.setattr("hf_attncap.metrics.trainer.CaptionMetrics", refuse)
    monkeypatch.setattr("hf_attncap.metrics.score.References", refuse)
    assert compute(evaluation(padded(IDS))) == first


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (np.zeros((3, 4, 11), np.float32), "shape .3, 4, 11. and type float32: set `predict_with_generate=True`"),
        ((np.zeros((3, 4, 11), np.float32), np.zeros(3)), "`predict_with_generate=True`"),
        (np.zeros((3, 11), np.float32), "`predict_with_generate=True`"),
        ([padded(IDS[:2]), padded(IDS[2:])], "a list: .* `eval_do_concat_batches`"),
        (padded(IDS[:2]), "captions for 2 images but references for 3"),
    ],
)
def test_predictions_that_cannot_be_scored_are_rejected(compute, predictions, message):
    with pytest.raises(ValueError, match=message):
        compute(evaluation(predictions))


def test_error_names_an_image_without_references():
    with pytest.raises(ValueError, match="'row 1' has no references"):
        caption_compute_metrics([["a dog"], []], decode)


def test_one_row_per_caption_is_rejected():
    compute = caption_compute_metrics([["a"], ["b"]], lambda ids: ["a"] * len(ids))
    again = np.array([[1, 2], [3, 4]] * 3)  # what several processes fill up with
    assert compute(SimpleNamespace(predictions=again[:5]))["mean_length"] == 1
    with pytest.raises(ValueError, match="captions for 4 rows but references for 2 images: evaluate on one row per image"):
        compute(SimpleNamespace(predictions=np.array([[1, 2], [3, 4], [5, 6], [7, 8]])))
