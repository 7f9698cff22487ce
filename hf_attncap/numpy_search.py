"""Greedy and beam search in numpy for exported captioners. The captions are the same as those of `search_attncap.py`.

Shapes: B images, K beams per image, L tokens at most, t tokens so far, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

IMPOSSIBLE = np.float32(-1.0e9)  # the score of a beam that must not be chosen, as in transformers
# A token of a beam: the beam that generated it, its log-probability, and the entropy of the distribution that it was chosen from.
TOKEN = np.dtype([("id", np.int64), ("beam", np.int64), ("log_prob", np.float32), ("entropy", np.float32)])
NOT_GENERATED = -1  # in the field `beam`
Captions = tuple[np.ndarray, np.ndarray]  # tokens (B, k, t + T), and scores (B, k)


@dataclass
class SearchSettings:
    """The generation settings of a checkpoint, under their names in transformers.

    `eos_token_id` is always a list. One of `max_new_tokens` and `max_length` is None.
    """

    decoder_start_token_id: int
    pad_token_id: int
    eos_token_id: list[int]
    num_beams: int
    max_new_tokens: int | None
    max_length: int | None
    length_penalty: float
    early_stopping: bool | str
    min_length: int = 0
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    suppress_tokens: list[int] = field(default_factory=list)
    repeatable_token_ids: list[int] | None = None

    def longest(self, start: int) -> int:
        """The maximum number of tokens in a caption, including the first `start` ones, which are start token and prompt."""
        longest = self.max_length if self.max_new_tokens is None else start + self.max_new_tokens
        assert longest is not None
        if longest <= start:
            raise ValueError(f"The prompt has {start - 1} tokens, but captions end after {longest - 1}: give a shorter prompt.")
        return longest


class Decoder(Protocol):
    """The decoder's steps for the captions of B images."""

    def read_prompt(self, ids: np.ndarray, beams: int) -> Any:
        """Read start token and prompt (t), and make `beams` equal captions per image; return logits as `read` does."""

    def read(self, ids: np.ndarray) -> Any:
        """Read the last token of the captions (B, K, t); return logits (B, K, V), their log-sum-exp and entropy (B, K)."""

    def select(self, beams: np.ndarray) -> None:
        """Keep the captions at these indices (B, K) of each image, in this order."""


def search(decoder: Decoder, settings: SearchSettings, images: int, prompt: list[int], beams: int, wanted: int) -> Captions:
    """Decode with `beams` beams, 1 for greedy search; return the `wanted` best captions per image, best first."""
    start = 1 + len(prompt)
    tokens = np.zeros((images, beams, settings.longest(start)), dtype=TOKEN)  # (B, K, L)
    tokens["id"], tokens["beam"] = settings.pad_token_id, NOT_GENERATED
    tokens["id"][:, :, :start] = [settings.decoder_start_token_id, *prompt]
    outputs = decoder.read_prompt(tokens["id"][0, 0, :start], beams)
    if beams == 1:
        return _greedy_search(decoder, settings, tokens, start, outputs)
    return _beam_search(decoder, settings, tokens, start, wanted, outputs)


def _greedy_search(decoder: Decoder, settings: SearchSettings, tokens: np.ndarray, start: int, outputs: Any) -> Captions:
    """The most probable token at each step."""
    running = np.ones(len(tokens), dtype=bool)  # (B)
    length = start
    while True:
        logits, normalizer, entropy = outputs  # (B, 1, V), (B, 1), (B, 1)
        ids = _process(settings, tokens["id"][:, :, :length], logits.copy(), start).argmax(axis=-1)  # (B, 1)
        chosen = tokens[running, 0, length]  # (running)
        chosen["id"], chosen["beam"], chosen["entropy"] = ids[running, 0], 0, entropy[running, 0]
        chosen["log_prob"] = (np.take_along_axis(logits, ids[..., None], -1)[..., 0] - normalizer)[running, 0]
        tokens[running, 0, length] = chosen
        running &= ~_is_in(tokens["id"][:, 0, length], settings.eos_token_id)  # (B)
        length += 1
        if length >= tokens.shape[-1] or not running.any():
            break
        outputs = decoder.read(tokens["id"][:, :, :length])
    count = (tokens["beam"] != NOT_GENERATED).sum(axis=-1)  # (B, 1)
    scores = tokens["log_prob"].sum(axis=-1) / count**settings.length_penalty  # (B, 1)
    return tokens[:, :, :length], scores


def _beam_search(decoder: Decoder, settings: SearchSettings, beams: np.ndarray, start: int, wanted: int, outputs: Any) -> Captions:
    """Beam search; the steps are those of `search_attncap.beam_search`."""
    B, K, longest = beams.shape
    image = np.arange(B)[:, None]  # (B, 1)
    count = max(2, 1 + len(settings.eos_token_id)) * K  # candidates per image
    is_top = np.arange(count) < K  # (count)
    best = beams.copy()  # (B, K, L): the best finished beams
    scores = np.zeros((B, K), np.float32)
    scores[:, 1:] = IMPOSSIBLE  # at first all beams of an image are equal, so only one counts
    best_scores = np.full((B, K), IMPOSSIBLE)
    finished = np.zeros((B, K), dtype=bool)
    improvable = np.ones((B, 1), dtype=bool)

    for length in range(start, longest):
        logits, normalizer, entropy = outputs  # (B, K, V), (B, K), (B, K)
        log_probs = logits - normalizer[:, :, None]  # (B, K, V)
        total = _process(settings, beams["id"][:, :, :length], log_probs.copy(), start)  # (B, K, V)
        total += scores[:, :, None]
        top, index = _top(total.reshape(B, -1), count)  # (B, count)
        parent, ids = index // logits.shape[-1], index % logits.shape[-1]  # (B, count)
        candidates = beams[image, parent]  # (B, count, L)
        newest = candidates[:, :, length]  # (B, count), a view
        newest["id"], newest["beam"] = ids, parent
        newest["log_prob"], newest["entropy"] = log_probs[image, parent, ids], entropy[image, parent]
        ended = _is_in(ids, settings.eos_token_id) | (length + 1 >= longest)  # (B, count)

        scores, order = _top(top + ended * IMPOSSIBLE, K)  # (B, K)
        beams = candidates[image, order]  # (B, K, L)

        new = top / (length + 1 - start) ** settings.length_penalty  # (B, count)
        lost = ~improvable | ~(ended & is_top)  # (B, count)
        if settings.early_stopping is True:
            lost |= finished.all(axis=-1, keepdims=True)
        best_scores, order = _top(np.concatenate([best_scores, new + lost * IMPOSSIBLE], axis=1), K)  # (B, K)
        best = np.concatenate([best, candidates], axis=1)[image, order]  # (B, K, L)
        finished = np.concatenate([finished, ended & is_top], axis=1)[image, order]  # (B, K)

        until = longest if settings.early_stopping == "never" and settings.length_penalty > 0 else length + 1
        possible = scores[:, :1] / (until - start) ** settings.length_penalty  # (B, 1)
        worst = np.where(finished, best_scores.min(axis=1, keepdims=True), IMPOSSIBLE)  # (B, K)
        improvable &= (possible > worst).any(axis=-1, keepdims=True)  # (B, 1)
        if not improvable.any() or (finished.all() and settings.early_stopping is True) or ended.all():
            break
        decoder.select(beams["beam"][:, :, length])
        outputs = decoder.read(beams["id"][:, :, : length + 1])

    best = best[:, :wanted]  # (B, k, L)
    generated = int((best["beam"] != NOT_GENERATED).sum(axis=-1).max())
    return best[:, :, : start + generated], best_scores[:, :wanted]


def _process(settings: SearchSettings, ids: np.ndarray, scores: np.ndarray, start: int) -> np.ndarray:
    """Change the scores (B, K, V) of the tokens after `ids` (B, K, t) as the logits processors of transformers do, in place."""
    B, K, length = ids.shape
    image, beam = np.arange(B)[:, None, None], np.arange(K)[:, None]  # (B, 1, 1), (K, 1)
    if settings.repetition_penalty != 1:
        old = scores[image, beam, ids]  # (B, K, t)
        scores[image, beam, ids] = np.where(old < 0, old * settings.repetition_penalty, old / settings.repetition_penalty)
    size = settings.no_repeat_ngram_size
    if 0 < size <= length:
        ngrams = np.lib.stride_tricks.sliding_window_view(ids, size, axis=-1)  # (B, K, n-grams, size)
        last = ids[:, :, None, length - size + 1 :]  # (B, K, 1, size - 1)
        found = (ngrams[..., :-1] == last).all(axis=-1).nonzero()  # 3 of (found)
        scores[found[0], found[1], ngrams[found][:, -1]] = -np.inf
    if length < settings.min_length or length - start < settings.min_new_tokens:
        scores[:, :, settings.eos_token_id] = -np.inf
    scores[:, :, settings.suppress_tokens] = -np.inf
    if settings.repeatable_token_ids is not None:
        found = (~_is_in(ids, settings.repeatable_token_ids + settings.eos_token_id)).nonzero()  # 3 of (found)
        scores[found[0], found[1], ids[found]] = -np.inf
    return scores


def _is_in(ids: np.ndarray, tokens: list[int]) -> np.ndarray:
    """`np.isin`, faster for few tokens."""
    return (ids[..., None] == np.array(tokens, ids.dtype)).any(axis=-1)


def _top(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest of values (B, n), in descending order, and their indices, (B, count) each."""
    places = np.argpartition(-values, count - 1, axis=1)[:, :count] if count < values.shape[1] // 4 else None
    found = values if places is None else np.take_along_axis(values, places, 1)
    order = np.argsort(-found, axis=1, kind="stable")[:, :count]  # (B, count)
    return np.take_along_axis(found, order, 1), order if places is None else np.take_along_axis(places, order, 1)
