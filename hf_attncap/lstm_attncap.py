"""The LSTM cell of the decoder. In training, the gradient of each of its weights is one product over all steps of a caption."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class LSTMCell(nn.LSTMCell):
    """`nn.LSTMCell`, and with `gradients` the same with less work in the backward pass."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor], gradients: "WeightGradients | None" = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return h and c (R, S) after the input x (R, E + C), from `state`, h and c before it."""
        if gradients is None:
            return super().forward(x, state)
        h, c = state
        gates = gradients.linear(x, self.weight_ih, self.bias_ih) + gradients.linear(h, self.weight_hh, self.bias_hh)  # (R, 4S)
        i, f, g, o = gates.chunk(4, dim=-1)  # (R, S) each
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # (R, S)
        return torch.sigmoid(o) * torch.tanh(c), c


class WeightGradients:
    """Linear layers for the steps of a loop. The gradient of a weight is one product after the loop, not a sum over the steps."""

    def __init__(self):
        self._weights: dict[int, tuple[torch.Tensor, torch.Tensor, list]] = {}

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b (R, out) for x (R, in), W (out, in) and b (out)."""
        if id(weight) not in self._weights:
            uses: list[tuple[torch.Tensor, torch.Tensor]] = []
            device = weight.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
            self._weights[id(weight)] = weight, _ProductOverSteps.apply(weight.to(dtype), uses), uses  # type: ignore[assignment]
        _, weight, uses = self._weights[id(weight)]
        return _LinearStep.apply(x.to(weight.dtype), weight, bias.to(weight.dtype), uses)  # type: ignore[return-value]


class _LinearStep(torch.autograd.Function):
    """A linear layer that leaves the gradient of its weight to `_ProductOverSteps`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, uses: list) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.uses = uses
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            ctx.uses.append((x, gradient))
        return gradient @ weight, None, gradient.sum(dim=0), None


class _ProductOverSteps(torch.autograd.Function):
    """The weight itself; its backward runs after that of all steps."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, uses: list) -> torch.Tensor:
        ctx.uses = uses
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not ctx.uses:
            return None, None
        inputs, gradients = (torch.cat(parts) for parts in zip(*ctx.uses))  # (all rows, in), (all rows, out)
        ctx.uses.clear()
        return gradients.T @ inputs, None


__all__ = ["LSTMCell", "WeightGradients"]
