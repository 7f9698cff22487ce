"""Recipes of transformers' documentation either train a captioner or are refused in a sentence that shows the right call."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.testing import assert_close
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_attncap import AttnCapForConditionalGeneration, AttnCapProcessor, Captioner

CAPTIONS = ["a black dog", "some children are playing near a big house", "two red dogs", "a child in the rain"]
EXACT = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture
def model(tiny_checkpoint) -> Any:
    return AttnCapForConditionalGeneration.from_pretrained(tiny_checkpoint, dropout=0.0)


@pytest.fixture
def processor(tiny_checkpoint) -> AttnCapProcessor:
    return AttnCapProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture
def data() -> Dataset:
    noise = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), dtype=np.uint8)
    images = [Image.fromarray(blocks).resize((96, 64), Image.Resampling.NEAREST) for blocks in noise]
    return Dataset.from_dict({"image": images, "text": CAPTIONS})


def arguments(folder, kind=TrainingArguments, **settings):
    common = {"use_cpu": True, "report_to": [], "remove_unused_columns": False, "per_device_train_batch_size": 2}
    return kind(output_dir=str(folder), **{**common, "max_steps": 1, "save_strategy": "no", **settings})


def prompts_as_labels(processor, padding, ignored):
    """The recipe of transformers' image captioning guide, and what other guides make of it."""

    def transform(batch):
        encoding = processor(images=batch["image"], text=batch["text"], padding=padding)
        labels = [[-100 if ignored and token == 0 else token for token in row] for row in encoding["input_ids"]]
        encoding.update({"labels": labels})
        return encoding

    return transform


@pytest.mark.parametrize("padding", ["max_length", True])
@pytest.mark.parametrize("ignored", [False, True], ids=["padding counts", "padding ignored"])
def test_prompts_as_labels_are_refused(model, processor, data, tmp_path, padding, ignored):
    data.set_transform(prompts_as_labels(processor, padding, ignored))
    batch_size = 1 if padding is True else 2  # unpadded rows of different lengths do not fit together
    trainer = Trainer(model, arguments(tmp_path, per_device_train_batch_size=batch_size), train_dataset=data)
    with pytest.raises(ValueError, match=r"`labels` equal the `input_ids`.*`processor\(text_target=captions\)`"):
        trainer.train()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_with_the_padding_token_are_refused(model, processor, training, side):
    processor.tokenizer.padding_side = side
    labels = processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match=r"padding \(id 0\).*`processor\(text_target=captions\)`"):
        model.train(training)(pixel_values=torch.rand(4, 3, 64, 96), labels=labels)


@pytest.mark.parametrize("training", [True, False])
def test_labels_padded_on_the_left_are_labels(model, processor, training):
    """As `DataCollatorForSeq2Seq` pads them for a tokenizer that pads on the left."""
    rows = [{"labels": processor(text_target=caption)["labels"][0], "input_ids": [4]} for caption in CAPTIONS]
    left = DataCollatorForSeq2Seq(processor.tokenizer)(rows)["labels"]
    right = processor(text_target=CAPTIONS, return_tensors="pt")["labels"]
    assert left[0, 0] == -100 and right[0, -1] == -100
    pixel_values = torch.rand(4, 3, 64, 96)
    losses = [model.train(training)(pixel_values=pixel_values, labels=labels).loss for labels in (left, right)]
    assert_close(*losses, **EXACT)
    inputs = DataCollatorForSeq2Seq(processor.tokenizer, model=model)(rows)
    with pytest.raises(ValueError, match="`labels` contain padding"):
        model(pixel_values=pixel_values, labels=left, decoder_input_ids=inputs["decoder_input_ids"])


def test_captions_without_an_end_are_warned_of_once(model, processor, monkeypatch):
    said = []
    monkeypatch.setattr("hf_attncap.loss_attncap.logger.warning_once", said.append)
    images = {"pixel_values": torch.rand(4, 3, 64, 96)}
    model.train()(**images, labels=processor(text_target=CAPTIONS, max_target_length=4, return_tensors="pt")["labels"])
    assert not said, "some captions were cut, which is right"
    model(**images, labels=processor(text_target=CAPTIONS, max_target_length=2, return_tensors="pt")["labels"])
    assert len(said) == 1 and "text_target" in said[0]


def test_a_captioner_whose_padding_is_its_end_token(model, processor):
    model.config.pad_token_id = model.config.eos_token_id
    model(pixel_values=torch.rand(4, 3, 64, 96), labels=processor(text_target=CAPTIONS, return_tensors="pt")["labels"])


def collate(processor):
    return lambda rows: processor(
        images=[row["image"] for row in rows], text_target=[row["text"] for row in rows], return_tensors="pt"
    )


def test_label_smoothing_of_the_trainer_is_refused(model, processor, data, tmp_path):
    settings = arguments(tmp_path, label_smoothing_factor=0.1)
    trainer = Trainer(model, settings, data_collator=collate(processor), train_dataset=data)
    with pytest.raises(ValueError, match="`label_smoothing_factor`.*`label_smoothing` in the model's config"):
        trainer.train()


def test_plain_trainer_end_to_end(model, processor, data, tmp_path):
    seen = []

    def compute_metrics(prediction):
        ids = np.where(prediction.predictions < 0, 0, prediction.predictions)
        seen.append(processor.batch_decode(ids, skip_special_tokens=True))
        return {"same": float(np.mean([text == caption for text, caption in zip(seen[-1], CAPTIONS)]))}

    settings = arguments(
        tmp_path,
        Seq2SeqTrainingArguments,
        max_steps=60,
        learning_rate=0.03,
        lr_scheduler_type="constant",
        logging_steps=1,
        per_device_eval_batch_size=3,  # two batches, whose captions have different lengths
        predict_with_generate=True,
        generation_num_beams=1,
        gradient_accumulation_steps=2,
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(
        model,
        settings,
        data_collator=collate(processor),
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor,
        compute_metrics=compute_metrics,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.2 * before["eval_loss"] and after["eval_same"] == 1.0, (before, after, seen)
    trainer.save_model()
    results = Captioner.from_pretrained(tmp_path, device="cpu").caption(data["image"][:], num_beams=1)
    assert [result.text for result in results] == CAPTIONS
