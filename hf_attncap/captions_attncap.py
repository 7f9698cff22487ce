"""Captions with scores and attention: `generate` for every decoding method.

Shapes: B images, k captions per image, R = B * k rows, T tokens, a grid of H x W regions, E word embedding, V vocabulary.
"""

from typing import Any

import torch


@torch.no_grad()
def generate_captions(
    model: Any,
    pixel_values: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    output_attentions: bool = False,
    encoder_outputs: Any = None,
    **generate_kwargs: Any,
) -> dict[str, Any]:
    """Calls `model.generate` and adds scores and, on request, attention, for every decoding method.

    Args:
        model: `AttnCapForConditionalGeneration`.
        pixel_values: (B, 3, height, width).
        input_ids, attention_mask: (B, t), the prompts, left-padded and without start token; t may be 0.
        output_attentions: also compute the attention, in one further forward pass over the captions.
        encoder_outputs: the encoder's output with `grid_shape`, instead of `pixel_values`.
        generate_kwargs: arguments of `generate`.

    Returns:
        For k = `num_return_sequences` captions per image:

        - `sequences` (B, k, T + 1), start token first
        - `scores` (B, k): `sequences_scores`, for greedy search and sampling too
        - `lowest` (B, k): the log-probability of the least likely generated token
        - `entropy` (B, k): the mean entropy, in nats, of the distributions of the generated tokens
        - `attention` (B, k, T, H, W) and `word_attention` (B, k, T, T) or (B, k, T, E) as `caption_attentions`, or None

        `lowest` and `entropy` use the model's distributions before logits processors, and include the end token.
    """
    if encoder_outputs is None:
        encoder_outputs = model.get_encoder()(pixel_values)  # (B, N, C)
    out = model.generate(
        encoder_outputs=encoder_outputs,
        input_ids=input_ids,
        attention_mask=attention_mask,
        **{**generate_kwargs, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    )
    batch = encoder_outputs.last_hidden_state.shape[0]
    regions = weights = None
    if output_attentions:
        regions, weights = _attentions(model, out.sequences, encoder_outputs, attention_mask)
    found = {
        "sequences": out.sequences,
        **_signals(model, out, generate_kwargs),
        "attention": regions,
        "word_attention": weights,
    }
    return {name: None if rows is None else rows.unflatten(0, (batch, -1)) for name, rows in found.items()}


def _attentions(
    model: Any, sequences: torch.Tensor, encoder_outputs: Any, prompt_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`caption_attentions` of sequences (R, T + 1) with padded prompts, whose mask is (B, t)."""
    if prompt_mask is None or prompt_mask.all():
        return model.caption_attentions(sequences, encoder_outputs=encoder_outputs)
    rows, steps = sequences.shape[0], sequences.shape[1] - 1
    is_word = torch.ones_like(sequences[:, :-1])  # (R, T)
    is_word[:, 1 : 1 + prompt_mask.shape[1]] = prompt_mask.repeat_interleave(rows // prompt_mask.shape[0], 0)
    regions, weights = model.caption_attentions(sequences, encoder_outputs=encoder_outputs, decoder_attention_mask=is_word)
    # A word after padding was chosen at the last word before the padding.
    step = torch.arange(steps, device=sequences.device)  # (T)
    chosen_at = torch.where(is_word.bool(), step, 0).cummax(dim=1).values  # (R, T)
    row = torch.arange(rows, device=sequences.device)[:, None]  # (R, 1)
    return regions[row, chosen_at], None if weights is None else weights[row, chosen_at]


def _signals(model: Any, out: Any, generate_kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`scores`, `lowest` and `entropy` (R) of the output of `generate`."""
    settings = dict(generate_kwargs)
    config, _ = model._prepare_generation_config(settings.pop("generation_config", None), **settings)
    logits = torch.stack(out.logits, dim=1)  # (rows, steps, V)
    beams = getattr(out, "beam_indices", None)  # (R, T), -1 after the end
    if beams is None:
        tokens = out.sequences[:, -logits.shape[1] :]  # (R, T)
        generated = _until_end(tokens, config.eos_token_id)  # (R, T)
    else:
        tokens = out.sequences[:, -beams.shape[1] :][:, : logits.shape[1]]  # (R, T)
        beams = beams[:, : logits.shape[1]]  # (R, T)
        generated = beams >= 0  # (R, T)
        logits = logits[beams.clamp(min=0), torch.arange(beams.shape[1], device=logits.device)]  # (R, T, V)
    log_probs = logits.float().log_softmax(dim=-1)  # (R, T, V)
    chosen = log_probs.gather(-1, tokens[..., None]).squeeze(-1).where(generated, 0)  # (R, T)
    entropies = torch.special.entr(log_probs.exp()).sum(dim=-1).where(generated, 0)  # (R, T)
    count = generated.sum(dim=1).clamp(min=1)  # (R)
    scores = getattr(out, "sequences_scores", None)  # (R)
    if scores is None:
        scores = chosen.sum(dim=1) / count**config.length_penalty  # (R)
    return {"scores": scores, "lowest": chosen.amin(dim=1), "entropy": entropies.sum(dim=1) / count}


def _until_end(tokens: torch.Tensor, ends: Any) -> torch.Tensor:
    """(R, T): which tokens (R, T) are not after the end token."""
    is_end = torch.isin(tokens, torch.tensor([] if ends is None else ends, device=tokens.device))  # (R, T)
    return is_end.cumsum(dim=1) - is_end.long() == 0


__all__ = ["generate_captions"]
