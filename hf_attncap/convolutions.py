"""Fuses batch norms, residuals and activations into the convolutions of an encoder, for faster inference."""

import operator
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import StochasticDepth

from .backbone_attncap import SameConv2d
from .encoder_attncap import GridEncoder
from .onednn import PackingLayer, is_available, is_cpu_inference

# Activations that oneDNN can fuse into a convolution, with oneDNN's names and parameters.
ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}
IDENTITIES = (nn.Identity, nn.Dropout, StochasticDepth)  # layers that do nothing in evaluation mode


class FusedConvolution(PackingLayer):
    """A convolution, the addition of a residual and an activation. On x86 CPUs, oneDNN computes them in one operation.

    For single images it keeps a second copy of the weights, packed for the last image size. The layers are called one by one on
    other devices, in other data types than float32 and bfloat16, under autocast and `torch.compile`, and if the input needs
    gradients.
    """

    def __init__(self, convolution: nn.Conv2d, activation: nn.Module):
        super().__init__()
        self.convolution, self.activation = convolution, activation
        # Copied, because `nn.Module` looks up its layers slowly.
        self._window = convolution.padding, convolution.stride, convolution.dilation, convolution.groups
        self._has_same_padding = isinstance(convolution, SameConv2d)
        self._activation = ACTIVATIONS[type(activation)]

    @property
    def weight(self) -> torch.Tensor:
        """The weights of the convolution."""
        return self.convolution.weight

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        layer: Any = self.convolution
        window, kept, (name, parameters) = self._window, None, self._activation
        if not (is_cpu_inference(x) and has_fused_convolutions(x.dtype)):
            out = layer(x)  # (B, D, h, w)
            return self.activation(out if residual is None else out + residual)
        x = x.contiguous(memory_format=torch.channels_last)
        if self._has_same_padding:
            pad, kept = layer.symmetric_padding(x)
            window = pad, *window[1:]
        weight = layer.weight
        if len(x) == 1:
            packed = self._packed  # another thread may replace it
            if packed is None or packed[0] != x.shape:
                # `_packed` is the shape of the input and the weights packed for it.
                packed = self._packed = x.shape, torch.ops.mkldnn._reorder_convolution_weight(weight, *window, x.shape)
            weight = packed[1]
        call = torch.ops.mkldnn._convolution_pointwise
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
            activation = (None, [], None) if name == "none" else (name, parameters, "")
            return call.binary(x, residual, weight, layer.bias, *window, "add", 1.0, *activation)  # (B, D, h, w)
        out = call.default(x, weight, layer.bias, *window, name, parameters, "")  # (B, D, h, w)
        return out if kept is None else out[kept]


@cache
def has_fused_convolutions(dtype: torch.dtype) -> bool:
    """Whether torch can run oneDNN's fused convolutions on this processor in this data type.

    They are private operations of torch, so this function tries them.
    """
    if not is_available():
        return False
    try:
        if dtype != torch.float32 and not (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            return False
        x, weight = (torch.ones(1, 1, side, side, dtype=dtype, device="cpu") for side in (2, 1))
        window = (0, 0), (1, 1), (1, 1), 1
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *window, x.shape)
        out = torch.ops.mkldnn._convolution_pointwise.binary(x, x, packed, None, *window, "add", 1.0, "relu", [], "")
        return bool((out == 2).all())
    except (AttributeError, RuntimeError, TypeError):  # a version of torch without these operations, or with other arguments
        return False


def fuse_convolutions(encoder: GridEncoder) -> int:
    """Replace the encoder's convolutions by `FusedConvolution`s, in place.

    Each block becomes an fx graph of its layers. Blocks that fx cannot trace are not changed.

    Returns:
        The number of batch norms that became part of a convolution.
    """
    blocks: list[Any] = encoder.blocks()
    backbone, folded = encoder.backbone, 0
    names = {module: name for name, module in backbone.named_modules()}
    for block in blocks:
        graph = _trace(block) if list(block.children()) else None
        if graph is not None:
            replaced = fx.GraphModule(block, graph)
            folded += _fuse_graph(replaced)
            backbone.set_submodule(names[block], replaced)
    # The other blocks are single layers. Do not fuse across the end of the frozen blocks, because their output can be cached.
    for part in (blocks[: encoder.frozen_blocks], blocks[encoder.frozen_blocks :]):
        for number, layer in enumerate(part):
            if not _is_fusible(layer):
                continue
            after = part[number + 1 : number + 3]
            norm = after.pop(0) if after and _is_foldable(after[0]) else None
            activation = after[0] if after and type(after[0]) in ACTIVATIONS else nn.Identity()
            convolution = layer if norm is None else fuse_conv_bn_eval(layer, norm)
            backbone.set_submodule(names[layer], FusedConvolution(convolution, activation))
            for module in (norm, activation):
                if module in names:
                    backbone.set_submodule(names[module], nn.Identity())
            folded += norm is not None
    encoder.set_submodule("windows", FusedConvolution(encoder.windows, nn.Identity()))
    return folded


class _Tracer(fx.Tracer):
    """Traces into all modules that have children, so that each layer is a node of its own in the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children())


def _trace(block: nn.Module) -> fx.Graph | None:
    """The graph of the layers of a block, or None if fx cannot trace it."""
    try:
        return _Tracer().trace(block)
    except Exception:  # fx raises many kinds for control flow that depends on tensors
        return None


def _fuse_graph(block: fx.GraphModule) -> int:
    """Replace the convolutions in the graph of a block by `FusedConvolution`s; return the number of folded batch norms."""
    modules: dict[Any, Any] = dict(block.named_modules())
    folded = 0
    calls = [node for node in block.graph.nodes if node.op == "call_module"]
    for node in calls:
        if type(modules[node.target]) in IDENTITIES:
            _bypass(node)
    for node in calls:
        layer = modules[node.target]
        if not _is_fusible(layer) or sum(node.target == other.target for other in calls) > 1:
            continue
        after, residual, activation = _only_user(node), None, nn.Identity()
        if after is not None and _is_foldable(modules.get(after.target)):
            layer = fuse_conv_bn_eval(layer, modules[after.target])
            _bypass(after)
            folded += 1
            after = _only_user(node)
        # The fused convolution runs at the place of the addition. Nothing between may change its input.
        if after is not None and not isinstance(layer, SameConv2d) and _only_user(node.args[0]) is node:
            residual = _residual(after, node)
        if after is not None and residual is not None:
            node.args = (*node.args, residual)
            after.append(node)
            _replace(after, node)
            after = _only_user(node)
        fusible = ACTIVATIONS if residual is None else (nn.ReLU,)
        if after is not None and type(modules.get(after.target)) in fusible:
            activation = modules[after.target]
            _bypass(after)
        block.set_submodule(node.target, FusedConvolution(layer, activation))
    block.delete_all_unused_submodules()
    block.recompile()
    return folded


def _is_fusible(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _is_foldable(layer: Any) -> bool:
    return isinstance(layer, nn.BatchNorm2d) and layer.track_running_stats


def _only_user(node: fx.Node) -> Any:
    """The node that uses the output of this one, if it is the only one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _residual(addition: fx.Node, convolution: fx.Node) -> fx.Node | None:
    """What a node adds to the output of a convolution, with `+` or `+=`; None if it does something else."""
    if addition.target is operator.add:
        others = [value for value in addition.args if value is not convolution]
    elif addition.target is operator.iadd:
        others = addition.args[1:] if addition.args[0] is convolution else ()
    else:
        others = ()
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _bypass(node: fx.Node) -> None:
    """Remove a node from its graph. Its input takes its place."""
    _replace(node, node.args[0])


def _replace(node: fx.Node, by: Any) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


__all__ = ["fuse_convolutions", "has_fused_convolutions"]
