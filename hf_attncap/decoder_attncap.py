"""The decoder: word embedding, attention, one LSTM cell and the deep output, unrolled over the words of a caption.

Shapes as in docs/model.md: B images, R caption rows (a multiple of B; the rows of one image are adjacent and share its regions),
N = H * W regions, T words, C region channels, E word embedding, S LSTM state, A attention space.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils.generic import ModelOutput

from .attention_attncap import DualAttention
from .cache_attncap import AttnCapCache
from .configuration_attncap import AttnCapConfig
from .lstm_attncap import LSTMCell, WeightGradients


@dataclass
class DecoderOutput(ModelOutput):
    """Output of the decoder.

    Attributes:
        last_hidden_state: the input of the output layer, (R, T, E), or (R, T, S) without deep output.
        cache: the cache that was given, now with these words.
        hidden_states: h and c after each word, (R, T, S) each.
        region_attention: alpha, (R, T, N).
        word_attention: beta, (R, T, t0 + T) for "history" after t0 cached words, (R, T, E) for "channel".
    """

    last_hidden_state: torch.Tensor | None = None
    cache: AttnCapCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    region_attention: torch.Tensor | None = None
    word_attention: torch.Tensor | None = None


class AttnCapDecoder(nn.Module):
    """Predicts the features of the next word from the regions and the words so far."""

    def __init__(self, config: AttnCapConfig):
        super().__init__()
        channels, embed, state = config.encoder_channels, config.word_embed_dim, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, embed, padding_idx=config.pad_token_id)
        self.attention = DualAttention(config)
        self.init_h = nn.Linear(channels, state)  # W_h
        self.init_c = nn.Linear(channels, state)  # W_c
        self.cell = LSTMCell(embed + channels, state)  # its input is [x ; z]
        self.gate = nn.Linear(state, channels) if config.gate else None  # W_g
        self.deep_output = config.deep_output
        if config.deep_output:
            self.word_out = nn.Linear(embed, embed, bias=False)  # W_e
            self.state_out = nn.Linear(state, embed)  # W_s
            self.region_out = nn.Linear(channels, embed, bias=False)  # W_z

    def step(
        self,
        h: torch.Tensor,
        c: torch.Tensor,
        keys: torch.Tensor,
        regions: torch.Tensor,
        e: torch.Tensor,
        u: torch.Tensor | None,
        mask: torch.Tensor | None = None,
        gradients: WeightGradients | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Read one word: attention, gate and LSTM. Training and generation both call it.

        Args:
            h, c: the LSTM state before the word, (R, S) each.
            keys, regions, e, u, mask: as in [`DualAttention.forward`].
            gradients: in training, the object that all steps of a loop share.

        Returns:
            h and c after the word (R, S), the gated context vector z (R, C), alpha (R, N) and beta as the attention returns it.
        """
        z, alpha, x, beta = self.attention(h, keys, regions, e, u, mask)  # (R, C), (R, N), (R, E)
        if self.gate is not None:
            z = torch.sigmoid(self.gate(h)) * z  # (R, C)
        h, c = self.cell(torch.cat([x, z], dim=-1), (h, c), gradients)  # (R, S), (R, S)
        return h, c, z, alpha, beta

    def forward(
        self,
        input_ids: torch.Tensor,
        regions: Any,
        attention_mask: torch.Tensor | None = None,
        past: AttnCapCache | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        lengths: torch.Tensor | None = None,
    ) -> DecoderOutput:
        """Unroll the decoder over words.

        Args:
            input_ids: (R, T), the start token first, or the words after those in the cache.
            regions: a, (B, N, C); not used if the cache already has them.
            attention_mask: (R, T), False at padding, which leaves the state unchanged; None if there is none.
            past: the cache to continue and to update.
            output_attentions, output_hidden_states: return them too.
            lengths: (R), for training without mask and cache: steps from `lengths` on are skipped where possible, and 0 in the
                output, which then has `last_hidden_state` and `region_attention`.
        """
        _check_rows(input_ids, regions)
        if lengths is not None:
            return self._forward_packed(input_ids, regions, lengths)
        e, u = self._embed(input_ids)  # (R, T, E), (R, T, A)
        if past is not None and past.is_initialized:
            h, c = past.state.keys, past.state.values  # (R, S), (R, S)
            keys, regions = past.regions.keys, past.regions.values  # (B, N, A), (B, N, C)
        else:
            h, c, keys = self._init_state(regions, len(input_ids))  # (R, S), (R, S), (B, N, A)
            if past is not None:
                past.state.start(h, c)
                past.regions.update(keys, regions)

        states, cells, contexts, alphas, betas = [], [], [], [], []
        for t, words in enumerate(self._words_per_step(*self._add_cached_words(e, u, attention_mask, past), e.shape[1])):
            new_h, new_c, z, alpha, beta = self.step(h, c, keys, regions, *words)
            if attention_mask is not None:
                is_word = attention_mask[:, t, None]  # (R, 1)
                new_h, new_c = torch.where(is_word, new_h, h), torch.where(is_word, new_c, c)  # (R, S), (R, S)
                beta = None if beta is None else beta * is_word
            h, c = new_h, new_c
            if past is not None:
                past.state.update(h, c)
            for outputs, output in zip((states, cells, contexts, alphas, betas), (h, c, z, alpha, beta)):
                outputs.append(output)

        states = torch.stack(states, dim=1)  # (R, T, S)
        hidden = self.project_output(e, states, torch.stack(contexts, dim=1))  # (R, T, E) or (R, T, S)
        if attention_mask is not None:
            hidden = _repeat_at_padding(hidden, attention_mask)
        return DecoderOutput(
            last_hidden_state=hidden,
            cache=past,
            hidden_states=(states, torch.stack(cells, dim=1)) if output_hidden_states else None,
            region_attention=torch.stack(alphas, dim=1) if output_attentions else None,  # (R, T, N)
            word_attention=_stack_word_attention(betas) if output_attentions and betas[0] is not None else None,
        )

    def read(self, tokens: torch.Tensor, cache: AttnCapCache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Read one word per row (R) and update the cache. The same as `forward` with T = 1, with less overhead.

        Returns:
            The input of the output layer (R, E) or (R, S), alpha (R, N) and beta as the attention returns it.
        """
        e, u = self._embed(tokens[:, None])  # (R, 1, E), (R, 1, A)
        words = self._add_cached_words(e, u, None, cache)  # (R, t, E), (R, t, A), (R, t)
        state, regions = cache.state, cache.regions
        h, c, z, alpha, beta = self.step(state.keys, state.values, regions.keys, regions.values, *words)
        state.update(h, c)
        return self.project_output(e[:, 0], h, z), alpha, beta

    def _forward_packed(self, input_ids: torch.Tensor, regions: torch.Tensor, lengths: torch.Tensor) -> DecoderOutput:
        """Unroll over captions of different lengths without the steps after the longest caption of an image.

        Images are sorted by their longest caption, so that the images that still have words are the first ones at each step. Steps
        of a caption that is shorter than the longest one of its image are computed and dropped.
        """
        (R, T), B = input_ids.shape, regions.shape[0]
        longest = lengths.unflatten(0, (B, -1)).amax(dim=1)  # (B)
        order = longest.argsort(descending=True, stable=True)  # (B)
        rows = torch.arange(R, device=order.device).unflatten(0, (B, -1))[order].flatten()  # (R)
        steps = torch.arange(T, device=order.device)  # (T)
        running = (longest[:, None] > steps).sum(dim=0).tolist()  # images with a word at step t, T numbers

        regions = regions[order]  # (B, N, C)
        e, u = self._embed(input_ids[rows])  # (R, T, E), (R, T, A)
        h, c, keys = self._init_state(regions, R)  # (R, S), (R, S), (B, N, A)
        states, contexts, alphas, gradients = [], [], [], WeightGradients()
        for count, words in zip(running, self._words_per_step(e, u, None, T)):
            if count == 0:
                break
            n = count * (R // B)  # captions of these images
            if n < len(h):  # the gradient of a slice is not free
                h, c, keys, regions = h[:n], c[:n], keys[:count], regions[:count]
            words: Any = [x if x is None or n == R else x[:n] for x in words]  # (n, t, .)
            h, c, z, alpha, _ = self.step(h, c, keys, regions, *words, gradients=gradients)
            states.append(h)
            contexts.append(z)
            alphas.append(alpha)

        step, row = (longest[order].repeat_interleave(R // B) > steps[:, None]).nonzero(as_tuple=True)  # of each computed state
        wanted = (step < lengths[rows[row]]).nonzero().squeeze(-1)  # (P)
        step, row = step[wanted], row[wanted]  # (P), (P)
        states, contexts, alphas = (torch.cat(parts)[wanted] for parts in (states, contexts, alphas))  # (P, S), (P, C), (P, N)
        hidden = self.project_output(e[row, step], states, contexts)  # (P, E) or (P, S)
        place = rows[row], step
        return DecoderOutput(
            last_hidden_state=hidden.new_zeros(R, T, hidden.shape[-1]).index_put(place, hidden),  # (R, T, E) or (R, T, S)
            region_attention=alphas.new_zeros(R, T, alphas.shape[-1]).index_put(place, alphas),  # (R, T, N)
        )

    def _embed(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the word embeddings e (R, T, E) and their projection u (R, T, A), None where words are not attended."""
        e = self.embed_tokens(input_ids)  # (R, T, E)
        return e, None if self.attention.word_attention == "none" else self.attention.word_proj(e)

    def _init_state(self, regions: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return h_0 and c_0 (R, S), and the keys K (B, N, A), all from the regions (B, N, C)."""
        mean = regions.mean(dim=1)  # (B, C)
        h, c = torch.tanh(self.init_h(mean)), torch.tanh(self.init_c(mean))  # (B, S), (B, S)
        captions = rows // regions.shape[0]  # per image
        return h.repeat_interleave(captions, 0), c.repeat_interleave(captions, 0), self.attention.region_proj(regions)

    def _add_cached_words(self, e, u, mask, past) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Put the cached words before the new ones: e (R, t0 + T, E), u (R, t0 + T, A) and mask, None if there is no padding."""
        if self.attention.word_attention != "history":
            return e, u, None
        if past is None:
            return e, u, mask
        past.words.all_words = past.words.all_words and mask is None
        past.words.update(u, e, torch.ones(e.shape[:2], dtype=torch.bool, device=e.device) if mask is None else mask)
        return past.words.values, past.words.keys, None if past.words.all_words else past.words.mask

    def _words_per_step(self, e, u, mask, length: int) -> list[tuple]:
        """Return, for each of the last `length` words, the e, u and mask of the words that its step attends to, newest last."""
        if self.attention.word_attention == "history":
            ends = range(e.shape[1] - length + 1, e.shape[1] + 1)
            return [(e[:, :end], u[:, :end], None if mask is None else mask[:, :end]) for end in ends]
        # `split` instead of slices: its gradient is one concatenation instead of a tensor of zeros per step.
        us = [None] * length if u is None else u.split(1, dim=1)  # T of (R, 1, A)
        return [(e_t, u_t, None) for e_t, u_t in zip(e.split(1, dim=1), us)]

    def project_output(self, e: torch.Tensor, h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Return the input of the output layer: W_e e + W_s h + W_z z (..., E), or h (..., S) without deep output."""
        return self.word_out(e) + self.state_out(h) + self.region_out(z) if self.deep_output else h


def _check_rows(input_ids: torch.Tensor, regions: torch.Tensor | None) -> None:
    if regions is not None and input_ids.shape[0] % regions.shape[0] != 0:
        raise ValueError(
            f"{input_ids.shape[0]} rows of words for {regions.shape[0]} images: give every image the same number of captions, "
            "those of one image in adjacent rows."
        )


def _repeat_at_padding(hidden: torch.Tensor, is_word: torch.Tensor) -> torch.Tensor:
    """Replace the output at padding by that of the last word before it: a prompt may end in padding."""
    position = torch.arange(is_word.shape[1], device=hidden.device)  # (T)
    last_word = torch.where(is_word, position, 0).cummax(dim=1).values  # (R, T)
    return hidden.gather(1, last_word[..., None].expand_as(hidden))


def _stack_word_attention(betas: list[torch.Tensor]) -> torch.Tensor:
    """Stack beta of all steps to (R, T, E) or (R, T, t0 + T); the weights of later words are 0."""
    width = betas[-1].shape[-1]
    return torch.stack([F.pad(beta, (0, width - beta.shape[-1])) for beta in betas], dim=1)


__all__ = ["AttnCapDecoder"]
