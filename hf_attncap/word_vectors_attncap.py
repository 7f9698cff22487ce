"""Pretrained word vectors from a text file: word2vec, GloVe or fastText."""

import os

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


def read_word_vectors(path: str | os.PathLike, vocabulary: dict[str, int], dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors of the words of a vocabulary; how many were found is logged.

    Args:
        path: a UTF-8 text file, a word and its numbers a line, with or without a first line of counts.
        vocabulary: words and their ids.
        dim: the dimension wanted.

    Returns:
        Ids (n) and vectors (n, dim) of the words found. A word of the file that the vocabulary lacks counts in lower case,
        unless the file has that spelling too; of lines with equal claim the first wins.

    Raises:
        ValueError: if the file has another dimension, is not such a file or has none of the words.
    """
    found: dict[int, list[float]] = {}
    exact: set[int] = set()  # found in their own spelling
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
        raise ValueError(f"'{path}' has none of the {len(vocabulary)} words of the vocabulary: is it of the same language?")
    logger.warning("word vectors: %d of %d words found in %s", len(found), len(vocabulary), path)
    return torch.tensor(sorted(found)), torch.tensor([found[index] for index in sorted(found)])


def _check_dimension(path: str | os.PathLike, dimension: int, wanted: int) -> None:
    if dimension != wanted:
        raise ValueError(
            f"'{path}' holds vectors of {dimension} dimensions, the model wants {wanted}: set `word_embed_dim={dimension}` in the "
            "config, or use other vectors."
        )


def _numbers(path: str | os.PathLike, line: int, pieces: list[str], dim: int) -> list[float]:
    try:
        values = [float(piece) for piece in pieces]
    except ValueError:
        values = []
    if len(values) != dim:
        raise ValueError(f"'{path}', line {line}: expected a word and {dim} numbers.")
    return values


__all__ = ["read_word_vectors"]
