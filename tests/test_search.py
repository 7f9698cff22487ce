"""The package's greedy search, sampling and beam search give the results of transformers' loops; other settings use those loops."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import EOS, PAD
from test_generation import WORDS, images, talker
from torch.testing import assert_close
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.generation.stopping_criteria import MaxTimeCriteria

from hf_attncap import generation_attncap, search_attncap
from hf_attncap.cache_attncap import CACHE_NAME

FULL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_attentions": True}


def search(fast: bool, kind: str, seed: int, regions: Any, **options: Any) -> Any:
    """The output of `generate`, by the fast loops or by transformers'."""
    supported = generation_attncap.is_supported
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation_attncap, "is_supported", supported if fast else lambda *_: False)
        model = talker(kind, seed)
        torch.manual_seed(seed)
        return model.generate(encoder_outputs=regions, **{**FULL, **options})


def assert_same(fast: Any, stock: Any) -> None:
    assert torch.equal(fast.sequences, stock.sequences)
    assert fast.keys() == stock.keys()
    for name in ("sequences_scores", "scores", "logits", "cross_attentions", "decoder_attentions"):
        if stock.get(name) is not None:
            assert_close(fast[name], stock[name], rtol=1e-5, atol=1e-6)
    if "sequences_scores" not in stock:  # after beam search the cache belongs to no caption
        assert fast[CACHE_NAME].get_seq_length() == stock[CACHE_NAME].get_seq_length()
    if "beam_indices" in stock:
        assert torch.equal(fast.beam_indices, stock.beam_indices)


def assert_same_as_transformers(kind: str, seed: int, batch: int, prompt: list[list[int]] | None, options: dict[str, Any]) -> None:
    """Compare the loops on images that all have the same prompt."""
    if prompt is not None:
        ids = torch.tensor(prompt * batch)
        options = {**options, "decoder_input_ids": ids, "decoder_attention_mask": ids != PAD}
    regions = images(batch, kind)
    assert_same(search(True, kind, seed, regions, **options), search(False, kind, seed, regions, **options))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["none", "score", "channel", "history"]),
    seed=st.integers(0, 9),
    batch=st.integers(1, 3),
    beams=st.integers(1, 5),
    length=st.integers(1, 9),
    penalty=st.sampled_from([-1.0, 0.0, 0.7, 1.0, 1.5, 3.0]),
    early=st.sampled_from([False, True, "never"]),
    returned=st.integers(1, 5),
    ngram=st.sampled_from([0, 2, 3]),
    more=st.sampled_from(
        [
            {},
            {"suppress_tokens": [4, 5]},
            {"suppress_tokens": []},
            {"suppress_tokens": [-1, 999]},
            {"min_new_tokens": 3},
            {"repetition_penalty": 1.3},
        ]
    ),
    ends=st.sampled_from([EOS, [EOS, 6], None]),
    prompt=st.sampled_from([None, [[4, 5]], [[PAD, 5]]]),
)
def test_results_equal_those_of_transformers(kind, seed, batch, beams, length, penalty, early, returned, ngram, more, ends, prompt):
    options = {"num_beams": beams, "max_new_tokens": length, "no_repeat_ngram_size": ngram, "eos_token_id": ends, **more}
    if beams > 1:
        options |= {"length_penalty": penalty, "early_stopping": early, "num_return_sequences": min(returned, beams)}
    if ends is None:
        options.pop("min_new_tokens", None)
    assert_same_as_transformers(kind, seed, batch, prompt, options)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["none", "score", "channel", "history"]),
    seed=st.integers(0, 9),
    batch=st.integers(1, 3),
    returned=st.integers(1, 4),
    length=st.integers(1, 9),
    more=st.sampled_from(
        [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.7}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 3}]
    ),
    ends=st.sampled_from([EOS, [EOS, 6]]),
    prompt=st.sampled_from([None, [[4, 5]], [[PAD, 5]]]),
)
def test_samples_equal_those_of_transformers(kind, seed, batch, returned, length, more, ends, prompt):
    """With the same random seed."""
    options = {"do_sample": True, "max_new_tokens": length, "num_return_sequences": returned, "eos_token_id": ends, **more}
    assert_same_as_transformers(kind, seed, batch, prompt, options)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 6))
def test_banned_ngrams_are_those_of_transformers(size, rows, length):
    input_ids = torch.tensor(rows)[:, :length]
    scores = torch.randn(len(rows), 5, generator=torch.Generator().manual_seed(length))
    expected = NoRepeatNGramLogitsProcessor(size)(input_ids, scores.clone())
    assert torch.equal(generation_attncap.NoRepeatedNgrams(size)(input_ids, scores), expected)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(0, 5), st.integers(0, 3), st.lists(st.integers(-2, 6), min_size=1, max_size=3)
)
def test_banned_tokens_are_those_of_transformers(rows, length, prompt, shortest, banned):
    input_ids = torch.zeros(rows, length, dtype=torch.long)
    scores = torch.randn(rows, 5, generator=torch.Generator().manual_seed(length))
    given, tokens = scores.clone(), torch.tensor(banned)
    expected = SuppressTokensLogitsProcessor(banned)(input_ids, scores)
    assert torch.equal(generation_attncap.SuppressedTokens(tokens, 5)(input_ids, scores), expected)
    expected = MinNewTokensLengthLogitsProcessor(prompt, shortest, tokens)(input_ids, scores)
    assert torch.equal(generation_attncap.NoEarlyEnd(prompt + shortest, tokens, 5)(input_ids, scores), expected)
    expected = MinLengthLogitsProcessor(shortest, tokens)(input_ids, scores)
    assert torch.equal(generation_attncap.NoEarlyEnd(shortest, tokens, 5)(input_ids, scores), expected)
    assert torch.equal(scores, given), "the processors changed their input"


@pytest.mark.parametrize("beams", [1, 3])
def test_no_processor_searches_the_vocabulary(beams, monkeypatch):
    """transformers' processors compare each token of the vocabulary with the banned ones at each step."""
    searches, isin = [], torch.isin
    monkeypatch.setattr(torch, "isin", lambda *args, **kwargs: searches.append(args) or isin(*args, **kwargs))
    settings: dict[str, Any] = {"suppress_tokens": [4], "no_repeat_ngram_size": 2, "num_beams": beams}
    counts = []
    for length in (2, 6):
        searches.clear()
        limits = {"min_new_tokens": length, "max_new_tokens": length}
        out = talker("score", 0).generate(encoder_outputs=images(2, "score"), **limits, **settings)
        assert out.shape == (2, 1 + length) and not ((out == EOS) | (out == 4)).any()
        counts.append(len(searches))
    assert counts[0] == counts[1], "the number of searches grows with the length"


def test_steps_between_two_checks_for_the_end_change_nothing(monkeypatch):
    """On a GPU, the loops check only at some steps whether all captions have ended."""
    used: list[int] = []

    def should_stop(steps: Any, unfinished: torch.Tensor) -> bool:
        steps.unfinished.append(unfinished)
        used.append(len(steps.unfinished))
        return len(steps.unfinished) % 4 == 0 and not unfinished

    for early, beams in itertools.product([False, True, "never"], [1, 2, 4]):
        options = {"num_beams": beams, "max_new_tokens": WORDS, "no_repeat_ngram_size": 2}
        options |= {"early_stopping": early, "num_return_sequences": beams} if beams > 1 else {}
        for seed in range(8):
            regions = images(2, "score")
            stock = search(False, "score", seed, regions, **options)
            used.clear()
            with monkeypatch.context() as patch:
                patch.setattr(search_attncap.DecodingSteps, "should_stop", should_stop)
                fast = search(True, "score", seed, regions, **options)
            assert_same(fast, stock)
            assert used, "the fast loops were not used"


def test_finished_captions_are_padded_with_the_padding_token():
    """transformers' beam search pads with the end token if the padding token is 0."""
    for fast in (True, False):
        sequences = search(fast, "score", 17, images(4, "score"), num_beams=3, max_new_tokens=WORDS).sequences
        for row in sequences.tolist():
            rest = row[row.index(EOS) + 1 :] if EOS in row else []
            assert set(rest) <= {PAD}
        assert (sequences == PAD).any(), "all captions are equally long"


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_beams": 2},
        {"use_cache": False},
        {"output_hidden_states": True},
        {"stopping_criteria": [MaxTimeCriteria(60.0)]},
    ],
    ids=["beam sampling", "no cache", "hidden states", "own criterion"],
)
def test_other_settings_use_transformers(options, monkeypatch):
    for name in ("greedy_search", "beam_search"):
        monkeypatch.setattr(generation_attncap, name, lambda *_: pytest.fail("the fast loop was used"))
    talker("score").generate(encoder_outputs=images(2, "score"), max_new_tokens=WORDS, **options)


@pytest.mark.parametrize("place", ["model", "model.model", "model.model.decoder"])
def test_changed_forwards_are_called_at_each_step(place, monkeypatch):
    model = talker("score")
    regions = images(1, "score")
    calls = []
    module = {"model": model, "model.model": model.model, "model.model.decoder": model.model.decoder}[place]
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(generation_attncap, "beam_search", lambda *_: pytest.fail("the fast loop was used"))
    try:
        model.generate(encoder_outputs=regions, num_beams=2, min_new_tokens=4, max_new_tokens=4)
    finally:
        handle.remove()
    assert len(calls) == 4
