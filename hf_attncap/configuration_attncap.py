"""Configuration of the AttnCap captioner: every choice of the architecture as a checked field."""

import math
from typing import Any, Literal

import torchvision
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .efficientnet_lite_attncap import EFFICIENTNET_LITE

# Their last hidden state is a sequence of windows or patches, not the map of a convolution.
ATTENTION_BACKBONES = ("vit_", "swin_", "maxvit_")

# What a confidence is computed from; `generate_captions` says what they are.
SIGNALS = ("score", "lowest", "entropy")


@strict
class AttnCapConfig(PreTrainedConfig):
    r"""Configuration of [`AttnCapModel`] and [`AttnCapForConditionalGeneration`].

    Args:
        backbone: name of a torchvision CNN classifier (`torchvision.models.list_models`), or `"efficientnet_lite0"` to 4; its
            trunk, without pooling and classifier, is the encoder.
        backbone_padding: `"torch"` for torchvision's symmetric padding, `"same"` for TensorFlow's (right and bottom first),
            which weights that come from TensorFlow need.
        freeze_backbone: keep the trunk's weights and its batch norm statistics as they are during training.
        trainable_blocks: where the trunk is trained, how many of its last blocks are, of 19 in MobileNetV2 and of 9 in
            EfficientNets, where each stage is one; those before stay as they are. `None` for all of them.
        freeze_batch_norm: where the trunk is trained, keep its batch norm statistics, which small batches would spoil.
        image_mean, image_std: what the backbone's weights expect of their input, one value or one per channel.
            `AttnCapImageProcessor.from_config` makes the processor of a new model from them. Afterwards the saved processor's
            own values are used, and loading warns if they differ from these.
        encoder_channels: C, the windows of the 1x1 convolution that replaces the classifier.
        grid_size: side or (height, width) of the region grid, by adaptive average pooling; `None` keeps the trunk's own grid.
        vocab_size: V, words in the vocabulary, special tokens included.
        word_embed_dim: E, width of the word embedding.
        hidden_size: S, width of the LSTM state.
        attention_dim: A, width of the space in which regions, words and state are compared.
        word_attention: how words are attended: `"none"` (classic attention over the regions only), `"score"` (the previous
            word also scores the regions), `"channel"` (and its components are weighted), `"history"` (and all earlier words
            are attended).
        max_word_distance: how many distances to earlier words have a learned bias of their own (`"history"` only); farther
            words share the last.
        gate: scale the attended region by a sigmoid of the state (Show, Attend and Tell, section 4.2.1).
        deep_output: predict the next word from previous word, state and attended region (ibid., equation 7) instead of
            the state alone.
        freeze_word_embeddings: keep the word vectors as they are during training; only for vectors that were loaded.
        tie_word_embeddings: share the word embedding with the output layer.
        dropout: dropout before the output layer, in training.
        alpha_c: weight of the doubly stochastic regulariser (ibid., equation 14).
        label_smoothing: of the cross-entropy, in [0, 1).
        confidence: the calibration that `attncap calibrate` fitted to these weights and to the default decoding, or `None`.
            It has `weights` of the signals `score`, `lowest` and `entropy`, a `bias`, the `threshold` of CIDEr from which a
            caption counts as good, and the number of `images` it was fitted on. Fine-tuning removes it.
        pad_token_id, decoder_start_token_id: what fills up short captions, and what every caption begins with; both are needed.
        bos_token_id, eos_token_id: the first word of a caption and its end, the end also as a list; `None` if there is none.
        unk_token_id: the unknown word, which generation leaves out by default; `None` if there is none.

    Raises:
        huggingface_hub.errors.StrictDataclassError: for contradictory or impossible settings, with what to change. It is no
            `ValueError`, but has one (or, for a value of the wrong type, a `TypeError`) as its cause.
    """

    model_type = "attncap"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",  # the same, as transformers calls it from 5.24 on
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "decoder_hidden_states",
        "decoder_attentions",
        "cross_attentions",
    ]

    backbone: str = "resnet152"
    backbone_padding: Literal["torch", "same"] = "torch"
    freeze_backbone: bool = True
    trainable_blocks: int | None = None
    freeze_batch_norm: bool = True
    image_mean: float | list[float | int] | tuple[float | int, ...] = (0.485, 0.456, 0.406)
    image_std: float | list[float | int] | tuple[float | int, ...] = (0.229, 0.224, 0.225)
    encoder_channels: int = 512
    grid_size: int | list[int] | tuple[int, ...] | None = None

    vocab_size: int = 10_000
    word_embed_dim: int = 256
    hidden_size: int = 512
    attention_dim: int = 512
    word_attention: Literal["none", "score", "channel", "history"] = "score"
    max_word_distance: int = 16
    gate: bool = True
    deep_output: bool = True
    freeze_word_embeddings: bool = False
    tie_word_embeddings: bool = False
    dropout: float | int = 0.5

    alpha_c: float | int = 1.0
    label_smoothing: float | int = 0.0
    confidence: dict[str, Any] | None = None

    is_encoder_decoder: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1
    unk_token_id: int | None = 3

    @property
    def num_hidden_layers(self) -> int:
        """The decoder is one LSTM cell."""
        return 1

    @property
    def num_attention_heads(self) -> int:
        """Both attentions have one head."""
        return 1

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.image_mean, (int, float)):
            self.image_mean = [self.image_mean] * 3
        if isinstance(self.image_std, (int, float)):
            self.image_std = [self.image_std] * 3
        # Checkpoints of earlier versions say it; most of them say False.
        if kwargs.pop("dilate_last_stage", False):
            raise ValueError(
                "`dilate_last_stage` is no longer supported: load this checkpoint with the version of hf_attncap that trained it."
            )
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What is saved. The code that an exported Hub folder names stays with that folder, unless it was loaded from there."""
        fields = super().to_dict()
        if self._auto_class is None:
            for name in ("auto_map", "custom_pipelines"):
                fields.pop(name, None)
        return fields

    def validate_architecture(self) -> None:
        """Called when the configuration is made; each message says what to change."""
        _check_backbone(self.backbone)
        for name in (
            "encoder_channels",
            "vocab_size",
            "word_embed_dim",
            "hidden_size",
            "attention_dim",
            "max_word_distance",
        ):
            _check(getattr(self, name) >= 1, f"`{name}` is {getattr(self, name)}, but it must be at least 1.")
        _check(
            self.trainable_blocks is None or self.trainable_blocks >= 1,
            f"`trainable_blocks` is {self.trainable_blocks}: set `freeze_backbone` to train none, or None to train all.",
        )
        _check(0 <= self.dropout < 1, f"`dropout` is {self.dropout}, but it must be in [0, 1).")
        _check(
            0 <= self.label_smoothing < 1,
            f"`label_smoothing` is {self.label_smoothing}, but it must be in [0, 1).",
        )
        _check(self.alpha_c >= 0, f"`alpha_c` is {self.alpha_c}, but a regulariser's weight cannot be negative.")
        if self.grid_size is not None:
            sides = [self.grid_size] if isinstance(self.grid_size, int) else list(self.grid_size)
            _check(
                len(sides) in (1, 2) and all(side >= 1 for side in sides),
                f"`grid_size` is {self.grid_size}, but it must be a positive side, a (height, width) pair or None.",
            )
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            _check(
                len(values) == 3,
                f"`{name}` is {values}, but it needs one value for each of the 3 colour channels.",
            )
        _check(
            isinstance(self.image_std, (int, float)) or all(value > 0 for value in self.image_std),
            f"`image_std` is {self.image_std}, but must be positive.",
        )
        self._validate_confidence()
        self._validate_tokens()
        if self.tie_word_embeddings:
            self._validate_tying()

    def _validate_confidence(self) -> None:
        if self.confidence is None:
            return
        weights = self.confidence.get("weights")
        values = [*weights.values(), self.confidence.get("bias")] if isinstance(weights, dict) else [None]
        _check(
            isinstance(weights, dict) and set(weights) <= set(SIGNALS) and all(map(_is_finite, values)),
            f"`confidence` is {self.confidence}, but it needs finite `weights` of {', '.join(SIGNALS)} and a finite `bias`: run "
            "`attncap calibrate`, or set it to None.",
        )

    def _validate_tokens(self) -> None:
        for name in ("pad_token_id", "decoder_start_token_id"):
            _check(
                getattr(self, name) is not None,
                f"`{name}` is None, but training and generation need it: set it to the tokenizer's "
                f"`{'pad_token_id' if name == 'pad_token_id' else 'bos_token_id'}`.",
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "unk_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            _check(
                all(0 <= token < self.vocab_size for token in ids),
                f"`{name}` is {value}, but the vocabulary has the ids 0 to {self.vocab_size - 1} (`vocab_size` is "
                f"{self.vocab_size}): set both as in the tokenizer.",
            )

    def _validate_tying(self) -> None:
        _check(
            not self.freeze_word_embeddings,
            "`tie_word_embeddings` would freeze the output layer together with the frozen word embeddings: set "
            "`freeze_word_embeddings=False` or `tie_word_embeddings=False`.",
        )
        _check(
            self.deep_output or self.hidden_size == self.word_embed_dim,
            f"`tie_word_embeddings` needs an output layer as wide as the word embedding, but without `deep_output` it is "
            f"`hidden_size` ({self.hidden_size}) against `word_embed_dim` ({self.word_embed_dim}): make the two equal, set "
            "`deep_output=True` or `tie_word_embeddings=False`.",
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_backbone(name: str) -> None:
    known: list[Any] = torchvision.models.list_models(module=torchvision.models)
    usable = sorted([*(other for other in known if not other.startswith(ATTENTION_BACKBONES)), *EFFICIENTNET_LITE])
    if name.startswith(ATTENTION_BACKBONES):
        raise ValueError(
            f"`backbone` is '{name}', a transformer, which has no convolutional map to attend to: use a CNN, for instance "
            "'resnet152', 'convnext_tiny' or 'mobilenet_v3_large'."
        )
    if name not in usable:
        raise ValueError(f"`backbone` is '{name}', which torchvision does not have: use one of {', '.join(usable)}.")


__all__ = ["SIGNALS", "AttnCapConfig"]
