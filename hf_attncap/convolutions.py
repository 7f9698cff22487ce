"""Makes the convolutions of an encoder faster for inference: batch norm, residual and activation become a part of them."""

import operator
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import StochasticDepth

from .backbone_attncap import SameConv2d
from .encoder_attncap import GridEncoder

# The activations that oneDNN computes in a convolution, with their names there and their parameters.
ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}


class FusedConvolution(nn.Module):
    """A convolution, the addition of a residual and an activation, which oneDNN computes in one operation.

    A second copy of the weights is kept in the layout that oneDNN prefers for one image. Where oneDNN is not used, on other devices
    and for gradients, the layers are called one by one.
    """

    def __init__(self, convolution: nn.Conv2d, activation: nn.Module):
        super().__init__()
        self.convolution, self.activation = convolution, activation
        self._packed: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The weights of the convolution."""
        return self.convolution.weight

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        layer, (name, parameters) = self.convolution, ACTIVATIONS[type(self.activation)]
        if not _is_supported(x):
            out = layer(x)  # (B, D, h, w)
            return self.activation(out if residual is None else out + residual)
        x = x.contiguous(memory_format=torch.channels_last)
        pad, kept = layer.symmetric_padding(x) if isinstance(layer, SameConv2d) else (layer.padding, None)
        window = pad, layer.stride, layer.dilation, layer.groups
        weight = layer.weight
        if len(x) == 1:
            if self._packed is None or self._packed.dtype != x.dtype:
                self._packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *window, x.shape)
            weight = self._packed
        call, activation = torch.ops.mkldnn._convolution_pointwise, (name, parameters, "")
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
            activation = (None, [], None) if name == "none" else activation
            return call.binary(x, residual, weight, layer.bias, *window, "add", 1.0, *activation)  # (B, D, h, w)
        out = call(x, weight, layer.bias, *window, *activation)
        return out if kept is None else out[kept]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # its layout cannot be pickled


def _is_supported(x: torch.Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _computes_bfloat16()))
        and not x.requires_grad
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


@cache
def _computes_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def has_fused_convolutions() -> bool:
    """Whether torch has oneDNN's fused operations, which are not part of its public interface, for this processor."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")):
        return False
    layer, x = nn.Conv2d(1, 1, 1).requires_grad_(False), torch.ones(1, 1, 2, 2)
    try:
        return torch.allclose(FusedConvolution(layer, nn.ReLU())(x), layer(x).relu())
    except (AttributeError, RuntimeError, TypeError):  # a version of torch without them, or with other arguments
        return False


class _Tracer(fx.Tracer):
    """Traces into all modules that have children, so that each layer is a node of its own in the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children())


def _trace(module: nn.Module) -> fx.Graph | None:
    """The graph of the layers of a module, or None if fx cannot trace it."""
    try:
        return _Tracer().trace(module)
    except Exception:  # fx raises many kinds for control flow that depends on tensors
        return None


def fold_batch_norm(backbone: nn.Module) -> int:
    """Fold batch norms into the convolutions whose outputs only they use, in place; return the number of folded batch norms.

    A backbone that fx cannot trace is not changed.
    """
    graph, folded = _trace(backbone), 0
    if graph is None:
        return 0
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
            folded += 1
    return folded


def fuse_activations(encoder: GridEncoder) -> int:
    """Replace the encoder's convolutions by `FusedConvolution`s, in place; return their number.

    Blocks become graphs of their layers. Those that fx cannot trace are not changed.
    """
    names = {module: name for name, module in encoder.backbone.named_modules()}
    blocks, fused = encoder.blocks(), 0
    for block in blocks:
        graph = _trace(block) if list(block.children()) else None
        if graph is not None:
            replaced = fx.GraphModule(block, graph)
            fused += _fuse_graph(replaced)
            encoder.backbone.set_submodule(names[block], replaced)
    # Blocks that are layers. A fused layer must not cross the end of the frozen blocks, whose output can be cached.
    for part in (blocks[: encoder.frozen_blocks], blocks[encoder.frozen_blocks :]):
        for number, layer in enumerate(part):
            if _is_fusible(layer):
                after = next((block for block in part[number + 1 :] if type(block) is not nn.Identity), None)
                activation = after if type(after) in ACTIVATIONS else nn.Identity()
                encoder.backbone.set_submodule(names[layer], FusedConvolution(layer, activation))
                if activation is after:
                    encoder.backbone.set_submodule(names[activation], nn.Identity())
                fused += 1
    encoder.windows = FusedConvolution(encoder.windows, nn.Identity())  # type: ignore[assignment]
    return fused + 1


def _fuse_graph(block: fx.GraphModule) -> int:
    """Replace the convolutions in the graph of a block by `FusedConvolution`s; return their number."""
    modules, fused = dict(block.named_modules()), 0
    calls = [node for node in block.graph.nodes if node.op == "call_module"]
    for node in calls:
        if type(modules[node.target]) in (nn.Identity, nn.Dropout, StochasticDepth):  # these do nothing in evaluation mode
            _bypass(node)
    for node in calls:
        layer = modules[node.target]
        if not _is_fusible(layer) or sum(node.target == other.target for other in calls) > 1:
            continue
        after = _only_user(node)
        residual = None if after is None or isinstance(layer, SameConv2d) else _residual(after, node)
        if residual is not None:
            node.args = (*node.args, residual)
            after.append(node)  # the residual may be computed after the input of the convolution
            after.replace_all_uses_with(node)
            block.graph.erase_node(after)
            after = _only_user(node)
        known = ACTIVATIONS if residual is None else (nn.ReLU,)
        is_activation = after is not None and after.op == "call_module" and type(modules[after.target]) in known
        block.set_submodule(node.target, FusedConvolution(layer, modules[after.target] if is_activation else nn.Identity()))
        if is_activation:
            _bypass(after)
        fused += 1
    block.recompile()
    return fused


def _residual(addition: fx.Node, convolution: fx.Node) -> fx.Node | None:
    """What a node adds to the output of a convolution, with `+` or `+=`; None if it does something else."""
    if addition.target is operator.add:
        others = [value for value in addition.args if value is not convolution]
    elif addition.target is operator.iadd:
        others = addition.args[1:] if addition.args[0] is convolution else ()
    else:
        others = ()
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _bypass(node: fx.Node) -> None:
    """Remove a node with one input from its graph."""
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)


def _is_fusible(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


__all__ = ["fold_batch_norm", "fuse_activations", "has_fused_convolutions"]
