"""`generate` says what the formulas say, in every mode; images are encoded once and no word is run twice."""

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from reference import BOS, EOS, PAD, UNK, Reference, beam_search, greedy, load, random_regions, tiny_model
from torch.testing import assert_close
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from hf_attncap.cache_attncap import AttnCapCache
from hf_attncap.modeling_attncap import GridEncoderOutput

WORDS = 7  # new words at most, end token included
# Seeds and kinds whose captions end early, late and not at all.
CASES = {"history": 18, "channel": 17, "score": 17, "none": 20}
every_kind = pytest.mark.parametrize("kind", CASES)


@cache
def talker(kind: str = "history", seed: int | None = None) -> Any:
    """A random captioner whose words depend on picture and state, with an end token that is likely enough."""
    model = tiny_model(CASES[kind] if seed is None else seed, word_attention=kind, hidden_size=8)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.35)
        model.lm_head.bias.zero_()
        model.lm_head.bias[EOS] = 1.2
        model.model.encoder.windows.weight.mul_(0.02)
        model.model.decoder.word_out.weight.mul_(0.7)
        model.model.decoder.state_out.weight.mul_(1.5)
        model.model.decoder.state_out.bias.zero_()
    return model


def images(count: int = 4, kind: str = "history") -> Any:
    return random_regions(count, seed=CASES[kind])


def pictures(count: int) -> torch.Tensor:
    """Pictures of very different contrast, else the random trunk would hardly tell them apart."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 64, 96, generator=generator) * 4.0 ** torch.arange(-1, count - 1)[:, None, None, None]


def one_image(regions: Any, index: int) -> GridEncoderOutput:
    return GridEncoderOutput(last_hidden_state=regions.last_hidden_state[index : index + 1], grid_shape=regions.grid_shape)


@cache
def scorers(kind: str) -> list:
    reference = Reference(talker(kind))
    return [reference.scorer(regions) for regions in images(kind=kind).last_hidden_state]


def until_end(sequence: torch.Tensor, start: int = 1) -> list[int]:
    """A row of `sequences` without what follows its end token."""
    words = sequence.tolist()
    return words[: words.index(EOS, start) + 1] if EOS in words[start:] else words


def forced_log_probs(model, regions, sequences: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """log p of each word after the first, (R, T), in one pass over the finished words."""
    out = model(encoder_outputs=regions, decoder_input_ids=sequences[:, :-1], decoder_attention_mask=mask, use_cache=False)
    return out.logits.log_softmax(-1).gather(-1, sequences[:, 1:, None]).squeeze(-1)


# --- greedy ---


@every_kind
def test_greedy_equals_a_plain_loop(kind):
    sequences = talker(kind).generate(encoder_outputs=images(kind=kind), max_new_tokens=WORDS)
    want = [greedy(score, [BOS], WORDS) for score in scorers(kind)]
    assert [until_end(row) for row in sequences] == want
    assert len({len(words) for words in want}) > 1, "all captions are equally long: a poor test"


def test_finished_rows_are_padded():
    sequences = talker().generate(encoder_outputs=images(), max_new_tokens=WORDS)
    for row in sequences:
        words = until_end(row)
        assert row.tolist() == words + [PAD] * (len(row) - len(words))
    assert any(PAD in row.tolist() for row in sequences)


@pytest.mark.parametrize("limit, length", [({"max_new_tokens": 3}, 4), ({"max_length": 3}, 3), ({"max_new_tokens": 1}, 2)])
@pytest.mark.parametrize("beams", [1, 2])
def test_length_limits(limit, length, beams):
    """`max_length` counts the start token, `max_new_tokens` does not."""
    model = talker(seed=3)  # one that does not come to an end by itself
    assert model.generate(encoder_outputs=images(1), num_beams=beams, suppress_tokens=[EOS], **limit).shape == (1, length)


def test_several_end_tokens():
    plain = [until_end(row) for row in talker().generate(encoder_outputs=images(), max_new_tokens=WORDS)]
    also = plain[0][2]
    sequences = talker().generate(encoder_outputs=images(), max_new_tokens=WORDS, eos_token_id=[EOS, also])
    for words, row in zip(plain, sequences.tolist()):
        cut = next((i for i, word in enumerate(words) if i and word in (EOS, also)), len(words) - 1)
        assert row[: cut + 1] == words[: cut + 1] and not any(row[cut + 1 :])


def test_streamer_gets_every_word():
    class Collect(BaseStreamer):
        words, ended = [], False

        def put(self, value):
            self.words += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Collect()
    sequences = talker().generate(encoder_outputs=images(1), max_new_tokens=WORDS, streamer=streamer)
    assert streamer.words == sequences[0].tolist() and streamer.ended


# --- beams ---


@every_kind
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 1.0, 2.0])
def test_beams_equal_a_written_out_search(kind, early_stopping, length_penalty):
    out = talker(kind).generate(
        encoder_outputs=images(kind=kind),
        max_new_tokens=WORDS,
        num_beams=3,
        num_return_sequences=3,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        return_dict_in_generate=True,
        output_scores=True,
    )
    wanted = [beam_search(score, [BOS], 3, WORDS, length_penalty, early_stopping) for score in scorers(kind)]
    assert [until_end(row) for row in out.sequences] == [words for captions in wanted for _, words in captions]
    want_scores = torch.tensor([score for captions in wanted for score, _ in captions])
    assert_close(out.sequences_scores, want_scores, rtol=1e-4, atol=1e-5)


def test_beam_settings_change_the_captions():
    """Else the comparison above would show nothing of them."""

    def captions(**settings):
        return [beam_search(score, [BOS], 3, WORDS, **settings) for kind in CASES for score in scorers(kind)]

    plain = captions()
    assert plain != captions(length_penalty=2.0)
    assert plain != captions(early_stopping=True)
    assert captions(length_penalty=2.0) != captions(length_penalty=2.0, early_stopping="never")
    lengths = {len(words) for caption in plain for _, words in caption}
    assert len(lengths) > 3
    assert any(caption[0][1] != greedy(score, [BOS], WORDS) for caption, score in zip(plain, scorers("history")))


@every_kind
def test_batched_beams_equal_single_ones(kind):
    model, regions = talker(kind), images(kind=kind)
    settings = {"max_new_tokens": WORDS, "num_beams": 4, "return_dict_in_generate": True, "output_scores": True}
    together = model.generate(encoder_outputs=regions, **settings)
    for row in range(4):
        single = model.generate(encoder_outputs=one_image(regions, row), **settings)
        assert until_end(together.sequences[row]) == until_end(single.sequences[0])
        assert_close(together.sequences_scores[row], single.sequences_scores[0], rtol=1e-5, atol=1e-6)


@every_kind
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("length_penalty", [0.6, 1.0])
def test_score_of_a_beam_is_the_log_probability_of_the_model(kind, sample, length_penalty):
    """log p of the words, end token included, over their number ** penalty; suppressed words keep their share of p."""
    model, regions = talker(kind), images(kind=kind)
    torch.manual_seed(0)
    out = model.generate(
        encoder_outputs=regions,
        max_new_tokens=WORDS,
        num_beams=3,
        num_return_sequences=2,
        do_sample=sample,
        length_penalty=length_penalty,
        return_dict_in_generate=True,
        output_scores=True,
    )
    log_p = forced_log_probs(model, regions, out.sequences)
    for row, score in enumerate(out.sequences_scores):
        count = len(until_end(out.sequences[row])) - 1
        assert_close(score.double(), log_p[row, :count].sum() / count**length_penalty, rtol=1e-4, atol=1e-5)


def test_several_return_sequences_are_distinct_and_best_first():
    settings = {"max_new_tokens": WORDS, "num_beams": 4, "return_dict_in_generate": True, "output_scores": True}
    out = talker().generate(encoder_outputs=images(), num_return_sequences=4, **settings)
    best = talker().generate(encoder_outputs=images(), **settings)
    scores = out.sequences_scores.unflatten(0, (4, 4))
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert_close(scores[:, 0], best.sequences_scores)
    for image in range(4):
        captions = [tuple(until_end(row)) for row in out.sequences[4 * image : 4 * image + 4]]
        assert len(set(captions)) == 4
        assert list(captions[0]) == until_end(best.sequences[image])


# --- sampling ---


def sample_by_hand(model, regions, rows: int, temperature: float = 1.0, top_k: int | None = None) -> list[list[int]]:
    """One multinomial draw a step over processed logits of a forward pass over all words so far."""
    words = torch.full((rows, 1), BOS)
    finished = torch.zeros(rows, dtype=torch.bool)
    while words.shape[1] <= WORDS and not finished.all():
        logits = model(encoder_outputs=regions, decoder_input_ids=words, use_cache=False).logits[:, -1].float() / temperature
        logits[:, [PAD, BOS, UNK]] = -torch.inf
        if top_k is not None:
            logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
        drawn = torch.multinomial(logits.softmax(-1), 1)
        drawn[finished] = PAD
        finished |= drawn.squeeze(1) == EOS
        words = torch.cat([words, drawn], dim=1)
    return words.tolist()


@every_kind
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.7, "top_k": 4}])
def test_samples_are_multinomial_draws(kind, settings):
    model, regions = talker(kind), images(kind=kind)
    ask = {"encoder_outputs": regions, "max_new_tokens": WORDS, "do_sample": True, "top_k": None, **settings}
    torch.manual_seed(3)
    first = model.generate(**ask).tolist()
    torch.manual_seed(3)
    assert model.generate(**ask).tolist() == first
    torch.manual_seed(3)
    assert sample_by_hand(model, regions, 4, **settings) == first
    torch.manual_seed(4)
    assert model.generate(**ask).tolist() != first


def test_several_samples_an_image():
    """Rows of an image are adjacent and share its regions."""
    model, regions = talker(), images()
    ask = {"max_new_tokens": WORDS, "do_sample": True, "top_k": 0}
    torch.manual_seed(5)
    shared = model.generate(encoder_outputs=regions, num_return_sequences=3, **ask)
    torch.manual_seed(5)
    repeated = GridEncoderOutput(last_hidden_state=regions.last_hidden_state.repeat_interleave(3, 0))
    assert shared.tolist() == model.generate(encoder_outputs=repeated, **ask).tolist()
    assert len({tuple(row) for row in shared.tolist()}) > 4


def test_beam_samples_follow_the_seed():
    ask = {"encoder_outputs": images(), "max_new_tokens": WORDS, "do_sample": True, "num_beams": 3, "num_return_sequences": 2}
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(talker().generate(**ask).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


# --- prompts ---

PROMPTS = [[5, 6, 7], [8], [], [9, 10]]
PROMPT_IDS = torch.tensor([[PAD] * (3 - len(p)) + p for p in PROMPTS])
PROMPT_MASK = torch.tensor([[0] * (3 - len(p)) + [1] * len(p) for p in PROMPTS])


@every_kind
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_different_lengths_in_one_batch(kind, beams, use_cache):
    """Left padding, even of an empty prompt, changes no caption; sequences begin with the start token."""
    together = talker(kind).generate(
        encoder_outputs=images(kind=kind),
        input_ids=PROMPT_IDS,
        attention_mask=PROMPT_MASK,
        max_new_tokens=WORDS,
        num_beams=beams,
        use_cache=use_cache,
    )
    assert together[:, :4].tolist() == [[BOS, *ids] for ids in PROMPT_IDS.tolist()]
    for row, prompt, score in zip(together, PROMPTS, scorers(kind)):
        start = [BOS, *prompt]
        search = beam_search(score, start, beams, WORDS) if beams > 1 else [(0.0, greedy(score, start, WORDS))]
        assert until_end(row, start=4)[4:] == search[0][1][len(start) :], prompt


@pytest.mark.parametrize("beams", [1, 2])
def test_all_forms_of_a_prompt_are_equal(beams):
    """Without a mask (padding is seen by its id), under the decoder's own names, and with the start token in front."""
    ask = {"encoder_outputs": images(), "max_new_tokens": WORDS, "num_beams": beams}
    want = talker().generate(input_ids=PROMPT_IDS, attention_mask=PROMPT_MASK, **ask).tolist()
    started, started_mask = torch.full((4, 1), BOS), torch.ones(4, 1, dtype=torch.long)
    ids, mask = torch.cat([started, PROMPT_IDS], 1), torch.cat([started_mask, PROMPT_MASK], 1)
    assert talker().generate(input_ids=PROMPT_IDS, **ask).tolist() == want
    assert talker().generate(decoder_input_ids=PROMPT_IDS, decoder_attention_mask=PROMPT_MASK, **ask).tolist() == want
    assert talker().generate(input_ids=ids, attention_mask=mask, **ask).tolist() == want
    assert talker().generate(decoder_input_ids=ids, decoder_attention_mask=mask, **ask).tolist() == want


def test_an_empty_prompt_equals_no_prompt():
    want = talker().generate(encoder_outputs=images(), max_new_tokens=WORDS).tolist()
    empty = torch.empty(4, 0, dtype=torch.long)
    assert talker().generate(encoder_outputs=images(), input_ids=empty, max_new_tokens=WORDS).tolist() == want


def test_generation_continues_from_a_cache():
    """Words already in a given cache are not run again."""
    model, regions, run = talker(seed=3), images(), []
    ask = {"encoder_outputs": regions, "return_dict_in_generate": True, "output_logits": True}
    ask["suppress_tokens"] = [PAD, BOS, UNK, EOS]
    whole = model.generate(max_new_tokens=6, **ask)
    half = model.generate(max_new_tokens=3, **ask)
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, __: run.append(args[0].shape[1]))
    rest = model.generate(decoder_input_ids=half.sequences, past_key_values=half.past_key_values, max_new_tokens=3, **ask)
    hook.remove()
    assert run == [1, 1, 1]
    assert rest.sequences.tolist() == whole.sequences.tolist()
    assert_close(torch.stack(rest.logits), torch.stack(whole.logits[3:]))


# --- what may be said ---


def forbid(kind: str, forbidden) -> list[list[int]]:
    """Greedy captions where `forbidden(words)` says which words may not follow."""

    def restricted(score):
        def restricted_score(words):
            log_p = score(words).clone()
            log_p[list(forbidden(list(words)))] = -torch.inf
            return log_p

        return restricted_score

    return [greedy(restricted(score), [BOS], WORDS) for score in scorers(kind)]


def test_no_repeated_pairs():
    def repeats(words):
        pairs = list(pairwise(words))
        return {b for a, b in pairs if a == words[-1]}

    got = talker().generate(encoder_outputs=images(), max_new_tokens=WORDS, no_repeat_ngram_size=2)
    want = forbid("history", repeats)
    assert [until_end(row) for row in got] == want
    assert want != [greedy(score, [BOS], WORDS) for score in scorers("history")]
    beams = talker().generate(encoder_outputs=images(), max_new_tokens=WORDS, no_repeat_ngram_size=2, num_beams=3)
    for words in map(until_end, beams):
        assert len(set(pairwise(words))) == len(words) - 1


def test_bad_words():
    plain = [greedy(score, [BOS], WORDS) for score in scorers("history")]
    word, pair = plain[0][1], [plain[1][1], plain[1][2]]
    bad = [[word], pair] if pair[0] != word else [[word]]
    ask = {"encoder_outputs": images(), "max_new_tokens": WORDS, "bad_words_ids": bad}
    want = forbid("history", lambda words: {word} | {b[-1] for b in bad[1:] if words[-1] == b[0]})
    assert [until_end(row) for row in talker().generate(**ask)] == want != plain
    assert word not in talker().generate(num_beams=3, **ask).flatten().tolist()


def test_repetition_penalty():
    """Logits of words already there are divided by the penalty if positive, else multiplied."""
    model, regions = talker(), images(1)
    words = [BOS]
    while len(words) <= WORDS and words[-1] != EOS:
        logits = model(encoder_outputs=regions, decoder_input_ids=torch.tensor([words]), use_cache=False).logits[0, -1]
        said = list(set(words))
        logits[said] = torch.where(logits[said] > 0, logits[said] / 3.0, logits[said] * 3.0)
        logits[[PAD, BOS, UNK]] = -torch.inf
        words.append(int(logits.argmax()))
    got = model.generate(encoder_outputs=regions, max_new_tokens=WORDS, repetition_penalty=3.0)[0].tolist()
    assert got == words != greedy(scorers("history")[0], [BOS], WORDS)


def test_allowed_words_by_image():
    """What stands in for constrained beams: a function of image and words so far."""
    allowed = [[4, 5, EOS], [6, 7, EOS], [8, 9, EOS], [10, 11, EOS]]
    sequences = talker().generate(
        encoder_outputs=images(), max_new_tokens=WORDS, num_beams=2, prefix_allowed_tokens_fn=lambda image, _: allowed[image]
    )
    for image, row in enumerate(sequences.tolist()):
        assert set(row[1:]) <= {*allowed[image], PAD}


MODES = [{}, {"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "num_beams": 2}]
REPEATABLE = [4, 6]


def test_no_repeated_words_except_the_repeatable_ones():
    got = talker().generate(encoder_outputs=images(), max_new_tokens=WORDS, generation_config=repeats(REPEATABLE))
    want = forbid("history", lambda words: set(words) - {*REPEATABLE})
    plain = [greedy(score, [BOS], WORDS) for score in scorers("history")]
    assert [until_end(row) for row in got] == want != plain
    got = talker().generate(encoder_outputs=images(), max_new_tokens=WORDS, generation_config=repeats(None))
    assert [until_end(row) for row in got] == plain


@pytest.mark.parametrize("mode", [*MODES, {"do_sample": True, "top_k": 1}, {"num_beams": 4, "num_return_sequences": 4}], ids=str)
def test_no_word_is_repeated_in_any_mode(mode):
    """The prompts count, of different lengths too; the tokens of beginning, end and padding do not."""
    torch.manual_seed(0)
    prompts = torch.tensor([[PAD, PAD, 7], [4, 4, 8], [PAD, 9, 9], [5, 6, 7]])
    settings = {"max_new_tokens": 6, "encoder_outputs": images(), "suppress_tokens": [PAD, BOS, UNK, EOS], **mode}
    sequences = talker().generate(input_ids=prompts, generation_config=repeats(REPEATABLE), **settings)
    start = 1 + prompts.shape[1]
    assert sequences.shape[1] == start + 6
    for row in sequences.tolist():
        for place in range(start, len(row)):
            assert row[place] in REPEATABLE or row[place] not in row[:place]
    free = talker().generate(input_ids=prompts, **settings)
    assert any(len({*row}) < len(row) for row in free[:, start:].tolist()), "nothing was repeated anyway: a poor test"


@pytest.mark.parametrize(
    "tokens, said", [("a", "is 'a': give a list"), ([1.5], "give a list"), ([4, 99999], "has 99999, but"), ([-1], "has -1, but")]
)
def test_error_names_invalid_repeatable_tokens(tokens, said):
    with pytest.raises(ValueError, match=f"`repeatable_token_ids` .*{said}"):
        talker().generate(encoder_outputs=images(), generation_config=repeats(tokens))


def repeats(tokens: Any) -> GenerationConfig:
    config = GenerationConfig()
    config.repeatable_token_ids = tokens
    return config


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("token", [PAD, BOS, UNK])
def test_special_tokens_are_suppressed_by_default(mode, token):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.bias[token] = 1000.0
    ask = {"encoder_outputs": images(2), "max_new_tokens": 4, **mode}
    for row in model.generate(**ask).tolist():
        ended = row.index(EOS) if EOS in row else len(row)
        assert token not in row[1:ended]
    assert (model.generate(suppress_tokens=None, **ask)[:, 1:] == token).all()


def test_own_generation_config_keeps_suppressed_tokens():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.bias[UNK] = 1000.0
    sequences = model.generate(encoder_outputs=images(2), generation_config=GenerationConfig(num_beams=2, max_new_tokens=4))
    assert UNK not in sequences.flatten().tolist()


def test_suppressed_tokens_are_saved(tmp_path):
    model = tiny_model().float()
    for folder, tokens in (("default", [PAD, BOS, UNK]), ("own", [PAD, 7])):
        model.generation_config.suppress_tokens = tokens
        model.save_pretrained(tmp_path / folder)
        loaded = load(tmp_path / folder)
        assert loaded.generation_config.suppress_tokens == tokens
    assert tiny_model().generation_config.suppress_tokens == [PAD, BOS, UNK]
    assert tiny_model(unk_token_id=None).generation_config.suppress_tokens == [PAD, BOS]
    assert tiny_model(pad_token_id=2).generation_config.suppress_tokens == [BOS, UNK]  # an end token must be sayable


GONE_MODES = [
    ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "num_return_sequences"),
    ({"num_beams": 2, "force_words_ids": [[5]]}, "prefix_allowed_tokens_fn"),
    ({"num_beams": 2, "constraints": [object()]}, "prefix_allowed_tokens_fn"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "sampling"),
    ({"dola_layers": "low"}, "greedy"),
]


@pytest.mark.parametrize("trusting", [{}, {"trust_remote_code": True}])
@pytest.mark.parametrize("mode, instead", GONE_MODES)
def test_error_of_a_removed_mode_names_a_replacement(mode, instead, trusting):
    with pytest.raises(ValueError, match=f"not part of transformers.*{instead}"):
        talker().generate(encoder_outputs=images(), max_new_tokens=WORDS, **mode, **trusting)


def test_other_cache_implementations_are_rejected():
    with pytest.raises(ValueError, match="`cache_implementation='static'` does not fit"):
        talker().generate(encoder_outputs=images(), max_new_tokens=WORDS, cache_implementation="static")


# --- assisted decoding ---


@every_kind
@pytest.mark.parametrize("helper", ["itself", "another", "prompt lookup"])
@pytest.mark.parametrize("prompt", [[], [PAD, PAD, 5, 6]])
def test_assisted_decoding_equals_greedy(kind, helper, prompt):
    model = talker(kind)
    ask: dict = {"max_new_tokens": 2 * WORDS, "suppress_tokens": [PAD, BOS, UNK, EOS]}
    if prompt:
        ask |= {"input_ids": torch.tensor([prompt])}
    assist: dict = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    if helper != "prompt lookup":
        assist = {"assistant_model": model if helper == "itself" else talker("none", seed=1)}
    for picture in pictures(2).split(1):  # an assistant encodes them itself
        want = model.generate(pixel_values=picture, **ask)
        assert model.generate(pixel_values=picture, **assist, **ask).tolist() == want.tolist()


@pytest.mark.parametrize("shortest", [{"min_new_tokens": 5}, {"min_length": 4}], ids=str)
def test_assisted_decoding_with_a_minimum_length_equals_greedy(shortest):
    for seed, picture in enumerate(pictures(4).split(1)):
        model, ask = talker("score", seed), {"pixel_values": picture, "max_new_tokens": 7, **shortest}
        want = model.generate(**ask)
        assert model.generate(assistant_model=talker("score", seed + 1), **ask).tolist() == want.tolist()
        assert EOS not in want[0, 1:4].tolist()


# --- what comes back ---


@pytest.mark.parametrize("kind, width", [("history", None), ("channel", 5), ("none", 0)])
@pytest.mark.parametrize("mode, rows", [({}, 2), ({"do_sample": True, "num_return_sequences": 2}, 4), ({"num_beams": 3}, 6)])
def test_shapes_of_all_outputs(kind, width, mode, rows):
    prompt, new = torch.tensor([[5, 6], [7, 8]]), 4
    out = talker(kind, seed=3).generate(
        pixel_values=torch.rand(2, 3, 64, 64),
        input_ids=prompt,
        max_new_tokens=new,
        suppress_tokens=[EOS],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
        **mode,
    )
    assert out.sequences.shape == (4 if "num_return_sequences" in mode else 2, 3 + new)
    for steps in (out.scores, out.logits, out.cross_attentions, out.decoder_hidden_states):
        assert len(steps) == new
    for step in range(new):
        run, so_far = (3, 3) if step == 0 else (1, 3 + step)
        assert out.logits[step].shape == out.scores[step].shape == (rows, 12)
        assert [a.shape for a in out.cross_attentions[step]] == [(rows, 1, run, 9)]
        assert [h.shape for h in out.decoder_hidden_states[step]] == [(rows, run, 8)] * 2
        if width == 0:
            assert out.decoder_attentions[step] is None
        else:
            assert [a.shape for a in out.decoder_attentions[step]] == [(rows, 1, run, width or so_far)]
    assert out.encoder_hidden_states[-1].shape == (2, 9, 4)
    assert isinstance(out.past_key_values, AttnCapCache) and out.past_key_values.get_seq_length() == 3 + new - 1


def test_assisted_decoding_returns_its_attention():
    model, regions = talker(seed=3), images(1)
    ask = {"max_new_tokens": 6, "suppress_tokens": [EOS], "return_dict_in_generate": True, "output_attentions": True}
    plain = model.generate(encoder_outputs=regions, **ask)
    assisted = model.generate(encoder_outputs=regions, prompt_lookup_num_tokens=2, max_matching_ngram_size=1, **ask)
    got, want = (torch.cat([step[0][0, 0] for step in out.cross_attentions]) for out in (assisted, plain))
    assert_close(got, want)


@every_kind
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_caption_attentions_equal_those_of_generation(kind, mode):
    """The maps of `caption_attentions` are those collected on the way, followed back through the beams."""
    model, regions, returned = talker(kind), images(kind=kind), 2 if mode else 1
    torch.manual_seed(0)
    out = model.generate(
        encoder_outputs=regions,
        max_new_tokens=WORDS,
        num_return_sequences=returned,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        **mode,
    )
    maps, words = model.caption_attentions(out.sequences, encoder_outputs=regions)
    rows, steps = len(out.sequences), out.sequences.shape[1] - 1
    assert maps.shape == (rows, steps, 2, 3)
    assert_close(maps.sum((-2, -1)), torch.ones(rows, steps).double())
    followed = False
    for row in range(rows):
        for step in range(len(until_end(out.sequences[row])) - 1):
            source = int(out.beam_indices[row, step]) if "num_beams" in mode else row
            followed |= source != row
            assert_close(maps[row, step].flatten(), out.cross_attentions[step][0][source, 0, 0])
            if words is not None:
                want = out.decoder_attentions[step][0][source, 0, 0]
                assert_close(words[row, step, : len(want)], want)
    assert (words is None) == (kind in ("none", "score"))
    assert followed == ("num_beams" in mode)


def test_caption_attentions_from_images_and_with_prompts():
    model, pixel_values = talker(), pictures(2)
    encoded = model.model.encoder(pixel_values)
    ids, mask = torch.tensor([[PAD, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]])
    sequences = model.generate(pixel_values=pixel_values, input_ids=ids, attention_mask=mask, max_new_tokens=3)
    whole = torch.ones_like(sequences[:, :-1])
    whole[:, 1:3] = mask
    maps, words = model.caption_attentions(sequences, pixel_values=pixel_values, decoder_attention_mask=whole)
    assert maps.shape[2:] == encoded.grid_shape and encoded.grid_shape[0] != encoded.grid_shape[1]
    again, _ = model.caption_attentions(sequences, encoder_outputs=encoded, decoder_attention_mask=whole)
    assert_close(maps, again, rtol=0, atol=0)
    assert not words[0, :, 1].any(), "padding was read"
    image = GridEncoderOutput(last_hidden_state=encoded.last_hidden_state[:1], grid_shape=encoded.grid_shape)
    alone, _ = model.caption_attentions(sequences[:1, [0, *range(2, sequences.shape[1])]], encoder_outputs=image)
    assert_close(maps[0, 2:], alone[0, 1:])


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", ["history", "none"])
def test_cache_does_not_change_captions(kind, mode):
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        sequences = talker(kind).generate(encoder_outputs=images(kind=kind), max_new_tokens=WORDS, use_cache=use_cache, **mode)
        results.append(sequences.tolist())
    assert results[0] == results[1]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_encoder_outputs_give_the_captions_of_their_images(mode):
    model, pixel_values, results = talker(), pictures(3), []
    encoded = model.model.encoder(pixel_values)
    for inputs in ({"pixel_values": pixel_values}, {"encoder_outputs": encoded}, {"inputs": pixel_values}):
        torch.manual_seed(0)
        results.append(model.generate(max_new_tokens=WORDS, **inputs, **mode).tolist())
    assert results[0] == results[1] == results[2]
    assert len({tuple(row) for row in results[0]}) > 1


# --- how much is computed ---


@pytest.mark.parametrize("mode, rows", [({}, 2), ({"num_beams": 3}, 6), ({"do_sample": True, "num_return_sequences": 4}, 8)])
@pytest.mark.parametrize("prompted", [False, True])
def test_each_image_and_each_word_is_computed_once(mode, rows, prompted):
    model = talker(seed=3)
    decoder, encoded, projected, embedded = model.model.decoder, [], [], []
    hooks = [
        model.model.encoder.windows.register_forward_hook(lambda _, args, __: encoded.append(len(args[0]))),
        decoder.attention.region_proj.register_forward_hook(lambda _, args, __: projected.append(len(args[0]))),
        decoder.embed_tokens.register_forward_hook(lambda _, args, __: embedded.append(tuple(args[0].shape))),
    ]
    prompt = {"input_ids": torch.tensor([[5, 6], [7, 8]])} if prompted else {}
    model.generate(pixel_values=torch.rand(2, 3, 64, 64), max_new_tokens=4, suppress_tokens=[EOS], **prompt, **mode)
    for hook in hooks:
        hook.remove()
    assert encoded == projected == [2]
    assert embedded == [(rows, 3 if prompted else 1), *[(rows, 1)] * 3]
