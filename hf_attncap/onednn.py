"""Layers that keep a copy of their weights in the packed layout of oneDNN, for faster inference on x86 CPUs."""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class PackingLayer(nn.Module):
    """A layer with a second copy of its weights in oneDNN's layout.

    This copy is not pickled, and is dropped when the layer changes its device or data type.
    """

    def __init__(self):
        super().__init__()
        self._packed: Any = None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._packed = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}


class PackedLinear(PackingLayer):
    """A linear layer for inference. In bfloat16 on x86 CPUs it packs its weights, which makes products with few rows faster.

    Args:
        weight: (out, in).
        bias: (out), or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)  # may be shared
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b for x (..., in). `added` (R, out) replaces b; x must then be (R, in)."""
        if not (x.dtype == torch.bfloat16 and is_cpu_inference(x) and has_packed_products()):
            return F.linear(x, self.weight, self.bias) if added is None else torch.addmm(added, x, self.weight.T)
        packed = self._packed  # another thread may replace it
        if packed is None:
            packed = self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous())
        call = torch.ops.mkldnn._linear_pointwise
        if added is not None:
            return call.binary(x, added, packed, None, "add")  # (R, out)
        return call.default(x, packed, self.bias, "none", [], "")  # (..., out)


def is_cpu_inference(x: torch.Tensor) -> bool:
    """Whether oneDNN's operations can take the place of torch's for this input."""
    return (
        not torch.compiler.is_compiling()  # first, because the compiler cannot trace the others
        and x.is_cpu
        and not x.requires_grad
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def has_packed_products() -> bool:
    """Whether torch can multiply with packed weights in bfloat16 on this processor. Packing was not faster in float32.

    The operations are private to torch, so this function tries them.
    """
    try:
        if not (is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            return False
        x = torch.ones(1, 2, dtype=torch.bfloat16, device="cpu")
        packed = torch.ops.mkldnn._reorder_linear_weight(x)
        out = torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")  # (1, 1)
        return bool((torch.ops.mkldnn._linear_pointwise.binary(x, out, packed, None, "add") == 4).all())
    except (AttributeError, RuntimeError, TypeError):  # a version of torch without these operations, or with other arguments
        return False


def is_available() -> bool:
    """Whether torch has oneDNN and this is an x86 processor with AVX."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


__all__ = ["PackedLinear", "PackingLayer", "has_packed_products", "is_available", "is_cpu_inference"]
