"""`Captioner`: texts, scores and attention against plain reference computations, and attention plots."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_attncap import Captioner, CaptionResult
from hf_attncap.images import ImageError, load_image

MAX_NEW_TOKENS = 8  # of the tiny checkpoints, the end token included
KINDS = {
    "word": {},
    "bpe": {"tokenizer": "bpe"},
    "channel": {"word_attention": "channel"},
    "none": {"word_attention": "none"},
}
TINY = 1e-4  # a sharpened random model magnifies what batching changes in the last digits


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint) -> Captioner:
    return Captioner.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture
def captioner(loaded) -> Captioner:
    """A copy that a test may change."""
    return copy.deepcopy(loaded)


@pytest.fixture
def result() -> CaptionResult:
    """The result of a landscape image; attention at one region on the upper right for "two" and uniform for "dogs"."""
    attention = np.full((2, 5, 7), 1 / 35, np.float32)
    attention[0] = 0
    attention[0, 1, 5] = 1
    return CaptionResult("two dogs", -0.5, ["two", "dogs"], attention, None, [], Image.new("RGB", (90, 60), "grey"))


def forced_score(captioner: Captioner, picture, text: str, prompt: str = "") -> float:
    """The score of a caption of whole-word tokens from one forward pass and plain sums."""
    tokenizer = captioner.processor.tokenizer
    words, given_words = tokenizer(text).input_ids, tokenizer(prompt).input_ids
    generated = words[len(given_words) :]
    if len(generated) < MAX_NEW_TOKENS:
        generated = [*generated, tokenizer.eos_token_id]
    ids = torch.tensor([[tokenizer.bos_token_id, *given_words, *generated]])
    pixel_values = captioner.processor(images=load_image(picture), return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = captioner.model(pixel_values=pixel_values, decoder_input_ids=ids[:, :-1]).logits[0]
    log_probs = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return float(log_probs[len(given_words) :].sum()) / len(generated) ** captioner.model.generation_config.length_penalty


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_each_word_comes_with_its_attention(make_checkpoint, pictures, kind, beams):
    captioner = Captioner.from_pretrained(make_checkpoint(**KINDS[kind]))
    for result in captioner.caption(pictures, num_beams=beams):
        steps = len(result.words)
        assert result.text and " ".join(result.words) == result.text
        assert result.attention.shape == (steps, 2, 3) and result.attention.dtype == np.float32
        assert np.allclose(result.attention.sum(axis=(1, 2)), 1)
        weights = result.word_attention
        if kind == "none":
            assert weights is None
        else:
            assert weights is not None and weights.dtype == np.float32
            assert weights.shape == (steps, 12 if kind == "channel" else steps)
            assert np.allclose(weights.sum(axis=1), 1)
            if kind != "channel":
                assert (np.triu(weights, k=1) == 0).all() and (np.tril(weights)[np.tril_indices(steps)] > 0).all()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    beams=st.integers(1, 4),
    prompt=st.lists(st.sampled_from(["a", "red", "dog", "rain"]), max_size=3).map(" ".join),
    length_penalty=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    no_repeat=st.sampled_from([0, 2]),
    picture=st.integers(0, 2),
)
def test_score_is_the_sum_of_log_probabilities(captioner, pictures, beams, prompt, length_penalty, no_repeat, picture):
    config = captioner.model.generation_config
    config.update(length_penalty=length_penalty, no_repeat_ngram_size=no_repeat)
    result = captioner.caption(pictures[picture], num_beams=beams, num_return_sequences=beams, prompt=prompt)
    for text, score in [(result.text, result.score), *result.alternatives]:
        assert text.startswith(prompt)
        assert score == pytest.approx(forced_score(captioner, pictures[picture], text, prompt), abs=TINY)


def test_greedy_score_includes_the_end_token_but_not_padding(captioner, pictures):
    captioner.model.lm_head.bias.data[2] += 2.5
    results = captioner.caption(pictures, num_beams=1)
    lengths = [len(result.words) for result in results]
    assert min(lengths) < max(lengths), "no caption is followed by padding"
    for file, result in zip(pictures, results):
        assert result.score == pytest.approx(forced_score(captioner, file, result.text), abs=TINY)


def test_logits_processors_affect_greedy_and_beam_scores_equally(captioner, pictures):
    captioner.model.generation_config.update(sequence_bias=[[[7], -0.5], [[9], -0.25]], max_new_tokens=1, length_penalty=1.0)
    greedy, beams = (captioner.caption(pictures[0], num_beams=n) for n in (1, 3))
    assert (greedy.text, greedy.score) == (beams.text, pytest.approx(beams.score, abs=TINY))


@pytest.mark.parametrize("beams", [1, 3])
def test_batched_images_get_the_results_of_single_images(captioner, pictures, beams):
    together = captioner.caption(pictures, num_beams=beams, batch_size=2)
    for file, batched in zip(pictures, together):
        alone = captioner.caption(file, num_beams=beams)
        assert batched.text == alone.text and batched.score == pytest.approx(alone.score, abs=TINY)
        assert np.allclose(batched.attention, alone.attention, atol=TINY)
        assert np.allclose(batched.word_attention, alone.word_attention, atol=TINY)
    assert len({result.text for result in together}) > 1


def test_attention_is_that_of_a_forced_forward_pass(captioner, pictures):
    for file in pictures:
        result = captioner.caption(file)
        pixel_values = captioner.processor(images=load_image(file), return_tensors="pt").pixel_values
        ids = torch.tensor([[1, *captioner.processor.tokenizer(result.text).input_ids]])
        with torch.no_grad():
            out = captioner.model(pixel_values=pixel_values, decoder_input_ids=ids[:, :-1], output_attentions=True)
        assert np.allclose(result.attention, out.cross_attentions[0][0, 0].unflatten(-1, (2, 3)), atol=TINY)
        assert np.allclose(result.word_attention, out.decoder_attentions[0][0, 0], atol=TINY)


def test_attention_of_subword_tokens_is_merged(make_checkpoint, pictures):
    captioner = Captioner.from_pretrained(make_checkpoint(tokenizer="bpe"))
    prompt = "beachild a redograin"
    result = captioner.caption(pictures[0], prompt=prompt)
    assert result.words[:2] == ["beachild", "a"] and result.words[2].startswith("redograin")

    encoding = captioner.processor.tokenizer(prompt)
    word_of = np.array(encoding.word_ids())
    assert len(word_of) > 3 and set(word_of) == {0, 1, 2}
    pixel_values = captioner.processor(images=load_image(pictures[0]), return_tensors="pt").pixel_values
    ids = torch.tensor([[1, *encoding.input_ids]])
    with torch.no_grad():
        out = captioner.model(pixel_values=pixel_values, decoder_input_ids=ids[:, :-1], output_attentions=True)
    regions, words = out.cross_attentions[0][0, 0].numpy(), out.decoder_attentions[0][0, 0].numpy()
    for word in range(2):  # the model may have continued the third
        of_word = regions[word_of == word].mean(axis=0)
        assert np.allclose(result.attention[word].flatten(), of_word, atol=TINY)
        rows = words[word_of == word].mean(axis=0)
        before = [rows[0], *(rows[1:][word_of[:-1] == earlier].sum() for earlier in range(word))]
        assert result.word_attention is not None
        assert np.allclose(result.word_attention[word, : word + 1], np.array(before) / np.sum(before), atol=TINY)


def test_prompt_is_continued(captioner, pictures):
    results = captioner.caption(pictures, prompt="Two red dogs")
    assert all(result.text.startswith("two red dogs ") and len(result.words) > 3 for result in results)
    assert captioner.caption(pictures[0], prompt="").text == captioner.caption(pictures[0]).text


def test_prompt_with_unknown_word_is_rejected(captioner, pictures):
    with pytest.raises(ValueError, match="does not know zebra in the prompt 'two zebra dogs'"):
        captioner.caption(pictures, prompt="two zebra dogs")
    with pytest.raises(ValueError, match="one string"):
        captioner.caption(pictures, prompt=["two"] * 3)


def test_alternatives_are_sorted_and_exclude_the_best_caption(captioner, pictures):
    result = captioner.caption(pictures[0], num_beams=5, num_return_sequences=4)
    scores = [result.score, *(other.score for other in result.alternatives)]
    texts = {result.text, *(other.text for other in result.alternatives)}
    assert len(texts) == 4 and scores == sorted(scores, reverse=True)
    assert captioner.caption(pictures[0]).alternatives == []


def test_default_beams_are_the_checkpoints_and_at_least_the_returned_sequences(captioner, pictures):
    assert captioner.caption(pictures[0]).score == captioner.caption(pictures[0], num_beams=3).score
    widened = captioner.caption(pictures[0], num_return_sequences=5)
    assert len(widened.alternatives) == 4
    assert widened.score == captioner.caption(pictures[0], num_beams=5).score


def test_sequences_that_beam_search_did_not_find_are_no_alternatives(captioner, pictures):
    every_token_but_two = [token for token in range(captioner.model.config.vocab_size) if token not in (5, 6)]
    captioner.model.generation_config.update(suppress_tokens=every_token_but_two, max_new_tokens=1)
    result = captioner.caption(pictures[0], num_beams=4, num_return_sequences=4)
    assert len(result.alternatives) == 1 and result.alternatives[0].score > -100


@pytest.mark.parametrize(
    "option", [{"num_beams": 0}, {"num_return_sequences": 0}, {"batch_size": 0}, {"num_beams": 2, "num_return_sequences": 3}]
)
def test_numbers_out_of_range_are_rejected(captioner, pictures, option):
    with pytest.raises(ValueError, match=f"`{list(option)[-1]}`"):
        captioner.caption(pictures, **option)


def test_old_argument_names_warn_and_work(captioner, pictures):
    new = captioner.caption(pictures[0], num_beams=4, num_return_sequences=2)
    with pytest.warns(FutureWarning, match="`alternatives` is deprecated: use `num_return_sequences`"):
        old = captioner.caption(pictures[0], num_beams=4, alternatives=2)
    with pytest.warns(FutureWarning, match="`beams` is deprecated: use `num_beams`"):
        streamed = next(captioner.stream(pictures, beams=4, num_return_sequences=2))
    with pytest.warns(FutureWarning, match="`beams` is deprecated"):
        explained = captioner.explain(pictures[0], beams=4, num_return_sequences=2)
    assert [pair.text for pair in old.alternatives] == [pair.text for pair in new.alternatives] and len(old.alternatives) == 1
    assert new.text == old.text == streamed.text == explained.text
    with pytest.raises(TypeError, match="give only `num_beams`"):
        captioner.caption(pictures[0], beams=4, num_beams=4)


def test_an_empty_caption_has_no_words(captioner, pictures, tmp_path):
    captioner.model.lm_head.bias.data[2] = 1000
    result = captioner.caption(pictures[0])
    assert (result.text, result.words) == ("", [])
    assert result.attention.shape == (0, 2, 3)
    assert result.word_attention is not None and result.word_attention.shape == (0, 0)
    result.plot_attention(tmp_path / "none.png")
    assert Image.open(tmp_path / "none.png").format == "PNG"


def test_all_kinds_of_sources_give_one_caption_and_keep_the_image_size(captioner, pictures):
    array = np.asarray(load_image(pictures[1]))
    results = captioner.caption((pictures[1], str(pictures[1]), array, Image.fromarray(array)))
    assert {result.text for result in results} == {results[0].text}
    assert all(result.image.size == (50, 150) and result.image.mode == "RGB" for result in results)
    assert captioner.caption([]) == []


@pytest.mark.parametrize("images", ["nowhere.jpg", [b"", b""], [["wide.jpg"]], [None]])
def test_unreadable_image_raises_an_image_error(captioner, images):
    with pytest.raises(ImageError):
        captioner.caption(images)


def test_attention_plot_shows_image_and_words(result, tmp_path):
    figure = result.plot_attention(tmp_path / "plot.png")
    photo, *words = (axis for axis in figure.axes if axis.images)
    assert np.array_equal(np.unique(photo.images[0].get_array()), [128])
    assert [axis.get_title() for axis in words] == result.words
    assert figure.get_suptitle() == result.text
    saved = Image.open(tmp_path / "plot.png")
    assert saved.width > 600 and len(np.unique(np.asarray(saved))) > 50


def test_attention_plot_is_brightest_at_the_attended_region(result):
    one, other = (axis.images[0].get_array().mean(axis=2) for axis in result.plot_attention().axes[1:3])
    height, width = one.shape
    assert abs(width - 1.5 * height) <= 1
    light = (one - one[-1, 0]).clip(0)
    light /= light.sum()
    centre = (light.sum(axis=1) @ np.arange(height) / height, light.sum(axis=0) @ np.arange(width) / width)
    assert np.allclose(centre, (1.5 / 5, 5.5 / 7), atol=0.01)  # the middle of the region
    assert np.ptp(other) < 0.01 and other.max() < one.max()  # one colour scale: uniform attention stays grey


@pytest.mark.parametrize("size", [(30, 300), (300, 30)])
def test_attention_plot_of_any_image_shape_and_caption_length(result, tmp_path, size):
    result.image = Image.new("RGB", size)
    result.words = ["$x_1$"] * 7
    result.text = " ".join(result.words)
    result.attention = np.full((7, 2, 3), 1 / 6, np.float32)
    result.plot_attention(tmp_path / "plot.png")
    width, height = Image.open(tmp_path / "plot.png").size
    assert 300 < width < 4000 and 100 < height < 3000


def test_unwritable_path_of_a_plot_is_an_os_error(result, tmp_path):
    with pytest.raises(OSError):
        result.plot_attention(tmp_path / "nowhere" / "plot.png")


GENERATE = [
    {"max_new_tokens": 3, "length_penalty": 2.0, "num_beams": 2},
    {"num_beams": 1, "repetition_penalty": 3.0, "min_new_tokens": 6},
    {"num_beams": 4, "suppress_tokens": [5, 6, 7], "early_stopping": False},
    {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "num_beams": 1},
    {"do_sample": True, "temperature": 5.0, "top_k": 30, "num_beams": 3},
    {"do_sample": True, "num_beams": 1, "num_return_sequences": 4},
]


@pytest.mark.parametrize("options", GENERATE, ids=str)
def test_arguments_of_generate_do_what_they_do_in_generate(captioner, pictures, options):
    tokenizer = captioner.processor.tokenizer
    pixel_values = captioner.processor(images=[load_image(file) for file in pictures], return_tensors="pt").pixel_values
    torch.manual_seed(1)
    sequences = captioner.model.generate(pixel_values, **options)
    expected = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    torch.manual_seed(1)
    results = captioner.caption(pictures, **options)
    torch.manual_seed(1)
    streamed = list(captioner.stream(pictures, **options))
    for found in (results, streamed):
        texts = [text for one in found for text in (one.text, *(other.text for other in one.alternatives))]
        assert texts == expected
    assert expected != [one.text for one in captioner.caption(pictures)]


def test_sampling_is_without_beams_by_default_and_none_means_the_checkpoints_value(captioner, pictures):
    torch.manual_seed(2)
    sampled = captioner.caption(pictures[0], do_sample=True, temperature=None)
    torch.manual_seed(2)
    assert sampled.text == captioner.caption(pictures[0], do_sample=True, num_beams=1).text
    plain = captioner.caption(pictures[0])
    assert captioner.caption(pictures[0], max_new_tokens=None, do_sample=None, top_p=None).text == plain.text


def test_stop_strings_end_captions(captioner, pictures):
    words = captioner.caption(pictures[0]).words
    stopped = captioner.caption(pictures[0], stop_strings=[words[1]], num_beams=1)
    assert words[1] not in stopped.words[:-1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temprature": 0.5}, "`temprature` is not an argument of the captioner, nor of `generate`: did you mean `temperature`?"),
        ({"streamer": 1}, "`streamer` is not an argument"),
        ({"output_attentions": True}, "`output_attentions` is an argument of `generate` that the captioner sets itself"),
        ({"top_p": 0.5}, "`top_p` has no effect without sampling: add `do_sample=True`"),
        ({"top_k": 5, "do_sample": False}, "`top_k` has no effect without sampling"),
        ({"do_sample": True, "num_beams": 2, "num_return_sequences": 3}, "raise `num_beams`"),
    ],
)
def test_arguments_that_generate_does_not_take_are_named_before_reading(captioner, options, message):
    for caption in (captioner.caption, captioner.stream, captioner.explain):
        with pytest.raises(ValueError, match=re.escape(message)):
            caption(["nowhere.jpg"], **options)


def test_values_that_generate_refuses_raise_its_error(captioner, pictures):
    with pytest.raises(ValueError, match="strictly positive"):
        captioner.caption(pictures, do_sample=True, temperature=0.0)


def test_results_without_attention_cost_none(captioner, pictures, monkeypatch):
    with_maps, asked = captioner.caption(pictures), []
    generate = captioner.model.generate
    monkeypatch.setattr(captioner.model, "generate", lambda *a, **options: asked.append(options) or generate(*a, **options))
    without = captioner.caption(pictures, attention=False)
    assert [options["output_attentions"] for options in asked] == [False]
    for one, other in zip(without, with_maps):
        assert (one.text, one.words, one.confidence) == (other.text, other.words, other.confidence)
        assert one.score == pytest.approx(other.score, abs=TINY) and one.signals == pytest.approx(other.signals, abs=TINY)
        assert one.attention is None and one.word_attention is None and one.image is None and one.importance is None
        with pytest.raises(ValueError, match="no attention to plot: caption the image without `attention=False`"):
            one.plot_attention()
    explained = captioner.explain(pictures[0], attention=False)
    assert (
        explained.attention is None and explained.importance.shape == with_maps[0].attention.shape and explained.image is not None
    )


def test_result_as_json(captioner, pictures):
    result = captioner.explain(pictures[0], num_return_sequences=2)
    read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert list(read) == ["caption", "score", "confidence", "words", "alternatives", "attention", "importance"]
    assert (read["caption"], read["score"], read["words"]) == (result.text, result.score, result.words)
    assert read["confidence"] is None
    assert read["alternatives"] == [{"caption": result.alternatives[0].text, "score": result.alternatives[0].score}]
    for name in ("attention", "importance"):
        assert np.array_equal(np.array(read[name], np.float32), getattr(result, name))
    short = captioner.caption(pictures[0], attention=False).to_dict()
    assert short["attention"] is None and short["importance"] is None and short["alternatives"] == []
