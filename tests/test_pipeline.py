"""The pipeline gives the same captions, scores and attention for every kind of input and every batch size."""

import base64
import io
import json
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hf_attncap.training.data.vocabulary import build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoProcessor, pipeline

from hf_attncap.pipeline_attncap import AttnCapPipeline
from hf_attncap.processing_attncap import AttnCapProcessor
from hf_attncap.words_attncap import CaptionPieces

make_pipeline: Any = pipeline  # its overloads know only the library's own tasks
CAPTIONS = ["a black dog is running fast on the beach", "two dogs play with a red ball", "the dog's ball"]
PROMPTS = ["the black dog is", "", "two"]
END = 2


@pytest.fixture(scope="module", params=["word", "bpe"])
def checkpoint(request, make_checkpoint) -> str:
    return str(make_checkpoint(request.param))


@pytest.fixture(scope="module")
def pipe(checkpoint) -> Any:
    return make_pipeline("image-captioning", model=checkpoint, device="cpu")


@pytest.fixture(scope="module")
def images(pictures) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in pictures]


def texts(results: Any) -> list[list[str]]:
    return [[caption["generated_text"] for caption in captions] for captions in results]


def assert_same(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [set(caption) for caption in actual] == [set(caption) for caption in expected]
    for one, other in zip(actual, expected, strict=True):
        assert one["generated_text"] == other["generated_text"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        if "attention" in one:
            assert one["words"] == other["words"]
            np.testing.assert_allclose(one["attention"], other["attention"], atol=1e-5)
            np.testing.assert_allclose(one["word_attention"], other["word_attention"], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 1}, {"num_beams": 2, "max_new_tokens": 4}])
def test_captions_equal_those_of_generate(pipe, images, options):
    assert issubclass(type(pipe), AttnCapPipeline)
    inputs = pipe.processor(images=images, return_tensors="pt")
    expected = pipe.processor.batch_decode(pipe.model.generate(**inputs, **options), skip_special_tokens=True)
    assert len(set(expected)) > 1
    assert texts(pipe(images, **options)) == [[text] for text in expected]
    assert texts(pipe(images, generate_kwargs=options)) == [[text] for text in expected]


def test_one_image_of_every_kind_of_source(pipe, images, tmp_path):
    file = tmp_path / "picture.png"
    images[0].save(file)
    data = io.BytesIO()
    images[0].save(data, "png")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    expected = pipe(images[0])
    assert [set(caption) for caption in expected] == [{"generated_text", "score"}]
    for picture in (file, str(file), url, {"images": str(file)}):
        assert_same(pipe(picture), expected)


class Stored(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Streamed(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_many_images_of_every_kind_of_collection(pipe, images, batch_size):
    expected = [pipe(picture, output_attentions=True) for picture in images]
    in_memory = [images, tuple(images)]
    lazy = [(picture for picture in images), Stored(images), Streamed(images), iter(images)]
    for held in in_memory + lazy:
        results = pipe(held, output_attentions=True, batch_size=batch_size)
        assert isinstance(results, list) == (held in in_memory)
        for actual, single in zip(results, expected, strict=True):
            assert_same(actual, single)


def test_a_column_of_a_dataset(pipe, images):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": images}, features=features)
    assert texts(pipe(dataset["image"], batch_size=2)) == texts(pipe(images))


def test_empty_list_gives_an_empty_list(pipe):
    assert pipe([]) == []


def test_images_are_read_lazily(pipe, images):
    read = []

    def source():
        for number, picture in enumerate(images):
            read.append(number)
            yield picture

    next(iter(pipe(source())))
    assert len(read) < len(images)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 1, "do_sample": True}])
def test_several_captions_per_image(pipe, images, options):
    results = pipe(images, batch_size=2, num_return_sequences=2, output_attentions=True, **options)
    assert [len(captions) for captions in results] == [2, 2, 2]
    for captions in results:
        assert all(len(caption["attention"]) == len(caption["words"]) for caption in captions)
        if options["num_beams"] > 1:
            assert captions[0]["score"] >= captions[1]["score"]
            assert captions[0]["generated_text"] != captions[1]["generated_text"]


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 1, "do_sample": True, "temperature": 0.5}])
@pytest.mark.parametrize("length_penalty", [1.0, 2.0])
@pytest.mark.parametrize("text", ["", "a dog"])
def test_score(pipe, images, options, length_penalty, text):
    """Against the log-probabilities of one forward pass, token by token, of captions that end and that are cut."""

    def generate(picture, **more):
        torch.manual_seed(0)
        inputs = pipe.processor(images=picture, text=text, return_tensors="pt")
        return inputs["pixel_values"], pipe.model.generate(**inputs, length_penalty=length_penalty, **options, **more)

    given_length = len(pipe.tokenizer(text)["input_ids"])
    ends = [END, generate(images[0])[1][0, : given_length + 4][-1].item()]
    lengths = set()
    for picture in images:
        torch.manual_seed(0)
        [caption] = pipe(picture, text=text, length_penalty=length_penalty, eos_token_id=ends, **options)
        pixel_values, ids = generate(picture, eos_token_id=ends)
        with torch.no_grad():
            logits = pipe.model(pixel_values=pixel_values, decoder_input_ids=ids[:, :-1]).logits[0]
        log_probabilities = [step.log_softmax(0)[token].item() for step, token in zip(logits, ids[0, 1:], strict=True)]
        generated = [p for p, token in zip(log_probabilities, ids[0, 1:], strict=True) if token != 0][given_length:]
        assert caption["score"] == pytest.approx(sum(generated) / len(generated) ** length_penalty, abs=1e-4)
        lengths.add(len(generated))
    assert min(lengths) <= 3 or options["num_beams"] > 1


@pytest.mark.parametrize("name", ["text", "prompt"])
def test_a_prompt_begins_all_captions(pipe, images, name):
    for captions in pipe(images, **{name: "A dog"}, batch_size=2, output_attentions=True):
        assert captions[0]["generated_text"].startswith("a dog")
        assert " ".join(captions[0]["words"]) == captions[0]["generated_text"]


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 2, "num_return_sequences": 2}])
def test_prompts_of_a_batch_are_independent(pipe, images, options):
    options = {**options, "output_attentions": True}
    singles = [pipe(picture, text=text, **options) for picture, text in zip(images, PROMPTS, strict=True)]
    together = [
        pipe(images, text=PROMPTS, batch_size=3, **options),
        pipe(images, prompt=tuple(PROMPTS), **options),
        pipe(({"images": i, "text": t} for i, t in zip(images, PROMPTS, strict=True)), batch_size=3, **options),
    ]
    for results in together:
        for actual, single in zip(results, singles, strict=True):
            assert_same(actual, single)


def test_options_of_the_pipeline_apply_to_each_call(checkpoint, pipe, images):
    options = {"text": "a dog", "num_beams": 2, "max_new_tokens": 4, "output_attentions": True, "batch_size": 2}
    fixed = make_pipeline("image-captioning", model=checkpoint, device="cpu", **options)
    for actual, expected in zip(fixed(images), pipe(images, **options), strict=True):
        assert_same(actual, expected)
    one_changed = pipe(images, **{**options, "num_beams": 1})
    for actual, expected in zip(fixed(images, num_beams=1), one_changed, strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_attention_of_words_is_that_of_their_tokens(pipe, images, beams):
    """Word by word against `caption_attentions`: the mean over a word's tokens, the sum over an earlier word's tokens."""
    in_pieces = "▁a" in pipe.tokenizer.get_vocab()
    for picture in images:
        [caption] = pipe(picture, output_attentions=True, num_beams=beams)
        inputs = pipe.processor(images=picture, return_tensors="pt")
        ids = pipe.model.generate(**inputs, num_beams=beams)
        maps, weights = (x[0].numpy() for x in pipe.model.caption_attentions(ids, inputs["pixel_values"]))
        groups, words = [], []
        for position, token in enumerate(ids[0].tolist()):
            piece = pipe.tokenizer.convert_ids_to_tokens(token)
            if token > 3 and (piece.startswith("▁") or not words or not in_pieces):
                groups.append([])
                words.append("")
            if token > 3:
                groups[-1].append(position)
                words[-1] += piece.replace("▁", "")
        assert caption["words"] == words
        for w, group in enumerate(groups):
            steps = [position - 1 for position in group]
            np.testing.assert_allclose(caption["attention"][w], maps[steps].mean(0), atol=1e-6)
            row = weights[steps].mean(0)
            before = [row[0], *(row[earlier].sum() for earlier in groups[:w])]
            np.testing.assert_allclose(caption["word_attention"][w, : w + 1], before / np.sum(before), atol=1e-6)
            assert not caption["word_attention"][w, w + 1 :].any()
        np.testing.assert_allclose(caption["attention"].sum((1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize(("word_attention", "width"), [("none", None), ("score", None), ("channel", 12)])
def test_word_attention_of_every_kind(make_checkpoint, images, word_attention, width):
    folder = make_checkpoint(word_attention=word_attention)
    [caption] = make_pipeline("image-captioning", model=str(folder), device="cpu")(images[0], output_attentions=True)
    if width is None:
        assert caption["word_attention"] is None
    else:
        assert caption["word_attention"].shape == (len(caption["words"]), width)
    assert caption["attention"].shape == (len(caption["words"]), 2, 3)
    assert caption["words"]


TOKENIZERS = {kind: build_tokenizer(CAPTIONS, kind, min_count=1) for kind in ("word", "bpe")}


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@given(data=st.data())
@settings(max_examples=60)
def test_words_and_attention_of_any_tokens_are_consistent(kind, data):
    tokenizer = TOKENIZERS[kind]
    body = data.draw(st.lists(st.integers(4, len(tokenizer) - 1), min_size=1, max_size=8))
    left, right = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    ids = [1, *[0] * left, *body, *([END] + [0] * (right - 1) if right else [])]
    pieces = CaptionPieces(tokenizer, ids)
    assert pieces.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert " ".join(pieces.words) == pieces.text

    T = len(ids) - 1
    rows = torch.rand(T, T, generator=torch.Generator().manual_seed(len(ids))).tril() + 1e-3 * torch.eye(T)
    rows[:, [position for position in range(1, T) if ids[position] == 0]] = 0
    rows[:, 0] += 0.1
    merged = pieces.merge((rows / rows.sum(1, keepdim=True)).numpy(), over_words=True)
    assert merged.shape == (len(pieces.words),) * 2
    np.testing.assert_allclose(merged.sum(1), 1, atol=1e-5)
    assert not np.triu(merged, 1).any()
    assert pieces.merge(np.ones((T, 2, 3))).shape == (len(pieces.words), 2, 3)


def test_tokens_of_a_word_are_merged():
    tokenizer = TOKENIZERS["bpe"]
    vocabulary = tokenizer.get_vocab()
    tokens = ["▁", "d", "o", "g", "▁", "b", "a"]
    pieces = CaptionPieces(tokenizer, [1, *(vocabulary[token] for token in tokens), END])
    assert pieces.words == ["dog", "ba"]
    looks = np.eye(8)  # token t looks at region t alone
    assert np.allclose(pieces.merge(looks), [[1 / 4] * 4 + [0] * 4, [0] * 4 + [1 / 3] * 3 + [0]])


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ("missing.jpg", {}, "missing.jpg"),
        (3, {}, "cannot be read from a int"),
        ({"image": "a.jpg"}, {}, "'image'.*`images`.*dataset\\['image'\\]"),
        (["a.jpg", "b.jpg"], {"text": ["a dog"]}, "a list of 1 for 2 images"),
        ("a.jpg", {"text": ["a dog"]}, "for an input that is not a list"),
        ("a.jpg", {"text": 5}, "must be one string, got 5"),
        ("a.jpg", {"text": "a 犬 dog 猫"}, "犬, 猫"),
        ("a.jpg", {"text": "a", "prompt": "a"}, "`text` and `prompt`"),
        ("a.jpg", {"num_beams": 2, "generate_kwargs": {"num_beams": 2}}, "num_beams: given directly and in"),
    ],
)
def test_errors_name_bad_input(pipe, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(inputs, **options)


def test_errors_name_an_unknown_option_and_a_damaged_file(pipe, images, tmp_path):
    with pytest.raises(ValueError, match="num_beems"):
        pipe(images[0], num_beems=3)
    file = tmp_path / "cut.png"
    images[0].save(file)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match="cut.png"):
        pipe([images[0], file])


def test_model_in_training_mode_is_set_to_evaluation(pipe, images):
    training = deepcopy(pipe.model).train()
    fresh = make_pipeline("image-captioning", model=training, processor=pipe.processor, device="cpu")
    for actual, expected in zip(fresh(images), pipe(images), strict=True):
        assert_same(actual, expected)


def test_save_and_load(pipe, images, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert not {"auto_map", "custom_pipelines"} & set(json.loads((tmp_path / "config.json").read_text()))
    assert type(AutoProcessor.from_pretrained(tmp_path)) is AttnCapProcessor
    loaded = make_pipeline("image-captioning", model=str(tmp_path), device="cpu")
    for actual, expected in zip(loaded(images), pipe(images), strict=True):
        assert_same(actual, expected)


@pytest.fixture(scope="module")
def stock(checkpoint) -> Any:
    return make_pipeline("image-text-to-text", model=checkpoint, device="cpu")


@pytest.mark.parametrize("text", ["", "a dog"])
@pytest.mark.parametrize("options", [{}, {"generate_kwargs": {"num_beams": 1}}])
def test_image_text_to_text_pipeline_captions_and_continues(stock, pipe, images, text, options):
    for picture in images:
        [expected] = pipe(picture, text=text, **options)
        [record] = stock(picture, text=text, **options)
        assert record["generated_text"] == expected["generated_text"]
        assert record["input_text"] == text


def test_image_text_to_text_pipeline_on_many_images(stock, pipe, images):
    expected = [text for [text] in texts(pipe(images, text=PROMPTS))]
    assert [record["generated_text"] for record in stock(images, text=PROMPTS)] == expected
    for batch_size in (1, 3):
        items = ({"images": picture, "text": "a dog"} for picture in images)
        assert texts(stock(items, batch_size=batch_size)) == texts(pipe(images, text="a dog"))
        items = ({"images": picture, "text": text} for picture, text in zip(images, ["a dog", "two", "a"], strict=True))
        assert len(list(stock(items, batch_size=batch_size))) == len(images)
