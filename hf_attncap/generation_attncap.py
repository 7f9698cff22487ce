"""Adapts `generate` to the captioner: prompts, stop strings, repeated words, the cache, and regions shared by beams."""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from .cache_attncap import CACHE_NAME, AttnCapCache
from .search_attncap import beam_search, greedy_search, is_supported, pad_after_end

# Modes that transformers 5 removed, with a replacement each.
REMOVED_MODES = {
    GenerationMode.GROUP_BEAM_SEARCH: "beam sampling (`num_beams` with `do_sample=True`) and `num_return_sequences`",
    GenerationMode.CONSTRAINED_BEAM_SEARCH: "a prompt (`input_ids`), or `prefix_allowed_tokens_fn`",
    GenerationMode.CONTRASTIVE_SEARCH: "sampling with `top_p`, or beams with `repetition_penalty`",
    GenerationMode.DOLA_GENERATION: "greedy or beam search; DoLa needs several layers",
}


class StopAtText(StoppingCriteria):
    """Ends a caption when its last token completes one of the stop strings.

    transformers' criterion tokenizes an artificial prefix, which a vocabulary of whole words cannot represent.
    """

    def __init__(self, texts: str | list[str], tokenizer: Any):
        self.texts = [texts] if isinstance(texts, str) else list(texts)
        self.tokenizer = tokenizer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows = input_ids.tolist()  # (R, T)
        before = self.tokenizer.batch_decode([row[:-1] for row in rows], skip_special_tokens=True)
        now = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        ends = [any(old.count(text) < new.count(text) for text in self.texts) for old, new in zip(before, now)]
        return torch.tensor(ends, device=input_ids.device)  # (R)


class NoRepeatedTokens(LogitsProcessor):
    """Bans the tokens that the caption or its prompt already has, except the repeatable ones."""

    def __init__(self, repeatable: list[int], vocab_size: int):
        self.penalty = torch.full((vocab_size,), -torch.inf)  # (V)
        self.penalty[repeatable] = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.penalty = self.penalty.to(scores)
        return scores.scatter_add(1, input_ids, self.penalty[input_ids])  # (R, V)


class SuppressedTokens(LogitsProcessor):
    """Bans tokens. Does the same as transformers' processor, but does not search the whole vocabulary at each step."""

    def __init__(self, banned: torch.Tensor, vocab_size: int):
        self.banned = banned[(banned >= 0) & (banned < vocab_size)].long()  # the tensor of an empty list has floats

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.banned = self.banned.to(scores.device)
        return scores.index_fill(1, self.banned, -torch.inf)  # (R, V)


class NoEarlyEnd(SuppressedTokens):
    """Bans the end tokens until a row has `length` tokens. Does the same as transformers' processors, like `SuppressedTokens`."""

    def __init__(self, length: int, ends: torch.Tensor, vocab_size: int):
        super().__init__(ends, vocab_size)
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__call__(input_ids, scores) if input_ids.shape[1] < self.length else scores  # (R, V)


class NoRepeatedNgrams(LogitsProcessor):
    """Bans the tokens that would repeat an n-gram of the row. Does the same as transformers' processor, without Python lists."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if input_ids.shape[1] < self.size:
            return scores
        ngrams = input_ids.unfold(1, self.size, 1)  # (R, n-grams, size)
        last = input_ids[:, None, input_ids.shape[1] - self.size + 1 :]  # (R, 1, size - 1)
        banned = (ngrams[..., :-1] == last).all(dim=-1)  # (R, n-grams)
        limit = scores.new_full(banned.shape, torch.inf).masked_fill(banned, -torch.inf)  # (R, n-grams)
        return scores.scatter_reduce(1, ngrams[..., -1], limit, "amin")  # (R, V)


class AttnCapGenerationMixin(GenerationMixin):
    """`generate` for captions, from `pixel_values` or `encoder_outputs`; `input_ids` may give the beginning of the caption.

    `generation_config.repeatable_token_ids` lists the tokens that may occur more than once in a caption. All other tokens except
    end tokens may occur once. None, or no such setting, allows all repeats.
    """

    config: Any
    device: Any
    model: Any

    @property
    def end_token_ids(self) -> list[int]:
        """The tokens that end a caption: `eos_token_id` of `generation_config`, or else of `config`."""
        ends = self.generation_config.eos_token_id
        ends = self.config.eos_token_id if ends is None else ends
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def _get_deprecated_gen_repo(self, generation_mode, trust_remote_code, custom_generate=None):
        """Refuse the removed modes; transformers would download their code from the Hub."""
        if custom_generate is None and generation_mode in REMOVED_MODES:
            raise ValueError(f"{generation_mode.value} is not part of transformers any more; use {REMOVED_MODES[generation_mode]}.")
        return None

    def _get_stopping_criteria(self, generation_config, stopping_criteria, tokenizer=None, **kwargs: Any):
        """Search `stop_strings` in the text of the caption, with any tokenizer."""
        texts = generation_config.stop_strings
        if texts is not None and tokenizer is not None:  # without a tokenizer, the library raises its error
            generation_config.stop_strings = None
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or []), StopAtText(texts, tokenizer)])
        return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _get_logits_processor(self, generation_config, *args: Any, logits_processor=None, **kwargs: Any):
        """Add `NoRepeatedTokens` if `repeatable_token_ids` is set, and use this module's processors in place of transformers'."""
        own, repeatable = LogitsProcessorList(), getattr(generation_config, "repeatable_token_ids", None)
        if repeatable is not None:
            if not (isinstance(repeatable, (list, tuple)) and all(isinstance(token, int) for token in repeatable)):
                raise ValueError(
                    f"`repeatable_token_ids` is {repeatable!r:.60}: give a list of token ids, or None to allow all repeats."
                )
            if unknown := [token for token in repeatable if not 0 <= token < self.config.vocab_size]:
                raise ValueError(
                    f"`repeatable_token_ids` has {unknown[0]}, but the vocabulary ends at {self.config.vocab_size - 1}."
                )
            own.append(NoRepeatedTokens([*repeatable, *self.end_token_ids], self.config.vocab_size))
        own.extend(logits_processor or [])
        processors = super()._get_logits_processor(generation_config, *args, logits_processor=own, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        for index, processor in enumerate(processors):
            if type(processor) is NoRepeatNGramLogitsProcessor:
                processors[index] = NoRepeatedNgrams(processor.ngram_size)
            elif type(processor) is SuppressTokensLogitsProcessor:
                processors[index] = SuppressedTokens(processor.suppress_tokens, self.config.vocab_size)
            elif type(processor) is MinLengthLogitsProcessor:
                processors[index] = NoEarlyEnd(processor.min_length, processor.eos_token_id, self.config.vocab_size)
            elif type(processor) is MinNewTokensLengthLogitsProcessor:  # transformers adds both for `min_new_tokens`
                length = processor.prompt_length_to_skip + processor.min_new_tokens
                processors[index] = NoEarlyEnd(length, processor.eos_token_id, self.config.vocab_size)
        return processors

    def _prepare_decoder_input_ids_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        batch_size: int,
        model_input_name: str,
        model_kwargs: dict[str, Any],
        decoder_start_token_id: torch.Tensor,
        device: torch.device | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the start token followed by the prompt, [BOS, pad, pad, a, dog], with a mask if there is padding."""
        prompt = model_kwargs.pop("decoder_input_ids", None)
        mask = model_kwargs.pop("decoder_attention_mask", None)
        text, text_mask = model_kwargs.pop("input_ids", None), model_kwargs.pop("attention_mask", None)
        if prompt is None:
            prompt, mask = text, text_mask if mask is None else mask
        start = decoder_start_token_id.to(device or self.device).reshape(-1, 1).expand(batch_size, 1)  # (B, 1)
        if prompt is None or prompt.shape[1] == 0:
            return start.clone(), model_kwargs
        prompt = prompt.to(start.device)  # (B, t)
        if mask is None:
            pad = self.generation_config.pad_token_id
            mask = (prompt != (self.config.pad_token_id if pad is None else pad)).long()  # (B, t)
        first = prompt.gather(1, mask.long().argmax(1, keepdim=True)).squeeze(1)  # (B)
        if (first != start[:, 0]).any():
            prompt = torch.cat([start, prompt], dim=1)  # (B, 1 + t)
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)  # (B, 1 + t)
        past = model_kwargs.get(CACHE_NAME)
        # A prompt that continues a cache includes its words. `generate` removes them if there is a mask for the whole prompt.
        if not mask.all() or (past is not None and past.get_seq_length() > 0):
            model_kwargs["decoder_attention_mask"] = mask.to(start.device)
        return prompt, model_kwargs

    def _assisted_decoding(self, input_ids: torch.Tensor, inputs_tensor: torch.Tensor | None = None, **kwargs: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compute the attentions of assisted decoding in one forward pass over the finished caption.

        The library splits the attentions of a step with several candidates as if word attention had the shape (R, 1, T, T) in every
        model, and returns wrong rows if the first step accepts candidates.
        """
        wanted = kwargs.pop("output_attentions", False)
        kwargs["generation_config"].output_attentions = False
        result = super()._assisted_decoding(input_ids, inputs_tensor=inputs_tensor, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if not wanted or isinstance(result, torch.Tensor):
            return result
        start, length = input_ids.shape[1], result.sequences.shape[1] - 1
        mask = kwargs.get("decoder_attention_mask")
        out = self.model(
            encoder_outputs=kwargs["encoder_outputs"],
            decoder_input_ids=result.sequences[:, :-1],
            decoder_attention_mask=None if mask is None else F.pad(mask, (0, length - mask.shape[1]), value=1),
            use_cache=False,
            output_attentions=True,
            return_dict=True,
        )
        steps = [slice(0, start), *(slice(t, t + 1) for t in range(start, length))]
        result.cross_attentions = tuple((out.cross_attentions[0][:, :, step],) for step in steps)  # (1, 1, n, N) each
        if out.decoder_attentions is None:
            result.decoder_attentions = (None,) * len(steps)
        else:
            words = out.decoder_attentions[0]  # (1, 1, T, T) or (1, 1, T, E)
            widths = [step.stop if self.config.word_attention == "history" else words.shape[-1] for step in steps]
            result.decoder_attentions = tuple((words[:, :, step, :width],) for step, width in zip(steps, widths))
        return result

    def _sample(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **kwargs: Any
    ):
        if is_supported(self, stopping_criteria, generation_config, synced_gpus, kwargs):
            return greedy_search(self, input_ids, logits_processor, generation_config, kwargs)
        return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _beam_search(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **kwargs: Any
    ):
        if is_supported(self, stopping_criteria, generation_config, synced_gpus, kwargs):
            return beam_search(self, input_ids, logits_processor, generation_config, kwargs)
        out: Any = super()._beam_search(input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        # If the padding token is 0, transformers pads finished captions with the end token.
        sequences = out if isinstance(out, torch.Tensor) else out.sequences  # (R, T)
        pad_after_end(sequences[:, input_ids.shape[1] :], generation_config)
        return out

    def _expand_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        """Repeat the rows of words but not the encoder outputs, because the rows of an image share its regions."""
        encoder_outputs = model_kwargs.pop("encoder_outputs", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            expand_size, is_encoder_decoder=False, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "encoder_outputs": encoder_outputs}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        given = model_kwargs.get(CACHE_NAME)
        if given is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"`cache_implementation='{generation_config.cache_implementation}'` does not fit a recurrent decoder: "
                    "leave it out."
                )
            model_kwargs[CACHE_NAME] = AttnCapCache()
        elif given is not None:
            given._is_user_defined = True


__all__ = ["AttnCapGenerationMixin"]
