"""`CaptionResult`: one caption with its score and attention maps. Needs neither torch nor transformers."""

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from .html_page import render_frame, render_page
from .summary import plot_summary
from .visualize import attention_layer, importance_layer, plot_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_IMPORTANCE = "This result has no importance: get one with `Captioner.explain` or `explain=True`."


class Alternative(NamedTuple):
    """A further caption of an image, and its score."""

    text: str
    score: float


@dataclass(eq=False)
class CaptionResult:
    """Caption, score and attention maps of one image. T words, a grid of H x W regions, E embedding dimensions.

    Attributes:
        text: the caption, including the prompt.
        score: what transformers calls `sequences_scores`, for greedy search too: the sum of the log-probabilities of the generated
            tokens (with the end token, without the prompt), divided by their number to the power of `length_penalty`. Closer to 0
            is more likely.
        words: the T words of `text`.
        attention: (T, H, W) float32, one attention map per word; each map sums to 1. The grid covers the whole image. None with
            `attention=False`.
        word_attention: float32. With `word_attention="history"` (T, T): row t holds the weights of the words before word t, which
            sum to 1; column 0 is the start token and column j word j - 1. With "channel" (T, E): the weights of the embedding
            dimensions of the previous word. Otherwise None.
        alternatives: the further captions, best first, if `num_return_sequences` is above 1. Sampled captions are not sorted.
        image: the image, upright and RGB, in its original size. None if the result has neither attention nor importance.
        importance: (T, H, W) float32, in nats, one map per word: how much the word's log-probability falls if the decoder does not
            see the region and its neighbours. Negative where it rises. None unless you ask for it (`Captioner.explain`).
        signals: the inputs of the confidence: "score", "lowest" (the log-probability of the least likely generated token) and
            "entropy" (the mean entropy, in nats, of the distributions of the generated tokens).
        confidence: the calibrated probability that `text` is a good caption. Good means a CIDEr-D of at least the calibration's
            threshold (0.5) against the references of its image. It holds for images like those of the calibration and for the
            default decoding; with other settings it is an approximation. None if the checkpoint has no calibration
            (`attncap calibrate` adds one), or with a prompt.
    """

    text: str
    score: float
    words: list[str]
    attention: np.ndarray | None = field(repr=False)
    word_attention: np.ndarray | None = field(repr=False)
    alternatives: list[Alternative]
    image: Image.Image | None = field(repr=False)
    importance: np.ndarray | None = field(default=None, repr=False)
    signals: dict[str, float] = field(repr=False, default_factory=dict)
    confidence: float | None = None

    def plot_attention(self, path: str | os.PathLike | None = None) -> "Figure":
        """Plots the image and, for each word, the image in grey with the attended regions in colour.

        The colours show attention relative to uniform attention, 1 / (H * W). Regions at or below uniform stay grey. All words
        share one colour scale.

        Args:
            path: also save the figure here, replacing a file of that name. The suffix sets the format (.png, .pdf, .svg).

        Raises:
            ImportError: matplotlib is not installed.
            OSError: `path` cannot be written.
            ValueError: the result has no attention.
        """
        image, attention = self._plotted()
        return plot_layers(image, self.text, self.words, [attention_layer(attention)], path)

    def plot_importance(self, path: str | os.PathLike | None = None) -> "Figure":
        """Plots the attention of each word and, below it, its importance, each with its own colour scale.

        Importance is in nats; regions at or below 0 stay grey.

        Args:
            path: as for `plot_attention`.

        Raises:
            ImportError, OSError: as `plot_attention`.
            ValueError: the result has no importance or no attention.
        """
        if self.importance is None:
            raise ValueError(NO_IMPORTANCE)
        image, attention = self._plotted()
        layers = [attention_layer(attention), importance_layer(self.importance)]
        return plot_layers(image, self.text, self.words, layers, path)

    def _plotted(self) -> tuple[Image.Image, np.ndarray]:
        if self.image is None or self.attention is None:
            raise ValueError("This result has no attention to plot: caption the image without `attention=False`.")
        return self.image, self.attention

    def plot_summary(self, path: str | os.PathLike | None = None) -> "Figure":
        """Plots the image with the regions that each content word of the caption depends on most, and their importance.

        Words whose importance is below 0.5 nats everywhere are listed, but not marked on the image.

        Args:
            path: as for `plot_attention`.

        Raises:
            ImportError, OSError, ValueError: as `plot_importance`.
        """
        if self.importance is None or self.image is None:
            raise ValueError(NO_IMPORTANCE)
        figure = plot_summary(self.image, self.text, self.words, self.importance)
        if path is not None:
            figure.savefig(path)
        return figure

    def to_html(self, title: str | None = None) -> str:
        """An HTML page with the interactive view: words light their regions, regions light the words that looked there.

        The page works offline and loads nothing. It holds the image as a JPEG of at most 1280 pixels. A notebook shows a result
        in this way by itself.

        Args:
            title: a heading above the view, such as a file name. Default: none.

        Raises:
            ValueError: the result has no image, because of `attention=False`.
        """
        if self.image is None:
            raise ValueError("This result has no image to show: caption the image without `attention=False`.")
        return render_page(self, title)

    def _repr_html_(self) -> str | None:
        return None if self.image is None else render_frame(self)

    def to_dict(self) -> dict[str, Any]:
        """The result in the types of JSON, without the image.

        Returns:
            A dictionary with `caption`, `score`, `confidence` (None without calibration), `words`, `alternatives` (a list of
            dictionaries with `caption` and `score`), `attention` and `importance` (T x H x W lists, or None).
        """
        return {
            "caption": self.text,
            "score": self.score,
            "confidence": self.confidence,
            "words": list(self.words),
            "alternatives": [{"caption": other.text, "score": other.score} for other in self.alternatives],
            "attention": None if self.attention is None else self.attention.tolist(),
            "importance": None if self.importance is None else self.importance.tolist(),
        }
