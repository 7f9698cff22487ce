"""The AttnCap captioner: GridEncoder -> DualAttention -> decoder step -> AttnCapForConditionalGeneration.

Letters as in docs/model.md: B images, R caption rows (a multiple of B; the rows of an image are adjacent and share its regions),
N = H * W regions, T words, C region channels, E word embedding, S LSTM state, A attention space, V vocabulary.
"""

import math
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils.generic import can_return_tuple

from .backbone_attncap import build_trunk, load_backbone_weights, run_checkpointed, trunk_channels
from .cache_attncap import AttnCapCache
from .configuration_attncap import AttnCapConfig
from .generation_attncap import AttnCapGenerationMixin
from .word_vectors_attncap import read_word_vectors


@dataclass
class GridEncoderOutput(ModelOutput):
    """What the encoder saw.

    Attributes:
        last_hidden_state: the regions a, (B, N, C), row by row of the grid.
        grid_shape: (H, W) with N = H * W.
        hidden_states: with `output_hidden_states`, the windows before and after pooling, (B, h * w, C) and (B, N, C).
    """

    last_hidden_state: torch.Tensor | None = None
    grid_shape: tuple[int, int] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class GridEncoder(nn.Module):
    """Picture to regions: torchvision trunk, 1x1 convolution of C windows, optional pooling to a fixed grid."""

    main_input_name = "pixel_values"

    def __init__(self, config: AttnCapConfig):
        super().__init__()
        self.backbone = build_trunk(config.backbone, config.backbone_padding)
        for module in self.backbone.modules():
            module.keep_torchvision_init = True  # type: ignore[assignment]
        self.windows = nn.Conv2d(trunk_channels(self.backbone), config.encoder_channels, kernel_size=1)
        grid = config.grid_size
        self.pool = nn.Identity() if grid is None else nn.AdaptiveAvgPool2d(grid if isinstance(grid, int) else tuple(grid))
        self.frozen = config.freeze_backbone
        self.batch_norm_frozen = config.freeze_batch_norm
        self.gradient_checkpointing = False
        self.train()  # modules begin in training mode, frozen ones must not

    def train(self, mode: bool = True):
        """A frozen backbone stays in evaluation mode, frozen batch norm too: their statistics do not move."""
        super().train(mode)
        for module in self.backbone.modules():
            if self.frozen or (self.batch_norm_frozen and isinstance(module, nn.modules.batchnorm._BatchNorm)):
                module.training = False
        return self

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The trunk's map (B, D, h, w) of pictures (B, 3, height, width): what a cache for a frozen encoder keeps."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"`pixel_values` must be (B, 3, height, width), but its shape is {tuple(pixel_values.shape)}.")
        x = pixel_values.to(self.windows.weight.dtype)  # (B, 3, height, width)
        for child in self.backbone:
            stages = child if isinstance(child, nn.Sequential) else [child]
            for stage in stages:
                is_block = next(stage.children(), None) is not None
                if self.gradient_checkpointing and self.training and is_block and x.requires_grad:
                    x = run_checkpointed(stage, x, self._gradient_checkpointing_func)
                else:
                    x = stage(x)
        return x  # (B, D, h, w)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        backbone_features: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> GridEncoderOutput:
        """Regions of pictures (B, 3, height, width), or of their `features` (B, D, h, w) computed before."""
        if backbone_features is None:
            if pixel_values is None:
                raise ValueError("The encoder needs `pixel_values` (B, 3, height, width) or `backbone_features` (B, D, h, w).")
            backbone_features = self.features(pixel_values)
        f = backbone_features.to(self.windows.weight.dtype)  # (B, D, h, w)
        windows = self.windows(f).flatten(2).mT  # (B, h * w, C)
        grid = self.pool(windows.mT.unflatten(-1, f.shape[-2:]))  # (B, C, H, W)
        a = grid.flatten(2).mT  # (B, N, C)
        hidden_states = (windows, a) if output_hidden_states else None
        return GridEncoderOutput(last_hidden_state=a, grid_shape=tuple(grid.shape[-2:]), hidden_states=hidden_states)


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
        h: torch.Tensor,
        keys: torch.Tensor,
        regions: torch.Tensor,
        e: torch.Tensor,
        u: torch.Tensor | None = None,
        memory_e: torch.Tensor | None = None,
        memory_u: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """One step: the state h (R, S) asks the regions and the words.

        Args:
            keys, regions: K (B, N, A) and a (B, N, C).
            e, u: the previous word, (R, E) and (R, A).
            memory_e, memory_u, mask: the words so far, as in `reread`; for `"history"` alone.

        Returns:
            z (R, C), alpha (R, N), x (R, E) and beta, (R, t) or (R, E), or None where x is e.
        """
        q = self.query_proj(h)  # (R, A)
        z, alpha = self.look(q if u is None else q + u, keys, regions)  # (R, C), (R, N)
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


class CellWeights(NamedTuple):
    """An LSTM cell's weights for x (4S, E), for z (4S, C) and for h (4S, S), and its two biases (4S)."""

    word_in: torch.Tensor
    region_in: torch.Tensor
    state_in: torch.Tensor
    bias_in: torch.Tensor
    bias_state: torch.Tensor


class OpenCell(nn.LSTMCell):
    """An LSTM cell for [x ; z] that leaves the products to the decoder, which may know x of all steps at once.

    The weights are asked for by a call because a call brings them where they are offloaded.
    """

    def forward(self, width: int) -> CellWeights:  # type: ignore[override]
        """The weights, x being `width` wide."""
        word_in, region_in = self.weight_ih.tensor_split([width], dim=1)
        return CellWeights(word_in, region_in, self.weight_hh, self.bias_ih, self.bias_hh)


def _lstm(gates: torch.Tensor, h: torch.Tensor, c: torch.Tensor, weights: CellWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """One LSTM step from the input's share of the gates (R, 4S), its bias included."""
    gates = gates + F.linear(h, weights.state_in, weights.bias_state)  # (R, 4S)
    i, f, g, o = gates.chunk(4, dim=-1)  # (R, S) each
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # (R, S)
    return torch.sigmoid(o) * torch.tanh(c), c


@dataclass
class DecoderOutput(ModelOutput):
    """`last_hidden_state`: what the output layer sees, (R, T, E), or (R, T, S) without deep output; the rest as in the model."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: AttnCapCache | None = None
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
        self.cell = OpenCell(embed + channels, state)
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

    def forward(
        self,
        input_ids: torch.Tensor,
        regions: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: AttnCapCache | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> DecoderOutput:
        """Unroll over the words (R, T), after those that the cache already holds."""
        rows, length = input_ids.shape
        past = past_key_values
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

        weights = self.cell(e.shape[-1])
        if kind in ("none", "score"):
            word_gates = F.linear(e, weights.word_in, weights.bias_in).unbind(1)  # T of (R, 4S), all words in one product
        # unbind, not [:, t]: its gradient is one stack instead of T tensors of zeros
        e_t, u_t = e.unbind(1), (None,) * length if u is None else u.unbind(1)  # T of (R, E), T of (R, A)
        states, cells, glimpses, alphas, betas = [], [], [], [], []
        for t in range(length):
            end = earlier + t + 1
            memory = [None if x is None else x[:, :end] for x in (memory_e, memory_u, memory_mask)]  # (R, t, .)
            z, alpha, x, beta = self.attention(h, keys, regions, e_t[t], u_t[t], *memory)  # (R, C), (R, N), (R, E), (R, .)
            if self.gate is not None:
                z = torch.sigmoid(self.gate(h)) * z  # (R, C)
            gates = word_gates[t] if beta is None else F.linear(x, weights.word_in, weights.bias_in)  # (R, 4S)
            new_h, new_c = _lstm(gates + F.linear(z, weights.region_in), h, c, weights)  # (R, S)
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
        out = self._deep_output(e, states, torch.stack(glimpses, dim=1)) if self.deep_output else states
        if attention_mask is not None:
            # Where padding follows a word, that word still says what comes next.
            last = (attention_mask * torch.arange(length, device=e.device)).cummax(dim=1).values  # (R, T)
            out = out.gather(1, last[..., None].expand_as(out))  # (R, T, .)
        if attention_mask is not None:
            out = self._repeat_at_padding(out, attention_mask)  # (R, T, E) or (R, T, S)
        return DecoderOutput(
            last_hidden_state=out,
            past_key_values=past,
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

    def _deep_output(self, e: torch.Tensor, h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.word_out(e) + self.state_out(h) + self.region_out(z)  # (R, T, E)

    def _repeat_at_padding(self, out: torch.Tensor, is_word: torch.Tensor) -> torch.Tensor:
        """Behind padding comes what comes behind the last word before it: a prompt may end in padding."""
        position = torch.arange(is_word.shape[1], device=out.device)  # (T)
        last_word = torch.where(is_word, position, 0).cummax(dim=1).values  # (R, T)
        return out.gather(1, last_word[..., None].expand_as(out))

    def _stack_word_attention(self, betas: list[torch.Tensor]) -> torch.Tensor:
        """(R, T, E), or (R, T, t): the weights of words not yet there are 0."""
        width = betas[-1].shape[-1]
        return torch.stack([F.pad(beta, (0, width - beta.shape[-1])) for beta in betas], dim=1)


class AttnCapPreTrainedModel(PreTrainedModel):
    """Loading, saving, initialisation and freezing."""

    config_class = AttnCapConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["GridEncoder", "AttnCapDecoder"]
    _skip_keys_device_placement = ["past_key_values"]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """As for transformers' own models: containers without weights of their own are asked as well, the encoder is one."""
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "keep_torchvision_init", False):
            return
        if isinstance(module, GridEncoder):
            self._init_backbone(module)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = math.sqrt(6 / (module.weight.shape[0] + module.weight.shape[1]))  # Glorot
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LSTMCell):
            bound = module.hidden_size**-0.5
            for weight in (module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh):
                init.uniform_(weight, -bound, bound)
        elif isinstance(module, DualAttention) and module.kind == "history":
            init.zeros_(module.distance_bias)

    def _init_backbone(self, encoder: GridEncoder) -> None:
        """Backbone weights that no checkpoint has set get torchvision's own initialisation, which each of its models has."""
        own = {**dict(encoder.backbone.named_parameters()), **dict(encoder.backbone.named_buffers())}
        if all(value.is_meta or getattr(value, "_is_hf_initialized", False) for value in own.values()):
            return
        with torch.device("cpu"):
            fresh = build_trunk(self.config.backbone, self.config.backbone_padding)
        for name, value in fresh.state_dict().items():
            init.copy_(own[name], value)

    def _apply_freezing(self) -> None:
        """`requires_grad` as the config says; loading gives every parameter a gradient."""
        base: AttnCapModel = self.base_model  # type: ignore[assignment]
        if self.config.freeze_backbone:
            base.encoder.backbone.requires_grad_(False)
        if self.config.freeze_word_embeddings:
            base.decoder.embed_tokens.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model._apply_freezing()
        return loaded


class AttnCapModel(AttnCapPreTrainedModel):
    """Encoder and decoder without the output layer."""

    def __init__(self, config: AttnCapConfig):
        super().__init__(config)
        self.encoder = GridEncoder(config)
        self.decoder = AttnCapDecoder(config)
        self.post_init()
        self._apply_freezing()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: GridEncoderOutput | tuple | None = None,
        backbone_features: torch.Tensor | None = None,
        past_key_values: AttnCapCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        r"""Picture and words so far to what the output layer sees.

        Args:
            pixel_values: (B, 3, height, width); or give `encoder_outputs`, or `backbone_features` (B, D, h, w).
            decoder_input_ids: (R, T), R a multiple of B: the captions of one image are adjacent rows. Default: the start token.
            decoder_attention_mask: (R, T), or (R, t0 + T) with a cache of t0 positions; 0 marks padding, which changes nothing.
            past_key_values: the cache that an earlier call returned.

        Returns:
            `last_hidden_state` (R, T, E) or, without deep output, (R, T, S); `cross_attentions`: one (R, 1, T, N);
            `decoder_attentions`: one (R, 1, T, t0 + T) for "history", (R, 1, T, E) for "channel", else None;
            `decoder_hidden_states`: the LSTM's h and c after each word, (R, T, S) both.
        """
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = self.config.use_cache if use_cache is None else use_cache
        past_key_values = _checked_cache(past_key_values, use_cache)
        if encoder_outputs is None and (past_key_values is None or not past_key_values.is_initialized):
            encoder_outputs = self.encoder(pixel_values, backbone_features, output_hidden_states=output_hidden_states)
        elif isinstance(encoder_outputs, (tuple, list)):
            encoder_outputs = GridEncoderOutput(last_hidden_state=encoder_outputs[0])
        regions = encoder_outputs.last_hidden_state if encoder_outputs is not None else None  # (B, N, C)
        if decoder_input_ids is None:
            start = torch.tensor([[self.config.decoder_start_token_id]], device=(self if regions is None else regions).device)
            decoder_input_ids = start.expand(1 if regions is None else regions.shape[0], 1)  # (B, 1)
        _check_rows(decoder_input_ids, regions)

        out = self.decoder(
            decoder_input_ids,
            regions,
            _mask_of_new_words(decoder_attention_mask, decoder_input_ids, past_key_values),
            past_key_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=out.last_hidden_state,
            past_key_values=out.past_key_values,
            decoder_hidden_states=out.hidden_states,
            decoder_attentions=None if out.word_attention is None else (out.word_attention[:, None],),
            cross_attentions=None if out.region_attention is None else (out.region_attention[:, None],),
            encoder_last_hidden_state=regions,
            encoder_hidden_states=encoder_outputs.hidden_states if output_hidden_states and encoder_outputs else None,
        )


def _checked_cache(cache: Any, use_cache: bool) -> AttnCapCache | None:
    if cache is None:
        return AttnCapCache() if use_cache else None
    if not isinstance(cache, AttnCapCache):
        raise ValueError(
            f"`past_key_values` is a {type(cache).__name__}, but the decoder's state is an `AttnCapCache`: pass the one that an "
            "earlier call returned, or none."
        )
    return cache


def _check_rows(decoder_input_ids: torch.Tensor, regions: torch.Tensor | None) -> None:
    if regions is not None and decoder_input_ids.shape[0] % regions.shape[0] != 0:
        raise ValueError(
            f"{decoder_input_ids.shape[0]} rows of words for {regions.shape[0]} images: give every image the same number of "
            "captions, those of one image in adjacent rows."
        )


def _mask_of_new_words(mask, decoder_input_ids, past) -> torch.Tensor | None:
    """The mask (R, T) of the new positions alone, or None if it masks nothing that is known to be padding."""
    if mask is None:
        return None
    length = decoder_input_ids.shape[1]
    start = past.get_seq_length() if past is not None and mask.shape[1] != length else 0
    mask = mask[:, start : start + length].bool()  # (R, T)
    if mask.shape != decoder_input_ids.shape:
        raise ValueError(
            f"`decoder_attention_mask` covers {tuple(mask.shape)} of the {tuple(decoder_input_ids.shape)} new words; it must have "
            "their shape, or that of the words so far and the new ones together."
        )
    return mask


class AttnCapForConditionalGeneration(AttnCapPreTrainedModel, AttnCapGenerationMixin):
    """The captioner: picture in, words out.

    Example:

    ```python
    model = AttnCapForConditionalGeneration.from_pretrained(folder)
    ids = model.generate(pixel_values=processor(images=image, return_tensors="pt").pixel_values)
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: AttnCapConfig):
        super().__init__(config)
        self.model = AttnCapModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.word_embed_dim if config.deep_output else config.hidden_size, config.vocab_size)  # W_o
        self.post_init()
        self._apply_freezing()
        if self.generation_config.suppress_tokens is None:
            never = {config.unk_token_id, config.pad_token_id, config.bos_token_id} - {
                None,
                config.eos_token_id,
            }
            self.generation_config.suppress_tokens = sorted(never)

    @classmethod
    def from_pretrained_parts(
        cls,
        config: AttnCapConfig,
        backbone_weights: str | os.PathLike | None = None,
        word_vectors: str | os.PathLike | None = None,
        tokenizer: Any = None,
        freeze_word_embeddings: bool = True,
    ) -> "AttnCapForConditionalGeneration":
        """A new captioner from pretrained parts; the decoder is random. What it saves needs neither part again.

        Args:
            config: of the new model. Its `image_mean` and `image_std` must be what a backbone file expects; for weights by
                torchvision's name they are set from the weights.
            backbone_weights: a torchvision weight name ("DEFAULT", "IMAGENET1K_V2"), or a state dict on disk (.safetensors,
                .pth) in torchvision's layout. None: random.
            word_vectors: a word2vec, GloVe or fastText text file of `config.word_embed_dim` dimensions.
            tokenizer: whose words are looked up there; needed with `word_vectors`.
            freeze_word_embeddings: keep the loaded word vectors as they are in training.

        Raises:
            ValueError: for weights or vectors that do not fit, naming what would.
        """
        if word_vectors is not None:
            if tokenizer is None:
                raise ValueError("`word_vectors` needs the `tokenizer` whose words are looked up in it.")
            config.freeze_word_embeddings = freeze_word_embeddings
            config.validate()
        model = cls(config)
        if backbone_weights is not None:
            encoder = model.model.encoder
            normalisation = load_backbone_weights(encoder.backbone, config.backbone, backbone_weights)
            if normalisation is not None:
                config.image_mean, config.image_std = normalisation
        if word_vectors is not None:
            embedding = model.get_input_embeddings().weight  # (V, E)
            rows, vectors = read_word_vectors(word_vectors, tokenizer.get_vocab(), config.word_embed_dim)
            with torch.no_grad():
                embedding[rows] = vectors.to(embedding)
        return model

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: GridEncoderOutput | tuple | None = None,
        backbone_features: torch.Tensor | None = None,
        past_key_values: AttnCapCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        r"""Logits of the next words, and the loss where labels are given.

        Args:
            labels: (R, T) words and end token, -100 where there is none; R a multiple of B, the captions of an image adjacent.
            num_items_in_batch: M, the number of labels over all accumulated batches and processes; default this batch's own.

        The other arguments are those of [`AttnCapModel.forward`].

        Returns:
            `loss` = cross-entropy + alpha_c * regulariser; `logits` (R, T, V); the attentions as in [`AttnCapModel.forward`].
        """
        if labels is not None:
            use_cache = False if use_cache is None else use_cache
            if decoder_input_ids is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        want_attention = self.config.output_attentions if output_attentions is None else output_attentions
        out = self.model(
            pixel_values,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            backbone_features,
            past_key_values,
            use_cache=use_cache,
            output_attentions=want_attention or labels is not None,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.lm_head(self.dropout(out.last_hidden_state))  # (R, T, V)
        loss = None
        if labels is not None:
            loss = self.caption_loss(logits, labels, out.cross_attentions[0].squeeze(1), num_items_in_batch)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            decoder_hidden_states=out.decoder_hidden_states,
            decoder_attentions=out.decoder_attentions if want_attention else None,
            cross_attentions=out.cross_attentions if want_attention else None,
            encoder_last_hidden_state=out.encoder_last_hidden_state,
            encoder_hidden_states=out.encoder_hidden_states,
        )

    def caption_loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        alpha: torch.Tensor,
        num_items: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Cross-entropy plus the doubly stochastic regulariser (Show, Attend and Tell, equation 14), each summed over M words.

        R = sum_b n_b mean_i (1 - sum_t alpha_bti)^2 / M over real words t, so that it adds up over accumulated batches and
        processes as the cross-entropy does.

        Args:
            logits: (R, T, V).
            labels: (R, T), -100 where there is none.
            alpha: region attention, (R, T, N).
            num_items: M; default the number of labels here.
        """
        is_word = labels != -100  # (R, T)
        words = is_word.sum(dim=1)  # (R)
        total = words.sum() if num_items is None else torch.as_tensor(num_items, device=logits.device)
        cross_entropy = F.cross_entropy(
            logits.flatten(0, 1).float() if logits.dtype != torch.float64 else logits.flatten(0, 1),
            labels.flatten(),
            ignore_index=-100,
            label_smoothing=float(self.config.label_smoothing),
            reduction="sum",
        )
        seen = (alpha.to(cross_entropy.dtype) * is_word[..., None]).sum(dim=1)  # (R, N)
        uneven = (words * (1 - seen).square().mean(dim=1)).sum()
        return (cross_entropy + self.config.alpha_c * uneven) / total

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """The labels (R, T) shifted right behind the start token, padding in place of -100."""
        start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)  # (R, T)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    @torch.no_grad()
    def caption_attentions(
        self,
        sequences: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        encoder_outputs: GridEncoderOutput | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where the model looked for each word of finished captions, whatever way they were found (beams too).

        Args:
            sequences: (R, T + 1) as `generate` returns them, from the start token on; R a multiple of the B images.
            pixel_values: (B, 3, height, width), or
            encoder_outputs: of the same images, with their `grid_shape`.
            decoder_attention_mask: (R, T) for captions that began with a padded prompt.

        Returns:
            Region maps (R, T, H, W), map t belonging to word t + 1 of the sequence, and word weights (R, T, T), (R, T, E)
            or None, as `decoder_attentions`.
        """
        if encoder_outputs is None:
            encoder_outputs = self.model.encoder(pixel_values)
        out = self.model(
            encoder_outputs=encoder_outputs,
            decoder_input_ids=sequences[:, :-1],
            decoder_attention_mask=decoder_attention_mask,
            use_cache=False,
            output_attentions=True,
            return_dict=True,
        )
        maps = out.cross_attentions[0].squeeze(1).unflatten(-1, encoder_outputs.grid_shape)  # (R, T, H, W)
        return maps, None if out.decoder_attentions is None else out.decoder_attentions[0].squeeze(1)


__all__ = ["AttnCapForConditionalGeneration", "AttnCapModel", "AttnCapPreTrainedModel"]
