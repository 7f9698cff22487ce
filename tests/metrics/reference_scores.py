"""BLEU, ROUGE-L and CIDEr-D written out caption by caption, from the papers, with pycocoevalcap's constants.

Slow and plain on purpose, and sharing nothing with the package. Also what the tests of these scores draw their captions from.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

N = range(1, 5)
Tokens = list[str]
Image = tuple[Tokens, list[Tokens]]  # prediction, references

STORED: dict[str, Any] = json.loads((Path(__file__).parent.parent / "data" / "caption_scores.json").read_text(encoding="utf-8"))

tokens = st.lists(st.sampled_from(["a", "b", "c", "dog", "zebra"]), max_size=9)
images = st.lists(st.tuples(tokens, st.lists(tokens, min_size=1, max_size=4)), min_size=1, max_size=6)


def split(corpus: Sequence[Image]) -> tuple[list[Tokens], list[list[Tokens]]]:
    """Predictions and references in the form that the scorers take."""
    return [prediction for prediction, _ in corpus], [references for _, references in corpus]


def stored_captions(name: str) -> tuple[list[Tokens], list[list[Tokens]]]:
    """Predictions and references of a stored corpus."""
    return split([(i["prediction"].split(), [r.split() for r in i["references"]]) for i in STORED[name]["images"]])


def ngrams(caption: Tokens, n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(caption[i : i + n]) for i in range(len(caption) - n + 1))


def bleu(corpus: Sequence[Image]) -> list[float]:
    """Papineni et al. (2002), section 2.3, with the closest reference length; smoothed by 1e-15 over 1e-9."""
    length = sum(len(prediction) for prediction, _ in corpus)
    closest = sum(min((abs(len(r) - len(p)), len(r)) for r in references)[1] for p, references in corpus)
    penalty = min(1.0, math.exp(1 - (closest + 1e-9) / (length + 1e-15)))
    precisions, scores = [], []
    for n in N:
        correct = guesses = 0
        for prediction, references in corpus:
            for ngram, count in ngrams(prediction, n).items():
                guesses += count
                correct += min(count, max(ngrams(r, n)[ngram] for r in references))
        precisions.append((correct + 1e-15) / (guesses + 1e-9))
        scores.append(penalty * math.prod(precisions) ** (1 / n))
    return scores


def lcs(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence by dynamic programming."""
    row = [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


def rouge_l(prediction: Tokens, references: list[Tokens], beta: float = 1.2) -> float:
    """Lin (2004), equations 2 to 4, with the best precision and the best recall; an empty caption is one empty token."""
    prediction, references = prediction or [""], [r or [""] for r in references]
    precision = max(lcs(prediction, r) / len(prediction) for r in references)
    recall = max(lcs(prediction, r) / len(r) for r in references)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision) if precision else 0.0


def document_frequencies(references: list[list[Tokens]]) -> Counter[tuple[str, ...]]:
    return Counter(gram for image in references for gram in {g for r in image for n in N for g in ngrams(r, n)})


def cider_d(prediction: Tokens, references: list[Tokens], frequencies: Counter[tuple[str, ...]], count: int) -> float:
    """Vedantam et al. (2015), section 6 (CIDEr-D), with log(images / frequency); `count` images made the frequencies."""

    def vector(caption: Tokens, n: int) -> dict[tuple[str, ...], float]:
        return {g: tf * math.log(count / max(1, frequencies[g])) for g, tf in ngrams(caption, n).items()}

    def bigrams(caption: Tokens) -> int:
        return max(len(caption) - 1, 0)

    total = 0.0
    for reference in references:
        penalty = math.exp(-((bigrams(prediction) - bigrams(reference)) ** 2) / (2 * 6.0**2))
        for n in N:
            c, s = vector(prediction, n), vector(reference, n)
            norms = math.hypot(*c.values()) * math.hypot(*s.values())
            dot = sum(min(weight, s[g]) * s[g] for g, weight in c.items() if g in s)
            total += penalty * dot / norms if norms else 0.0
    return 10 * total / len(references) / len(N)
