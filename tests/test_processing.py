"""The processor: images, prompts and captions together, for training, `generate` and the pipeline."""

from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from hf_attncap.training.data.vocabulary import build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor
from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline

from hf_attncap.configuration_attncap import AttnCapConfig
from hf_attncap.image_processing_attncap import AttnCapImageProcessor
from hf_attncap.processing_attncap import AttnCapProcessor

WORDS = ["a", "black", "dog", "is", "running", "fast", "on", "the", "beach"]


def make_processor(kind: Literal["word", "bpe"]) -> AttnCapProcessor:
    tokenizer = build_tokenizer([" ".join(WORDS)], kind, min_count=1)
    return AttnCapProcessor(AttnCapImageProcessor(size=32), tokenizer)


PROCESSORS = {"word": make_processor("word"), "bpe": make_processor("bpe")}
IMAGE = Image.new("RGB", (40, 30), "teal")
EOS = 2
kinds = pytest.mark.parametrize("kind", list(PROCESSORS))


@pytest.fixture
def processor() -> AttnCapProcessor:
    return PROCESSORS["word"]


def texts(processor: AttnCapProcessor, labels: torch.Tensor) -> list[str]:
    return processor.batch_decode([[i for i in row if i >= 0] for row in labels.tolist()])


def test_training_batch(processor):
    captions = ["A black dog .", "The dog is running on the beach ."]
    batch = processor(images=[IMAGE, IMAGE], text_target=captions, return_tensors="pt")
    assert set(batch) == {"pixel_values", "labels"}
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"][0, 3] == EOS and batch["labels"][0, 4:].tolist() == [-100] * 4
    assert texts(processor, batch["labels"]) == ["a black dog </s>", "the dog is running on the beach </s>"]


@kinds
def test_truncated_caption_has_no_end_token(kind):
    processor = PROCESSORS[kind]
    captions = ["a black dog", "a black dog is"]
    labels = processor(text_target=captions, max_target_length=3, return_tensors="pt")["labels"]
    assert (labels == EOS).sum(dim=1).tolist() == [1, 0]
    decoded = processor.batch_decode(labels.clamp(min=0), skip_special_tokens=True)
    assert decoded == ["a black dog", "a black dog"]


def test_twenty_words_are_kept_by_default(processor):
    labels = processor(text_target=["a " * 20, "a " * 21])["labels"]
    assert [len([i for i in row if i >= 0]) for row in labels] == [21, 20]
    assert labels[0][20] == EOS


@kinds
@given(
    captions=st.lists(st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join), min_size=1, max_size=5),
    limit=st.integers(1, 9),
)
@settings(max_examples=60)
def test_labels_are_caption_end_token_and_padding(kind, captions, limit):
    processor = PROCESSORS[kind]
    labels = processor(text_target=captions, max_target_length=limit, return_tensors="pt")["labels"]
    for caption, row in zip(captions, labels.tolist(), strict=True):
        length = next((i for i, token in enumerate(row) if token == -100), len(row))
        assert all(token == -100 for token in row[length:])
        words = caption.split()
        assert processor.decode(row[:length], skip_special_tokens=True).split() == words[:limit]
        ends = [i for i, token in enumerate(row[:length]) if token == EOS]
        assert ends == ([length - 1] if len(words) <= limit else [])
    assert (labels != -100).any(dim=0).all()


@kinds
def test_prompts_are_left_padded_without_special_tokens(kind):
    batch = PROCESSORS[kind](text=["A black dog,", "a"], return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["input_ids"][1, :2].tolist() == [0, 0]
    assert (batch["input_ids"][0] > 3).all()


@pytest.mark.parametrize("text", ["", [""], "?!"])
def test_empty_prompt_has_no_tokens(processor, text):
    batch = processor(images=IMAGE, text=text, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (1, 0)
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64


def test_one_prompt_is_used_for_all_images(processor):
    batch = processor(images=[IMAGE, IMAGE], text="a dog", return_tensors="pt")
    assert texts(processor, batch["input_ids"]) == ["a dog", "a dog"]


def test_rows_keep_their_batch_axis_in_every_return_type(processor):
    lists = processor(images=IMAGE, text="a dog", text_target="a dog is")
    arrays = processor(images=IMAGE, text="a dog", text_target="a dog is", return_tensors="np")
    assert isinstance(lists["input_ids"], list) and isinstance(arrays["labels"], np.ndarray)
    for name in ("input_ids", "attention_mask", "labels"):
        assert np.array_equal(lists[name], arrays[name]) and arrays[name].dtype == np.int64


def test_options_reach_tokenizer_and_image_processor(processor):
    batch = processor(
        images=IMAGE,
        text="a dog",
        images_kwargs={"size": 16},
        text_kwargs={"padding": "max_length", "max_length": 5},
        return_tensors="pt",
    )
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`images`.*`text`.*`text_target`"),
        ({"text": []}, "`text` must be"),
        ({"text": 5}, "`text` must be"),
        ({"text_target": [["a"]]}, "`text_target` must be"),
        ({"images": [IMAGE, IMAGE], "text": ["a"]}, "`text` has 1 entries for 2 images"),
        ({"images": [IMAGE, IMAGE], "text_target": "a"}, "`text_target` has 1 entries for 2 images"),
        ({"text_target": "a", "max_target_length": 0}, "`max_target_length`"),
        ({"text_target": "a", "max_target_length": "all"}, "`max_target_length`"),
    ],
)
def test_errors_name_bad_input(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


@kinds
def test_save_and_load(kind, tmp_path):
    AutoImageProcessor.register(AttnCapConfig, image_processor_classes={"torchvision": AttnCapImageProcessor}, exist_ok=True)
    saved = make_processor(kind)
    saved.save_pretrained(tmp_path)
    loaded = AttnCapProcessor.from_pretrained(tmp_path)
    call = {"images": IMAGE, "text": "A dog", "text_target": "A dog 's beach .", "return_tensors": "pt"}
    expected, actual = saved(**call), loaded(**call)
    assert set(actual) == set(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name])
    assert loaded.to_dict() == saved.to_dict()


@kinds
@pytest.mark.parametrize(
    ("images", "text", "full"),
    [
        (IMAGE, "", ["is running"]),
        (IMAGE, "A dog", ["A dog is running"]),
        ([IMAGE], ["a dog"], ["a dog is running"]),
        ([IMAGE, IMAGE], ["a black dog", "the"], ["a black dog is running", "the is running"]),
        ([IMAGE, IMAGE], ["", "a dog"], ["is running", "a dog is running"]),
    ],
)
def test_image_text_to_text_pipeline_uses_the_processor(kind, images, text, full):
    processor = PROCESSORS[kind]
    pipe = SimpleNamespace(processor=processor, tokenizer=processor.tokenizer, dtype=torch.float16)
    inputs = ImageTextToTextPipeline.preprocess(pipe, {"images": images, "text": text})  # pyright: ignore
    assert inputs["pixel_values"].dtype == torch.float16 and inputs["input_ids"].dtype == torch.int64

    prompt = inputs["input_ids"]  # (B, T)
    end = [*processor.tokenizer("is running")["input_ids"], EOS, 0]
    rows = [[1, *row, *end] for row in prompt.tolist()]
    outputs = {"prompt_text": inputs["text"], "generated_sequence": torch.tensor(rows), "input_ids": prompt}
    records = ImageTextToTextPipeline.postprocess(pipe, outputs)  # pyright: ignore
    assert [record["generated_text"] for record in records] == full
