"""Which regions a word depends on: how much its log-probability falls when they are hidden from the decoder.

Attention tells where the decoder looked. Importance tells what changes without a region, at the price of decoding each caption
once more per region. Zeiler and Fergus (2014), "Visualizing and understanding convolutional networks", hide patches of the
picture in the same way.
"""

from typing import Any

import torch

from .modeling_attncap import AttnCapForConditionalGeneration

WINDOW = 3  # regions: side of the square that is hidden
SMALL_GRID = 5  # regions: with a side below that, such a square would hide most of the picture
NUMBERS = 2**25  # in the largest tensors of one pass, which bounds its memory


@torch.no_grad()
def word_importance(
    model: AttnCapForConditionalGeneration, sequences: torch.Tensor, encoder_outputs: Any, window: int | None = None
) -> torch.Tensor:
    """How much each token of finished captions depends on each region of its image.

    For each region, the regions of the square around it are replaced by the mean of all others, or by zeros where there are no
    others. What is measured is the fall of each token's log-probability, given the tokens before it.

    Args:
        model: in evaluation mode.
        sequences: (R, T + 1) as `generate` returns them, from the start token on, without padding in front; R a multiple of the
            B images, the captions of an image adjacent.
        encoder_outputs: of the B images, with their `grid_shape` (H, W).
        window: side of the hidden square, an odd number of regions. Default: 3, or 1 on a grid with fewer than 5 rows or columns.

    Returns:
        (R, T, H, W) float32, in nats; map t belongs to token t + 1. Negative where hiding makes the token more likely. Maps of
        what follows the end token mean nothing.

    Raises:
        ValueError: `window` is even or below 1.
    """
    regions, grid = encoder_outputs.last_hidden_state, encoder_outputs.grid_shape  # (B, N, C)
    if window is None:
        window = WINDOW if min(grid) >= SMALL_GRID else 1
    if window < 1 or window % 2 == 0:
        raise ValueError(f"`window` is {window}, but it must be an odd number of regions, at least 1.")
    captions = sequences.unflatten(0, (regions.shape[0], -1))  # (B, k, T + 1)
    hidden = squares(grid, window).to(regions.device)  # (N, N)
    hidden = torch.cat([torch.zeros_like(hidden[:1]), hidden])  # (1 + N, N), first nothing
    found = []
    variants_of_all = torch.arange(len(regions) * len(hidden), device=regions.device)
    for variants in variants_of_all.split(variants_per_pass(model, regions, captions)):
        image, place = variants // len(hidden), variants % len(hidden)  # (v), (v)
        without = hide(regions[image], hidden[place])  # (v, N, C)
        found.append(token_log_probabilities(model, without, captions[image]))  # (v, k, T)
    log_p = torch.cat(found).unflatten(0, (len(regions), -1))  # (B, 1 + N, k, T)
    falls = (log_p[:, :1] - log_p[:, 1:]).permute(0, 2, 3, 1)  # (B, k, T, N)
    return falls.flatten(0, 1).unflatten(-1, grid).float()  # (R, T, H, W)


def squares(grid: tuple[int, int], window: int) -> torch.Tensor:
    """For each of the N regions of a grid (H, W), which regions the square around it covers: (N, N) bool."""
    y, x = (axis.flatten() for axis in torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij"))  # (N), (N)
    reach = window // 2
    return ((y[:, None] - y).abs() <= reach) & ((x[:, None] - x).abs() <= reach)


def hide(regions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Regions (v, N, C) with those that `hidden` (v, N) names replaced by the mean of the others, or by zeros: (v, N, C)."""
    seen = (~hidden).float()  # (v, N)
    mean = (seen[:, None] @ regions.float()) / seen.sum(dim=1).clamp(min=1)[:, None, None]  # (v, 1, C)
    return torch.where(hidden[..., None], mean.to(regions.dtype), regions)


def token_log_probabilities(model: AttnCapForConditionalGeneration, regions: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """The log-probability of each token of k captions (v, k, T + 1) of each of v images' regions (v, N, C): (v, k, T)."""
    ids = captions.flatten(0, 1)  # (v * k, T + 1)
    logits = model(encoder_outputs=(regions,), decoder_input_ids=ids[:, :-1], use_cache=False, output_attentions=False).logits
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (v * k, T, V)
    chosen = scores.gather(-1, ids[:, 1:, None]).squeeze(-1) - scores.logsumexp(dim=-1)  # (v * k, T)
    return chosen.unflatten(0, captions.shape[:2])


def variants_per_pass(model: AttnCapForConditionalGeneration, regions: torch.Tensor, captions: torch.Tensor) -> int:
    """How many images, whole or with something hidden, are decoded at a time."""
    (_, count, channels), (_, rows, length) = regions.shape, captions.shape
    of_a_caption = length * model.config.vocab_size + count * model.config.attention_dim
    return max(NUMBERS // (count * channels + rows * of_a_caption), 1)
