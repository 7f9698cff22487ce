"""The decoder unrolled for training: no step behind the end of a caption, and one product for each weight's gradient.

`AttnCapDecoder.forward` gives the same states in the plain way, and serves everywhere else. Letters as there.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

# h and c (R, S), z (R, C), alpha (R, N), and beta or None.
StepResult = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


class PackedStates(NamedTuple):
    """What the decoder has for the P words that there are, of all captions.

    Attributes:
        hidden: what the output layer sees, (P, E), or (P, S) without deep output.
        alpha: region attention, (P, N).
        rows, steps: caption and place in it of each word, (P).
    """

    hidden: torch.Tensor
    alpha: torch.Tensor
    rows: torch.Tensor
    steps: torch.Tensor


class _Shared(torch.autograd.Function):
    """A weight and its bias for many steps: their gradients are one product over all steps instead of a sum of small ones."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, bias: torch.Tensor | None, uses: list) -> torch.Tensor:
        ctx.uses, ctx.has_bias = uses, bias is not None
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not ctx.uses:
            return None, None, None
        inputs, gradients = (torch.cat(parts) for parts in zip(*ctx.uses))  # (all rows, in), (all rows, out)
        ctx.uses.clear()
        return gradients.T @ inputs, gradients.sum(dim=0) if ctx.has_bias else None, None


class _Use(torch.autograd.Function):
    """One step's product with a shared weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, uses: list) -> torch.Tensor:
        x = x.to(weight.dtype)
        ctx.save_for_backward(x, weight)
        ctx.uses = uses
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        ctx.uses.append((x, gradients[0]))
        return gradients[0] @ weight, None, None, None


class SharedLinear:
    """x -> x W^T + b for the steps of a loop; W (out, in) and b (out) must not change between them."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        kind = weight.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.uses: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.weight: Any = _Shared.apply(weight, bias, self.uses)
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _Use.apply(x, self.weight, self.bias, self.uses)  # type: ignore[return-value]


def is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer does nothing but its own product, so that `FusedStep` may read its weights instead.

    Adapters and parametrizations change the layer's class. Hooks, offloading and quantised weights act during the call.
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (
        type(layer) in (nn.Linear, nn.LSTMCell)
        and "forward" not in vars(layer)  # accelerate's hooks put one there
        and not any(hooks)
        and not _has_any_global_hook()
        and all(type(weight) is nn.Parameter for weight in layer.parameters())
    )


class FusedStep:
    """`AttnCapDecoder.step` for plain layers: one product with the state, and one for each weight's gradient over all steps."""

    def __init__(self, decoder: Any):
        query, gate, cell = decoder.attention.query_proj, decoder.gate, decoder.cell
        linears = [query] if gate is None else [query, gate]
        weights = [*(linear.weight for linear in linears), cell.weight_hh]
        biases = [*(linear.bias for linear in linears), cell.bias_hh + cell.bias_ih]
        self.attention = decoder.attention
        self.from_state = SharedLinear(torch.cat(weights), torch.cat(biases))
        self.from_input = SharedLinear(cell.weight_ih)
        self.sizes = [len(weight) for weight in weights]  # A, C where there is a gate, 4S

    def __call__(self, h: torch.Tensor, c: torch.Tensor, keys: torch.Tensor, regions: torch.Tensor, *words: Any) -> StepResult:
        q, *gate, gates = self.from_state(h).split(self.sizes, dim=-1)  # (R, A), (R, C), (R, 4S)
        z, alpha, x, beta = self.attention(q, keys, regions, *words)  # (R, C), (R, N), (R, E)
        if gate:
            z = torch.sigmoid(gate[0]) * z  # (R, C)
        gates = gates + self.from_input(torch.cat([x, z], dim=-1))  # (R, 4S)
        i, f, g, o = gates.chunk(4, dim=-1)  # (R, S) each
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # (R, S)
        return torch.sigmoid(o) * torch.tanh(c), c, z, alpha, beta


def unroll_packed(decoder: Any, input_ids: torch.Tensor, regions: torch.Tensor, lengths: torch.Tensor) -> PackedStates:
    """Unroll a decoder over captions of different lengths, without a cache.

    Images go by their longest caption, so that a step has the images that still need it: a slice. Of a caption that is shorter
    than its image's longest one, the steps behind its end are computed and dropped.

    Args:
        decoder: an `AttnCapDecoder`.
        input_ids: (R, T), the start token first.
        regions: a, (B, N, C); R is a multiple of B.
        lengths: steps that each caption needs, (R), 0 to T.
    """
    attend, images = decoder.attention, regions.shape[0]
    per_image = input_ids.shape[0] // images
    longest = lengths.unflatten(0, (images, per_image)).amax(dim=1)  # (B)
    order = longest.argsort(descending=True, stable=True)  # (B)
    rows = (order[:, None] * per_image + torch.arange(per_image, device=order.device)).flatten()  # (R)
    still = (longest[:, None] > torch.arange(input_ids.shape[1], device=order.device)).sum(dim=0).tolist()  # T

    regions, lengths = regions[order], lengths[rows]  # (B, N, C), (R)
    e = decoder.embed_tokens(input_ids[rows])  # (R, T, E)
    u = attend.word_proj(e) if attend.kind != "none" else None  # (R, T, A)
    h, c, keys = decoder.begin(regions, input_ids.shape[0])  # (R, S), (R, S), (B, N, A)
    memory = (e, u) if attend.kind == "history" else (None, None)  # (R, T, .)
    sequential = [attend.query_proj, decoder.cell, *([] if decoder.gate is None else [decoder.gate])]
    step = FusedStep(decoder) if all(map(is_plain, sequential)) else decoder.step
    e_t: Any = e.unbind(1)  # T of (R, E)
    u_t: Any = None if u is None else u.unbind(1)  # T of (R, A)
    states, glimpses, alphas = [], [], []
    for t, count in enumerate(still):
        if not count:
            break
        n = count * per_image  # the captions of the images that have a word here
        if n < h.shape[0]:
            h, c, keys, regions = h[:n], c[:n], keys[:count], regions[:count]
        u_now = None if u_t is None else u_t[t][:n]  # (n, A)
        so_far = [None if x is None else x[:n, : t + 1] for x in memory]  # (n, t + 1, .)
        h, c, z, alpha, _ = step(h, c, keys, regions, e_t[t][:n], u_now, *so_far)  # (n, S), (n, S), (n, C), (n, N)
        states.append(h)
        glimpses.append(z)
        alphas.append(alpha)

    taken = torch.cat([torch.arange(len(h), device=order.device) for h in states])  # place among `rows` of each computed word
    steps = torch.cat([torch.full((len(h),), t, device=order.device) for t, h in enumerate(states)])
    wanted = (steps < lengths[taken]).nonzero().squeeze(-1)  # (P)
    taken, steps = taken[wanted], steps[wanted]  # (P), (P)
    hidden = torch.cat(states)[wanted]  # (P, S)
    if decoder.deep_output:
        hidden = decoder.deepen(e[taken, steps], hidden, torch.cat(glimpses)[wanted])  # (P, E)
    return PackedStates(hidden, torch.cat(alphas)[wanted], rows[taken], steps)


__all__ = ["PackedStates", "StepResult", "unroll_packed"]
