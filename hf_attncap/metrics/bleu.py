"""BLEU-1 to BLEU-4 with the closest reference length, as pycocoevalcap computes them.

Papineni, Roukos, Ward and Zhu (2002), "BLEU: a method for automatic evaluation of machine translation".
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .ngrams import LONGEST, Floats, Ints, Matches

# pycocoevalcap adds these to matches and n-grams: a caption without n-grams scores (1e-15 / 1e-9)^(1/n), not 0 / 0.
TINY, SMALL = 1e-15, 1e-9


@dataclass(frozen=True)
class BleuScores:
    """BLEU-1 to BLEU-4 of P predictions, 0 to 1, and what they are computed from."""

    corpus: Floats  # (4,)
    per_image: Floats  # (P, 4)
    statistics: Floats  # (P, 10): clipped matches for n = 1..4, n-grams for n = 1..4, prediction's and closest reference's length


def score_bleu(matches: Matches) -> BleuScores:
    """BLEU of predictions, any number per image.

    Counts of n-grams are clipped to their maximum in one reference. The brevity penalty uses the reference length that is closest
    to the prediction's, the shorter one of a tie. Single images are smoothed only by pycocoevalcap's tiny constants: without a
    matching 4-gram, BLEU-4 is close to 0. An empty prediction scores 0.
    """
    found, inside, rows = matches.found, matches.groups >= 0, len(matches.images)
    clipped = np.minimum(found.counts[inside], matches.references.max_counts[matches.groups[inside]])
    correct = np.bincount(found.slots[inside], weights=clipped, minlength=rows * LONGEST).reshape(rows, LONGEST)  # (P, 4)
    guesses = np.maximum(found.lengths[:, None] - np.arange(LONGEST), 0)  # (P, 4)
    lengths = np.stack([found.lengths, _closest_lengths(matches)], axis=1)  # (P, 2)
    statistics = np.concatenate([correct, guesses, lengths], axis=1).astype(np.float64)  # (P, 10)
    return BleuScores(corpus_bleu(statistics.sum(axis=0)), corpus_bleu(statistics), statistics)


def _closest_lengths(matches: Matches) -> Ints:
    """(P,): the reference length closest to the length of each prediction."""
    references, lengths = matches.references, matches.found.lengths  # (P,)
    starts, rows, own = references.pairs(matches.images)  # (P,), (Q,), (Q,)
    found = references.lengths[own]  # (Q,)
    scale = references.lengths.max() + 1
    distance = np.abs(found - lengths[rows])  # (Q,)
    return np.minimum.reduceat(distance * scale + found, starts) % scale if len(rows) else lengths


def corpus_bleu(totals: ArrayLike) -> Floats:
    """BLEU-1 to BLEU-4 from counts: the geometric mean of the n-gram precisions times the brevity penalty.

    Args:
        totals: (..., 10) columns of `BleuScores.statistics`, summed over the images of a corpus.

    Returns:
        (..., 4), 0 to 1.
    """
    totals = np.asarray(totals, dtype=np.float64)
    correct, guesses, length, closest = totals[..., :4], totals[..., 4:8], totals[..., 8:9], totals[..., 9:10]
    precisions = np.cumprod((correct + TINY) / (guesses + SMALL), axis=-1) ** (1 / np.arange(1, LONGEST + 1))
    brevity = np.exp(np.minimum(1 - (closest + SMALL) / (length + TINY), 0))
    return precisions * brevity
