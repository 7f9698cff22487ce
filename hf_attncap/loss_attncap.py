"""The training loss of captions, and the checks of the labels that it is computed from.

Shapes as in docs/model.md: B images, R caption rows (a multiple of B; the rows of one image are adjacent), N regions, T words,
V vocabulary, P labels that are not -100.
"""

from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils import logging

from .configuration_attncap import AttnCapConfig

logger = logging.get_logger(__name__)

MAKE_LABELS = "make labels with `processor(text_target=captions)`, which adds the end token and pads with -100 on the right"


def caption_loss(
    config: AttnCapConfig,
    logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy plus `alpha_c` times the doubly stochastic regulariser (Show, Attend and Tell, equation 14).

    Both are sums over words, divided by M, so that they add up over accumulated batches and processes. The regulariser of a caption
    with n words is n * mean_i (1 - sum_t alpha_ti)^2.

    Args:
        logits: of the words that have a label, row by row, (P, V).
        labels: (R, T), -100 where there is none.
        alpha: region attention, (R, T, N).
        num_items: M; default P.
    """
    is_word = labels != -100  # (R, T)
    words = is_word.sum(dim=1)  # (R)
    cross_entropy = F.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(),
        labels[is_word],
        label_smoothing=float(config.label_smoothing),
        reduction="sum",
    )
    attended = (alpha.to(cross_entropy.dtype) * is_word[..., None]).sum(dim=1)  # (R, N)
    regulariser = (words * (1 - attended).square().mean(dim=1)).sum()
    total = words.sum() if num_items is None else torch.as_tensor(num_items, device=logits.device)
    return (cross_entropy + config.alpha_c * regulariser) / total


def flatten_labels(labels: torch.Tensor, images: Any) -> torch.Tensor:
    """Return labels (B, k, T) or (R, T) as (R, T).

    Args:
        images: pixel values, features or encoder outputs, whose number of images is compared with that of labels (B, k, T).

    Raises:
        ValueError: the numbers differ.
    """
    if labels.ndim == 2:
        return labels
    if images is not None and not isinstance(images, torch.Tensor):
        images = images[0]  # the regions of the encoder's output
    if images is not None and images.shape[0] != labels.shape[0]:
        raise ValueError(
            f"`labels` {tuple(labels.shape)} are for {labels.shape[0]} images, but {images.shape[0]} were given: use the shape "
            "(images, captions per image, tokens)."
        )
    return labels.flatten(0, 1)


def move_padding_right(labels: torch.Tensor) -> torch.Tensor:
    """Move the -100 that a collator put on the left of labels (R, T) to the right."""
    first = (labels != -100).int().argmax(dim=1, keepdim=True)  # (R, 1)
    position = torch.arange(labels.shape[1], device=labels.device)  # (T)
    return labels.gather(1, (position + first) % labels.shape[1])


def refuse_prompts(labels: torch.Tensor, prompts: torch.Tensor | None) -> None:
    """Raise an error for labels that equal the `input_ids` of the batch, as training recipes of other captioners make them."""
    if prompts is not None and prompts.shape == labels.shape and ((labels == prompts) | (labels == -100)).all():
        raise ValueError(f"`labels` equal the `input_ids`, which are prompts without an end token: {MAKE_LABELS}.")


def check_labels(labels: torch.Tensor, input_ids: torch.Tensor | None, config: AttnCapConfig, end_token_ids: list[int]) -> None:
    """Check that labels (R, T) have no padding tokens, and warn if none of them is an end token.

    Args:
        input_ids: the inputs (R, T) if the user gave them; a label after padding is refused too.

    Raises:
        ValueError: the padding token is a label, or the word before a label is padding.
    """
    pad = config.pad_token_id
    if pad in end_token_ids or not end_token_ids:
        return
    wrong = labels == pad  # (R, T)
    if input_ids is not None:
        after_padding = (input_ids == pad) & (labels != -100)  # (R, T)
        starts_with_padding = pad == config.decoder_start_token_id
        wrong = wrong[:, 1:] | after_padding[:, 1:] if starts_with_padding else wrong | after_padding
    is_end = torch.isin(labels, torch.tensor(end_token_ids, device=labels.device))  # (R, T)
    any_wrong, any_end = torch.stack([wrong.any(), is_end.any()]).tolist()  # one wait for the GPU
    if any_wrong:
        raise ValueError(f"`labels` contain padding (id {pad}), which the model would learn to generate: {MAKE_LABELS}.")
    if not any_end:
        logger.warning_once(
            f"No label of this batch is an end token, so the model may not learn to end captions: {MAKE_LABELS}. Ignore this "
            "warning if all captions of the batch were truncated."
        )


__all__ = ["caption_loss", "check_labels", "flatten_labels", "move_padding_right", "refuse_prompts"]
