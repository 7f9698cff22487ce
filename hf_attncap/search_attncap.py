"""Greedy search, sampling and beam search that call the decoder directly. They are faster than transformers' loops.

transformers' loops prepare the inputs of a whole model at each step. Here a step calls only the decoder, the output layer and the
logits processors in use. The results are the same. `is_supported` says which settings these loops support; transformers' loops
run the others.

Shapes: B images, K beams per image, R rows, t tokens of start token and prompt, L tokens at most, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateBeamEncoderDecoderOutput, GenerateEncoderDecoderOutput

from .cache_attncap import CACHE_NAME, AttnCapCache

IMPOSSIBLE = -1.0e9  # the score of a beam that must not be chosen, as in transformers
GPU_STEPS = 8  # steps between two checks whether all captions have ended, because each check waits for the GPU


def is_supported(model: Any, criteria: Any, config: Any, synced_gpus: bool, kwargs: dict[str, Any]) -> bool:
    """Whether `greedy_search` or `beam_search` can run with these settings of `generate`."""
    cache = kwargs.get(CACHE_NAME)
    return (
        not _has_changed_forward(model)
        and not (config.do_sample and config.num_beams > 1)
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


def _has_changed_forward(model: Any) -> bool:
    """Whether a subclass, a hook, a compiler or mixed precision has changed `forward`, so that the whole model must be called."""
    owner = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    return owner.__name__ != "AttnCapForConditionalGeneration" or any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or module._compiled_call_impl is not None
        for module in (model, model.model, model.model.decoder)
    )


@dataclass
class DecodingSteps:
    """Runs the steps of the decoder in a search, and records what `generate` was asked to return."""

    model: Any
    processors: Any
    config: Any
    cache: AttnCapCache
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    cross_attentions: list[tuple] = field(default_factory=list)
    decoder_attentions: list[tuple | None] = field(default_factory=list)
    unfinished: list[torch.Tensor] = field(default_factory=list)  # after each step: whether any caption has not ended

    def read_prompt(self, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
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

    def read_token(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read one token per row, (R); return the logits of the next one (R, V)."""
        hidden, alpha, beta = self.model.model.decoder.read(tokens, self.cache)  # (R, E), (R, N), (R, t) or (R, E)
        if self.config.output_attentions:
            self.cross_attentions.append((alpha[:, None, None],))  # (R, 1, 1, N)
            self.decoder_attentions.append(None if beta is None else (beta[:, None, None],))  # (R, 1, 1, .)
        return self.model.lm_head(hidden).float()  # (R, V)

    def process(self, input_ids: torch.Tensor, logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Apply the logits processors to scores (R, V); record logits and scores if `generate` returns them."""
        for processor in self.processors:  # calling the list itself inspects the signature of each processor at each step
            scores = processor(input_ids, scores)
        if self.config.output_logits:
            self.logits.append(logits)
        if self.config.output_scores:
            self.scores.append(scores)
        return scores

    def should_stop(self, unfinished: torch.Tensor) -> bool:
        """Whether all captions have ended. On a GPU, a search may run some steps too many; `trim` removes their records."""
        self.unfinished.append(unfinished)
        check_now = unfinished.device.type == "cpu" or len(self.unfinished) % GPU_STEPS == 0
        return check_now and not unfinished

    def trim(self) -> int:
        """Remove the records of the steps after all captions had ended; return the number of remaining steps."""
        needed = 1 + int(torch.stack(self.unfinished).long().cumprod(0)[:-1].sum())
        for records in (self.scores, self.logits, self.cross_attentions, self.decoder_attentions):
            del records[needed:]
        return needed

    def output_fields(self, sequences: torch.Tensor) -> dict[str, Any]:
        """The fields that the outputs of greedy search and of beam search have in common."""
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
    """Greedy search, or sampling with `do_sample`, for rows (R, t) of start token and prompt.

    The result is that of transformers' `_sample`, also with the same random seed.
    """
    steps = DecodingSteps(model, processors, config, kwargs[CACHE_NAME])
    ends, pad = config._eos_token_tensor, config._pad_token_tensor
    running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)  # (R)
    logits = steps.read_prompt(input_ids, kwargs)  # (R, V)
    while True:
        scores = steps.process(input_ids, logits, logits)  # (R, V)
        tokens = torch.multinomial(scores.softmax(dim=-1), 1).squeeze(1) if config.do_sample else scores.argmax(dim=-1)  # (R)
        if ends is not None:
            tokens = torch.where(running, tokens, pad)  # (R)
            running = running & ~_is_in(tokens, ends)  # (R)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)  # (R, t + 1)
        if steps.should_stop(running.any()) or input_ids.shape[1] >= config.max_length:
            break
        logits = steps.read_token(tokens)  # (R, V)
    extra = len(steps.unfinished) - steps.trim()  # steps after all captions had ended
    input_ids = input_ids[:, : input_ids.shape[1] - extra]
    steps.cache.crop(-extra)
    return GenerateEncoderDecoderOutput(**steps.output_fields(input_ids)) if config.return_dict_in_generate else input_ids


def beam_search(model: Any, input_ids: torch.Tensor, processors: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    """Beam search for rows (B * K, t) of start token and prompt, K = `num_beams`.

    The result is that of transformers' `_beam_search`, except that finished captions are always padded with `pad_token_id`.
    """
    K, start, L = config.num_beams, input_ids.shape[1], config.max_length
    B = len(input_ids) // K
    steps = DecodingSteps(model, processors, config, kwargs[CACHE_NAME])
    ends, device = config._eos_token_tensor, input_ids.device
    candidates_kept = max(2, 1 + (0 if ends is None else len(ends))) * K

    # A beam is its L tokens and, for each generated token, the row that generated it.
    beams = torch.full((B, K, 2 * L), -1, dtype=torch.long, device=device)  # (B, K, 2L)
    beams[:, :, :L] = 0 if config._pad_token_tensor is None else config._pad_token_tensor
    beams[:, :, :start] = input_ids.unflatten(0, (B, K))
    best = beams  # (B, K, 2L): the best finished beams
    scores = torch.zeros(B, K, device=device)  # (B, K)
    scores[:, 1:] = IMPOSSIBLE  # at first all beams of an image are equal, so only one counts
    best_scores = torch.full((B, K), IMPOSSIBLE, device=device)  # (B, K)
    finished = torch.zeros(B, K, dtype=torch.bool, device=device)  # (B, K)
    improvable = torch.ones(B, 1, dtype=torch.bool, device=device)  # (B, 1)
    unfinished = torch.ones((), dtype=torch.bool, device=device)
    # Until a beam finishes, or an image has no possible beam left, the finished beams need no update. On a GPU, to check this would
    # mean to wait for it at every step, so the update always runs.
    may_have_finished = device.type != "cpu"
    first_row = torch.arange(B, device=device)[:, None] * K  # (B, 1)

    logits = steps.read_prompt(input_ids, kwargs)  # (B * K, V)
    for length in range(start, L):
        log_probs = steps.process(beams[:, :, :length].flatten(0, 1), logits, logits.log_softmax(dim=-1))  # (B * K, V)
        total = (log_probs.unflatten(0, (B, K)) + scores[:, :, None]).flatten(1)  # (B, K * V)
        top, index = total.topk(candidates_kept)  # (B, candidates)
        parent = index // logits.shape[-1]  # (B, candidates)
        token = index - parent * logits.shape[-1]  # (B, candidates)
        candidates = _select(beams, parent)  # (B, candidates, 2L)
        candidates[:, :, length] = token
        candidates[:, :, L + length - start] = parent + first_row
        is_last = length + 1 >= L
        ended = torch.full_like(token, is_last, dtype=torch.bool) if is_last or ends is None else _is_in(token, ends)

        scores, order = top.masked_fill(ended, IMPOSSIBLE).topk(K)  # (B, K)
        beams = _select(candidates, order)  # (B, K, 2L)

        steps.cache.reorder_cache(beams[:, :, L + length - start].flatten())  # type: ignore[arg-type]
        if not may_have_finished:
            may_have_finished = bool(ended[:, :K].any() | (scores[:, 0] <= IMPOSSIBLE).any())
        if may_have_finished:
            finishing = ended[:, :K] & unfinished  # (B, K), because only the best K candidates may finish
            eligible = finishing & improvable  # (B, K)
            if config.early_stopping is True:
                eligible = eligible & ~finished.all(dim=-1, keepdim=True)
            new_scores = (top[:, :K] / (length + 1 - start) ** config.length_penalty).masked_fill(~eligible, IMPOSSIBLE)  # (B, K)
            best_scores, order = torch.cat([best_scores, new_scores], dim=1).topk(K)  # (B, K)
            best = _select(torch.cat([best, candidates[:, :K]], dim=1), order)  # (B, K, 2L)
            finished = torch.cat([finished, finishing], dim=1).gather(1, order)  # (B, K)
            improvable = model._check_early_stop_heuristic(
                improvable, scores, best_scores, finished, length + 1, L, start, config.early_stopping, config.length_penalty
            )
            unfinished = unfinished & model._beam_search_has_unfinished_sequences(
                improvable, finished, ended, config.early_stopping
            )
        if steps.should_stop(unfinished):
            break
        logits = steps.read_token(beams[:, :, length].flatten())  # (B * K, V)

    steps.trim()
    best = best[:, : config.num_return_sequences].flatten(0, 1)  # (R, 2L)
    tokens, rows = best.split(L, dim=1)  # (R, L), (R, L)
    generated = int((rows >= 0).sum(dim=1).max())
    sequences = tokens[:, : start + generated]  # (R, t + T)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateBeamEncoderDecoderOutput(
        **steps.output_fields(sequences),
        sequences_scores=best_scores[:, : config.num_return_sequences].flatten() if config.output_scores else None,
        beam_indices=rows[:, :generated].int(),  # type: ignore[arg-type]
    )


def pad_after_end(tokens: torch.Tensor, config: Any) -> None:
    """Replace the tokens (R, T) after the first end token by the padding token, in place."""
    ends, pad = config._eos_token_tensor, config._pad_token_tensor
    if ends is None or pad is None:
        return
    tokens.masked_fill_(is_after_end(tokens, ends), pad)


def is_after_end(tokens: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """(R, T): which tokens (R, T) come after the first of the end tokens `ends`."""
    is_end = _is_in(tokens, ends).long()  # (R, T)
    return is_end.cumsum(dim=1) - is_end > 0


def _select(beams: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Select the beams at `index` (B, m) from beams (B, n, 2L): (B, m, 2L)."""
    return beams.gather(1, index[:, :, None].expand(-1, -1, beams.shape[2]))


def _is_in(tokens: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    if ends.numel() == 1:
        return tokens == ends
    return (tokens[..., None] == ends).any(dim=-1)


__all__ = ["beam_search", "greedy_search", "is_after_end", "is_supported", "pad_after_end"]
