"""The attention over image regions and words.

Shapes as in docs/model.md: B images, R caption rows (a multiple of B; the rows of one image are adjacent and share its regions),
N = H * W regions, t words so far, C region channels, E word embedding, S LSTM state, A attention space.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_attncap import AttnCapConfig


class DualAttention(GradientCheckpointingLayer):
    """Soft additive attention over the image regions and, with `word_attention="history"`, over the words so far.

    Three linear layers project regions, words and LSTM state to a common space of `attention_dim` dimensions. The projected regions
    K and words u are computed once per image and per word, the projected state q once per step.
    """

    # Training memory is dominated by the scores, (R, N, A) and (R, t, A) per step. Gradient checkpointing recomputes them.

    def __init__(self, config: AttnCapConfig):
        super().__init__()
        self.word_attention = config.word_attention
        self.region_proj = nn.Linear(config.encoder_channels, config.attention_dim, bias=False)  # W_r
        self.query_proj = nn.Linear(config.hidden_size, config.attention_dim)  # W_q; the bias of all scores
        self.region_score = nn.Linear(config.attention_dim, 1, bias=False)  # v_r
        if self.word_attention != "none":
            self.word_proj = nn.Linear(config.word_embed_dim, config.attention_dim, bias=False)  # W_w
        if self.word_attention == "channel":
            self.channel_score = nn.Linear(config.attention_dim, config.word_embed_dim, bias=False)  # V_c
        if self.word_attention == "history":
            self.word_score = nn.Linear(config.attention_dim, 1, bias=False)  # v_w
            self.distance_bias = nn.Parameter(torch.zeros(config.max_word_distance))  # b

    def forward(
        self,
        h: torch.Tensor,
        keys: torch.Tensor,
        regions: torch.Tensor,
        e: torch.Tensor,
        u: Any,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Compute the context vector and the LSTM's word input for one step.

        Args:
            h: the LSTM state before the word, (R, S).
            keys, regions: K (B, N, A) and a (B, N, C).
            e, u: the words so far, newest last, (R, t, E) and (R, t, A). Only `"history"` needs more than the newest word (t = 1).
                u is None with `"none"`.
            mask: (R, t), False at padding; None if there is none.

        Returns:
            z (R, C), alpha (R, N), x (R, E), and beta: (R, t) for `"history"`, (R, E) for `"channel"`, else None.
        """
        q = self.query_proj(h)  # (R, A)
        query = q if self.word_attention == "none" else q + u[:, -1]  # (R, A)
        z, alpha = self.attend_regions(query, keys, regions)  # (R, C), (R, N)
        if self.word_attention == "history":
            x, beta = self.attend_words(q, e, u, mask)  # (R, E), (R, t)
        elif self.word_attention == "channel":
            x, beta = self.attend_channels(query, e[:, -1])  # (R, E), (R, E)
        else:
            x, beta = e[:, -1], None  # (R, E)
        return z, alpha, x, beta

    def attend_regions(self, query: torch.Tensor, keys: torch.Tensor, regions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return z = sum_i alpha_i a_i (R, C) and alpha = softmax_i(v_r . tanh(K_i + query)) (R, N)."""
        query = query.unflatten(0, (keys.shape[0], -1))  # (B, R/B, A)
        scores = self.region_score((keys[:, None] + query[:, :, None]).tanh_()).squeeze(-1)  # (B, R/B, N)
        alpha = scores.softmax(dim=-1)  # (B, R/B, N)
        return torch.bmm(alpha, regions).flatten(0, 1), alpha.flatten(0, 1)  # (R, C), (R, N)

    def attend_channels(self, query: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x = E * beta * e (R, E) and beta = softmax(V_c tanh(query)) over the E channels of the embedding e (R, E)."""
        beta = self.channel_score(torch.tanh(query)).softmax(dim=-1)  # (R, E)
        return beta.shape[-1] * beta * e, beta

    def attend_words(
        self, q: torch.Tensor, e: torch.Tensor, u: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x = sum_j beta_j e_j (R, E) and beta = softmax_j(v_w . tanh(u_j + q) + b_distance) (R, t).

        The distance to a word counts the words between, not the padding. A row that has only padding so far gets beta = 0.
        """
        scores = self.word_score(torch.tanh(u + q[:, None])).squeeze(-1)  # (R, t)
        if mask is None:
            distance = torch.arange(u.shape[1] - 1, -1, -1, device=u.device)  # (t)
        else:
            distance = mask.sum(dim=-1, keepdim=True) - mask.cumsum(dim=-1)  # (R, t)
        scores = scores + self.distance_bias[distance.clamp(max=len(self.distance_bias) - 1)]  # (R, t)
        if mask is None:
            beta = scores.softmax(dim=-1)  # (R, t)
        else:
            beta = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1) * mask  # (R, t)
        return torch.bmm(beta[:, None], e).squeeze(1), beta  # (R, E), (R, t)


__all__ = ["DualAttention"]
