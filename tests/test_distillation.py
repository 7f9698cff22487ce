"""Learning from teachers, against plain mathematics and as a user runs it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration, AttnCapImageProcessor, AttnCapProcessor
from training.arguments import CaptionTrainingArguments, SettingError
from training.collator import CaptionCollator
from training.distillation import Teachers
from training.train import main
from training.trainer import CaptionTrainer
from training.vocabulary import build_tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (240, 240, 240)}
CAPTIONS = {name: [f"a {name} square .", f"there is a {name} square", f"{name}"] for name in COLOURS}


def rows() -> list[dict]:
    return [
        {"image": Image.new("RGB", (40, 40), colour), "captions": CAPTIONS[name], "image_id": name}
        for name, colour in COLOURS.items()
    ]


@pytest.fixture(scope="module")
def processor() -> AttnCapProcessor:
    tokenizer = build_tokenizer([caption for captions in CAPTIONS.values() for caption in captions], min_count=1)
    return AttnCapProcessor(AttnCapImageProcessor(size={"height": 64, "width": 32}), tokenizer)


def captioner(processor, seed: int, **config: Any) -> Any:
    torch.manual_seed(seed)
    settings = {"hidden_size": 32, "word_embed_dim": 16, "attention_dim": 16, "encoder_channels": 24, "dropout": 0.0, **config}
    model = AttnCapForConditionalGeneration(
        AttnCapConfig(backbone="mobilenet_v3_small", vocab_size=len(processor.tokenizer), **settings)
    )
    model.generation_config.update(max_new_tokens=9)
    return model


@pytest.fixture(scope="module")
def saved(processor, tmp_path_factory):
    """Saves a captioner with its processor; returns the folder."""

    def save(model, own_processor=None) -> str:
        folder = tmp_path_factory.mktemp("teacher")
        model.save_pretrained(folder)
        (own_processor or processor).save_pretrained(folder)
        return str(folder)

    return save


def trainer_of(model, processor, teachers, output: Path, **settings: Any) -> CaptionTrainer:
    arguments = CaptionTrainingArguments(
        output_dir=str(output), remove_unused_columns=False, use_cpu=True, report_to="none", **settings
    )
    return CaptionTrainer(
        model=model, args=arguments, train_dataset=rows(), data_collator=CaptionCollator(processor, 3), teachers=teachers
    )


def loss_of(trainer: CaptionTrainer, batches: list[dict]) -> torch.Tensor:
    """The sum of the losses of accumulated batches, whose gradients add up."""
    model: Any = trainer.model
    model.train().zero_grad()
    taken, words = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    loss: Any = sum(trainer.compute_loss(model, batch, num_items_in_batch=words) for batch in taken)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("parts", [1, 2])
def test_loss_is_that_of_captions_and_of_the_teachers_mean_by_word(processor, saved, tmp_path, parts):
    student, teachers = captioner(processor, 0), [captioner(processor, seed) for seed in (1, 2)]
    given = Teachers([saved(teacher) for teacher in teachers], processor, student, cached=False)
    trainer = trainer_of(student, processor, given, tmp_path, distill_weight=0.3)
    size = len(COLOURS) // parts
    batches = [trainer.data_collator(rows()[start : start + size]) for start in range(0, len(COLOURS), size)]
    loss = loss_of(trainer, batches)

    batch = trainer.data_collator(rows())
    is_word = batch["labels"].flatten(0, 1) != -100  # (R, T)
    student.train()
    with torch.no_grad():
        out = student(**batch)
        mean = sum(teacher.eval()(**batch).logits.double().softmax(-1) for teacher in teachers) / 2
        taught = -(mean * out.logits.double().log_softmax(-1)).sum(-1)[is_word].mean()
    assert loss == pytest.approx(float(0.7 * out.loss + 0.3 * taught), rel=1e-5)


def test_a_teacher_with_the_students_own_weights_moves_nothing_and_stays_as_it_is(processor, saved, tmp_path):
    student = captioner(processor, 0)
    folder = saved(student)
    teachers = Teachers([folder], processor, student, cached=False)
    trainer = trainer_of(student, processor, teachers, tmp_path, distill_weight=1.0)
    batch = trainer.data_collator(rows())
    loss_of(trainer, [batch])
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) < 1e-5
    before = teachers.probabilities({name: batch[name] for name in ("pixel_values", "labels")})
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1)
    assert torch.equal(before, teachers.probabilities({name: batch[name] for name in ("pixel_values", "labels")}))


def test_teachers_that_do_not_fit_are_named(processor, saved):
    student = captioner(processor, 0)
    with pytest.raises(SettingError, match="/no/such/teacher cannot be loaded"):
        Teachers(["/no/such/teacher"], processor, student, cached=False)
    words = AttnCapProcessor(processor.image_processor, build_tokenizer(["other words"], min_count=1))
    folder = saved(student, words)
    with pytest.raises(SettingError, match=f"{folder} has another vocabulary"):
        Teachers([folder], processor, student, cached=False)
    pictures = AttnCapProcessor(AttnCapImageProcessor(size={"height": 96, "width": 32}), processor.tokenizer)
    folder = saved(student, pictures)
    with pytest.raises(SettingError, match=f"{folder} sees pictures in another size"):
        Teachers([folder], processor, student, cached=False)
    other = saved(captioner(processor, 1))
    with pytest.raises(SettingError, match=f"{other} has other frozen blocks"):
        Teachers([other], processor, student, cached=True)
    Teachers([other], processor, student, cached=False)


def test_training_from_teachers_on_cached_maps(processor, saved, tmp_path):
    """As a user starts it: the student comes closer to its teacher than by captions alone; the record says who taught."""
    file = tmp_path / "train.parquet"
    Dataset.from_list(rows()).remove_columns("image_id").to_parquet(str(file))
    teacher = captioner(processor, 0)
    folder = saved(teacher)
    with torch.no_grad():
        for parameter in teacher.model.decoder.parameters():
            parameter.mul_(1.5)
    taught_by = saved(teacher)
    settings = {
        "model_name_or_path": folder,
        "train_file": file,
        "validation_share": 0.25,
        "feature_cache": tmp_path / "maps",
        "captions_per_image": 3,
        "max_steps": 30,
        "learning_rate": 0.01,
        "report_to": "none",
        "sample_images": 0,
        "use_cpu": True,
    }

    def divergence(output: str, **more: Any) -> float:
        options = {**settings, "output_dir": tmp_path / output, **more}
        assert main([word for key, value in options.items() for word in (f"--{key}", *str(value).split())]) == 0
        student = AttnCapForConditionalGeneration.from_pretrained(tmp_path / output).eval()
        batch = CaptionCollator(processor, 3)(rows())
        where = batch["labels"].flatten(0, 1) != -100  # (R, T)
        with torch.no_grad():
            own, theirs = (model.eval()(**batch).logits[where].log_softmax(-1) for model in (student, teacher))
        return float((theirs.exp() * (theirs - own)).sum(-1).mean())

    alone = divergence("alone")
    taught = divergence("taught", distill_from=f"{taught_by} {taught_by}", distill_weight=0.9)
    assert taught < alone / 2
    said = json.loads((tmp_path / "taught" / "training.json").read_text())[-1]["settings"]
    assert said["distill_from"] == [Path(taught_by).name] * 2 and said["distill_weight"] == 0.9


def test_settings_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(SettingError, match="`distill_weight` is 2"):
        CaptionTrainingArguments(output_dir=str(tmp_path), distill_weight=2.0)
    with pytest.raises(SettingError, match="leave out `self_critical`"):
        CaptionTrainingArguments(output_dir=str(tmp_path), distill_from=["a"], self_critical=True)
