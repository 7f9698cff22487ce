"""The interface between `Captioner` and the library that runs its model. Needs neither torch nor transformers."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

# Arguments of `generate` that have an effect only with `do_sample=True`.
SAMPLING_ARGUMENTS = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}


@dataclass
class GeneratedCaptions:
    """The captions of B images, k per image, best first. T tokens, a grid of H x W regions, E embedding dimensions.

    Attributes:
        sequences: (B, k, T + 1) int64, start token first.
        scores, lowest, entropy: (B, k), the signals of the confidence, as `CaptionResult.signals` describes them.
        attention: (B, k, T, H, W) float32, or None if it was not asked for.
        word_attention: (B, k, T, T) float32 with `word_attention="history"`, (B, k, T, E) with "channel", else None, as also
            without attention.
        importance: (B, T, H, W) float32 of the best captions, or None.
    """

    sequences: np.ndarray
    scores: np.ndarray
    lowest: np.ndarray
    entropy: np.ndarray
    attention: np.ndarray | None
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

    @property
    def samples(self) -> bool:
        """Whether the checkpoint's generation settings choose tokens at random (`do_sample`)."""
        ...

    def check_arguments(self, num_beams: int, generate_kwargs: Mapping[str, Any]) -> None:
        """Raises a ValueError for arguments that `generate` does not take."""

    def try_settings(self, **settings: Any) -> None:
        """Raises the error that `generate` would raise for any image with these settings, its arguments without the images."""

    def generate(
        self,
        images: list[Image.Image],
        prompt: str | None,
        num_beams: int,
        num_return_sequences: int,
        explain: bool,
        attention: bool = True,
        **generate_kwargs: Any,
    ) -> GeneratedCaptions:
        """Captions B upright RGB images, k = `num_return_sequences` captions each; `explain` also computes the importance.

        `generate_kwargs` are arguments of transformers' `generate`.
        """
        ...


def check_sampling(generate_kwargs: Mapping[str, Any], samples: bool) -> None:
    """Raises a ValueError if an argument needs sampling, but tokens are not sampled; `samples` is the checkpoint's `do_sample`."""
    useless = sorted(SAMPLING_ARGUMENTS & set(generate_kwargs))
    if useless and not generate_kwargs.get("do_sample", samples):
        raise ValueError(f"`{useless[0]}` has no effect without sampling: add `do_sample=True`, or leave it out.")


def unknown_argument(name: str, known: Iterable[str]) -> str:
    """The message for an argument that `generate` does not have."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean `{near[0]}`?" if near else "leave it out."
    return f"`{name}` is not an argument of the captioner, nor of `generate`: {hint}"
