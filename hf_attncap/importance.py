"""Occlusion importance: how much a word's log-probability falls when a region is hidden from the decoder.

Attention shows where the decoder looked; importance shows which regions the word depends on. It decodes each caption once per
region. Zeiler and Fergus (2014), "Visualizing and understanding convolutional networks", hide patches of the image in the same way.
"""

from typing import Any

import torch

from .modeling_attncap import AttnCapForConditionalGeneration
from .occlusion import hidden_squares

MAX_ELEMENTS = 2**25  # in the largest tensors of one forward pass, which bounds its memory


@torch.no_grad()
def word_importance(
    model: AttnCapForConditionalGeneration, sequences: torch.Tensor, encoder_outputs: Any, window: int | None = None
) -> torch.Tensor:
    """How much each token of a caption depends on each region of its image.

    For each region, the square of regions around it is replaced by the mean of all other regions, or by zeros if it covers all of
    them. The importance is the fall of each token's log-probability, given the tokens before it.

    Args:
        model: in evaluation mode.
        sequences: (R, T + 1) as `generate` returns them, start token first, without left padding. R is a multiple of the number of
            images B; the captions of an image are adjacent.
        encoder_outputs: the encoder's output for the B images, with `grid_shape` (H, W).
        window: side of the hidden square, an odd number of regions. Default: 3, or 1 on a grid with fewer than 5 rows or columns.

    Returns:
        (R, T, H, W) float32, in nats; map t belongs to token t + 1. Negative if hiding the region makes the token more likely.
        Ignore the maps after the end token.

    Raises:
        ValueError: `window` is even or below 1.
    """
    regions, grid = encoder_outputs.last_hidden_state, encoder_outputs.grid_shape  # (B, N, C)
    captions = sequences.unflatten(0, (regions.shape[0], -1))  # (B, k, T + 1)
    hidden = torch.from_numpy(hidden_squares(grid, window)).to(regions.device)  # (N, N)
    hidden = torch.cat([torch.zeros_like(hidden[:1]), hidden])  # (1 + N, N), first nothing hidden
    found = []
    variants_of_all = torch.arange(len(regions) * len(hidden), device=regions.device)
    for variants in variants_of_all.split(variants_per_pass(model, regions, captions)):
        image, place = variants // len(hidden), variants % len(hidden)  # (v), (v)
        without = hide(regions[image], hidden[place])  # (v, N, C)
        found.append(token_log_probabilities(model, without, captions[image]))  # (v, k, T)
    log_p = torch.cat(found).unflatten(0, (len(regions), -1))  # (B, 1 + N, k, T)
    falls = (log_p[:, :1] - log_p[:, 1:]).permute(0, 2, 3, 1)  # (B, k, T, N)
    return falls.flatten(0, 1).unflatten(-1, grid).float()  # (R, T, H, W)


def hide(regions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """(v, N, C): regions (v, N, C) with the `hidden` ones (v, N) replaced by the mean of the others, or by zeros."""
    seen = (~hidden).float()  # (v, N)
    mean = (seen[:, None] @ regions.float()) / seen.sum(dim=1).clamp(min=1)[:, None, None]  # (v, 1, C)
    return torch.where(hidden[..., None], mean.to(regions.dtype), regions)


def token_log_probabilities(model: AttnCapForConditionalGeneration, regions: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """(v, k, T): log-probabilities of the tokens of k captions (v, k, T + 1) for each of v sets of regions (v, N, C)."""
    ids = captions.flatten(0, 1)  # (v * k, T + 1)
    logits = model(encoder_outputs=(regions,), decoder_input_ids=ids[:, :-1], use_cache=False, output_attentions=False).logits
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (v * k, T, V)
    chosen = scores.gather(-1, ids[:, 1:, None]).squeeze(-1) - scores.logsumexp(dim=-1)  # (v * k, T)
    return chosen.unflatten(0, captions.shape[:2])


def variants_per_pass(model: AttnCapForConditionalGeneration, regions: torch.Tensor, captions: torch.Tensor) -> int:
    """The number of images, with or without a hidden square, that fit in one forward pass."""
    (_, count, channels), (_, rows, length) = regions.shape, captions.shape
    of_a_caption = length * model.config.vocab_size + count * model.config.attention_dim
    return max(MAX_ELEMENTS // (count * channels + rows * of_a_caption), 1)
