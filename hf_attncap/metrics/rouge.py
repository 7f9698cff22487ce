"""ROUGE-L, as pycocoevalcap computes it.

Lin (2004), "ROUGE: a package for automatic evaluation of summaries": the longest common subsequence of prediction and reference,
as a share of either's length. The subsequences' lengths come from the bit-parallel algorithm of Hyyrö (2004), "Bit-parallel
LCS-length computation revisited", run over all references of an image at once.
"""

from collections.abc import Sequence

import numpy as np

from .ngrams import Floats, Tokens, check_predictions, check_references

BETA = 1.2  # weight of recall over precision
EMPTY = ("",)  # pycocoevalcap splits an empty caption into one empty token


class RougeL:
    """Scores predictions against the references of I images, prepared once.

    Args:
        references: for each image, one or more lists of tokens.

    Raises:
        TypeError: a caption is a string.
        ValueError: no image, or an image without a reference.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]):
        check_references(references)
        self._images = [_Image(captions) for captions in references]

    def score(self, predictions: Sequence[Tokens]) -> Floats:
        """ROUGE-L of one prediction for each image, in the images' order.

        F = (1 + beta^2) P R / (R + beta^2 P) of the best precision P and the best recall R over an image's references, which may
        be two different ones. An empty prediction scores 0, and 1 where a reference is empty as well, as with pycocoevalcap.

        Args:
            predictions: I lists of tokens.

        Returns:
            (I,), 0 to 1; the corpus' ROUGE-L is the mean.

        Raises:
            TypeError: a prediction is a string.
            ValueError: there are not as many predictions as images.
        """
        check_predictions(predictions, len(self._images))
        return np.array([image.score(tokens or EMPTY) for image, tokens in zip(self._images, predictions)])


class _Image:
    """The references of one image side by side in the bits of one integer, a spare bit after each to catch its carry."""

    __slots__ = ("bits", "spans", "where")

    def __init__(self, captions: Sequence[Tokens]):
        self.where: dict[str, int] = {}  # the places of each token
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
        common = ~state  # each place where the common subsequence grew
        precision = recall = 0.0
        for length, span in self.spans:
            lcs = (common & span).bit_count()
            precision, recall = max(precision, lcs / len(tokens)), max(recall, lcs / length)
        if not precision:
            return 0.0
        return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
