"""Self-critical training compared with plain formulas; EMA of the weights, early stopping."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hf_attncap.training.arguments import CaptionTrainingArguments, SettingError
from hf_attncap.training.data.collator import CaptionCollator
from hf_attncap.training.data.vocabulary import build_tokenizer
from hf_attncap.training.train import main
from hf_attncap.training.trainers import self_critical
from hf_attncap.training.trainers.caption_trainer import CaptionTrainer
from hf_attncap.training.trainers.self_critical import (
    SelfCriticalTrainer,
    advantages,
    disable_dropout,
    policy_logits,
    sample,
    sample_tokens,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import TrainerCallback

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration, AttnCapImageProcessor, AttnCapProcessor
from hf_attncap.metrics import CiderReward, DocumentFrequencies, tokenize

WORDS = {
    "red": ["a red square on a table", "a red square on the table", "one red square on a table"],
    "green": ["a green ball in the grass", "the green ball in the grass", "a green ball in tall grass"],
    "blue": ["the blue sea under a sky", "a blue sea under the sky", "blue sea under the sky"],
    "white": ["white snow on a roof", "the white snow on the roof", "white snow on the roof"],
}
CHANNELS = 576  # of the smallest backbone's map


def rows() -> list[dict]:
    """Four images as feature maps of a backbone, (D, 1, 2), with three captions each."""
    maps = np.random.default_rng(0).normal(size=(len(WORDS), CHANNELS, 1, 2)).astype(np.float32)
    return [
        {"backbone_features": features, "captions": captions, "image_id": name}
        for features, (name, captions) in zip(maps, WORDS.items())
    ]


@pytest.fixture(scope="module")
def processor():
    tokenizer = build_tokenizer([caption for captions in WORDS.values() for caption in captions], min_count=1)
    return AttnCapProcessor(AttnCapImageProcessor(size={"height": 32, "width": 64}), tokenizer)


def captioner(processor, **config) -> AttnCapForConditionalGeneration:
    sizes = {"hidden_size": 32, "word_embed_dim": 16, "attention_dim": 16}
    settings = {"dropout": 0.3, "alpha_c": 1.0, "word_attention": "history", **sizes, **config}
    torch.manual_seed(0)
    model = AttnCapForConditionalGeneration(
        AttnCapConfig(backbone="mobilenet_v3_small", encoder_channels=24, vocab_size=len(processor.tokenizer), **settings)
    )
    # As in trained checkpoints; sampling ignores their repetition rule.
    model.generation_config.update(max_new_tokens=9, num_beams=3, no_repeat_ngram_size=2)
    return model


def trainer_of(model, processor, output: Path, trainer_class=SelfCriticalTrainer, **settings) -> CaptionTrainer:
    defaults = {
        "self_critical": trainer_class is SelfCriticalTrainer,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "remove_unused_columns": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 5,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 5,
    }
    arguments = CaptionTrainingArguments(output_dir=str(output), **{**defaults, **settings})
    critical = trainer_class is SelfCriticalTrainer
    return trainer_class(
        model=model,
        args=arguments,
        train_dataset=rows(),
        eval_dataset=rows(),
        data_collator=CaptionCollator(processor, 3, with_image_ids=critical),
        processing_class=processor,
        **({"references": WORDS} if critical else {}),
    )


@pytest.fixture(scope="module")
def warm(processor, tmp_path_factory) -> Path:
    """A captioner after a short training on the captions."""
    folder = tmp_path_factory.mktemp("warm")
    model = captioner(processor)
    trainer_of(model, processor, folder, CaptionTrainer, max_steps=25).train()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def load(folder) -> Any:
    return AttnCapForConditionalGeneration.from_pretrained(folder)


def batch_of(processor, images=None) -> dict:
    return CaptionCollator(processor, 3, with_image_ids=True)(rows() if images is None else images)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(trainer, batches: list[dict]) -> torch.Tensor:
    """The sum of the losses of accumulated batches; adds their gradients, as the Trainer does before a step."""
    trainer.model.zero_grad()
    taken, words = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(taken)
    return torch.stack([trainer.training_step(trainer.model, batch, words) for batch in taken]).sum()


@given(st.integers(2, 6), st.integers(1, 4), st.randoms(use_true_random=False))
def test_baseline_is_the_mean_of_the_other_samples_of_the_image(k, images, random):
    rewards = [random.uniform(0, 10) for _ in range(k * images)]
    expected = []
    for place, reward in enumerate(rewards):
        start = place // k * k
        others = [r for at, r in enumerate(rewards[start : start + k], start) if at != place]
        expected.append(reward - sum(others) / len(others))
    assert advantages(torch.tensor(rewards, dtype=torch.float64), k).tolist() == pytest.approx(expected, abs=1e-12)


def plain_loss(model, features, samples, advantage) -> torch.Tensor:
    """-sum advantage * log p, word by word and caption by caption: no batch, no padding, no shared encoding."""
    never = model.generation_config.suppress_tokens
    total = torch.zeros((), dtype=torch.float64)
    per_image = len(samples) // len(features)
    for row, (tokens, gain) in enumerate(zip(samples, advantage)):
        words = [model.config.decoder_start_token_id]
        for word in tokens:
            ids = torch.tensor([words])
            picture = features[row // per_image][None]
            logits = model(backbone_features=picture, decoder_input_ids=ids, use_cache=False).logits[0, -1]
            said = [v for v in range(len(logits)) if v not in never]
            total = total - gain * (logits[word] - torch.logsumexp(logits[said], 0))
            words.append(word)
    return total


@pytest.mark.parametrize("kind", ["none", "history"])
def test_loss_and_gradients_equal_plain_float64_formulas(processor, tmp_path, monkeypatch, kind):
    model = captioner(processor, word_attention=kind).double()
    never, end = model.generation_config.suppress_tokens, model.config.eos_token_id
    words = [v for v in range(len(processor.tokenizer)) if v not in never and v != end]
    # Ended, empty, unfinished and repeated samples, two per image.
    samples = [[*words[:3], end], [end], words[3:12], [*words[:2], end], [*words[4:8], end], words[5:6] * 4, [words[0], end], [end]]
    longest = max(map(len, samples))
    padded = torch.tensor([row + [-100] * (longest - len(row)) for row in samples])
    monkeypatch.setattr(self_critical, "sample", lambda *_: padded)
    trainer = trainer_of(model, processor, tmp_path, samples_per_image=2)
    batch = batch_of(processor)
    batch["backbone_features"] = batch["backbone_features"].double()
    rewards = trainer._reward.reward(
        [name for name in WORDS for _ in range(2)],
        [tokenize(processor.decode(row, skip_special_tokens=True)) for row in samples],
        [row[-1] == end for row in samples],
    )
    gain = [rewards[i] - rewards[i ^ 1] for i in range(8)]
    assert any(abs(value) > 0.01 for value in gain)
    gain = torch.tensor(gain, dtype=torch.float32).double()  # the trainer's advantages are float32

    loss = loss_of(trainer, [batch])
    found = gradients(model)
    model.zero_grad()
    model.eval()
    expected = plain_loss(model, batch["backbone_features"], samples, gain) / 8
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-9)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-10, msg=name)


def test_sampling_and_loss_use_the_same_probabilities(warm, processor):
    """Frequencies of sampled first words equal the probabilities of the loss, and suppressed words are never sampled."""
    model = load(warm)
    disable_dropout(model)
    regions = model.base_model.encoder(backbone_features=batch_of(processor)["backbone_features"]).last_hidden_state
    torch.manual_seed(1)
    samples = sample(model, regions, 500)
    first = samples[:, :1]
    p = policy_logits(model, model(encoder_outputs=(regions,), labels=first).logits[:, 0]).softmax(-1).unflatten(0, (4, 500))[:, 0]
    counts = torch.stack([torch.bincount(row, minlength=p.shape[-1]) for row in first.flatten().unflatten(0, (4, 500))])
    assert (counts / 500 - p).abs().max() < 0.09  # four standard errors
    assert not set(samples.unique().tolist()) & set(model.generation_config.suppress_tokens)
    assert samples.shape[1] == model.generation_config.max_new_tokens
    is_end = samples == model.config.eos_token_id
    behind = is_end.cumsum(1) - is_end.long() > 0
    assert torch.equal(behind, samples == -100)


def test_sampled_tokens_have_the_given_probabilities():
    p = torch.tensor([[0.5, 0.0, 0.3, 0.15, 0.05], [0.0, 0.0, 1.0, 0.0, 0.0]])
    torch.manual_seed(0)
    sampled = sample_tokens(p.repeat_interleave(20_000, 0))
    assert sampled.shape == (40_000, 1)
    counts = torch.stack([torch.bincount(row, minlength=5) for row in sampled.flatten().unflatten(0, (2, 20_000))])
    assert (counts / 20_000 - p).abs().max() < 0.014  # four standard errors
    assert (counts[p == 0] == 0).all()


def test_sampling_converts_weights_to_half_precision_once(processor, tmp_path, monkeypatch):
    """Autocast keeps converted weights only while its outermost block lasts, and each call of the model is a block of its own."""
    model = captioner(processor)
    trainer = trainer_of(model, processor, tmp_path, bf16=True)
    trainer.model_wrapped = trainer.accelerator.prepare(model)
    seen = []
    original = self_critical.sample_tokens
    monkeypatch.setattr(self_critical, "sample_tokens", lambda p: seen.append(torch.is_autocast_enabled("cpu")) or original(p))
    loss_of(trainer, [batch_of(processor)])
    assert len(seen) > 1 and all(seen)


@pytest.mark.parametrize("bf16", [True, False], ids=["bfloat16", "float32"])
def test_depthwise_convolutions_compute_in_float32(processor, tmp_path, bf16):
    """Their backward pass is slow in bfloat16 on CPUs. Other layers compute in bfloat16."""
    model = captioner(processor, freeze_backbone=False)
    trainer = trainer_of(model, processor, tmp_path, CaptionTrainer, bf16=bf16)
    convolutions = [layer for layer in model.model.encoder.backbone.modules() if isinstance(layer, torch.nn.Conv2d)]
    depthwise = [layer for layer in convolutions if layer.groups > 1]
    seen = []
    for layer in depthwise:
        layer.register_forward_hook(lambda layer, args, output: seen.append((layer, args[0], output)))
    with torch.no_grad(), trainer.accelerator.autocast():
        regions = model.model.encoder(torch.randn(2, 3, 32, 64)).last_hidden_state
    assert len(seen) == len(depthwise) > 5 and regions.dtype == (torch.bfloat16 if bf16 else torch.float32)
    for layer, x, output in seen:
        expected = torch.nn.functional.conv2d(
            x.float(), layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )
        assert output.dtype == x.dtype and torch.equal(output, expected.to(x.dtype))


def ending_with(warm, ends: Any) -> Any:
    """The captioner with these `eos_token_id`s in place of one."""
    config = load(warm).config
    config.eos_token_id = ends
    model = AttnCapForConditionalGeneration(config)
    model.load_state_dict(load(warm).state_dict())
    model.generation_config.update(max_new_tokens=9)
    return model


def test_each_of_several_end_tokens_ends_a_sample(warm, processor, tmp_path):
    also = processor.tokenizer.convert_tokens_to_ids("square")
    model = ending_with(warm, [2, also])
    disable_dropout(model)
    regions = model.base_model.encoder(backbone_features=batch_of(processor)["backbone_features"]).last_hidden_state
    torch.manual_seed(1)
    samples = sample(model, regions, 100)  # (R, T)
    is_end = (samples == 2) | (samples == also)
    assert torch.equal(is_end.cumsum(1) - is_end.long() > 0, samples == -100)
    assert (samples == 2).any() and (samples == also).any()
    trainer = trainer_of(model, processor, tmp_path)
    trainer._advantage(samples, list(WORDS))
    assert trainer._sums[4] == is_end.any(dim=1).sum(), "of samples that ended"


def test_self_critical_loss_has_no_dropout_and_fixed_batch_norm(processor, tmp_path):
    """Also with a trainable backbone."""
    model = captioner(processor, freeze_backbone=False, dropout=0.9)
    pictures = torch.randn(4, 3, 32, 64)
    batch = {**batch_of(processor), "pixel_values": pictures}
    del batch["backbone_features"]
    trainer = trainer_of(model, processor, tmp_path)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(float(loss_of(trainer, [dict(batch)])))
    assert losses[0] == losses[1] != 0
    assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers())
    assert any("backbone" in name and gradient.abs().sum() > 0 for name, gradient in gradients(model).items())


def test_accumulated_batches_have_the_gradients_of_one_batch(warm, processor, tmp_path, monkeypatch):
    model = load(warm)
    trainer = trainer_of(model, processor, tmp_path)
    whole = batch_of(processor)
    disable_dropout(model)
    regions = model.base_model.encoder(backbone_features=whole["backbone_features"]).last_hidden_state
    fixed = sample(model, regions, 5)
    monkeypatch.setattr(self_critical, "sample", lambda *_: fixed)
    one = loss_of(trainer, [whole])
    expected = gradients(model)
    halves = iter([fixed[:10], fixed[10:]])
    monkeypatch.setattr(self_critical, "sample", lambda *_: next(halves))
    two = loss_of(trainer, [batch_of(processor, rows()[:2]), batch_of(processor, rows()[2:])])
    assert float(two) == pytest.approx(float(one), rel=1e-4)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_weight_one_is_cross_entropy_training(warm, processor, tmp_path):
    """With dropout and the attention regulariser; with weight 0.5, the loss is the mean of both parts."""
    critical, plain = load(warm), load(warm)
    batch = batch_of(processor)
    losses = {}
    for weight in (0.0, 0.5, 1.0):
        trainer = trainer_of(critical, processor, tmp_path, cross_entropy_weight=weight)
        torch.manual_seed(4)
        critical.train()
        losses[weight] = float(loss_of(trainer, [dict(batch)]))
    trainer = trainer_of(plain, processor, tmp_path, CaptionTrainer)
    torch.manual_seed(4)
    disable_dropout(plain)
    regions = plain.base_model.encoder(backbone_features=batch["backbone_features"]).last_hidden_state
    sample(plain, regions, 5)  # takes the same random numbers as the losses above
    expected = float(loss_of(trainer, [{name: x for name, x in batch.items() if name != "image_ids"}]))
    assert losses[1.0] == pytest.approx(expected, rel=1e-6)
    assert losses[0.5] == pytest.approx((losses[0.0] + losses[1.0]) / 2, rel=1e-5)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(critical)[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_unfinished_sample_has_a_lower_reward(warm, processor, tmp_path):
    model = load(warm)
    trainer = trainer_of(model, processor, tmp_path)
    words = processor(text_target=["a red square on the table"], return_tensors="pt")["labels"][0].tolist()
    samples = torch.tensor([words, [*words[:-1], -100]])
    ended, cut = trainer._advantage(samples, ["red"]).tolist()
    assert ended > 0.1 and cut == pytest.approx(-ended)


def test_reward_increases_in_training(warm, processor, tmp_path):
    trainer = trainer_of(load(warm), processor, tmp_path, max_steps=60, learning_rate=0.005, logging_steps=10)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 6
    assert logs[-1]["reward"] > 1.5 * logs[0]["reward"] > 1
    for entry in logs:
        assert 0 <= entry["reward"] <= 10 and 0 < entry["advantage_std"] < 10
        assert 0 < entry["sample_length"] <= 9 and 0 < entry["sample_ended"] <= 1 and 0.2 <= entry["sample_distinct"] <= 1


def test_document_frequencies_come_from_training_captions_and_are_reused_when_resuming(warm, processor, tmp_path, monkeypatch):
    trainer = trainer_of(load(warm), processor, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    tokens = {name: [tokenize(caption) for caption in captions] for name, captions in WORDS.items()}
    by_hand = CiderReward(tokens, DocumentFrequencies.from_references(list(tokens.values()), end_token=True))
    sample = [["a", "red", "square"]]
    saved = CiderReward(tokens, DocumentFrequencies.load(tmp_path / "document_frequencies.npz"))
    assert trainer._reward.reward(["red"], sample, [True]) == by_hand.reward(["red"], sample, [True])
    assert saved.reward(["red"], sample, [True]) == by_hand.reward(["red"], sample, [True])

    def counted(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(DocumentFrequencies, "from_references", counted)
    checkpoint = str(tmp_path / "checkpoint-1")
    resumed = trainer_of(load(warm), processor, tmp_path, max_steps=3, resume_from_checkpoint=checkpoint)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 3
    with pytest.raises(AssertionError, match="computed again"):
        trainer_of(load(warm), processor, tmp_path)

    monkeypatch.undo()
    DocumentFrequencies.from_references([[["a"]]], end_token=True).save(tmp_path / "document_frequencies.npz")
    with pytest.raises(SettingError, match="on 1 images, but there are 4"):
        trainer_of(load(warm), processor, tmp_path, resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"self_critical": True, "samples_per_image": 1}, "`samples_per_image` is 1"),
        ({"self_critical": True, "cross_entropy_weight": 1.5}, "`cross_entropy_weight` is 1.5"),
        ({"metric_for_best_model": "cider"}, "set `predict_with_generate`"),
        ({"self_critical": True, "input_dropout": 0.1}, "leave it out"),
        ({"ema_decay": 1.0}, "`ema_decay` is 1.0"),
        ({"input_dropout": 1.0}, "`input_dropout` is 1.0"),
        ({"early_stopping_patience": 2}, "needs `metric_for_best_model`"),
        ({"early_stopping_patience": 2, "metric_for_best_model": "loss"}, "set `eval_strategy`"),
        ({"early_stopping_patience": 0, "metric_for_best_model": "loss", "eval_strategy": "epoch"}, "at least 1"),
    ],
)
def test_invalid_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(SettingError, match=message):
        CaptionTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_checkpoint_without_max_new_tokens_is_refused(processor, tmp_path):
    model = captioner(processor)
    model.generation_config.max_new_tokens = None
    with pytest.raises(SettingError, match="`max_new_tokens`"):
        trainer_of(model, processor, tmp_path)


def averaged_by_hand(path: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    average = path[0]
    for earlier, weights in enumerate(path[1:], 1):
        share = min(decay, (1 + earlier) / (10 + earlier))
        average = {name: share * average[name] + (1 - share) * w for name, w in weights.items()}
    return average


def test_input_dropout_affects_regions_and_words_in_training_only(warm, processor, tmp_path):
    model, plain = load(warm), load(warm)
    trainer_of(model, processor, tmp_path, CaptionTrainer, input_dropout=0.25)
    ids = torch.arange(4, 12).repeat(50, 1)
    features = batch_of(processor)["backbone_features"]

    def inputs_of(captioner):
        return captioner.base_model.encoder(backbone_features=features).last_hidden_state, captioner.get_input_embeddings()(ids)

    wanted = inputs_of(plain)
    for found, whole in zip(inputs_of(model.train()), wanted):
        kept = found != 0
        four_errors = 4 * (0.25 * 0.75 / found.numel()) ** 0.5
        assert abs(1 - kept.double().mean() - 0.25) < four_errors
        assert torch.allclose(found[kept], whole[kept] / 0.75)
    for quiet in (torch.nn.Module.eval, disable_dropout):
        quiet(model)
        assert all(torch.equal(found, whole) for found, whole in zip(inputs_of(model), wanted))


@pytest.mark.parametrize("trainer_class", [CaptionTrainer, SelfCriticalTrainer])
def test_ema_weights_are_evaluated_saved_and_resumed(warm, processor, tmp_path, trainer_class):
    decay, path = 0.22, []  # below 3 / 12, so the warm-up of the decay ends within the run

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            path.append({name: p.detach().clone() for name, p in model.named_parameters()})

    each = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    more = {"ema_decay": decay, "max_steps": 4, **each}
    model = load(warm)
    trainer = trainer_of(model, processor, tmp_path, trainer_class, **more)
    trainer.add_callback(Watch)
    trainer.train()
    whole = list(path)
    assert len(whole) == 4 and not torch.equal(whole[1]["lm_head.bias"], whole[3]["lm_head.bias"])
    for step in (2, 4):
        saved = load(tmp_path / f"checkpoint-{step}")
        for name, weight in averaged_by_hand(whole[:step], decay).items():
            torch.testing.assert_close(saved.get_parameter(name), weight, msg=name)
    assert all(torch.equal(p, saved.get_parameter(name)) for name, p in model.named_parameters())
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated[-1] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)

    path.clear()
    again = trainer_of(load(warm), processor, tmp_path, trainer_class, **more)
    again.add_callback(Watch)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, weight in whole[3].items():
        torch.testing.assert_close(path[-1][name], weight, msg=f"live {name}")
        torch.testing.assert_close(again.model.get_parameter(name), model.get_parameter(name), msg=f"averaged {name}")


def test_best_ema_checkpoint_is_loaded_at_the_end(warm, processor, tmp_path):
    more = {"ema_decay": 0.5, "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    model = load(warm)
    # With this learning rate the model gets worse, so the first checkpoint is the best.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.5}
    trainer = trainer_of(model, processor, tmp_path, CaptionTrainer, **more, **best)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)
    saved = load(trainer.state.best_model_checkpoint)
    assert all(torch.equal(p, saved.get_parameter(name)) for name, p in model.named_parameters())


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    """The four images as noise."""
    pictures = []
    for seed in range(len(WORDS)):
        noise = np.random.default_rng(seed).integers(0, 256, (32, 64, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, format="PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    Dataset.from_dict({"image": pictures, "captions": list(WORDS.values())}).to_parquet(str(path))
    return path


def options(warm, parquet, output, **more) -> list[str]:
    values = {
        "model_name_or_path": warm,
        "train_file": parquet,
        "output_dir": output,
        "model_config": '{"dropout": 0.0}',
        "self_critical": True,
        "captions_per_image": 3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "num_logged_images": 0,
        "use_cpu": True,
        **more,
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def test_command_line_run_stops_early_and_keeps_the_best_checkpoint(warm, parquet, tmp_path):
    """Evaluations use beam search. With a learning rate of zero nothing improves, so the second evaluation ends the run."""
    config = Path(main.__code__.co_filename).parent / "configs" / "flickr8k_mobilenet_v2_self_critical.yaml"
    more = {"feature_cache": tmp_path / "cache", "validation_file": parquet, "eval_strategy": "epoch", "save_strategy": "epoch"}
    more |= {"learning_rate": 0, "encoder_learning_rate": 0}
    argv = options(warm, parquet, tmp_path / "run", num_train_epochs=6, early_stopping_patience=1, **more)
    assert main(["--config", str(config), *argv]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and state["best_model_checkpoint"].endswith("checkpoint-1")
    assert len([entry for entry in state["log_history"] if "eval_cider" in entry]) == 3
    assert len([entry for entry in state["log_history"] if "reward" in entry]) == 2


def test_self_critical_training_needs_a_trained_checkpoint(parquet, tmp_path, capsys):
    argv = options("", parquet, tmp_path)
    assert main(argv[2:]) == 2
    assert "set `--model_name_or_path`" in capsys.readouterr().err


# Deterministic samples that do not depend on the process of an image: the i-th sample takes the i-th most likely word at each step.
# Each process that computes document frequencies leaves a file.
RUN = """
import sys
import torch
from hf_attncap.metrics import DocumentFrequencies
from hf_attncap.training.train import main
from hf_attncap.training.trainers import self_critical

count = DocumentFrequencies.from_references

def counted(*args, **kwargs):
    with open(sys.argv[1], "a") as file:
        file.write("counted\\n")
    return count(*args, **kwargs)

DocumentFrequencies.from_references = counted
self_critical.sample_tokens = lambda p: p.topk(5).indices.gather(1, (torch.arange(len(p)) % 5)[:, None])
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_two_processes_make_the_same_step_as_one(warm, parquet, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    step = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 1000, "cross_entropy_weight": 0.3}
    weights, logs = [], []
    for processes, size, accumulated in ((1, 4, 1), (2, 1, 2)):
        output, marks = tmp_path / f"{processes}", tmp_path / f"{processes}.marks"
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "ddp_backend": "gloo"}
        argv = options(warm, parquet, output, **step, **more)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(script)]
        done = subprocess.run([*launch, str(marks), *argv], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert marks.read_text() == "counted\n"
        weights.append(load(output).state_dict())
        logs.append(json.loads((output / "trainer_state.json").read_text())["log_history"][0])
        del logs[-1]["elapsed"]
    start = load(warm).state_dict()
    assert any(not torch.equal(weights[0][name], start[name]) for name in start)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert logs[1] == pytest.approx(logs[0], rel=1e-3)
