"""BLEU equals pycocoevalcap and the formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_scores import STORED, bleu, images, split, stored_captions
from scorers import bleu_scores

from hf_attncap.metrics.bleu import corpus_bleu, score_bleu
from hf_attncap.metrics.ngrams import References


@pytest.mark.parametrize("name", STORED)
def test_equals_pycocoevalcap(name):
    predictions, references = stored_captions(name)
    scores = bleu_scores(references, predictions)
    np.testing.assert_allclose(scores.corpus, STORED[name]["corpus"]["bleu"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores.per_image, [image["bleu"] for image in STORED[name]["images"]], rtol=0, atol=1e-12)


@given(images)
def test_equals_the_formula(corpus):
    predictions, references = split(corpus)
    scores = bleu_scores(references, predictions)
    np.testing.assert_allclose(scores.corpus, bleu(corpus), rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores.per_image, [bleu([image]) for image in corpus], rtol=0, atol=1e-12)


@given(images, st.data())
def test_several_predictions_per_image_in_any_order(corpus, data):
    predictions, references = split(corpus)
    order = data.draw(st.lists(st.sampled_from(range(len(corpus))), max_size=8))
    matches = References(references).match([predictions[i] for i in order], np.array(order, dtype=np.int64))
    np.testing.assert_array_equal(score_bleu(matches).statistics, bleu_scores(references, predictions).statistics[order])


def test_statistics_are_the_counts():
    references = [[["a", "dog", "runs", "fast", "home"], ["a", "dog", "and", "a", "cat", "run", "home"]]]
    statistics = bleu_scores(references, [["a", "a", "a", "dog", "runs", "fast"]]).statistics
    # Clipped: "a" twice. As close to 5 words as to 7: the shorter counts.
    assert statistics.tolist() == [[5, 3, 2, 1, 6, 5, 4, 3, 6, 5]]


@given(images, st.data())
def test_prediction_equal_to_a_reference_has_perfect_precision(corpus, data):
    _, references = split(corpus)
    predictions = [data.draw(st.sampled_from(captions)) for captions in references]
    scores = bleu_scores(references, predictions).per_image
    for prediction, score in zip(predictions, scores):
        np.testing.assert_allclose(score[: len(prediction)], 1, rtol=0, atol=1e-7)


@given(images, st.randoms())
def test_the_order_of_images_does_not_matter(corpus, random):
    predictions, references = split(corpus)
    before = bleu_scores(references, predictions)
    order = random.sample(range(len(corpus)), len(corpus))
    after = bleu_scores([references[i] for i in order], [predictions[i] for i in order])
    np.testing.assert_array_equal(after.corpus, before.corpus)
    np.testing.assert_array_equal(after.statistics, before.statistics[order])


def test_bleu_of_several_totals():
    totals = np.random.default_rng(0).integers(1, 50, (3, 2, 10))
    scores = corpus_bleu(totals)
    assert scores.shape == (3, 2, 4)
    for i, j in np.ndindex(3, 2):
        np.testing.assert_array_equal(scores[i, j], corpus_bleu(totals[i, j]))
