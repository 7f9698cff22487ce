"""Greedy search, sampling and beam search in numpy for exported captioners. Without sampling, the captions are the same as those of
`search_attncap.py`.

Shapes: B images, K beams per image, L tokens at most, t tokens so far, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np

from .engine import SAMPLING_ARGUMENTS, check_sampling, unknown_argument

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


@dataclass
class Sampling:
    """The settings of sampling, under their names and with the defaults of transformers."""

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0


def _whole(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) is int and value >= least, f"an integer, at least {least}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)


_POSITIVE = (lambda value: _is_number(value) and value > 0, "a number above 0")
# The arguments of `generate` that exported captioners have: whether a value can be used, and which values can.
CHANGEABLE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": _whole(1),
    "min_new_tokens": _whole(0),
    "no_repeat_ngram_size": _whole(0),
    "length_penalty": (_is_number, "a number"),
    "repetition_penalty": _POSITIVE,
    "early_stopping": (lambda value: value in (True, False, "never"), "True, False or 'never'"),
    "do_sample": (lambda value: isinstance(value, bool), "True or False"),
    "temperature": _POSITIVE,
    "top_k": _whole(0),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0, at most 1"),
}


def change_settings(settings: SearchSettings, generate_kwargs: Mapping[str, Any]) -> tuple[SearchSettings, Sampling | None]:
    """The settings with arguments of `generate`, and those of sampling, or None without sampling; raises a ValueError."""
    for name, value in generate_kwargs.items():
        if name in SAMPLING_ARGUMENTS | {item.name for item in fields(SearchSettings)} and name not in CHANGEABLE:
            raise ValueError(
                f"Exported captioners do not have `{name}`: use the checkpoint without export, or one of {', '.join(CHANGEABLE)}."
            )
        if name not in CHANGEABLE:
            raise ValueError(unknown_argument(name, CHANGEABLE))
        is_valid, allowed = CHANGEABLE[name]
        if not is_valid(value):
            raise ValueError(f"`{name}` is {value!r:.60}, but it must be {allowed}.")
    check_sampling(generate_kwargs, False)
    given = dict(generate_kwargs)
    drawn = {name: given.pop(name) for name in SAMPLING_ARGUMENTS & set(given)}
    sampling = Sampling(**drawn) if given.pop("do_sample", False) else None
    return replace(settings, **given), sampling


class Decoder(Protocol):
    """The decoder's steps for the captions of B images."""

    def read_prompt(self, ids: np.ndarray, beams: int) -> Any:
        """Read start token and prompt (t), and make `beams` equal captions per image; return logits as `read` does."""

    def read(self, ids: np.ndarray) -> Any:
        """Read the last token of the captions (B, K, t); return logits (B, K, V), their log-sum-exp and entropy (B, K)."""

    def select(self, beams: np.ndarray) -> None:
        """Keep the captions at these indices (B, K) of each image, in this order."""


def search(
    decoder: Decoder,
    settings: SearchSettings,
    images: int,
    prompt: list[int],
    beams: int,
    wanted: int,
    sampling: Sampling | None = None,
) -> Captions:
    """Decode with `beams` beams, 1 for greedy search; return the `wanted` best captions per image, best first.

    With `sampling`, sample `wanted` captions per image.
    """
    start = 1 + len(prompt)
    rows = beams if sampling is None else wanted
    tokens = np.zeros((images, rows, settings.longest(start)), dtype=TOKEN)  # (B, K, L)
    tokens["id"], tokens["beam"] = settings.pad_token_id, NOT_GENERATED
    tokens["id"][:, :, :start] = [settings.decoder_start_token_id, *prompt]
    outputs = decoder.read_prompt(tokens["id"][0, 0, :start], rows)
    if beams == 1:
        return _extend(decoder, settings, tokens, start, outputs, sampling)
    return _beam_search(decoder, settings, tokens, start, wanted, outputs)


def _extend(
    decoder: Decoder, settings: SearchSettings, tokens: np.ndarray, start: int, outputs: Any, sampling: Sampling | None
) -> Captions:
    """Extend each row of tokens (B, K, L) by the most probable token at each step, or by one chosen at random."""
    running = np.ones(tokens.shape[:2], dtype=bool)  # (B, K)
    row = np.broadcast_to(np.arange(tokens.shape[1]), running.shape)  # (B, K)
    length = start
    while True:
        logits, normalizer, entropy = outputs  # (B, K, V), (B, K), (B, K)
        scores = _process(settings, tokens["id"][:, :, :length], logits.copy(), start)  # (B, K, V)
        ids = scores.argmax(axis=-1) if sampling is None else _sample(scores, sampling)  # (B, K)
        chosen = tokens[running, length]  # (running)
        chosen["id"], chosen["beam"], chosen["entropy"] = ids[running], row[running], entropy[running]
        chosen["log_prob"] = (np.take_along_axis(logits, ids[..., None], -1)[..., 0] - normalizer)[running]
        tokens[running, length] = chosen
        running &= ~_is_in(tokens["id"][:, :, length], settings.eos_token_id)  # (B, K)
        length += 1
        if length >= tokens.shape[-1] or not running.any():
            break
        outputs = decoder.read(tokens["id"][:, :, :length])
    count = (tokens["beam"] != NOT_GENERATED).sum(axis=-1)  # (B, K)
    scores = tokens["log_prob"].sum(axis=-1) / count**settings.length_penalty  # (B, K)
    return tokens[:, :, :length], scores


def _sample(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    """One token per row of scores (B, K, V), chosen by numpy's global random generator: (B, K)."""
    scores = scores.astype(np.float64) / sampling.temperature  # (B, K, V)
    order = np.argsort(-scores, axis=-1, kind="stable")  # (B, K, V)
    ranked = np.take_along_axis(scores, order, -1)  # (B, K, V), descending
    if sampling.top_k:
        least = ranked[..., : sampling.top_k].min(axis=-1, keepdims=True)  # (B, K, 1)
        ranked = np.where(ranked < least, -np.inf, ranked)
    weights = np.exp(ranked - ranked[..., :1])  # (B, K, V)
    weights /= weights.sum(axis=-1, keepdims=True)
    before = weights.cumsum(axis=-1) - weights  # (B, K, V): the probability of all more probable tokens
    weights[before >= sampling.top_p] = 0  # the first token stays
    upto = weights.cumsum(axis=-1)  # (B, K, V)
    place = (upto > np.random.random_sample((*upto.shape[:2], 1)) * upto[..., -1:]).argmax(axis=-1)  # (B, K)
    return np.take_along_axis(order, place[..., None], -1)[..., 0]


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
    may_have_finished = False  # until then, the finished beams need no update

    for length in range(start, longest):
        logits, normalizer, entropy = outputs  # (B, K, V), (B, K), (B, K)
        log_probs = logits - normalizer[:, :, None]  # (B, K, V)
        total = _process(settings, beams["id"][:, :, :length], log_probs, start)  # (B, K, V)
        total += scores[:, :, None]
        top, index = _top(total.reshape(B, -1), count)  # (B, count)
        parent, ids = index // logits.shape[-1], index % logits.shape[-1]  # (B, count)
        candidates = beams[image, parent]  # (B, count, L)
        newest = candidates[:, :, length]  # (B, count), a view
        newest["id"], newest["beam"] = ids, parent
        newest["log_prob"] = logits[image, parent, ids] - normalizer[image, parent]
        newest["entropy"] = entropy[image, parent]
        ended = _is_in(ids, settings.eos_token_id) | (length + 1 >= longest)  # (B, count)

        scores, order = _top(top + ended * IMPOSSIBLE, K)  # (B, K)
        beams = candidates[image, order]  # (B, K, L)

        if not may_have_finished:
            may_have_finished = bool(ended[:, :K].any() or (scores[:, 0] <= IMPOSSIBLE).any())
        if may_have_finished:
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
        count = length - size + 1  # the number of n-grams; the last `size - 1` tokens start at this index
        banned = np.ones((B, K, count), dtype=bool)  # n-grams that begin with the last `size - 1` tokens
        for place in range(size - 1):
            banned &= ids[:, :, place : place + count] == ids[:, :, count + place, None]
        found = banned.nonzero()  # 3 of (found)
        scores[found[0], found[1], ids[:, :, size - 1 :][found]] = -np.inf
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
    row = np.arange(len(values))[:, None]  # (B, 1)
    places = np.argpartition(-values, count - 1, axis=1)[:, :count] if count < values.shape[1] // 4 else None
    found = values if places is None else values[row, places]
    order = np.argsort(-found, axis=1, kind="stable")[:, :count]  # (B, count)
    return found[row, order], order if places is None else places[row, order]
