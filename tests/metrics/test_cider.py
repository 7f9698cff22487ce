"""CIDEr-D equals pycocoevalcap and the formula; the reward equals it with fixed frequencies."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from reference_scores import STORED, cider_d, document_frequencies, images, split, stored_captions
from scorers import cider_scores

from hf_attncap.metrics.cider import DocumentFrequencies
from hf_attncap.metrics.reward import CiderReward

CORPUS = [
    [["a", "dog", "runs", "with", "a", "ball"], ["the", "dog", "plays", "with", "a", "ball"]],
    [["two", "men", "ride", "bikes"], ["men", "on", "bikes"]],
    [["a", "cat", "sleeps", "on", "a", "sofa"], ["the", "cat", "is", "asleep"]],
]


@pytest.mark.parametrize("name", STORED)
def test_equals_pycocoevalcap(name):
    predictions, references = stored_captions(name)
    scores = cider_scores(references, predictions)
    np.testing.assert_allclose(scores.mean(), STORED[name]["corpus"]["cider"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores, [image["cider"] for image in STORED[name]["images"]], rtol=0, atol=1e-12)


@given(images)
def test_equals_the_formula(corpus):
    predictions, references = split(corpus)
    frequencies = document_frequencies(references)
    expected = [cider_d(*image, frequencies, len(corpus)) for image in corpus]
    np.testing.assert_allclose(cider_scores(references, predictions), expected, rtol=0, atol=1e-9)


@given(images, images)
def test_equals_the_formula_with_the_frequencies_of_other_images(corpus, training):
    predictions, references = split(corpus)
    _, others = split(training)
    frequencies = document_frequencies(others)
    expected = [cider_d(*image, frequencies, len(training)) for image in corpus]
    scores = cider_scores(references, predictions, DocumentFrequencies.from_references(others))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-9)


@given(images, st.randoms())
def test_the_order_of_images_does_not_matter(corpus, random):
    predictions, references = split(corpus)
    before = cider_scores(references, predictions)
    order = random.sample(range(len(corpus)), len(corpus))
    after = cider_scores([references[i] for i in order], [predictions[i] for i in order])
    np.testing.assert_allclose(after, before[order], rtol=0, atol=1e-12)


def test_captions_without_common_words_score_zero():
    assert cider_scores([[["a", "dog"]]], [["a", "dog"]]).tolist() == [0]  # a single image: every word is in all images
    assert cider_scores([[[]], [[], []]], [["a", "dog"], []]).tolist() == [0, 0]
    assert cider_scores(CORPUS, [[], [], []]).tolist() == [0, 0, 0]


@given(images, st.data())
def test_the_reward_with_frequencies_of_the_same_references_is_cider(corpus, data):
    predictions, references = split(corpus)
    reward = CiderReward({f"image {i}": r for i, r in enumerate(references)}, DocumentFrequencies.from_references(references))
    order = data.draw(st.lists(st.sampled_from(range(len(corpus))), max_size=8))
    earned = reward.reward([f"image {i}" for i in order], [predictions[i] for i in order])
    np.testing.assert_allclose(earned, cider_scores(references, predictions)[order], rtol=0, atol=1e-9)


@given(images, st.data())
def test_end_token_counts_as_a_word(corpus, data):
    predictions, references = split(corpus)
    ended = data.draw(st.lists(st.booleans(), min_size=len(corpus), max_size=len(corpus)))
    reward = CiderReward(dict(enumerate(references)), DocumentFrequencies.from_references(references, end_token=True))
    expected = cider_scores(
        [[[*caption, "."] for caption in captions] for captions in references],
        [[*caption, "."] if end else caption for caption, end in zip(predictions, ended)],
    )
    earned = reward.reward(range(len(corpus)), predictions, ended)
    np.testing.assert_allclose(earned, expected, rtol=0, atol=1e-9)


def test_truncated_caption_gets_a_lower_reward_with_end_tokens():
    whole, cut = ["a", "dog", "runs", "with", "a", "ball"], ["a", "dog", "runs", "with", "a"]
    loss = {}
    for end_token in (False, True):
        reward = CiderReward({"dog": CORPUS[0]}, DocumentFrequencies.from_references(CORPUS, end_token=end_token))
        best, worse = reward.reward(["dog", "dog"], [whole, cut], [True, True] if end_token else None)
        loss[end_token] = 1 - worse / best
    assert loss[True] > loss[False] > 0
    ending = CiderReward({"dog": CORPUS[0]}, DocumentFrequencies.from_references(CORPUS, end_token=True))
    finished, unfinished = ending.reward(["dog", "dog"], [whole, whole], [True, False])
    assert finished > unfinished


def test_errors_of_the_reward_name_the_argument():
    plain = CiderReward({"dog": CORPUS[0]}, DocumentFrequencies.from_references(CORPUS))
    ending = CiderReward({"dog": CORPUS[0]}, DocumentFrequencies.from_references(CORPUS, end_token=True))
    with pytest.raises(ValueError, match="'zebra'"):
        plain.reward(["dog", "zebra"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="2 ids for 1 samples"):
        plain.reward(["dog", "dog"], [["a"]])
    with pytest.raises(ValueError, match="1 values of `ended` for 2 samples"):
        ending.reward(["dog", "dog"], [["a"], ["b"]], [True])
    with pytest.raises(ValueError, match="have an end token: give `ended`"):
        ending.reward(["dog"], [["a"]])
    with pytest.raises(ValueError, match="leave `ended` out"):
        plain.reward(["dog"], [["a"]], [True])
    for reward, ended in ((plain, None), (ending, [True])):
        with pytest.raises(TypeError, match="'a dog'.*tokenize it first"):
            reward.reward(["dog"], ["a dog"], ended)
    with pytest.raises(TypeError, match="'a dog'.*tokenize it first"):
        DocumentFrequencies.from_references([["a dog"]], end_token=True)


@given(images, images, st.booleans())
def test_saved_frequencies_are_loaded_unchanged(tmp_path_factory, corpus, training, end_token):
    predictions, references = split(corpus)
    made = DocumentFrequencies.from_references(split(training)[1], end_token=end_token)
    path = tmp_path_factory.mktemp("frequencies") / "some name"
    made.save(path)
    loaded = DocumentFrequencies.load(path)
    assert (loaded.images, loaded.end_token, loaded.index.words) == (made.images, made.end_token, made.index.words)
    np.testing.assert_array_equal(loaded.counts, made.counts)
    np.testing.assert_array_equal(cider_scores(references, predictions, loaded), cider_scores(references, predictions, made))
    assert [file.name for file in path.parent.iterdir()] == ["some name"]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "frequencies.npz"
    DocumentFrequencies.from_references(CORPUS).save(path)
    old = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="No space left"):
        DocumentFrequencies.from_references(CORPUS[:1]).save(path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_error_names_a_file_of_other_content(tmp_path):
    path = tmp_path / "frequencies.npz"
    with pytest.raises(FileNotFoundError, match="frequencies.npz"):
        DocumentFrequencies.load(path)
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.savez(tmp_path / "newer.npz", format=np.array("attncap document frequencies 2"))
    np.save(tmp_path / "array.npy", np.zeros(3))
    others = [(tmp_path / name).read_bytes() for name in ("other.npz", "newer.npz", "array.npy")]
    for content in [b"", b"a dog", b'{"a": 1}', *others]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="frequencies.npz' holds no document frequencies"):
            DocumentFrequencies.load(path)


@given(st.data())
def test_damaged_file_is_rejected(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("frequencies") / "damaged.npz"
    made = DocumentFrequencies.from_references(CORPUS)
    made.save(path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255))
    assume(content[place] != byte)
    content[place] = byte
    path.write_bytes(content)
    try:
        loaded = DocumentFrequencies.load(path)
    except ValueError as error:
        assert "damaged.npz" in str(error)
    else:  # a time or another byte that is not read
        assert (loaded.images, loaded.end_token, loaded.index.words) == (made.images, made.end_token, made.index.words)
        np.testing.assert_array_equal(loaded.index.keys, made.index.keys)
        np.testing.assert_array_equal(loaded.counts, made.counts)
