"""Diversity measures against hand-counted captions, and their bounds for any captions."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_attncap.metrics.diversity import bad_endings, distinct, diversity, novel, repeated_ngrams, repeated_words

SHARES = ("distinct_1", "distinct_2", "repeated_words", "repeated_bigrams", "bad_endings", "empty", "novel")
words = st.sampled_from(["a", "dog", "with", "runs", "man"])
captions = st.lists(st.lists(words, max_size=8), max_size=8)


def tokens(*captions: str) -> list[list[str]]:
    return [caption.split() for caption in captions]


def test_counted_by_hand():
    predictions = tokens("a dog runs", "a dog and a dog", "a man with a a", "")
    measures = diversity(predictions, training=tokens("a dog runs", "a cat"))
    assert measures == pytest.approx(
        {
            "distinct_1": 6 / 13,  # a dog runs and man with
            "distinct_2": 8 / 10,  # "a dog" is there three times
            "vocabulary": 6,
            "mean_length": 13 / 4,
            "repeated_words": 1 / 4,
            "repeated_bigrams": (1 / 4) / 4,  # one of the second caption's four
            "bad_endings": 1 / 4,
            "empty": 1 / 4,
            "novel": 2 / 4,
        }
    )


def test_novel_needs_training_captions():
    assert "novel" not in diversity(tokens("a dog"))
    assert diversity(tokens("a dog"), training=[])["novel"] == 1


@pytest.mark.parametrize("predictions", [[], [[]], [[], []]], ids=["none", "one empty", "two empty"])
def test_empty_predictions_give_finite_values(predictions):
    measures = diversity(predictions, training=[])
    assert measures.pop("empty") == (1 if predictions else 0)
    assert set(measures.values()) == {0}
    json.dumps(measures, allow_nan=False)


@pytest.mark.parametrize("end", ["a", "the", "with", "of", "and", "is", "while", "near"])
def test_bad_endings(end):
    assert bad_endings(tokens(f"a man {end}")) == 1


@pytest.mark.parametrize("caption", ["a truck with its lights on", "a boy looks up", "a man with a dog", "a crowd walks by"])
def test_good_endings(caption):
    assert bad_endings(tokens(caption)) == 0


@given(captions, captions)
def test_bounds(predictions, training):
    measures = diversity(predictions, training)
    assert all(0 <= measures[name] <= 1 for name in SHARES)
    assert all(math.isfinite(value) for value in measures.values())
    assert measures["vocabulary"] <= sum(map(len, predictions))


@given(captions)
def test_order_does_not_matter_and_training_captions_are_not_novel(predictions):
    assert diversity(predictions) == pytest.approx(diversity(predictions[::-1]))
    assert novel(predictions, predictions) == 0


@given(captions.filter(lambda predictions: any(map(len, predictions))))
def test_duplicating_all_captions_halves_distinct(predictions):
    assert distinct(predictions * 2, 1) == pytest.approx(distinct(predictions, 1) / 2)


@given(st.lists(words, min_size=2, max_size=8))
def test_repeated_words_are_adjacent_duplicates(caption):
    expected = any(caption[place] == caption[place + 1] for place in range(len(caption) - 1))
    assert repeated_words([caption]) == expected
    assert repeated_ngrams([caption], 1) == pytest.approx(1 - len(set(caption)) / len(caption))
