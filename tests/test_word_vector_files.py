"""Reading pretrained word vectors from word2vec, GloVe and fastText text files."""

import itertools
import logging

import pytest
import torch
from torch.testing import assert_close

from hf_attncap.word_vectors import read_word_vectors

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "dog", "runs", ".", "café", "the", "5", "at"]
VOCABULARY = {word: index for index, word in enumerate(WORDS)}


def write(path, *lines: str):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


BODY = ["the 1 2 3 4 5", "dog -1.5 2e-1 0 0 1", "unheard 9 9 9 9 9", "café 0.25 0 0 0 0", "5 5 5 5 5 5"]
FOUND = {9: [1, 2, 3, 4, 5], 5: [-1.5, 0.2, 0, 0, 1], 8: [0.25, 0, 0, 0, 0], 10: [5, 5, 5, 5, 5]}


@pytest.mark.parametrize(
    "lines",
    [BODY, ["5 5", *BODY], [f"{line} " for line in ["5 5", *BODY]], [line.replace(" ", "\t") for line in BODY], [*BODY, ""]],
    ids=["GloVe", "word2vec", "fastText with trailing spaces", "tabs", "empty line"],
)
def test_text_files_of_word_vectors(lines, tmp_path):
    ids, vectors = read_word_vectors(write(tmp_path / "vectors.txt", *lines), VOCABULARY, 5)
    assert ids.tolist() == sorted(FOUND)
    assert_close(vectors, torch.tensor([FOUND[i] for i in sorted(FOUND)], dtype=vectors.dtype))


def test_words_with_spaces_are_read_whole(tmp_path):
    lines = [*BODY[:2], ". . . 7 7 7 7 7", "at name@domain.com 7 7 7 7 7", *BODY[2:], ". 1 1 1 1 1", "at 2 2 2 2 2"]
    ids, vectors = read_word_vectors(write(tmp_path / "glove.txt", *lines), VOCABULARY, 5)
    found = dict(zip(ids.tolist(), vectors.tolist()))
    assert found[VOCABULARY["."]] == [1] * 5 and found[VOCABULARY["at"]] == [2] * 5


def test_upper_case_words_match_if_nothing_else_does(tmp_path):
    ids, _ = read_word_vectors(write(tmp_path / "vectors.txt", *BODY, "RUNS 1 1 1 1 1"), VOCABULARY, 5)
    assert VOCABULARY["runs"] in ids.tolist()


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["DOG 7 7 7 7 7", "Dog 8 8 8 8 8", "dog 1 1 1 1 1", "dog 9 9 9 9 9"]))
)
def test_spelling_of_the_vocabulary_has_priority(order, tmp_path):
    ids, vectors = read_word_vectors(write(tmp_path / "vectors.txt", *order), VOCABULARY, 5)
    first = next(line for line in order if line.startswith("dog"))
    assert ids.tolist() == [VOCABULARY["dog"]] and vectors[0].tolist() == [float(first.split()[1])] * 5


@pytest.mark.parametrize("header", [[], ["5 5"]])
@pytest.mark.parametrize("wanted", [4, 6, 300])
def test_error_of_a_wrong_dimension_names_the_right_one(header, wanted, tmp_path):
    path = write(tmp_path / "vectors.txt", *header, *BODY)
    with pytest.raises(ValueError, match=f"vectors.txt' holds vectors of 5 dimensions.*{wanted}: set `word_embed_dim=5`"):
        read_word_vectors(path, VOCABULARY, wanted)


@pytest.mark.parametrize("broken", ["a 1 2 3 four 5", "a 1 2 3", "a 1 2 3 4"])
def test_error_names_a_broken_line(broken, tmp_path):
    path = write(tmp_path / "vectors.txt", *BODY, broken)
    with pytest.raises(ValueError, match="vectors.txt', line 6: expected a word and 5 numbers"):
        read_word_vectors(path, VOCABULARY, 5)


def test_file_without_known_words_is_rejected(tmp_path):
    path = write(tmp_path / "vectors.txt", "chien 1 2 3 4 5", "chat 1 2 3 4 5")
    with pytest.raises(ValueError, match="vectors.txt' has none of the 12 words"):
        read_word_vectors(path, VOCABULARY, 5)


def test_coverage_is_reported(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        read_word_vectors(write(tmp_path / "vectors.txt", *BODY), VOCABULARY, 5)
    assert "4 of 12 words found" in caplog.text
