"""Configuration of the AttnCap captioner."""

import math
from typing import Any, Literal

import torchvision
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .confidence_attncap import SIGNALS
from .efficientnet_lite_attncap import EFFICIENTNET_LITE

# Their output is a sequence of patches, not a convolutional feature map.
ATTENTION_BACKBONES = ("vit_", "swin_", "maxvit_")


@strict
class AttnCapConfig(PreTrainedConfig):
    r"""Configuration of [`AttnCapModel`] and [`AttnCapForConditionalGeneration`].

    Args:
        backbone (`str`, *optional*, defaults to `"resnet152"`):
            A torchvision CNN classifier (`torchvision.models.list_models`) or `"efficientnet_lite0"` to `"efficientnet_lite4"`,
            used without its pooling and classification layers.
        backbone_padding (`str`, *optional*, defaults to `"torch"`):
            `"torch"` for torchvision's symmetric padding, `"same"` for TensorFlow's, which weights from TensorFlow need.
        freeze_backbone (`bool`, *optional*, defaults to `True`):
            Keep the weights and the batch norm statistics of the backbone fixed during training.
        trainable_blocks (`int`, *optional*):
            Number of final backbone blocks to train if `freeze_backbone` is false: of 19 in MobileNetV2, of 9 in EfficientNets,
            where each stage is one block. The default trains all of them.
        freeze_batch_norm (`bool`, *optional*, defaults to `True`):
            Keep the batch norm statistics of trained blocks fixed, because small batches give poor ones.
        image_mean, image_std (`float` or `list[float]`, *optional*, default to ImageNet's values):
            Normalisation that the backbone's weights expect, one value or one per channel. `AttnCapImageProcessor.from_config`
            makes the processor of a new model from them. A saved processor uses its own values; loading warns if they differ.
        encoder_channels (`int`, *optional*, defaults to 512):
            C, output channels of the 1x1 convolution that replaces the classifier.
        grid_size (`int` or `list[int]`, *optional*):
            Side or (height, width) of the region grid, by adaptive average pooling. The default keeps the backbone's grid.
        vocab_size (`int`, *optional*, defaults to 10000):
            V, number of words in the vocabulary, with special tokens.
        word_embed_dim (`int`, *optional*, defaults to 256):
            E, dimension of the word embedding.
        hidden_size (`int`, *optional*, defaults to 512):
            S, dimension of the LSTM state.
        attention_dim (`int`, *optional*, defaults to 512):
            A, dimension of the space in which regions, words and state are compared.
        word_attention (`str`, *optional*, defaults to `"score"`):
            The role of words in the attention. `"none"`: attention over the regions from the state alone. `"score"`: the previous
            word also enters the region scores. `"channel"`: also, the channels of its embedding are weighted. `"history"`: as
            `"score"`, with attention over all earlier words.
        max_word_distance (`int`, *optional*, defaults to 16):
            Number of distances to earlier words with a learned bias each (`"history"` only); longer distances share the last one.
        gate (`bool`, *optional*, defaults to `True`):
            Multiply the context vector by a sigmoid of the state (Show, Attend and Tell, section 4.2.1).
        deep_output (`bool`, *optional*, defaults to `True`):
            Predict the next word from the previous word, the state and the context vector (same paper, equation 7), not from the
            state alone.
        freeze_word_embeddings (`bool`, *optional*, defaults to `False`):
            Keep pretrained word vectors fixed during training.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Share the weights of the word embedding with the output layer.
        dropout (`float`, *optional*, defaults to 0.5):
            Dropout before the output layer during training.
        alpha_c (`float`, *optional*, defaults to 1.0):
            Weight of the doubly stochastic regulariser (same paper, equation 14), which pushes the total attention of each region
            over a caption towards 1.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Label smoothing of the cross-entropy, in [0, 1).
        confidence (`dict`, *optional*):
            The calibration that `attncap calibrate` fitted to these weights and to the default decoding: `weights` of the signals
            `score`, `lowest` and `entropy`, a `bias`, the `threshold` of CIDEr from which a caption counts as good, and the number
            of `images` used. Fine-tuning removes it.
        pad_token_id (`int`, *optional*, defaults to 0):
            Padding token; required.
        bos_token_id (`int`, *optional*, defaults to 1):
            First token of a caption, or `None`.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to 2):
            Token or tokens that end a caption, or `None`.
        decoder_start_token_id (`int`, *optional*, defaults to 1):
            First input of the decoder; required.
        unk_token_id (`int`, *optional*, defaults to 3):
            Unknown word, which generation suppresses by default, or `None`.

    Raises:
        huggingface_hub.errors.StrictDataclassError: for invalid or contradictory values, with a way to fix them. Its cause is a
            `ValueError`, or a `TypeError` for a value of the wrong type.

    Example:

    ```python
    from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration

    config = AttnCapConfig(backbone="mobilenet_v2", word_attention="history", vocab_size=3000)
    model = AttnCapForConditionalGeneration(config)  # random weights
    ```
    """

    model_type = "attncap"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",  # its name since transformers 5.24
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
        # Checkpoints of earlier versions have this field, mostly False.
        if kwargs.pop("dilate_last_stage", False):
            raise ValueError(
                "`dilate_last_stage` is no longer supported: load this checkpoint with the version of hf_attncap that trained it."
            )
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields to save, without an exported Hub folder's references to its code unless the config uses that code."""
        fields = super().to_dict()
        if self._auto_class is None:
            for name in ("auto_map", "custom_pipelines"):
                fields.pop(name, None)
        return fields

    def validate_architecture(self) -> None:
        """Check all fields; `__init__` calls it."""
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
        deviations: Any = self.image_std
        _check(
            all(value > 0 for value in deviations),
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
            isinstance(weights, dict)
            and set(weights) <= set(SIGNALS)
            and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values),
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


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def usable_backbones() -> list[str]:
    """The valid values of `AttnCapConfig.backbone`."""
    known: list[Any] = torchvision.models.list_models(module=torchvision.models)
    return sorted([*(name for name in known if not name.startswith(ATTENTION_BACKBONES)), *EFFICIENTNET_LITE])


def _check_backbone(name: str) -> None:
    if name.startswith(ATTENTION_BACKBONES):
        raise ValueError(
            f"`backbone` is '{name}', a transformer, which has no convolutional map to attend to: use a CNN, for instance "
            "'resnet152', 'convnext_tiny' or 'mobilenet_v3_large'."
        )
    if name not in usable_backbones():
        raise ValueError(f"`backbone` is '{name}', which torchvision does not have: use one of {', '.join(usable_backbones())}.")


__all__ = ["SIGNALS", "AttnCapConfig", "usable_backbones"]
