"""Regions and words so far to what the output layer sees: DualAttention and the LSTM step, unrolled.

Letters as in docs/model.md: B images, R caption rows (a multiple of B; the rows of an image are adjacent and share its regions),
N = H * W regions, T words, C region channels, E word embedding, S LSTM state, A attention space.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput

from .cache_attncap import AttnCapCache
from .configuration_attncap import AttnCapConfig
from .packed_attncap import PackedStates, StepResult, unroll_packed


class DualAttention(GradientCheckpointingLayer):
    """Three linear layers bring regions, words and state into one space; both regions and words are attended there.

    Its scores, (R, N, A) and (R, t, A) a step, are what training holds in memory, so gradient checkpointing recomputes them.
    """

    def __init__(self, config: AttnCapConfig):
        super().__init__()
        self.kind = config.word_attention
        self.region_proj = nn.Linear(config.encoder_channels, config.attention_dim, bias=False)  # W_r
        self.query_proj = nn.Linear(config.hidden_size, config.attention_dim)  # W_q; its bias serves all scores
        self.region_score = nn.Linear(config.attention_dim, 1, bias=False)  # v_r
        if self.kind != "none":
            self.word_proj = nn.Linear(config.word_embed_dim, config.attention_dim, bias=False)  # W_w
        if self.kind == "channel":
            self.channel_score = nn.Linear(config.attention_dim, config.word_embed_dim, bias=False)  # V_c
        if self.kind == "history":
            self.word_score = nn.Linear(config.attention_dim, 1, bias=False)  # v_w
            self.distance_bias = nn.Parameter(torch.zeros(config.max_word_distance))  # b

    def forward(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        regions: torch.Tensor,
        e: torch.Tensor,
        u: Any = None,
        memory_e: Any = None,
        memory_u: Any = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """One step: the state asks the regions and the words.

        Args:
            q: the state's projection W_q h, (R, A).
            keys, regions: K (B, N, A) and a (B, N, C).
            e, u: the previous word, (R, E) and (R, A).
            memory_e, memory_u, mask: the words so far, as in `reread`; for `"history"` alone.

        Returns:
            z (R, C), alpha (R, N), x (R, E) and beta, (R, t) or (R, E), or None where x is e.
        """
        query = q if self.kind == "none" else q + u  # (R, A)
        z, alpha = self.look(query, keys, regions)  # (R, C), (R, N)
        if self.kind == "channel":
            x, beta = self.weigh_channels(q, u, e)  # (R, E), (R, E)
        elif self.kind == "history":
            x, beta = self.reread(q, memory_u, memory_e, mask)  # (R, E), (R, t)
        else:
            x, beta = e, None
        return z, alpha, x, beta

    def look(self, query: torch.Tensor, keys: torch.Tensor, regions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where to look: z = sum_i alpha_i a_i with alpha = softmax(v_r . tanh(K + query)).

        Args:
            query: q_t, plus u_{t-1} where words score regions, (R, A).
            keys: K, (B, N, A), shared by the R / B rows of an image.
            regions: a, (B, N, C).

        Returns:
            z (R, C) and alpha (R, N).
        """
        query = query.unflatten(0, (keys.shape[0], -1))  # (B, R/B, A)
        scores = self.region_score(torch.tanh(keys[:, None] + query[:, :, None]))  # (B, R/B, N, 1)
        alpha = scores.squeeze(-1).softmax(dim=-1)  # (B, R/B, N)
        return torch.bmm(alpha, regions).flatten(0, 1), alpha.flatten(0, 1)  # (R, C), (R, N)

    def weigh_channels(self, q: torch.Tensor, u: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x = E * beta * e with beta = softmax over the components of e (R, E), and beta (R, E)."""
        beta = self.channel_score(torch.tanh(u + q)).softmax(dim=-1)  # (R, E)
        return beta.shape[-1] * beta * e, beta

    def reread(
        self, q: torch.Tensor, u: torch.Tensor, e: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x = sum_j beta_j e_j with beta = softmax(v_w . tanh(u_j + q) + b_distance) over the words so far.

        Args:
            q: the state's projection, (R, A).
            u, e: the words so far, the newest last, (R, t, A) and (R, t, E).
            mask: (R, t), False where a position is padding; distances count words, not padding.

        Returns:
            x (R, E) and beta (R, t).
        """
        scores = self.word_score(torch.tanh(u + q[:, None])).squeeze(-1)  # (R, t)
        farthest = self.distance_bias.shape[0] - 1
        if mask is None:
            t = u.shape[1]
            distance = torch.arange(t - 1, -1, -1, device=u.device).clamp(max=farthest)  # (t)
            beta = (scores + self.distance_bias[distance]).softmax(dim=-1)  # (R, t)
        else:
            distance = (mask.sum(-1, keepdim=True) - mask.cumsum(-1)).clamp(max=farthest)  # (R, t)
            scores = scores + self.distance_bias[distance]  # (R, t)
            beta = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)  # (R, t)
            beta = beta * mask  # a row that has no word yet
        return torch.bmm(beta[:, None], e).squeeze(1), beta  # (R, E), (R, t)


@dataclass
class DecoderOutput(ModelOutput):
    """`last_hidden_state`: what the output layer sees, (R, T, E), or (R, T, S) without deep output; the rest as in the model."""

    last_hidden_state: torch.Tensor | None = None
    cache: AttnCapCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    region_attention: torch.Tensor | None = None
    word_attention: torch.Tensor | None = None


class AttnCapDecoder(nn.Module):
    """Embedding, attention, one LSTM cell and the deep output, unrolled over the words."""

    def __init__(self, config: AttnCapConfig):
        super().__init__()
        channels, embed, state = config.encoder_channels, config.word_embed_dim, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, embed, padding_idx=config.pad_token_id)
        self.attention = DualAttention(config)
        self.init_h = nn.Linear(channels, state)  # W_h
        self.init_c = nn.Linear(channels, state)  # W_c
        self.cell = nn.LSTMCell(embed + channels, state)  # of [x ; z]
        self.gate = nn.Linear(state, channels) if config.gate else None  # W_g
        self.deep_output = config.deep_output
        if config.deep_output:
            self.word_out = nn.Linear(embed, embed, bias=False)  # W_e
            self.state_out = nn.Linear(state, embed)  # W_s
            self.region_out = nn.Linear(channels, embed, bias=False)  # W_z

    def begin(self, regions: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """h_0 and c_0 (R, S) and the keys K (B, N, A), once an image."""
        mean = regions.mean(dim=1)  # (B, C)
        h, c = torch.tanh(self.init_h(mean)), torch.tanh(self.init_c(mean))  # (B, S)
        repeats = rows // regions.shape[0]
        return (
            h.repeat_interleave(repeats, 0),
            c.repeat_interleave(repeats, 0),
            self.attention.region_proj(regions),
        )

    def step(self, h: torch.Tensor, c: torch.Tensor, keys: torch.Tensor, regions: torch.Tensor, *words: Any) -> StepResult:
        """Read one word. Every layer is called, so that hooks, adapters and offloading work.

        Args:
            h, c: the state, (R, S) each.
            keys, regions: K (B, N, A) and a (B, N, C).
            words: e, u, memory_e, memory_u and mask, as `DualAttention` takes them.

        Returns:
            h and c after the word (R, S), z after the gate (R, C), and alpha (R, N) and beta as `DualAttention` returns them.
        """
        z, alpha, x, beta = self.attention(self.attention.query_proj(h), keys, regions, *words)
        if self.gate is not None:
            z = torch.sigmoid(self.gate(h)) * z  # (R, C)
        h, c = self.cell(torch.cat([x, z], dim=-1), (h, c))  # (R, S)
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
    ) -> DecoderOutput | PackedStates:
        """Unroll over the words (R, T), after those that the cache already holds.

        With `lengths` (R), the steps that each caption needs, the result is that of `unroll_packed`, without mask and cache.
        """
        if lengths is not None:
            return unroll_packed(self, input_ids, regions, lengths)
        rows, length = input_ids.shape
        e = self.embed_tokens(input_ids)  # (R, T, E)
        kind, attend = self.attention.kind, self.attention
        u = attend.word_proj(e) if kind != "none" else None  # (R, T, A)
        if past is not None and past.is_initialized:
            h, c = past.state.keys, past.state.values  # (R, S)
            keys, regions = past.regions.keys, past.regions.values  # (B, N, A), (B, N, C)
        else:
            h, c, keys = self.begin(regions, rows)
            if past is not None:
                past.state.start(h, c)
                past.regions.update(keys, regions)
        memory_u, memory_e, memory_mask = self._remember(u, e, attention_mask, past)  # (R, t0 + T, .)
        earlier = 0 if memory_e is None else memory_e.shape[1] - length

        # unbind, not [:, t]: its gradient is one stack instead of T tensors of zeros
        e_t, u_t = e.unbind(1), (None,) * length if u is None else u.unbind(1)  # T of (R, E), T of (R, A)
        states, cells, glimpses, alphas, betas = [], [], [], [], []
        for t in range(length):
            end = earlier + t + 1
            memory = [None if x is None else x[:, :end] for x in (memory_e, memory_u, memory_mask)]  # (R, t, .)
            new_h, new_c, z, alpha, beta = self.step(h, c, keys, regions, e_t[t], u_t[t], *memory)
            if attention_mask is not None:
                is_word = attention_mask[:, t, None]  # (R, 1)
                new_h, new_c = torch.where(is_word, new_h, h), torch.where(is_word, new_c, c)
                beta = beta * is_word if beta is not None else None
            h, c = new_h, new_c
            if past is not None:
                past.state.update(h, c)
            states.append(h)
            cells.append(c)
            glimpses.append(z)
            alphas.append(alpha)
            betas.append(beta)

        states = torch.stack(states, dim=1)  # (R, T, S)
        out = self.deepen(e, states, torch.stack(glimpses, dim=1)) if self.deep_output else states
        if attention_mask is not None:
            out = self._repeat_at_padding(out, attention_mask)  # (R, T, E) or (R, T, S)
        return DecoderOutput(
            last_hidden_state=out,
            cache=past,
            hidden_states=(states, torch.stack(cells, dim=1)) if output_hidden_states else None,
            region_attention=torch.stack(alphas, dim=1) if output_attentions else None,  # (R, T, N)
            word_attention=self._stack_word_attention(betas) if output_attentions and betas[0] is not None else None,
        )

    def _remember(self, u, e, mask, past):
        """The words to attend to, new ones last: u (R, t, A), e (R, t, E), mask (R, t) or None if all are words."""
        if self.attention.kind != "history":
            return None, None, None
        if past is None:
            return u, e, mask
        new_mask = torch.ones(e.shape[:2], dtype=torch.bool, device=e.device) if mask is None else mask  # (R, T)
        past.words.update(u, e, new_mask)
        some_padding = mask is not None or not past.words.all_words
        past.words.all_words = not some_padding
        return past.words.keys, past.words.values, past.words.mask if some_padding else None

    def deepen(self, e: torch.Tensor, h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """What the output layer sees, (..., E), from word e, state h and glimpse z."""
        return self.word_out(e) + self.state_out(h) + self.region_out(z)  # (..., E)

    def _repeat_at_padding(self, out: torch.Tensor, is_word: torch.Tensor) -> torch.Tensor:
        """Behind padding comes what comes behind the last word before it: a prompt may end in padding."""
        position = torch.arange(is_word.shape[1], device=out.device)  # (T)
        last_word = torch.where(is_word, position, 0).cummax(dim=1).values  # (R, T)
        return out.gather(1, last_word[..., None].expand_as(out))

    def _stack_word_attention(self, betas: list[torch.Tensor]) -> torch.Tensor:
        """(R, T, E), or (R, T, t): the weights of words not yet there are 0."""
        width = betas[-1].shape[-1]
        return torch.stack([F.pad(beta, (0, width - beta.shape[-1])) for beta in betas], dim=1)


__all__ = ["AttnCapDecoder", "DualAttention"]
