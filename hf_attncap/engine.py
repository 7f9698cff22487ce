"""The interface between `Captioner` and the library that runs its model. Needs neither torch nor transformers."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image


@dataclass
class GeneratedCaptions:
    """The captions of B images, k per image, best first. T tokens, a grid of H x W regions, E embedding dimensions.

    Attributes:
        sequences: (B, k, T + 1) int64, start token first.
        scores, lowest, entropy: (B, k), the signals of the confidence, as `CaptionResult.signals` describes them.
        attention: (B, k, T, H, W) float32.
        word_attention: (B, k, T, T) float32 with `word_attention="history"`, (B, k, T, E) with "channel", else None.
        importance: (B, T, H, W) float32 of the best captions, or None.
    """

    sequences: np.ndarray
    scores: np.ndarray
    lowest: np.ndarray
    entropy: np.ndarray
    attention: np.ndarray
    word_attention: np.ndarray | None
    importance: np.ndarray | None


class Engine(Protocol):
    """A loaded model that captions images."""

    @property
    def tokenizer(self) -> Any:
        """A tokenizer with `decode(ids)`, `all_special_ids`, `unk_token_id` and `tokenizer(text)["input_ids"]`."""

    @property
    def default_beams(self) -> int:
        """The beam width of the checkpoint's generation settings."""
        ...

    @property
    def calibration(self) -> dict[str, Any] | None:
        """The checkpoint's `AttnCapConfig.confidence`, the calibration of the confidence."""

    @property
    def word_attention(self) -> str:
        """The checkpoint's `AttnCapConfig.word_attention`."""
        ...

    def generate(
        self, images: list[Image.Image], prompt: str | None, num_beams: int, num_return_sequences: int, explain: bool
    ) -> GeneratedCaptions:
        """Captions B upright RGB images, k = `num_return_sequences` captions each; `explain` also computes the importance."""
        ...
