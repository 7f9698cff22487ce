"""Diversity and well-formedness of captions, without references.

Every function takes one list of tokens per prediction, as `ptb.tokenize` returns them. An empty prediction is an empty list; it
counts as a prediction without words and n-grams. The fraction of an empty set is 0.0, so that JSON can hold every value.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

Tokens = Sequence[str]

# Words that cannot end a caption. Captioners trained on CIDEr without an end token produce such endings; Ruotian Luo's
# self-critical.pytorch counts them ("bad endings") with another list. Prepositions that can end a sentence ("with its lights on",
# "jumps in", "walks by", "looks up") are not in the list.
_CANNOT_END = """
    a an the every his its my our their your
    against among at between during for from into near of onto to toward towards upon with without
    although and as because but if or than that when which while who whose
    am are be been being had has have is was were
"""
BAD_ENDINGS = frozenset(_CANNOT_END.split())


def diversity(predictions: Sequence[Tokens], training: Sequence[Tokens] | None = None) -> dict[str, float]:
    """All measures of this file by name; `novel` only with training captions.

    Args:
        predictions: one list of tokens per image.
        training: the training captions of the model, tokenised in the same way.

    Returns:
        `distinct_1`, `distinct_2`, `repeated_bigrams`, `repeated_words`, `bad_endings`, `empty` and `novel` from 0 to 1;
        `vocabulary` in words; `mean_length` in words per prediction.
    """
    measures = {
        "distinct_1": distinct(predictions, 1),
        "distinct_2": distinct(predictions, 2),
        "vocabulary": float(vocabulary(predictions)),
        "mean_length": mean_length(predictions),
        "repeated_words": repeated_words(predictions),
        "repeated_bigrams": repeated_ngrams(predictions, 2),
        "bad_endings": bad_endings(predictions),
        "empty": _fraction(not tokens for tokens in predictions),
    }
    return measures if training is None else {**measures, "novel": novel(predictions, training)}


def distinct(predictions: Sequence[Tokens], n: int) -> float:
    """Distinct n-grams / n-grams of all predictions, 0 to 1: distinct-n of Li et al. 2016 (arXiv 1510.03055).

    It falls with the number of predictions, so compare only values of equally many predictions.
    """
    ngrams = [ngram for tokens in predictions for ngram in _ngrams(tokens, n)]
    return len(set(ngrams)) / max(len(ngrams), 1)


def vocabulary(predictions: Sequence[Tokens]) -> int:
    """Number of distinct words (the types of van Miltenburg et al. 2018, "Measuring the Diversity of Automatic Image
    Descriptions", COLING)."""
    return len({word for tokens in predictions for word in tokens})


def mean_length(predictions: Sequence[Tokens]) -> float:
    """Mean number of words per prediction; an empty one has 0."""
    return sum(map(len, predictions)) / max(len(predictions), 1)


def novel(predictions: Sequence[Tokens], training: Sequence[Tokens]) -> float:
    """Fraction of predictions that equal no training caption, 0 to 1 (van Miltenburg et al. 2018).

    An empty prediction is not novel.
    """
    seen = {tuple(tokens) for tokens in training}
    return _fraction(bool(tokens) and tuple(tokens) not in seen for tokens in predictions)


def repeated_words(predictions: Sequence[Tokens]) -> float:
    """Fraction of predictions in which a word directly follows itself ("a a dog"), 0 to 1."""
    return _fraction(any(first == second for first, second in pairwise(tokens)) for tokens in predictions)


def repeated_ngrams(predictions: Sequence[Tokens], n: int) -> float:
    """Mean fraction of a prediction's n-grams that repeat an earlier one, 0 to 1.

    For each prediction, 1 - distinct n-grams / n-grams: seq-rep-n of Welleck et al. 2019 (arXiv 1908.04319). They use n = 4 for
    long texts. `diversity` uses 2, because captions are short and models with blocked trigrams always have 0 for n = 4. A
    prediction of fewer than n words has 0.
    """
    repeats = 0.0
    for tokens in predictions:
        ngrams = list(_ngrams(tokens, n))
        repeats += 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
    return repeats / max(len(predictions), 1)


def bad_endings(predictions: Sequence[Tokens]) -> float:
    """Fraction of predictions whose last word is in `BAD_ENDINGS` ("a man with a"), 0 to 1; an empty one has no ending.

    Words must be lower-case, as `ptb.tokenize` returns them.
    """
    return _fraction(bool(tokens) and tokens[-1] in BAD_ENDINGS for tokens in predictions)


def _ngrams(tokens: Tokens, n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(n)))


def _fraction(answers: Iterator[bool]) -> float:
    hits = list(answers)
    return sum(hits) / max(len(hits), 1)
