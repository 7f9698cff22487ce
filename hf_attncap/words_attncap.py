"""The words of captions and prompts, from the tokens of any tokenizer. Needs neither torch nor transformers.

Shapes: T tokens, W words, E word embedding, a grid of H x W regions.
"""

from typing import Any

import numpy as np


class CaptionPieces:
    """The text of a generated sequence, and the tokens of each of its words.

    Args:
        tokenizer: a word or subword tokenizer.
        ids: the T + 1 tokens of the sequence, start token first. Special tokens belong to no word.

    Attributes:
        text: the caption.
        words: its W words.
    """

    def __init__(self, tokenizer: Any, ids: list[int]):
        special = set(tokenizer.all_special_ids)
        positions = [position for position, token in enumerate(ids) if token not in special]
        pieces = [ids[position] for position in positions]
        self.text: str = tokenizer.decode(pieces)
        self.words = self.text.split()
        last = len(self.words) - 1
        # The number of words from a token onward gives its word, both for tokenizers that mark the beginning of a word ("▁do",
        # "g") and for those that mark its continuation ("do", "##g").
        words_left = [len(tokenizer.decode(pieces[n:]).split()) for n in range(len(pieces))]
        self._word_of = {position: min(last + 1 - left, last) for position, left in zip(positions, words_left) if self.words}

    def merge(self, rows: np.ndarray, over_words: bool = False) -> np.ndarray:
        """Averages rows of tokens over the tokens of each word.

        Args:
            rows: (T, ...); row t belongs to token t + 1 as in `caption_attentions`.
            over_words: the columns of rows (T, T) are tokens too; sum them over the tokens of each word. Weights between the tokens
                of one word are dropped.

        Returns:
            float32 (W, ...); each row sums to 1. With `over_words` (W, W): column 0 is the start token and column j word j - 1.
        """
        values = np.asarray(rows, np.float32)  # (T, ...)
        mean = self._tokens_of_words(len(values))  # (W, T)
        total = np.zeros((len(values), 1 + len(self.words)), dtype=np.float32)  # (T, 1 + W)
        total[0, 0] = 1
        for position, word in self._word_of.items():
            total[position : position + 1, 1 + word] = 1  # the last token is not an input and has no column
        mean /= mean.sum(axis=1, keepdims=True)
        merged = np.tensordot(mean, values, axes=1)  # (W, ...)
        if over_words:
            merged = np.tril(merged @ total[:, :-1])  # (W, W)
        return merged / merged.sum(axis=tuple(range(1, merged.ndim)), keepdims=True)

    def add_up(self, rows: np.ndarray) -> np.ndarray:
        """Sums rows (T, ...), row t of token t + 1, over the tokens of each word: float32 (W, ...)."""
        values = np.asarray(rows, np.float32)  # (T, ...)
        return np.tensordot(self._tokens_of_words(len(values)), values, axes=1)  # (W, ...)

    def _tokens_of_words(self, tokens: int) -> np.ndarray:
        """(W, T) float32: 1 if token t + 1 is a part of the word, else 0."""
        parts = np.zeros((len(self.words), tokens), dtype=np.float32)  # (W, T)
        for position, word in self._word_of.items():
            parts[word, position - 1] = 1
        return parts


def check_prompt(tokenizer: Any, prompt: str) -> None:
    """Raises a ValueError if a prompt is not a string or has words that the model does not know."""
    if not isinstance(prompt, str):
        raise ValueError(f"The prompt must be one string, got {prompt!r:.200}.")
    unknown = [word for word in prompt.split() if tokenizer.unk_token_id in tokenizer(word)["input_ids"]]
    if unknown:
        raise ValueError(f"The model does not know {', '.join(unknown)} in the prompt {prompt!r}: rephrase it.")


__all__ = ["CaptionPieces", "check_prompt"]
