"""Reads pretrained word vectors from word2vec, GloVe and fastText text files."""

import os

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


def read_word_vectors(path: str | os.PathLike, vocabulary: dict[str, int], dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors of the words of a vocabulary. Logs how many words were found.

    A word of the file that is not in the vocabulary is looked up in lower case, unless the file also has the vocabulary's
    spelling. If two lines match equally well, the first one counts.

    Args:
        path: a UTF-8 text file with one word and its numbers per line. It may start with a line of counts.
        vocabulary: words and their ids, such as `tokenizer.get_vocab()`.
        dim: the dimension of the vectors, `AttnCapConfig.word_embed_dim`.

    Returns:
        Ids (n) and vectors (n, dim) of the n words found, for `from_pretrained_parts(word_vectors=...)`.

    Raises:
        ValueError: the file has another dimension, is not a file of word vectors, or has none of the words.
    """
    found: dict[int, list[float]] = {}
    exact: set[int] = set()  # ids found in the vocabulary's spelling
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            pieces = line.rstrip().split(" ") if " " in line.strip() else line.split()
            if number == 1 and len(pieces) == 2 and all(piece.isdigit() for piece in pieces):
                _check_dimension(path, int(pieces[1]), dim)
                continue
            if len(pieces) < 2:
                continue
            word = " ".join(pieces[: len(pieces) - dim]) if len(pieces) > dim + 1 else pieces[0]
            is_exact = word in vocabulary
            index = vocabulary[word] if is_exact else vocabulary.get(word.lower())
            if number <= 2:
                _check_dimension(path, len(pieces) - 1, dim)
            if index is not None and index not in (exact if is_exact else found):
                found[index] = _numbers(path, number, pieces[-dim:] if len(pieces) > dim else pieces, dim)
                if is_exact:
                    exact.add(index)
    if not found:
        raise ValueError(f"'{path}' has none of the {len(vocabulary)} words of the vocabulary: give vectors of the same language.")
    logger.warning("word vectors: %d of %d words found in %s", len(found), len(vocabulary), path)
    return torch.tensor(sorted(found)), torch.tensor([found[index] for index in sorted(found)])


def _check_dimension(path: str | os.PathLike, dimension: int, expected: int) -> None:
    if dimension != expected:
        raise ValueError(
            f"'{path}' holds vectors of {dimension} dimensions, the model expects {expected}: set `word_embed_dim={dimension}` in "
            "the config, or use other vectors."
        )


def _numbers(path: str | os.PathLike, line: int, pieces: list[str], dim: int) -> list[float]:
    try:
        values = [float(piece) for piece in pieces]
    except ValueError:
        values = []
    if len(values) != dim:
        raise ValueError(f"'{path}', line {line}: expected a word and {dim} numbers.")
    return values
