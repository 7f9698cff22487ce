"""Generates captions with scores and attention, for every decoding method: `generate_captions`.

Shapes: B images, k captions per image, R = B * k rows, T tokens, a grid of H x W regions, E word embedding, V vocabulary.
"""

from typing import Any

import torch
from torch.nn import functional as F

from .search_attncap import is_after_end


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
        output_attentions: also return the attention.
        encoder_outputs: the encoder's output with `grid_shape`, instead of `pixel_values`.
        generate_kwargs: arguments of `generate`.

    Returns:
        For k = `num_return_sequences` captions per image:

        - `sequences` (B, k, T + 1), start token first
        - `scores` (B, k): `sequences_scores`, for greedy search and sampling too
        - `lowest` (B, k): the log-probability of the least likely generated token
        - `entropy` (B, k): the mean entropy, in nats, of the distributions of the generated tokens
        - `attention` (B, k, T, H, W) and `word_attention` (B, k, T, T) or (B, k, T, E) as
          `AttnCapForConditionalGeneration.caption_attentions`, but 0 after the end; or None

        `lowest` and `entropy` use the model's distributions before logits processors, and include the end token.
    """
    if encoder_outputs is None:
        encoder_outputs = model.get_encoder()(pixel_values)  # (B, N, C)
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_attentions": output_attentions}
    out = model.generate(
        encoder_outputs=encoder_outputs, input_ids=input_ids, attention_mask=attention_mask, **{**generate_kwargs, **wanted}
    )
    ends, length_penalty = None, 1.0
    if getattr(out, "beam_indices", None) is None:  # the output of beam search has the scores and the ends
        settings = dict(generate_kwargs)
        config, _ = model._prepare_generation_config(settings.pop("generation_config", None), **settings)
        ends, length_penalty = config.eos_token_id, config.length_penalty
    tokens, rows, generated = _generated_tokens(out, ends)
    found = {"sequences": out.sequences, **_signals(out, tokens, rows, generated, length_penalty)}
    found |= {"attention": None, "word_attention": None}
    if output_attentions:
        maps = _attentions(out.cross_attentions, rows, generated, attention_mask)  # (R, T, N)
        found["attention"] = maps.unflatten(-1, encoder_outputs.grid_shape)  # (R, T, H, W)
        if out.decoder_attentions[0] is not None:
            found["word_attention"] = _attentions(out.decoder_attentions, rows, generated, attention_mask)
    batch = encoder_outputs.last_hidden_state.shape[0]
    return {name: None if values is None else values.unflatten(0, (batch, -1)) for name, values in found.items()}


def _generated_tokens(out: Any, ends: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The G generated tokens in the output of `generate`, the row that chose each of them, and which are not after the end.

    All are (R, G). With greedy search and sampling, a caption has the same row in all steps.
    """
    beams = getattr(out, "beam_indices", None)  # (R, G), -1 after the end
    steps = len(out.logits)
    if beams is None:
        tokens = out.sequences[:, -steps:]  # (R, G)
        return (
            tokens,
            torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens),
            ~is_after_end(tokens, torch.tensor([] if ends is None else ends, device=tokens.device)),
        )
    tokens = out.sequences[:, -beams.shape[1] :]  # (R, G)
    return tokens, beams.long().clamp(min=0), beams >= 0


def _attentions(steps: Any, rows: torch.Tensor, generated: torch.Tensor, prompt_mask: torch.Tensor | None) -> torch.Tensor:
    """The attention weights that chose each token: (R, T, N) for regions, (R, T, T) or (R, T, E) for words; 0 after the end.

    Args:
        steps: the weights of G steps, one tensor (rows, 1, t, .) each; t is the length of start token and prompt in the first
            step, then 1.
        rows, generated: (R, G), from `_generated_tokens`.
        prompt_mask: (B, t), False at padding.
    """
    weights = [step[0].squeeze(1) for step in steps[: rows.shape[1]]]  # G of (rows, t, .)
    width = weights[-1].shape[-1]
    prompt = F.pad(weights[0][rows[:, 0], :-1], (0, width - weights[0].shape[-1]))  # (R, t - 1, .)
    last = torch.stack([F.pad(step[:, -1], (0, width - step.shape[-1])) for step in weights], dim=1)  # (rows, G, .)
    chosen = last[rows, torch.arange(rows.shape[1], device=rows.device)] * generated[..., None]  # (R, G, .)
    maps = torch.cat([prompt, chosen], dim=1)  # (R, T, .)
    if prompt_mask is None or prompt_mask.all():
        return maps
    is_word = torch.ones(maps.shape[:2], dtype=torch.bool, device=maps.device)  # (R, T)
    is_word[:, 1 : 1 + prompt_mask.shape[1]] = prompt_mask.bool().repeat_interleave(len(maps) // len(prompt_mask), 0)
    # A word after padding was chosen at the last word before the padding.
    step = torch.arange(maps.shape[1], device=maps.device)  # (T)
    chosen_at = torch.where(is_word, step, 0).cummax(dim=1).values  # (R, T)
    return maps[torch.arange(len(maps), device=maps.device)[:, None], chosen_at]


def _signals(
    out: Any, tokens: torch.Tensor, rows: torch.Tensor, generated: torch.Tensor, length_penalty: float
) -> dict[str, torch.Tensor]:
    """`scores`, `lowest` and `entropy` (R) from the output of `generate` and its `_generated_tokens` (R, G)."""
    steps = torch.arange(tokens.shape[1], device=tokens.device)  # (G)
    logits = torch.stack(out.logits[: tokens.shape[1]], dim=1)[rows, steps]  # (R, G, V)
    log_probs = logits.float().log_softmax(dim=-1)  # (R, G, V)
    chosen = log_probs.gather(-1, tokens[..., None]).squeeze(-1).where(generated, 0)  # (R, G)
    entropies = torch.special.entr(log_probs.exp()).sum(dim=-1).where(generated, 0)  # (R, G)
    count = generated.sum(dim=1).clamp(min=1)  # (R)
    scores = getattr(out, "sequences_scores", None)  # (R)
    if scores is None:
        scores = chosen.sum(dim=1) / count**length_penalty  # (R)
    return {"scores": scores, "lowest": chosen.amin(dim=1), "entropy": entropies.sum(dim=1) / count}


__all__ = ["generate_captions"]
