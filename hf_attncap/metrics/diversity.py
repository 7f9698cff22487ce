"""How varied and how well-formed captions are, without looking at any reference.

Every function takes predictions as token lists, one list a prediction, as `ptb.tokenize` gives them. An empty
prediction is an empty list: it counts as a prediction wherever predictions are counted, and has no words and no n-grams.
A share of nothing (of no predictions, of no n-grams) is 0.0, so that every value is a finite number and JSON can hold it.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

Tokens = Sequence[str]

# Words after which a caption cannot be over. The idea of counting such ends, which captioners trained on CIDEr without an
# end token produce, is that of Ruotian Luo's self-critical.pytorch ("bad endings"); the list is our own. Prepositions that
# also stand alone ("with its lights on", "jumps in", "walks by", "looks up") are left out: people end captions with them.
_CANNOT_END = """
    a an the every his its my our their your
    against among at between during for from into near of onto to toward towards upon with without
    although and as because but if or than that when which while who whose
    am are be been being had has have is was were
"""
BAD_ENDINGS = frozenset(_CANNOT_END.split())


def diversity(predictions: Sequence[Tokens], training: Sequence[Tokens] | None = None) -> dict[str, float]:
    """Every measure of this file under its function's name; `novel` only when training captions are given.

    Args:
        predictions: one token list an image.
        training: the captions the model learned from, as token lists of the same tokenisation.

    Returns:
        `distinct_1`, `distinct_2`, `repeated_bigrams`, `repeated_words`, `bad_endings`, `empty` and `novel` from 0 to 1;
        `vocabulary` in words, 0 or more; `mean_length` in words a prediction, 0 or more.

    Raises:
        TypeError: a caption is a string, not a list of tokens.
    """
    for caption in (*predictions, *(training or ())):
        if isinstance(caption, str):
            raise TypeError(f"the caption {caption!r} is a string; give its tokens, as ptb.tokenize makes them")
    measures = {
        "distinct_1": distinct(predictions, 1),
        "distinct_2": distinct(predictions, 2),
        "vocabulary": float(vocabulary(predictions)),
        "mean_length": mean_length(predictions),
        "repeated_words": repeated_words(predictions),
        "repeated_bigrams": repeated_ngrams(predictions, 2),
        "bad_endings": bad_endings(predictions),
        "empty": _share(not tokens for tokens in predictions),
    }
    return measures if training is None else {**measures, "novel": novel(predictions, training)}


def distinct(predictions: Sequence[Tokens], n: int) -> float:
    """Distinct n-grams over all n-grams of all predictions together, 0 to 1: distinct-n of Li et al. 2016 (arXiv 1510.03055).

    It falls as predictions grow in number, so only values over equally many predictions compare.
    """
    ngrams = [ngram for tokens in predictions for ngram in _ngrams(tokens, n)]
    return len(set(ngrams)) / max(len(ngrams), 1)


def vocabulary(predictions: Sequence[Tokens]) -> int:
    """Number of distinct words used (the types of van Miltenburg et al. 2018, "Measuring the Diversity of Automatic Image
    Descriptions", COLING)."""
    return len({word for tokens in predictions for word in tokens})


def mean_length(predictions: Sequence[Tokens]) -> float:
    """Mean number of words of a prediction; an empty one has 0."""
    return sum(map(len, predictions)) / max(len(predictions), 1)


def novel(predictions: Sequence[Tokens], training: Sequence[Tokens]) -> float:
    """Share of predictions that are no training caption, word for word, 0 to 1 (van Miltenburg et al. 2018).

    An empty prediction is not novel: it says nothing.
    """
    seen = {tuple(tokens) for tokens in training}
    return _share(bool(tokens) and tuple(tokens) not in seen for tokens in predictions)


def repeated_words(predictions: Sequence[Tokens]) -> float:
    """Share of predictions in which a word directly follows itself ("a a dog"), 0 to 1."""
    return _share(any(first == second for first, second in pairwise(tokens)) for tokens in predictions)


def repeated_ngrams(predictions: Sequence[Tokens], n: int) -> float:
    """Share of a prediction's n-grams that it has said before, averaged over predictions, 0 to 1.

    That is 1 - distinct n-grams / n-grams of each prediction by itself: seq-rep-n of Welleck et al. 2019 (arXiv 1908.04319).
    They take n = 4 for long texts; `diversity` takes 2, because captions are short and blocked trigrams would make 4 always
    zero. A prediction of fewer than n words repeats nothing.
    """
    repeats = 0.0
    for tokens in predictions:
        ngrams = list(_ngrams(tokens, n))
        repeats += 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
    return repeats / max(len(predictions), 1)


def bad_endings(predictions: Sequence[Tokens]) -> float:
    """Share of predictions whose last word is one of `BAD_ENDINGS` ("a man with a"), 0 to 1; an empty one does not count.

    Words are compared as they are: lower-cased, as `ptb.tokenize` gives them.
    """
    return _share(bool(tokens) and tokens[-1] in BAD_ENDINGS for tokens in predictions)


def _ngrams(tokens: Tokens, n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(n)))


def _share(answers: Iterator[bool]) -> float:
    hits = list(answers)
    return sum(hits) / max(len(hits), 1)
