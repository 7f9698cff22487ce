"""The model behaves as users of transformers, accelerate and torch expect any model to."""

import copy
import inspect
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from reference import BOS, EOS, KINDS, PAD, load
from safetensors import safe_open
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, Trainer, TrainingArguments

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration, AttnCapModel

VOCABULARY = 40
every_kind = pytest.mark.parametrize("kind", KINDS)


def tiny(backbone: str = "squeezenet1_1", seed: int = 0, **settings: Any) -> AttnCapForConditionalGeneration:
    config = AttnCapConfig(
        **{
            "backbone": backbone,
            "encoder_channels": 12,
            "vocab_size": VOCABULARY,
            "word_embed_dim": 10,
            "hidden_size": 14,
            "attention_dim": 8,
            "word_attention": "history",
            "dropout": 0.0,
            **settings,
        }
    )
    torch.manual_seed(seed)
    return AttnCapForConditionalGeneration(config).eval()


def batch(rows: int = 2, side: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Pictures and captions of different lengths, the longest of 5 words."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, VOCABULARY - 10, (rows, 5), generator=random)
    for row in range(rows):
        labels[row, 4 - row % 3] = EOS
        labels[row, 5 - row % 3 :] = -100
    return {"pixel_values": torch.rand(rows, 3, side, side, generator=random), "labels": labels}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert got.keys() == want.keys() and want
    for name in want:
        assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# --- vocabulary ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [VOCABULARY + 7, VOCABULARY - 7])
def test_resized_vocabulary(tied, size, tmp_path):
    model, inputs = tiny(tie_word_embeddings=tied), batch()
    nn.init.normal_(model.lm_head.bias)
    before, kept = model(**inputs).logits, min(size, VOCABULARY)
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == size
    assert model.lm_head.weight.shape[0] == model.lm_head.bias.shape[0] == model.lm_head.out_features == size
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert_close(model(**inputs).logits[..., :kept], before[..., :kept])
    model.save_pretrained(tmp_path)
    reloaded = load(tmp_path)
    assert_close(reloaded(**inputs).logits, model(**inputs).logits)
    model.generation_config.min_new_tokens = 3
    assert model.generate(inputs["pixel_values"], max_new_tokens=3).max() < size


def test_tied_words_are_one_tensor_here_and_in_the_file(tmp_path):
    model, inputs = tiny(tie_word_embeddings=True), batch()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert len({"lm_head.weight", "model.decoder.embed_tokens.weight"} & names) == 1
    reloaded, info = load(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert reloaded.lm_head.weight is reloaded.get_input_embeddings().weight
    assert_close(reloaded(**inputs).loss, model(**inputs).loss)


def test_checkpoint_of_another_vocabulary(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path, vocab_size=VOCABULARY + 5)
    other = load(tmp_path, vocab_size=VOCABULARY + 5, ignore_mismatched_sizes=True)
    assert other.lm_head.weight.isfinite().all() and other.get_input_embeddings().weight.shape[0] == VOCABULARY + 5
    assert_close(other.model.decoder.cell.weight_ih, model.model.decoder.cell.weight_ih)


# --- initialisation and loading ---


@every_kind
def test_weights_missing_from_a_checkpoint_are_initialised(kind):
    config = tiny("mobilenet_v3_small", word_attention=kind).config
    model = load(None, config=config, state_dict={})
    fresh = AttnCapForConditionalGeneration(config)
    state = model.state_dict()
    assert state.keys() == fresh.state_dict().keys()
    for name, want in fresh.state_dict().items():
        got = state[name]
        assert not got.is_meta and got.isfinite().all(), name
        if want.is_floating_point() and want.numel() > 400:
            assert_close(got.std(), want.std(), rtol=0.35, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
        elif "backbone" in name and want.ndim == 1:  # batch norm
            assert_close(got, want)


def test_loaded_weights_are_not_initialised_again(tmp_path):
    """Only what is missing is initialised: here one convolution and the output layer."""
    model = tiny("mobilenet_v3_small")
    missing = ("model.encoder.backbone.features.1.block.0.0.weight", "lm_head.weight")
    state = {name: torch.rand_like(value) for name, value in model.state_dict().items() if value.is_floating_point()}
    loaded, info = load(
        None,
        config=model.config,
        state_dict={name: value for name, value in state.items() if name not in missing},
        output_loading_info=True,
    )
    assert {name for name in info["missing_keys"] if "num_batches" not in name} == set(missing)
    for name, value in loaded.state_dict().items():
        if name in missing:
            assert 0.001 < value.std() < 0.5 and value.mean().abs() < 0.1, name
        elif name in state:
            assert torch.equal(value, state[name]), name


def test_built_on_meta_and_initialised_later():
    config = tiny("mobilenet_v3_small").config
    with torch.device("meta"):
        model = AttnCapForConditionalGeneration(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu").init_weights()
    fresh = AttnCapForConditionalGeneration(config)
    assert_same(dict(model.named_buffers()), dict(fresh.named_buffers()))
    assert model.eval()(**batch()).loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    model, inputs = tiny("mobilenet_v3_small"), batch()
    model.save_pretrained(tmp_path)
    half = load(tmp_path, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype} and half.config.dtype == dtype
    out = half(**inputs)
    assert out.logits.dtype == dtype and out.loss.dtype == torch.float32
    assert_close(out.loss, model(**inputs).loss, rtol=0.02, atol=0.02)
    for beams in (1, 3):
        assert half.generate(inputs["pixel_values"], num_beams=beams, max_new_tokens=4).shape[0] == 2
    half.save_pretrained(tmp_path)
    assert load(tmp_path).dtype == dtype and load(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_weights_in_several_files(tmp_path):
    model, inputs = tiny(), batch()
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_close(load(tmp_path)(**inputs).loss, model(**inputs).loss)


@pytest.mark.parametrize("kind", ["none", "history"])
def test_offloaded_weights(kind, tmp_path):
    """With `device_map`, layers without memory of their own get their weights when they are called."""
    pytest.importorskip("accelerate")
    model, inputs = tiny(word_attention=kind), batch()
    model.save_pretrained(tmp_path / "model")
    places = {"model.encoder": "cpu", "model.decoder": "disk", "lm_head": "disk"}
    for device_map in (places, {"": "disk"}):
        loaded = load(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
        assert any(parameter.is_meta for parameter in loaded.parameters())
        with torch.no_grad():
            assert_close(loaded(**inputs).loss, model(**inputs).loss)
        options = {"num_beams": 2, "max_new_tokens": 4}
        wanted = model.generate(inputs["pixel_values"], **options)
        assert torch.equal(loaded.generate(inputs["pixel_values"], **options), wanted)


def families() -> dict[str, list[str]]:
    """torchvision's convolutional classifiers by the module they are written in."""
    grouped: dict[str, list[str]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        home = inspect.getmodule(torchvision.models.get_model_builder(name)).__name__.rpartition(".")[2]  # type: ignore[union-attr]
        if home not in ("vision_transformer", "swin_transformer", "maxvit"):
            grouped.setdefault(home, []).append(name)
    return grouped


SMALLEST = {
    "alexnet": "alexnet",
    "convnext": "convnext_tiny",
    "densenet": "densenet121",
    "efficientnet": "efficientnet_b0",
    "googlenet": "googlenet",
    "inception": "inception_v3",
    "mnasnet": "mnasnet0_5",
    "mobilenetv2": "mobilenet_v2",
    "mobilenetv3": "mobilenet_v3_small",
    "regnet": "regnet_y_400mf",
    "resnet": "resnet18",
    "shufflenetv2": "shufflenet_v2_x0_5",
    "squeezenet": "squeezenet1_1",
    "vgg": "vgg11",
}


def reloaded_backbone(name: str, folder: Path) -> AttnCapForConditionalGeneration:
    model = tiny(name, freeze_backbone=False, freeze_batch_norm=False)
    model.save_pretrained(folder)
    reloaded, info = load(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(reloaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    inputs = batch(side=96)
    with torch.no_grad():
        assert_close(reloaded(**inputs).loss, model(**inputs).loss)
    return reloaded


def compare_checkpointed(model: AttnCapForConditionalGeneration, reentrant: bool = False) -> None:
    """Checkpointing changes neither gradients nor batch norm statistics."""
    plain = model.double().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one in (plain, checkpointed):
        torch.manual_seed(0)
        one(**batch(side=96)).loss.backward()
    assert_same(gradients(checkpointed), gradients(plain))
    buffers = dict(plain.named_buffers())
    if buffers:  # not in AlexNet, ConvNeXt, SqueezeNet and VGG
        assert_same(dict(checkpointed.named_buffers()), buffers)


@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf", "efficientnet_b0", "shufflenet_v2_x0_5"])
def test_backbones_save_and_reload(name, tmp_path):
    reloaded_backbone(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(SMALLEST))
def test_one_backbone_of_each_family(family, tmp_path):
    assert set(families()) == set(SMALLEST)
    assert SMALLEST[family] in families()[family]
    compare_checkpointed(reloaded_backbone(SMALLEST[family], tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(itertools.chain(*families().values())))
def test_every_backbone_is_built_on_meta_as_on_the_cpu(name):
    """What loading rests on: a model without memory has the same tensors."""
    config = tiny().config
    config.backbone = name
    with torch.device("meta"):
        on_meta = AttnCapForConditionalGeneration(config)
    shapes = {key: (value.shape, value.dtype) for key, value in on_meta.state_dict().items()}
    real = AttnCapForConditionalGeneration(config)
    assert shapes == {key: (value.shape, value.dtype) for key, value in real.state_dict().items()}


# --- training ---


@every_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_neither_gradients_nor_statistics(kind, reentrant):
    model = tiny("mobilenet_v3_small", word_attention=kind, freeze_backbone=False, freeze_batch_norm=False)
    compare_checkpointed(model, reentrant)


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointed_parts_run_again_in_the_backward_pass(frozen):
    model = tiny("resnet18", freeze_backbone=frozen).train()
    runs: dict[str, int] = {}

    def count(name: str) -> None:
        part = model.get_submodule(name)
        part.register_forward_pre_hook(lambda *_: runs.update({name: runs.get(name, 0) + 1}))

    block, step = "model.encoder.backbone.layer3.0.conv1", "model.decoder.attention.region_score"
    count(block)
    count(step)
    model.gradient_checkpointing_enable()
    model(**batch()).loss.backward()
    assert runs == {block: 1 if frozen else 2, step: 2 * 5}
    model.gradient_checkpointing_disable()
    runs.clear()
    model(**batch()).loss.backward()
    assert runs == {block: 1, step: 5}


@every_kind
def test_label_padding_changes_nothing(kind):
    model, inputs = tiny(word_attention=kind, label_smoothing=0.1).double(), batch()
    wider = {**inputs, "labels": nn.functional.pad(inputs["labels"], (0, 3), value=-100)}
    losses, grads = [], []
    for one in (inputs, wider):
        model.zero_grad()
        loss = model(**one).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append(gradients(model))
    assert_close(losses[1], losses[0])
    assert_same(grads[1], grads[0])


class Rows(torch.utils.data.Dataset):
    """One picture and its caption a row, all captions padded to one length."""

    def __init__(self, inputs: dict[str, torch.Tensor]):
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs["labels"])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: value[row] for name, value in self.inputs.items()}


def test_accumulated_batches_train_as_one_batch(tmp_path):
    """The Trainer's step over four batches of one row, of different lengths, is that over one batch of four."""
    pytest.importorskip("accelerate")
    states = []
    for size in (4, 1):
        model = tiny(label_smoothing=0.1)
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=1,
            optim="sgd",
            learning_rate=0.5,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=Rows(batch(4))).train()
        states.append(model.state_dict())
    assert_same(states[1], states[0], rtol=1e-5, atol=1e-6)
    fresh = tiny(label_smoothing=0.1).state_dict()
    assert not torch.allclose(states[0]["lm_head.weight"], fresh["lm_head.weight"])


SWITCHES: list[dict[str, Any]] = [
    *(
        {"word_attention": kind, "gate": gate, "deep_output": deep}
        for kind, gate, deep in itertools.product(KINDS, (True, False), (True, False))
    ),
    {"tie_word_embeddings": True},
    {"freeze_word_embeddings": True},
    {"freeze_backbone": False},
]


def compare_with_one_process(rank: int, world: int, folder: str) -> None:
    """Each process trains on its rows; the gradients must be those of one process with all rows, unused weights none."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    inputs = batch(2 * world)
    words = (inputs["labels"] != -100).sum()
    own = {name: value[2 * rank : 2 * rank + 2] for name, value in inputs.items()}
    for switches in SWITCHES:
        alone = tiny(**switches).train()
        together = DistributedDataParallel(copy.deepcopy(alone))  # find_unused_parameters=False
        alone(**inputs).loss.backward()
        for _ in range(2):  # a weight left out shows at the second step
            together.zero_grad()
            (world * together(**own, num_items_in_batch=words).loss).backward()  # the Trainer's convention
        assert_same(gradients(together.module), gradients(alone), rtol=1e-4, atol=1e-6)
    distributed.destroy_process_group()


def test_all_weights_are_used_in_distributed_training(tmp_path):
    compare_with_one_process(0, 1, str(tmp_path))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    spawn(compare_with_one_process, args=(2, str(tmp_path)), nprocs=2)


# --- what goes in and comes out ---


@every_kind
def test_tuple_outputs_equal_dictionary_outputs(kind):
    model, inputs = tiny(word_attention=kind), batch()
    wanted = {"output_attentions": True, "output_hidden_states": True}
    for one, given in ((model, inputs), (model.model, {"pixel_values": inputs["pixel_values"]})):
        as_dict, as_tuple = one(**given, **wanted), one(**given, **wanted, return_dict=False)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == len(as_dict)
        for a, b in zip(flat(as_tuple), flat(as_dict.to_tuple()), strict=True):
            assert_close(a, b)
    assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).loss)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


def flat(x: Any) -> list[torch.Tensor]:
    return [x] if isinstance(x, torch.Tensor) else [t for y in x for t in flat(y)] if isinstance(x, tuple) else []


@pytest.mark.parametrize("grid", [None, (2, 3)])
def test_hidden_states_get_gradients(grid):
    model, inputs = tiny(grid_size=grid), batch(side=96)
    out = model.model(inputs["pixel_values"], torch.tensor([[BOS, 5, 6]] * 2), output_hidden_states=True)
    encoder, decoder = out.encoder_hidden_states, out.decoder_hidden_states
    assert len(encoder) == len(decoder) == model.config.num_hidden_layers + 1
    assert_close(encoder[-1], out.encoder_last_hidden_state)
    assert encoder[0].shape == (2, 25, 12) and encoder[1].shape == (2, 25 if grid is None else 6, 12)
    assert decoder[0].shape == decoder[1].shape == (2, 3, 14)
    for state in (encoder[0], decoder[0]):
        state.retain_grad()
    out.last_hidden_state.sum().backward()
    assert encoder[0].grad.abs().sum() > 0 and decoder[0].grad.abs().sum() > 0


def test_encoder_decoder_and_embeddings_have_the_usual_accessors():
    model = tiny()
    assert model.get_encoder() is model.model.encoder and model.get_decoder() is model.model.decoder
    assert model.base_model is model.model and model.get_output_embeddings() is model.lm_head
    assert next(iter(inspect.signature(model.forward).parameters)) == model.main_input_name == "pixel_values"
    replacement = nn.Embedding(VOCABULARY, 10, padding_idx=PAD)
    model.set_input_embeddings(replacement)
    assert model.get_input_embeddings() is model.model.decoder.embed_tokens is replacement


def test_auto_classes(tmp_path):
    model, inputs = tiny(), batch()
    model.save_pretrained(tmp_path)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(whole, AttnCapForConditionalGeneration)
    base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(base, AttnCapModel) and not info["missing_keys"]
    assert_close(base(inputs["pixel_values"]).last_hidden_state, model.model(inputs["pixel_values"]).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again, info = load(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight", "lm_head.bias"}
    assert_close(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_settings_can_be_overridden_on_loading(tmp_path):
    model, inputs = tiny(freeze_backbone=True), batch()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, alpha_c=0, freeze_backbone=False)
    assert loaded.config.alpha_c == 0 and all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded(**inputs).loss < model(**inputs).loss
    assert not any(parameter.requires_grad for parameter in load(tmp_path).model.encoder.backbone.parameters())
    assert AutoConfig.from_pretrained(tmp_path, dropout=0.25).dropout == 0.25


def test_configs_and_models_can_be_copied():
    model, inputs = tiny(), batch()
    for config in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert config.to_dict() == model.config.to_dict() and config is not model.config
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(other(**inputs).loss, model(**inputs).loss)


def test_one_mean_and_std_for_all_channels():
    config = AttnCapConfig(backbone="squeezenet1_1", image_mean=0.5, image_std=0.25)
    assert config.image_mean == [0.5] * 3 and config.image_std == [0.25] * 3


@pytest.mark.parametrize("shape", [(1, 1), (3, 64, 64), (2, 64, 64, 3), (2, 1, 64, 64)])
def test_pixel_values_of_a_wrong_shape_are_rejected(shape):
    with pytest.raises(ValueError, match="pixel_values.*height, width"):
        tiny()(torch.zeros(shape))
