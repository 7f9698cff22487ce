"""CIDEr-D as in pycocoevalcap, which calls it CIDEr.

Vedantam, Zitnick and Parikh (2015), "CIDEr: consensus-based image description evaluation".
"""

import io
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..atomic import atomic_write
from .ngrams import (
    LONGEST,
    LOW,
    Floats,
    Ints,
    Matches,
    NgramIndex,
    References,
    Tokens,
    check_references,
)

SIGMA = 6.0  # of the Gaussian of the length difference
SCALE = 10.0
END = "<end of caption>"  # contains spaces, so that no token equals it
FORMAT = "attncap document frequencies 1"


@dataclass(frozen=True)
class DocumentFrequencies:
    """The number of images whose references contain each n-gram; can be saved to a file."""

    index: NgramIndex
    counts: Ints  # (len(index),) 1 to `images`
    images: int
    end_token: bool = False  # whether the end of a caption was counted as a word

    @classmethod
    def from_references(cls, references: Sequence[Sequence[Tokens]], *, end_token: bool = False) -> "DocumentFrequencies":
        """Counts the n-grams of references.

        Args:
            references: one or more lists of tokens per image.
            end_token: count the end of each reference as one more word. Needed for rewards: without it, captions learn to stop at
                "with a", because leaving out the last word costs nothing.

        Raises:
            TypeError: a caption is a string.
            ValueError: there are no images, or an image has no reference.
        """
        prepared = References(ending(references) if end_token else references)
        return cls(prepared.index, prepared.images_with(), len(prepared), end_token)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one compressed file (numpy's .npz format, whatever the name) atomically."""
        keys = self.index.keys[np.argsort(self.index.ids)]
        # Neighbouring keys share their prefix, so that differences compress well.
        arrays = {
            "format": np.array(FORMAT),
            "images": np.array(self.images),
            "end_token": np.array(self.end_token),
            "words": np.frombuffer(json.dumps(list(self.index.words), ensure_ascii=False).encode(), np.uint8),
            "prefixes": np.diff(keys >> 32, prepend=0).astype(np.int32),
            "last_words": (keys & LOW).astype(np.int32),
            "counts": self.counts.astype(np.int32),
        }
        with atomic_write(path, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DocumentFrequencies":
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file has other content, or is damaged.
        """
        content = io.BytesIO(Path(path).read_bytes())
        try:
            with np.load(content, allow_pickle=False) as file:
                if str(file["format"]) != FORMAT:
                    raise ValueError(f"its format is '{file['format']}'")
                words = json.loads(file["words"].tobytes())
                keys = np.cumsum(file["prefixes"], dtype=np.int64) << 32 | file["last_words"]
                counts, images = file["counts"].astype(np.int64), int(file["images"])
                end_token = bool(file["end_token"])
        except (ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"'{path}' holds no document frequencies: give a file that DocumentFrequencies.save wrote.") from error
        index = NgramIndex({word: i for i, word in enumerate(words)}, keys, np.arange(len(words), len(words) + len(keys)))
        return cls(index, counts, images, end_token)


class CiderD:
    """Computes CIDEr-D. The norms of the references are computed once.

    Args:
        references: made with `frequencies.index`, if there are frequencies.
        frequencies: document frequencies of n-grams. None: counted on these references, as for published scores.
    """

    def __init__(self, references: References, frequencies: DocumentFrequencies | None = None):
        self.references = references
        counts = references.images_with() if frequencies is None else frequencies.counts
        images = len(references) if frequencies is None else frequencies.images
        # The additional last weight is for all n-grams without a document frequency.
        self._idf = np.log(images) - np.log(np.maximum(np.append(counts, 0), 1))
        self._norms = self._reference_norms()  # (C, 4)

    def score(self, matches: Matches) -> Floats:
        """CIDEr-D (P,), 0 to 10, of P predictions, any number per image; the CIDEr of a corpus is the mean.

        The score is the mean over n = 1..4 and over the references of 10 * cosine * exp(-(length difference)^2 / 72). The cosine is
        that of the n-gram counts, weighted by log(images / images with the n-gram); the prediction's counts are clipped to the
        reference's. (pycocoevalcap's length is the number of bigrams; the difference is the same if the captions share a word.)
        An n-gram that occurs for every image has weight 0. So all scores are 0 if the frequencies come from a single image.
        An empty prediction scores 0. So do references without a word, for which pycocoevalcap fails.
        """
        references, found, images = self.references, matches.found, matches.images
        starts, rows, own = references.pairs(images)  # (P,), (Q,), (Q,)
        weights = self._weights(found.grams)  # (K,)
        norms = _norms(found.slots, found.counts * weights, len(images))  # (P, 4)
        dots = self._dots(matches, weights, starts, len(rows))  # (Q, 4)
        scale = norms[rows] * self._norms[own]
        cosines = np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)
        longer = found.lengths[rows] - references.lengths[own]  # (Q,)
        similar = cosines.mean(axis=1) * np.exp(-(longer**2) / (2 * SIGMA**2))  # (Q,)
        return SCALE * np.bincount(rows, weights=similar, minlength=len(images)) / references.per_image[images]

    def _dots(self, matches: Matches, weights: Floats, starts: Ints, pairs: int) -> Floats:
        """(Q, 4): clipped inner products of each prediction with each reference of its image, for each n."""
        references, found = self.references, matches.found
        inside = np.flatnonzero(matches.groups >= 0)
        groups = matches.groups[inside]
        sizes = references.group_sizes[groups]
        match = np.repeat(inside, sizes)  # (S,) one entry per n-gram shared by a prediction and a reference
        first = references.group_starts[groups] - (np.cumsum(sizes) - sizes)
        entries = np.arange(len(match)) + np.repeat(first, sizes)  # (S,)
        counts = references.counts[entries]
        products = np.minimum(found.counts[match], counts) * counts * weights[match] ** 2
        rows, n = found.slots[match] // LONGEST, found.slots[match] % LONGEST
        pair = starts[rows] + references.rows[entries] - references.starts[matches.images[rows]]
        return _sums(pair * LONGEST + n, products, pairs)

    def _reference_norms(self) -> Floats:
        """(C, 4): the norm of each reference's vector for each n."""
        references = self.references
        keys = np.repeat(references.group_keys, references.group_sizes)
        slots = references.rows.astype(np.int64) * LONGEST + (keys >> 32) % LONGEST
        return _norms(slots, references.counts * self._weights(keys & LOW), len(references.lengths))

    def _weights(self, grams: Ints) -> Floats:
        return self._idf[np.minimum(grams, len(self._idf) - 1)]


def ending(references: Sequence[Sequence[Tokens]]) -> list[list[list[str]]]:
    """The references, each with an end token."""
    check_references(references)
    return [[[*caption, END] for caption in captions] for captions in references]


def _norms(slots: Ints, values: Floats, captions: int) -> Floats:
    """(captions, 4): square roots of the sums of squares in each slot."""
    return np.sqrt(_sums(slots, values**2, captions))


def _sums(slots: Ints, values: Floats, rows: int) -> Floats:
    """(rows, 4): sums of the values in each slot."""
    sums = np.bincount(slots, weights=values, minlength=rows * LONGEST).reshape(rows, LONGEST)
    return sums.astype(np.float64)  # without any slots, bincount returns integers
