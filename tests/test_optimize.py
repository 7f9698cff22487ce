"""A model optimized for inference gives the same captions, and the original model does not change."""

import copy
import itertools
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
from reference import tiny_model
from torch import nn
from torch.testing import assert_close

from hf_attncap import Captioner, convolutions, optimize
from hf_attncap.configuration_attncap import usable_backbones
from hf_attncap.convolutions import has_fused_convolutions
from hf_attncap.optimize import InferenceDecoder, optimize_for_inference

# The number of batch norms that remain after folding, by backbone. In DenseNet some do not follow a convolution.
BACKBONES = {
    "resnet18": 0,
    "mobilenet_v2": 0,
    "efficientnet_lite0": 0,
    "shufflenet_v2_x0_5": 0,
    "squeezenet1_1": 0,
    "densenet121": 62,
}
SLOW_BACKBONES = {"regnet_y_400mf": 0, "googlenet": 0, "vgg11_bn": 0, "convnext_tiny": 0}


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def captioner_with_statistics(**settings):
    """A tiny captioner whose batch norms change their inputs."""
    torch.manual_seed(0)
    model = tiny_model(**settings).eval()
    for norm in norms(model):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2.0)
        nn.init.normal_(norm.weight, 1.0, 0.1)
        nn.init.normal_(norm.bias, std=0.1)
    return model


def assert_same_regions(model, fast, pictures, tolerance=1e-4, **inputs):
    with torch.no_grad():
        expected, found = (m.model.encoder(pictures, **inputs).last_hidden_state for m in (model, fast))
    assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def check_backbone(backbone: str, **settings) -> nn.Module:
    """Compares regions for one and two images, even and odd sizes, in float32 (fused) and float64 (not fused)."""
    single = captioner_with_statistics(backbone=backbone, **settings).float()
    before = copy.deepcopy(single.state_dict())
    for model, tolerance in ((copy.deepcopy(single).double(), 1e-9), (single, 1e-3)):
        fast = optimize_for_inference(model)
        for count, side in ((1, 80), (2, 75), (1, 75)):
            assert_same_regions(model, fast, torch.randn(count, 3, side, side), tolerance)
    assert all(torch.equal(before[name], value) for name, value in single.state_dict().items()), "the model itself changed"
    return fast


@pytest.mark.parametrize(("backbone", "left"), BACKBONES.items(), ids=BACKBONES)
def test_regions_are_the_same_and_batch_norm_is_folded(backbone, left):
    assert len(norms(check_backbone(backbone))) == left


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "left"), SLOW_BACKBONES.items(), ids=SLOW_BACKBONES)
def test_batch_norm_of_more_backbones_is_folded(backbone, left):
    assert len(norms(check_backbone(backbone))) == left


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "resnet18"])
def test_regions_are_the_same_with_same_padding(backbone):
    check_backbone(backbone, backbone_padding="same")


@pytest.mark.skipif(not has_fused_convolutions(torch.bfloat16), reason="torch cannot fuse convolutions in bfloat16 here")
@pytest.mark.parametrize("count", [1, 3])
def test_regions_are_similar_in_bfloat16(count):
    model = captioner_with_statistics(backbone="mobilenet_v2", backbone_padding="same").bfloat16()
    assert_same_regions(model, optimize_for_inference(model), torch.randn(count, 3, 75, 75), tolerance=5e-2)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", usable_backbones())
def test_regions_are_the_same_with_every_backbone(backbone):
    check_backbone(backbone)


@pytest.mark.skipif(not has_fused_convolutions(torch.float32), reason="torch cannot fuse convolutions on this processor")
@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0", "mobilenet_v2"])
def test_the_encoder_runs_no_separate_activations_and_additions(backbone):
    encoder = optimize_for_inference(tiny_model(backbone=backbone).float()).model.encoder
    with torch.no_grad(), torch.profiler.profile() as profile:
        encoder(torch.randn(1, 3, 64, 64))
    called = {event.key for event in profile.key_averages()}
    assert "mkldnn::_convolution_pointwise" in called
    assert not {name for name in called if name.startswith(("aten::relu", "aten::hardtanh", "aten::add", "aten::batch_norm"))}


class Block(nn.Module):
    """Additions that look like residuals; each kind is one way to write them."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.first, self.second, self.act = kind, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()

    def forward(self, x):
        y = self.first(x)
        match self.kind:
            case "+":
                return self.act(y + x)
            case "+ swapped":
                return self.act(x * 2 + y)
            case "+=":
                y += x
                return self.act(y)
            case "+= to the input, which is used again":
                z = x * 2
                z += y
                return self.act(z) + z
            case "two convolutions":
                return self.act(y + self.second(x))
            case "to itself":
                return self.act(y + y)
            case "number":
                return self.act(y + 1.0)
            case "used twice":
                return self.act(y) + y
            case "input changed in between":
                z = x * 2
                y = self.first(z)
                z += 1
                return self.act(y + z)
            case "layer called twice":
                return self.act(self.first(y) + x)
            case _:
                return self.act(y - x)


KINDS = [
    "+", "+ swapped", "+=", "+= to the input, which is used again", "two convolutions", "to itself", "number", "used twice",
    "layer called twice", "input changed in between", "difference",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_additions_are_computed_correctly(kind):
    torch.manual_seed(0)
    model = tiny_model(backbone="resnet18").float()
    block = Block(kind).requires_grad_(False)
    model.model.encoder.backbone = nn.Sequential(nn.Conv2d(3, 4, 1).requires_grad_(False), block, nn.Conv2d(4, 512, 1))
    assert_same_regions(model, optimize_for_inference(model), torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("trainable", [11, 10, 9], ids=["after the convolution", "after the batch norm", "after the activation"])
def test_cached_features_can_end_between_layers_that_are_fused(trainable):
    model = captioner_with_statistics(backbone="resnet18", trainable_blocks=trainable).float()
    fast = optimize_for_inference(model)
    pictures = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = fast.model.encoder.features(pictures)
        assert_close(features, model.model.encoder.features(pictures), rtol=1e-4, atol=1e-4)
    assert_same_regions(model, fast, None, backbone_features=features)


def test_a_fused_encoder_gives_gradients_and_follows_changes_of_device_and_data_type():
    model = captioner_with_statistics(backbone="mobilenet_v2").float()
    fast, picture = optimize_for_inference(model), torch.randn(1, 3, 64, 64)
    assert_same_regions(model, fast, picture)  # the weights are packed now
    gradients = []
    for m in (model, fast):
        given = picture.clone().requires_grad_()
        m.model.encoder(given).last_hidden_state.square().sum().backward()
        gradients.append(given.grad)
    assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-3 * float(gradients[0].abs().max()))
    loaded = copy.deepcopy(fast)
    loaded.model.encoder = pickle.loads(pickle.dumps(fast.model.encoder))
    assert_same_regions(model, loaded, picture)
    rounded = copy.deepcopy(fast).bfloat16().float()
    assert_same_regions(copy.deepcopy(model).bfloat16().float(), rounded, picture, tolerance=5e-2)
    assert_close(*(rounded.model.encoder(given).last_hidden_state[0] for given in (picture, picture.repeat(2, 1, 1, 1))))
    assert_same_regions(model, fast.double(), picture)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_regions(model.float(), fast.float(), picture, tolerance=5e-2)


def test_without_fused_operations_the_regions_are_the_same(monkeypatch):
    monkeypatch.setattr(convolutions, "has_fused_convolutions", lambda dtype: False)
    model = captioner_with_statistics(backbone="efficientnet_lite0").float()
    assert_same_regions(model, optimize_for_inference(model), torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("missing", ["_reorder_convolution_weight", "_convolution_pointwise"])
def test_versions_of_torch_without_the_operations_are_noticed(missing, monkeypatch):
    known = {name: getattr(torch.ops.mkldnn, name) for name in ("_reorder_convolution_weight", "_convolution_pointwise")}
    known.pop(missing)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**known))
    assert not has_fused_convolutions.__wrapped__(torch.float32)


VARIANTS = [
    *itertools.product(["none", "score", "channel", "history"], [True, False], [True, False], [torch.float64]),
    *itertools.product(["none", "score"], [True], [True], [torch.float32]),
]


@pytest.mark.parametrize(("kind", "deep_output", "gate", "dtype"), VARIANTS)
def test_captions_scores_and_attentions_are_the_same(kind, deep_output, gate, dtype):
    torch.manual_seed(0)
    tolerance = 1e-4 if dtype == torch.float64 else 2e-3  # the weights are large
    model = tiny_model(word_attention=kind, deep_output=deep_output, gate=gate).to(dtype)
    fast = optimize_for_inference(model)
    assert isinstance(fast.model.decoder, InferenceDecoder) == (kind in ("none", "score"))
    pictures = torch.randn(2, 3, 64, 64)
    wanted = {"max_new_tokens": 7, "return_dict_in_generate": True, "output_scores": True, "output_attentions": True}
    for beams in (1, 3):
        found, expected = (m.generate(pictures, num_beams=beams, **wanted) for m in (fast, model))
        assert torch.equal(found.sequences, expected.sequences)
        assert_close(found.scores, expected.scores, rtol=tolerance, atol=tolerance)
        assert_close(found.cross_attentions, expected.cross_attentions, rtol=tolerance, atol=tolerance / 10)
    with torch.no_grad():
        labels = torch.randint(4, 9, (2, 5))
        assert_close(fast(pictures, labels=labels).loss, model(pictures, labels=labels).loss, rtol=tolerance, atol=tolerance / 10)


def test_large_vocabularies_keep_the_decoder(monkeypatch):
    monkeypatch.setattr(optimize, "MAX_TABLE_ELEMENTS", 100)
    assert not isinstance(optimize_for_inference(tiny_model(word_attention="score")).model.decoder, InferenceDecoder)


def test_optimized_model_is_not_saved(tmp_path):
    with pytest.raises(RuntimeError, match="cannot be saved"):
        optimize_for_inference(tiny_model()).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_log_says_what_was_done(caplog):
    with caplog.at_level(logging.INFO, logger="hf_attncap.optimize"):
        optimize_for_inference(tiny_model(backbone="resnet18", word_attention="score"))
    assert "20 batch norms folded" in caplog.text and "word products in a table" in caplog.text and "not compiled" in caplog.text


def test_compiling_needs_optimizing():
    with pytest.raises(ValueError, match="leave one of them out"):
        Captioner.from_pretrained(optimize=False, compile=True)
    with pytest.raises(ValueError, match="must be 'auto' or False"):
        Captioner.from_pretrained(optimize=True)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_captions():
    torch.manual_seed(0)
    model, pictures = tiny_model().float(), torch.randn(2, 3, 64, 64)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(optimize_for_inference(model, compile=True).generate(pictures), model.generate(pictures))
    assert not torch._dynamo.utils.counters["graph_break"]
