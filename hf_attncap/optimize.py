"""Makes a faster copy of a captioner for inference: batch norm folded into convolutions, and images in channels-last layout."""

import copy
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .modeling_attncap import AttnCapForConditionalGeneration


def optimize_for_inference(model: AttnCapForConditionalGeneration) -> AttnCapForConditionalGeneration:
    """A copy of a captioner whose encoder is faster. Captions are the same; the regions differ by rounding errors only.

    Batch norm is folded into the convolution before it, and the encoder's weights are stored in channels-last layout, which
    convolutions on CPUs and GPUs read faster. The copy is in evaluation mode. It can be neither trained nor saved.

    Args:
        model: is not changed.
    """
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    encoder: Any = fast.model.encoder
    _fold_batch_norm(encoder.backbone)
    encoder.to(memory_format=torch.channels_last)
    fast.save_pretrained = _refuse_saving
    return fast


def _refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError("This model was optimized for inference and cannot be saved: save the model that it was made of.")


class _Tracer(fx.Tracer):
    """Follows every module except single layers, so that a convolution and its batch norm become neighbours in the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children())


def _fold_batch_norm(backbone: nn.Module) -> None:
    """Replace each convolution whose only use is a batch norm by both in one, in place. A backbone that fx cannot trace stays."""
    try:
        graph = _Tracer().trace(backbone)
    except Exception:  # fx raises many kinds for control flow that depends on tensors
        return
    modules = dict(backbone.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    used_once = {name for name in modules if sum(node.target == name for node in calls) == 1}
    for node in calls:
        before = node.args[0] if node.args else None
        if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
            continue
        convolution: Any = modules[str(before.target)]
        norm: Any = modules[str(node.target)]
        foldable = isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats
        if foldable and {before.target, node.target} <= used_once:
            backbone.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            backbone.set_submodule(str(node.target), nn.Identity())


__all__ = ["optimize_for_inference"]
