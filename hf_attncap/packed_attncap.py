"""The decoder unrolled for training: no step behind the end of a caption, and one product for each weight's gradient.

The same states as `AttnCapDecoder.forward`, which is the plain way to them and serves everywhere else. Letters as there.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .decoder_attncap import AttnCapDecoder, lstm_step


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


def unroll_packed(decoder: AttnCapDecoder, input_ids: torch.Tensor, regions: torch.Tensor, lengths: torch.Tensor) -> PackedStates:
    """Unroll an `AttnCapDecoder` over captions of different lengths, without a cache.

    Images go by their longest caption, so that a step has the images that still need it: a slice. Of a caption that is shorter
    than its image's longest one, the steps behind its end are computed and dropped.

    Args:
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
    from_state, from_input, word_gates, sizes = _products(decoder, e)
    e_t: Any = e.unbind(1)  # T of (R, E)
    u_t: Any = None if u is None else u.unbind(1)  # T of (R, A)
    states, glimpses, alphas = [], [], []
    for t, count in enumerate(still):
        if not count:
            break
        n = count * per_image  # the captions of the images that have a word here
        if n < h.shape[0]:
            h, c, keys, regions = h[:n], c[:n], keys[:count], regions[:count]
        q, gate, gates = from_state(h).split(sizes, dim=-1)  # (n, A), (n, C or 0), (n, 4S)
        u_now = None if u_t is None else u_t[t][:n]  # (n, A)
        so_far = [None if x is None else x[:n, : t + 1] for x in memory]  # (n, t + 1, .)
        z, alpha, x, _ = attend(q, keys, regions, e_t[t][:n], u_now, *so_far)  # (n, C), (n, N), (n, E)
        if decoder.gate is not None:
            z = torch.sigmoid(gate) * z  # (n, C)
        seen = z if word_gates else torch.cat([x, z], dim=-1)  # (n, C) or (n, E + C)
        gates = gates + from_input(seen) + (word_gates[t][:n] if word_gates else 0)  # (n, 4S)
        h, c = lstm_step(gates, c)  # (n, S)
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


def _products(decoder: AttnCapDecoder, e: torch.Tensor) -> tuple[SharedLinear, SharedLinear, Any, list[int]]:
    """What the state is multiplied with, all in one; what the attended word and regions are; and the words' part, known at once.

    The sizes are those of what comes from the state: q (A), the gate (C, or 0) and its share of the LSTM's gates (4S).
    """
    cell = decoder.cell(e.shape[-1])
    query, gate = decoder.attention.query_proj, decoder.gate
    parts = [(query.weight, query.bias), *([(gate.weight, gate.bias)] if gate is not None else [])]
    parts.append((cell.state_in, cell.bias_state + cell.bias_in))
    from_state = SharedLinear(torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts]))
    sizes = [query.out_features, gate.out_features if gate is not None else 0, cell.state_in.shape[0]]
    if decoder.attention.kind in ("none", "score"):
        return from_state, SharedLinear(cell.region_in), F.linear(e, cell.word_in).unbind(1), sizes
    return from_state, SharedLinear(torch.cat([cell.word_in, cell.region_in], dim=1)), None, sizes


__all__ = ["PackedStates", "unroll_packed"]
