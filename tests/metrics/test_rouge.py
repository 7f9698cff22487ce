"""ROUGE-L equals pycocoevalcap and the formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_scores import STORED, images, rouge_l, split, stored_captions

from hf_attncap.metrics.rouge import RougeL

long_captions = st.lists(st.sampled_from(["a", "b", "c"]), min_size=30, max_size=150)


@pytest.mark.parametrize("name", STORED)
def test_equals_pycocoevalcap(name):
    predictions, references = stored_captions(name)
    scores = RougeL(references).score(predictions)
    np.testing.assert_allclose(scores.mean(), STORED[name]["corpus"]["rouge_l"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores, [image["rouge_l"] for image in STORED[name]["images"]], rtol=0, atol=1e-12)


@given(images)
def test_equals_the_formula(corpus):
    predictions, references = split(corpus)
    expected = [rouge_l(*image) for image in corpus]
    np.testing.assert_allclose(RougeL(references).score(predictions), expected, rtol=0, atol=1e-12)


@given(long_captions, st.lists(long_captions, min_size=1, max_size=3))
def test_equals_the_formula_where_captions_exceed_the_bits_of_a_word(prediction, references):
    np.testing.assert_allclose(RougeL([references]).score([prediction]), [rouge_l(prediction, references)], rtol=0, atol=1e-12)


@given(images, st.data())
def test_a_prediction_equal_to_a_reference_is_perfect(corpus, data):
    _, references = split(corpus)
    predictions = [data.draw(st.sampled_from(captions)) for captions in references]
    np.testing.assert_allclose(RougeL(references).score(predictions), 1, rtol=0, atol=1e-12)


def test_best_precision_and_best_recall_may_come_from_different_references():
    references = [["a", "dog"], ["x", "y", "a", "dog", "runs", "home", "z", "u"]]
    precision, recall = 4 / 4, 2 / 2
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert RougeL([references]).score([["a", "dog", "runs", "home"]])[0] == pytest.approx(expected)


def test_empty_prediction_scores_only_with_an_empty_reference():
    scorer = RougeL([[["a", "dog"], []], [["a", "dog"]]])
    assert scorer.score([[], []]).tolist() == [1, 0]
