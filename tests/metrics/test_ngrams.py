"""N-grams as integer ids: complete and unique for vocabularies of any size."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_scores import N, ngrams, tokens

from hf_attncap.metrics.ngrams import NgramIndex, References

captions = st.lists(tokens, max_size=5)


def names(index: NgramIndex) -> dict[int, tuple[str, ...]]:
    """The n-gram of each id of an index."""
    known = {i: (word,) for word, i in index.words.items()}
    for i, key in sorted(zip(index.ids.tolist(), index.keys.tolist())):
        known[i] = known[key >> 32] + known[key & (2**32 - 1)]
    return known


@given(captions, captions)
def test_counts_do_not_depend_on_earlier_ngrams_of_the_index(before, now):
    index = NgramIndex.empty()
    index = index.extended(index.count(before))
    earlier = names(index)
    found = index.count(now)
    extended = index.extended(found)
    assert names(extended).items() >= earlier.items()
    assert sorted(names(extended)) == list(range(len(extended)))
    counted = {
        (slot // 4, slot % 4 + 1, names(extended)[gram]): count
        for slot, gram, count in zip(found.slots.tolist(), found.grams.tolist(), found.counts.tolist())
    }
    assert counted == {
        (row, n, gram): count for row, caption in enumerate(now) for n in N for gram, count in ngrams(caption, n).items()
    }
    assert found.lengths.tolist() == [len(caption) for caption in now]


def test_ngrams_of_a_huge_vocabulary_have_different_ids():
    words = 100_000
    assert words**4 > 2**64
    random = np.random.default_rng(0)
    numbers = np.concatenate([np.arange(words), random.choice([0, 1, 50_000, words - 1], 4000)]).reshape(-1, 10)
    captions = [[f"w{i}" for i in row] for row in numbers.tolist()]
    index = NgramIndex.empty()
    found = index.count(captions)
    ids = Counter(dict(zip(*(x.tolist() for x in np.unique(found.grams, return_counts=True)))))
    seen = Counter(gram for caption in captions for n in N for gram in ngrams(caption, n))
    assert len(ids) == len(seen) == len(index.extended(found))


def test_errors_name_bad_input():
    with pytest.raises(ValueError, match="There are no images"):
        References([])
    with pytest.raises(ValueError, match="Image 1 has no reference"):
        References([[["a"]], []])
    with pytest.raises(TypeError, match="'a dog'.*tokenize it first"):
        References([["a dog"]])
    with pytest.raises(TypeError, match="'a dog'.*tokenize it first"):
        References(["a dog"])
