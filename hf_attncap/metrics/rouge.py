"""ROUGE-L, as pycocoevalcap computes it.

Lin (2004), "ROUGE: a package for automatic evaluation of summaries": the length of the longest common subsequence of prediction and
reference, relative to the length of each. It is computed with the bit-parallel algorithm of Hyyrö (2004), "Bit-parallel LCS-length
computation revisited", for all references of an image at once.
"""

from collections.abc import Sequence

import numpy as np

from .ngrams import Floats, Tokens

BETA = 1.2  # weight of recall over precision
EMPTY = ("",)  # pycocoevalcap splits an empty caption into one empty token


class RougeL:
    """Computes ROUGE-L for I images, whose references it prepares once: one or more lists of tokens per image."""

    def __init__(self, references: Sequence[Sequence[Tokens]]):
        self._images = [_Image(captions) for captions in references]

    def score(self, predictions: Sequence[Tokens]) -> Floats:
        """ROUGE-L (I,), 0 to 1, of one prediction for each image, in the images' order; that of a corpus is the mean.

        F = (1 + beta^2) P R / (R + beta^2 P), where P and R are the best precision and the best recall over the references of the
        image, possibly of two different ones. An empty prediction scores 0, or 1 if a reference is empty too, as in pycocoevalcap.
        """
        return np.array([image.score(tokens or EMPTY) for image, tokens in zip(self._images, predictions)])


class _Image:
    """The references of one image as bits of one integer, with one spare bit after each reference for its carry."""

    __slots__ = ("bits", "spans", "where")

    def __init__(self, captions: Sequence[Tokens]):
        self.where: dict[str, int] = {}  # token -> the bits of its positions
        self.spans: list[tuple[int, int]] = []  # (length, bits) of each reference
        self.bits = 0
        bit = 1
        for caption in captions:
            first = bit
            for token in caption or EMPTY:
                self.where[token] = self.where.get(token, 0) | bit
                bit <<= 1
            self.spans.append((len(caption or EMPTY), bit - first))
            self.bits |= bit - first
            bit <<= 1

    def score(self, tokens: Tokens) -> float:
        state, bits, where = self.bits, self.bits, self.where
        for token in tokens:
            if token in where:
                same = state & where[token]
                state = ((state + same) | (state - same)) & bits
        common = ~state  # the positions at which the common subsequence grew
        precision = recall = 0.0
        for length, span in self.spans:
            lcs = (common & span).bit_count()
            precision, recall = max(precision, lcs / len(tokens)), max(recall, lcs / length)
        if not precision:
            return 0.0
        return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
