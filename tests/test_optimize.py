"""A model optimized for inference gives the same captions, and the original model does not change."""

import copy
import logging

import pytest
import torch
from reference import tiny_model
from torch import nn
from torch.testing import assert_close

from hf_attncap import Captioner, optimize
from hf_attncap.optimize import InferenceDecoder, optimize_for_inference

# The number of batch norms that remain after folding, by backbone. In DenseNet some do not follow a convolution.
BACKBONES = {
    "resnet18": 0,
    "mobilenet_v2": 0,
    "efficientnet_lite0": 0,
    "shufflenet_v2_x0_5": 0,
    "regnet_y_400mf": 0,
    "googlenet": 0,
    "squeezenet1_1": 0,
    "vgg11_bn": 0,
    "densenet121": 62,
    "convnext_tiny": 0,
}


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize(("backbone", "left"), BACKBONES.items(), ids=BACKBONES)
def test_regions_are_the_same_and_batch_norm_is_folded(backbone, left):
    torch.manual_seed(0)
    model = tiny_model(backbone=backbone).eval()
    for norm in norms(model):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2.0)
        nn.init.normal_(norm.weight, 1.0, 0.1)
        nn.init.normal_(norm.bias, std=0.1)
    before, pictures = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 64, 64)
    fast = optimize_for_inference(model)
    with torch.no_grad():
        regions, faster = (m.model.encoder(pictures).last_hidden_state for m in (model, fast))
    assert_close(faster, regions, rtol=1e-3, atol=1e-4 * float(regions.abs().max()))
    assert len(norms(fast)) == left
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "the model itself changed"


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("deep_output", [True, False], ids=["deep output", "state only"])
@pytest.mark.parametrize("kind", ["none", "score", "channel", "history"])
def test_captions_scores_and_attentions_are_the_same(kind, deep_output, gate):
    torch.manual_seed(0)
    model = tiny_model(word_attention=kind, deep_output=deep_output, gate=gate).eval()
    fast = optimize_for_inference(model)
    assert isinstance(fast.model.decoder, InferenceDecoder) == (kind in ("none", "score"))
    pictures = torch.randn(2, 3, 64, 64)
    wanted = {"max_new_tokens": 7, "return_dict_in_generate": True, "output_scores": True, "output_attentions": True}
    for beams in (1, 3):
        found, expected = (m.generate(pictures, num_beams=beams, **wanted) for m in (fast, model))
        assert torch.equal(found.sequences, expected.sequences)
        assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
        assert_close(found.cross_attentions, expected.cross_attentions, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        labels = torch.randint(4, 9, (2, 5))
        assert_close(fast(pictures, labels=labels).loss, model(pictures, labels=labels).loss, rtol=1e-4, atol=1e-5)


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
    model, pictures = tiny_model().eval(), torch.randn(2, 3, 64, 64)
    assert torch.equal(optimize_for_inference(model, compile=True).generate(pictures), model.generate(pictures))
