"""N-grams of one to four words as integer ids. BLEU and CIDEr share their counts.

Captions are lists of tokens. I images have C references in total. A `row` is the index of a caption, and a `slot` is
row * 4 + (n - 1), so that one `bincount` over slots sums for every caption and every n.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, filterfalse

import numpy as np
from numpy.typing import NDArray

Tokens = Sequence[str]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

LONGEST = 4
LOW = (1 << 32) - 1  # the bits of an n-gram's or a word's id inside a key


@dataclass(frozen=True)
class NgramCounts:
    """Counts of the n-grams of captions: K pairs of a caption and an n-gram, sorted by slot, then by id."""

    slots: Ints  # (K,) row * 4 + (n - 1)
    grams: Ints  # (K,) ids; n-grams that are not in the index have ids after those of the index
    counts: Ints  # (K,) at least 1
    lengths: Ints  # (captions,) tokens
    new_words: dict[str, int]  # words that are not in the index, with their ids
    new_keys: Ints  # (F,) n-grams that are not in the index; their ids follow those of the new words


class NgramIndex:
    """Assigns an id to each word and each n-gram: a trie whose nodes are the n-grams.

    The key of an n-gram is the id of its first n - 1 words, shifted left by 32 bits, plus the id of its last word. Ids stay below
    2^31, so that different n-grams have different keys.

    Args:
        words: id of each word.
        keys: (M,) the key of each n-gram of two or more words, in any order.
        ids: (M,) their ids. Together with those of the words, they are 0 to len(index) - 1.
    """

    def __init__(self, words: dict[str, int], keys: Ints, ids: Ints):
        order = np.argsort(keys, kind="stable")  # fast on nearly sorted keys
        self.words, self.keys, self.ids = words, keys[order], ids[order]

    @classmethod
    def empty(cls) -> "NgramIndex":
        """An index without n-grams."""
        return cls({}, np.empty(0, np.int64), np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.words) + len(self.keys)

    def count(self, captions: Sequence[Tokens]) -> NgramCounts:
        """Counts the n-grams of captions; unknown n-grams get ids too."""
        flat = list(chain.from_iterable(captions))
        lengths = np.fromiter(map(len, captions), np.int64, len(captions))
        unknown_words = dict.fromkeys(filterfalse(self.words.__contains__, flat))
        new_words = {word: len(self) + i for i, word in enumerate(unknown_words)}
        words = self.words | new_words if new_words else self.words
        ids = np.fromiter(map(words.__getitem__, flat), np.int64, len(flat))  # (T,)
        rows = np.repeat(np.arange(len(captions)), lengths)  # (T,)
        left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(flat))  # (T,) words from this one to the end of the caption
        prefix, found, new_keys = ids.copy(), [(rows * LONGEST) << 32 | ids], []
        for n in range(2, LONGEST + 1):
            starts = np.flatnonzero(left >= n)
            keys = prefix[starts] << 32 | ids[starts + n - 1]
            grams = self._find(keys)
            unknown = np.flatnonzero(grams < 0)
            distinct, inverse = np.unique(keys[unknown], return_inverse=True)
            grams[unknown] = len(self) + len(new_words) + sum(map(len, new_keys)) + inverse
            new_keys.append(distinct)
            prefix[starts] = grams
            found.append((rows[starts] * LONGEST + n - 1) << 32 | grams)
        pairs, counts = np.unique(np.concatenate(found), return_counts=True)
        return NgramCounts(pairs >> 32, pairs & LOW, counts, lengths, new_words, np.concatenate(new_keys))

    def extended(self, counts: NgramCounts) -> "NgramIndex":
        """This index plus the new words and n-grams of `counts`, with their ids."""
        first = len(self) + len(counts.new_words)
        ids = np.arange(first, first + len(counts.new_keys))
        return NgramIndex(
            self.words | counts.new_words, np.concatenate([self.keys, counts.new_keys]), np.concatenate([self.ids, ids])
        )

    def _find(self, keys: Ints) -> Ints:
        """The ids of keys; -1 for unknown ones."""
        where = positions(self.keys, keys)
        where[where >= 0] = self.ids[where[where >= 0]]
        return where


class References:
    """The references of I images with their n-gram counts, which BLEU and CIDEr share.

    Args:
        references: one or more lists of tokens per image.
        index: an index of n-grams that keep their ids.

    Raises:
        TypeError: a caption is a string.
        ValueError: there are no images, or an image has no reference.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]], index: NgramIndex | None = None):
        check_references(references)
        index = index or NgramIndex.empty()
        counts = index.count(list(chain.from_iterable(references)))
        self.index = index.extended(counts)
        self.per_image = np.fromiter(map(len, references), np.int64, len(references))  # (I,)
        self.starts = np.cumsum(self.per_image) - self.per_image  # (I,) row of each image's first reference
        self.lengths = counts.lengths  # (C,)
        rows, image_of = counts.slots // LONGEST, np.repeat(np.arange(len(references)), self.per_image)
        keys = (image_of[rows] * LONGEST + counts.slots % LONGEST) << 32 | counts.grams
        order = np.argsort(keys, kind="stable")
        # An entry (E,) is an n-gram of a caption. The entries of one n-gram in one image are adjacent and form a group (G,).
        keys, self.rows, self.counts = keys[order], rows[order].astype(np.int32), counts.counts[order].astype(np.int32)
        self.group_starts = np.flatnonzero(np.diff(keys, prepend=-1))  # (G,)
        self.group_keys = keys[self.group_starts]  # (G,) the slot of the image and the id of the n-gram

    def __len__(self) -> int:
        return len(self.per_image)

    @cached_property
    def group_sizes(self) -> Ints:
        """(G,): the number of the image's references that contain the n-gram."""
        return np.diff(self.group_starts, append=len(self.rows))

    @cached_property
    def max_counts(self) -> NDArray[np.int32]:
        """(G,): the maximum count of the n-gram in one reference."""
        return np.maximum.reduceat(self.counts, self.group_starts) if len(self.rows) else self.counts

    def images_with(self) -> Ints:
        """(len(index),): the number of images whose references contain each n-gram."""
        return np.bincount(self.group_keys & LOW, minlength=len(self.index))

    def pairs(self, images: Ints) -> tuple[Ints, Ints, Ints]:
        """The Q pairs of a prediction and a reference of its image, sorted by prediction.

        Args:
            images: (P,) the image of each prediction.

        Returns:
            (P,) the index of the first pair of each prediction; (Q,) the prediction and (Q,) the reference of each pair.
        """
        sizes = self.per_image[images]  # (P,)
        starts = np.cumsum(sizes) - sizes  # (P,)
        rows = np.repeat(np.arange(len(images)), sizes)  # (Q,)
        return starts, rows, np.arange(len(rows)) + np.repeat(self.starts[images] - starts, sizes)

    def match(self, predictions: Sequence[Tokens], images: Ints | None = None) -> "Matches":
        """Counts the n-grams of P predictions and finds them in the references of their image.

        Args:
            images: (P,) the image of each prediction. None: one prediction per image, in the order of the images.
        """
        images = np.arange(len(self)) if images is None else images  # (P,)
        found = self.index.count(predictions)
        slots = images[found.slots // LONGEST] * LONGEST + found.slots % LONGEST
        return Matches(self, images, found, positions(self.group_keys, slots << 32 | found.grams))


@dataclass(frozen=True)
class Matches:
    """The n-grams of P predictions, and the group of `references` of each."""

    references: References
    images: Ints  # (P,)
    found: NgramCounts
    groups: Ints  # (K,) -1 for n-grams that no reference of the image contains


def positions(sorted_keys: Ints, keys: Ints) -> Ints:
    """The index of each of `keys` in `sorted_keys`; -1 for missing ones."""
    if not len(sorted_keys):
        return np.full(len(keys), -1)
    where = np.searchsorted(sorted_keys, keys)
    where[where == len(sorted_keys)] = 0
    return np.where(sorted_keys[where] == keys, where, -1)


def check_references(references: Sequence[Sequence[Tokens]]) -> None:
    """Raises if there are no images, an image has no reference, or a caption is a string."""
    if not len(references):
        raise ValueError("There are no images: give at least one, with its references.")
    for image, captions in enumerate(references):
        if not len(captions):
            raise ValueError(f"Image {image} has no reference: give it at least one, or leave it out.")
    check_tokens(references, "references")
    check_tokens(chain.from_iterable(references), "a reference")


def check_tokens(captions: Iterable[object], what: str) -> None:
    """Raises if a caption is a string, whose letters would count as words."""
    for caption in captions:
        if isinstance(caption, str):
            raise TypeError(f"{caption!r}: {what} must be a list of tokens, not a string: tokenize it first.")
