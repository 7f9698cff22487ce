"""Greedy search, sampling and beam search that call the decoder directly.

Their results are those of transformers' loops, at a fraction of the cost.

transformers' loops prepare the inputs of a whole model at each step. Here a step is a call of the decoder, the output layer and the
logits processors in use. `is_supported` decides which settings these loops can handle; transformers' loops handle the others.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateBeamEncoderDecoderOutput, GenerateEncoderDecoderOutput

from .cache_attncap import CACHE_NAME, AttnCapCache

IMPOSSIBLE = -1.0e9  # the score of a beam that must not be chosen, as in transformers


def is_supported(model: Any, criteria: Any, config: Any, synced_gpus: bool, kwargs: dict[str, Any]) -> bool:
    """Whether `greedy_search` or `beam_search` can run with these settings of `generate`."""
    cache = kwargs.get(CACHE_NAME)
    return (
        not (config.do_sample and config.num_beams > 1)
        and not config.output_hidden_states
        and not synced_gpus
        and not model.training
        and config.prefill_chunk_size is None
        and kwargs.get("streamer") is None
        and bool(kwargs.get("use_cache"))
        and isinstance(cache, AttnCapCache)
        and not getattr(cache, "_is_user_defined", False)
        and all(type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in criteria)
    )


@dataclass
class Steps:
    """The decoder's steps of a search, and what `generate` was asked to return of them."""

    model: Any
    processors: Any
    config: Any
    cache: AttnCapCache
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    cross_attentions: list[tuple] = field(default_factory=list)
    decoder_attentions: list[tuple] = field(default_factory=list)

    def first(self, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Read the start token and the prompt (R, t); return the logits of the next token (R, V)."""
        out = self.model.model(
            decoder_input_ids=input_ids,
            decoder_attention_mask=kwargs.get("decoder_attention_mask"),
            encoder_outputs=kwargs["encoder_outputs"],
            use_cache=True,
            output_attentions=self.config.output_attentions,
            return_dict=True,
            **{CACHE_NAME: self.cache},
        )
        if self.config.output_attentions:
            self.cross_attentions.append(out.cross_attentions)
            self.decoder_attentions.append(out.decoder_attentions)
        return self.model.lm_head(out.last_hidden_state[:, -1]).float()  # (R, V)

    def next(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read one token per row, (R); return the logits of the next one (R, V)."""
        out = self.model.model.decoder(tokens[:, None], None, past=self.cache, output_attentions=self.config.output_attentions)
        if self.config.output_attentions:
            self.cross_attentions.append((out.region_attention[:, None],))
            words = out.word_attention
            self.decoder_attentions.append(None if words is None else (words[:, None],))  # type: ignore[arg-type]
        return self.model.lm_head(out.last_hidden_state[:, -1]).float()  # (R, V)

    def process(self, input_ids: torch.Tensor, logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Apply the logits processors to scores (R, V), and record what is wanted."""
        scores = self.processors(input_ids, scores)
        if self.config.output_logits:
            self.logits.append(logits)
        if self.config.output_scores:
            self.scores.append(scores)
        return scores

    def outputs(self, sequences: torch.Tensor) -> dict[str, Any]:
        """The fields that both kinds of output have."""
        config = self.config
        return {
            "sequences": sequences,
            "scores": tuple(self.scores) if config.output_scores else None,
            "logits": tuple(self.logits) if config.output_logits else None,
            "cross_attentions": tuple(self.cross_attentions) if config.output_attentions else None,
            "decoder_attentions": tuple(self.decoder_attentions) if config.output_attentions else None,
            CACHE_NAME: self.cache,
        }


def greedy_search(model: Any, input_ids: torch.Tensor, processors: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    """The most probable token at each step, for rows (R, t) of start token and prompt; with `do_sample`, a random one.

    The result is that of `_sample`, and uses the same random numbers.
    """
    steps = Steps(model, processors, config, kwargs[CACHE_NAME])
    ends, pad = config._eos_token_tensor, config._pad_token_tensor
    running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)  # (R)
    logits = steps.first(input_ids, kwargs)  # (R, V)
    while True:
        scores = steps.process(input_ids, logits, logits)  # (R, V)
        tokens = torch.multinomial(scores.softmax(dim=-1), 1).squeeze(1) if config.do_sample else scores.argmax(dim=-1)  # (R)
        if ends is not None:
            tokens = torch.where(running, tokens, pad)  # (R)
            running = running & ~_is_in(tokens, ends)  # (R)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)  # (R, t + 1)
        if input_ids.shape[1] >= config.max_length or not running.any():
            break
        logits = steps.next(tokens)  # (R, V)
    return GenerateEncoderDecoderOutput(**steps.outputs(input_ids)) if config.return_dict_in_generate else input_ids


def beam_search(model: Any, input_ids: torch.Tensor, processors: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    """Beam search for rows (B * K, t) of start token and prompt, K = `num_beams`. The result is that of `_beam_search`.

    Finished captions are padded with `pad_token_id`.
    """
    K, start, longest = config.num_beams, input_ids.shape[1], config.max_length
    B = len(input_ids) // K
    steps = Steps(model, processors, config, kwargs[CACHE_NAME])
    ends, device = config._eos_token_tensor, input_ids.device
    candidates_kept = max(2, 1 + (0 if ends is None else len(ends))) * K

    # A beam is its tokens and, for each generated token, the row that generated it.
    beams = torch.full((B, K, 2, longest), -1, dtype=torch.long, device=device)  # (B, K, 2, L)
    beams[:, :, 0] = 0 if config._pad_token_tensor is None else config._pad_token_tensor
    beams[:, :, 0, :start] = input_ids.unflatten(0, (B, K))
    best = beams.clone()  # the finished ones
    scores = torch.zeros(B, K, device=device)  # (B, K)
    scores[:, 1:] = IMPOSSIBLE  # at first all beams of an image are equal, so only one counts
    best_scores = torch.full((B, K), IMPOSSIBLE, device=device)  # (B, K)
    finished = torch.zeros(B, K, dtype=torch.bool, device=device)  # (B, K)
    improvable = torch.ones(B, 1, dtype=torch.bool, device=device)  # (B, 1)
    first_row = torch.arange(B, device=device)[:, None] * K  # (B, 1)
    is_top = torch.arange(candidates_kept, device=device) < K  # (candidates)

    logits = steps.first(input_ids, kwargs)  # (B * K, V)
    for length in range(start, longest):
        log_probs = steps.process(beams[:, :, 0, :length].flatten(0, 1), logits, logits.log_softmax(dim=-1))  # (B * K, V)
        total = (log_probs.unflatten(0, (B, K)) + scores[:, :, None]).flatten(1)  # (B, K * V)
        top, index = total.topk(candidates_kept)  # (B, candidates)
        parent, token = index // logits.shape[-1], index % logits.shape[-1]  # (B, candidates)
        candidates = _select(beams, parent)  # (B, candidates, 2, L)
        candidates[:, :, 0, length] = token
        candidates[:, :, 1, length - start] = parent + first_row
        ended = torch.zeros_like(token, dtype=torch.bool) if ends is None else _is_in(token, ends)  # (B, candidates)
        if length + 1 >= longest:
            ended = torch.ones_like(ended)

        running = top + ended * IMPOSSIBLE  # (B, candidates)
        scores, order = running.topk(K)  # (B, K)
        beams = _select(candidates, order)  # (B, K, 2, L)

        new = top / (length + 1 - start) ** config.length_penalty  # (B, candidates)
        if config.early_stopping is True:
            new = new + finished.all(dim=-1, keepdim=True) * IMPOSSIBLE
        new = new + ~improvable * IMPOSSIBLE
        new = new + ~(ended & is_top) * IMPOSSIBLE
        best_scores, order = torch.cat([best_scores, new], dim=1).topk(K)  # (B, K)
        best = _select(torch.cat([best, candidates], dim=1), order)  # (B, K, 2, L)
        finished = torch.cat([finished, ended & is_top], dim=1).gather(1, order)  # (B, K)

        rows: Any = beams[:, :, 1, length - start].flatten()  # (B * K)
        steps.cache.reorder_cache(rows)
        improvable = model._check_early_stop_heuristic(
            improvable, scores, best_scores, finished, length + 1, longest, start, config.early_stopping, config.length_penalty
        )
        if not model._beam_search_has_unfinished_sequences(improvable, finished, ended, config.early_stopping):
            break
        logits = steps.next(beams[:, :, 0, length].flatten())  # (B * K, V)

    best = best[:, : config.num_return_sequences].flatten(0, 1)  # (R, 2, L)
    generated = int((best[:, 1] >= 0).sum(dim=1).max())
    sequences = best[:, 0, : start + generated]  # (R, t + T)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateBeamEncoderDecoderOutput(
        **steps.outputs(sequences),
        sequences_scores=best_scores[:, : config.num_return_sequences].flatten() if config.output_scores else None,
        beam_indices=best[:, 1, :generated].int(),  # type: ignore[arg-type]
    )


def pad_after_end(tokens: torch.Tensor, config: Any) -> None:
    """Replace the tokens (R, T) after the first end token by the padding token, in place."""
    ends, pad = config._eos_token_tensor, config._pad_token_tensor
    if ends is None or pad is None:
        return
    is_end = _is_in(tokens, ends).long()  # (R, T)
    tokens.masked_fill_(is_end.cumsum(dim=1) - is_end > 0, pad)


def _select(beams: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Of beams (B, n, 2, L) those at `index` (B, m): (B, m, 2, L)."""
    return beams.gather(1, index[:, :, None, None].expand(-1, -1, *beams.shape[2:]))


def _is_in(tokens: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return (tokens[..., None] == ends).any(dim=-1)


__all__ = ["beam_search", "greedy_search", "is_supported", "pad_after_end"]
