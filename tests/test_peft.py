"""Adapters, hooks and offloading reach every layer of the captioner, in training and in generation."""

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset, Image
from hf_attncap.training.arguments import CaptionTrainingArguments
from hf_attncap.training.data.collator import CaptionCollator
from hf_attncap.training.trainers.caption_trainer import CaptionTrainer
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration, AttnCapProcessor

KINDS = ["none", "score", "channel", "history"]
EXACT = {"rtol": 1e-12, "atol": 1e-12}
ATTENTION_AND_GATE = ["query_proj", "gate"]
DECODER = [
    *["region_proj", "word_proj", "query_proj", "gate", "region_score", "init_h", "init_c"],
    *["word_out", "state_out", "region_out", "lm_head"],
]
ENCODER = ["windows", "squeeze", "expand1x1", "expand3x3"]
FEATURES = torch.randn(2, 512, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
PICTURES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
LABELS = torch.tensor([[4, 9, 12, 5, 2], [7, 2, -100, -100, -100], [8, 4, 2, -100, -100], [5, 6, 7, 2, -100]])


def tiny(**settings) -> AttnCapForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"encoder_channels": 8, "hidden_size": 10, "attention_dim": 7, "word_embed_dim": 6, "vocab_size": 21, "dropout": 0.0}
    return AttnCapForConditionalGeneration(AttnCapConfig(backbone="squeezenet1_1", **{**sizes, **settings})).double()


def adapted(model, targets: list[str], **options):
    """The model with random adapters, which change its output."""
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options))


def adapters(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "targets", [ATTENTION_AND_GATE, ["query_proj"], ["gate"], DECODER], ids=["query and gate", "query", "gate", "all"]
)
def test_training_reaches_adapters_of_the_decoder(kind, targets):
    plain = tiny(word_attention=kind).eval()(backbone_features=FEATURES, labels=LABELS).loss
    model = adapted(tiny(word_attention=kind), targets)
    expected = model.eval()(backbone_features=FEATURES, labels=LABELS)
    out = model.train()(backbone_features=FEATURES, labels=LABELS)
    out.loss.backward()
    assert_close(out.loss, expected.loss, **EXACT)
    assert_close(out.logits[LABELS != -100], expected.logits[LABELS != -100], **EXACT)
    assert abs(out.loss - plain) > 1e-3, "the adapters have an effect"
    assert all(weight.grad is not None and weight.grad.any() for weight in adapters(model).values())
    assert {name.split(".lora_")[0].split(".")[-1] for name in adapters(model)} == set(targets) - (
        {"word_proj"} if kind == "none" else set()
    )


def test_training_reaches_adapters_of_the_encoder():
    model = adapted(tiny(), ENCODER)
    expected = model.eval()(pixel_values=PICTURES, labels=LABELS).loss
    loss = model.train()(pixel_values=PICTURES, labels=LABELS).loss
    loss.backward()
    assert_close(loss, expected, **EXACT)
    assert len(adapters(model)) > 40
    assert all(weight.grad is not None and weight.grad.any() for weight in adapters(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_every_module_fire_in_training(kind):
    model, called = tiny(word_attention=kind).train(), set()
    modules = {name: module for name, module in model.named_modules() if "backbone" not in name}
    expected = model(backbone_features=FEATURES, labels=LABELS).loss
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    loss = model(backbone_features=FEATURES, labels=LABELS).loss
    assert called == set(modules)
    assert_close(loss, expected, **EXACT)


@pytest.mark.parametrize("name", ["attention.query_proj", "gate", "cell"])
@pytest.mark.parametrize("kind", ["score", "history"])
def test_changes_by_a_hook_affect_training(kind, name):
    model = tiny(word_attention=kind)
    plain = model.train()(backbone_features=FEATURES, labels=LABELS).loss

    def halve(module, inputs, output):
        return tuple(part / 2 for part in output) if isinstance(output, tuple) else output / 2

    model.model.decoder.get_submodule(name).register_forward_hook(halve)
    loss = model(backbone_features=FEATURES, labels=LABELS).loss
    assert abs(loss - plain) > 1e-4
    assert_close(loss, model.eval()(backbone_features=FEATURES, labels=LABELS).loss, **EXACT)


def test_parametrized_weights_are_used():
    model = tiny()
    torch.nn.utils.parametrizations.weight_norm(model.model.decoder.gate)
    torch.nn.utils.parametrizations.spectral_norm(model.model.decoder.cell, "weight_hh")
    model.eval()(backbone_features=FEATURES, labels=LABELS)
    model.train()(backbone_features=FEATURES, labels=LABELS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.decoder.parameters())


def test_offloaded_weights_are_loaded_for_use():
    model = tiny().train()
    with torch.no_grad():
        expected = model(backbone_features=FEATURES, labels=LABELS).loss
        cpu_offload(model, torch.device("cpu"))
        assert model.model.decoder.gate.weight.is_meta
        assert_close(model(backbone_features=FEATURES, labels=LABELS).loss, expected, **EXACT)


def test_lora_rejects_the_cell():
    with pytest.raises(ValueError, match="LSTMCell.*not supported"):
        adapted(tiny(), ["cell"])


def test_the_cell_is_trained_as_a_copy():
    """`modules_to_save`, as docs/fine_tuning.md has it."""
    model = adapted(tiny(), ["query_proj"], modules_to_save=["cell"])
    frozen = model.base_model.model.model.decoder.cell.original_module
    before = [weight.clone() for weight in frozen.parameters()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()(backbone_features=FEATURES, labels=LABELS).loss.backward()
    optimizer.step()
    trained = model.base_model.model.model.decoder.cell.modules_to_save["default"]
    assert all(torch.equal(now, then) for now, then in zip(frozen.parameters(), before))
    assert all(not torch.equal(now, then) for now, then in zip(trained.parameters(), before))


@pytest.mark.parametrize("kind", ["score", "history"])
def test_train_save_load_merge_generate(kind, tmp_path):
    model = get_peft_model(tiny(word_attention=kind), LoraConfig(r=4, target_modules=[*DECODER, "windows"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(12):
        loss = model.train()(backbone_features=FEATURES, labels=LABELS[:2]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    settings = {"pixel_values": PICTURES, "num_beams": 2, "max_new_tokens": 6}
    trained = model.eval().generate(**settings)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(word_attention=kind), str(tmp_path)).eval()
    assert torch.equal(loaded.generate(**settings), trained)
    merged = loaded.merge_and_unload()
    assert type(merged) is AttnCapForConditionalGeneration
    assert torch.equal(merged.generate(**settings), trained)
    assert not torch.equal(tiny(word_attention=kind).eval().generate(**settings), trained)


def test_adapters_train_with_the_caption_trainer(tiny_checkpoint, pictures, tmp_path):
    """It takes the captioner with the adapters in it; PEFT saves them."""
    data = Dataset.from_dict({"image": [str(p) for p in pictures], "captions": [["a black dog"], ["two red dogs"], ["a child"]]})
    data = data.cast_column("image", Image()).add_column("image_id", ["0", "1", "2"])
    config = LoraConfig(r=4, target_modules=[*ATTENTION_AND_GATE, "windows", "lm_head"])
    model = get_peft_model(AttnCapForConditionalGeneration.from_pretrained(tiny_checkpoint), config)
    processor = AttnCapProcessor.from_pretrained(tiny_checkpoint)
    settings = {"max_steps": 20, "learning_rate": 0.05, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    arguments = CaptionTrainingArguments(str(tmp_path), remove_unused_columns=False, **settings)
    collator = CaptionCollator(processor, captions_per_image=2)
    trainer = CaptionTrainer(model.get_base_model(), arguments, data_collator=collator, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    model.save_pretrained(tmp_path)
    base = AttnCapForConditionalGeneration.from_pretrained(tiny_checkpoint)
    merged = PeftModel.from_pretrained(base, str(tmp_path)).merge_and_unload()
    inputs = processor(images=[row["image"] for row in data], return_tensors="pt")
    assert torch.equal(merged.eval().generate(**inputs), model.eval().generate(**inputs))
