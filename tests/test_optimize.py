"""A model optimized for inference gives the same captions, and the model that it was made of does not change."""

import copy

import pytest
import torch
from reference import tiny_model
from torch import nn
from torch.testing import assert_close

from hf_attncap.optimize import optimize_for_inference

# Backbones whose batch norms follow convolutions, and how many are left where some do not.
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


def test_optimized_model_is_not_saved(tmp_path):
    with pytest.raises(RuntimeError, match="cannot be saved"):
        optimize_for_inference(tiny_model()).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
