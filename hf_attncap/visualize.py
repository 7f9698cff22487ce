"""Film strips: a picture, then for each word of its caption the picture in grey, lit by the maps of that word."""

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from .atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS_A_ROW = 6
PANEL_AREA = 5.3  # square inches, whatever the shape of the picture
DOTS = 150  # an inch
LONGEST = 20.0  # times the shorter side: pictures that are longer still are drawn squashed
MARK = "hf_attncap"
JPEG_MARK = f"Software: {MARK}".encode()
JPEG_WIDTH = 1600  # dots: twice the width of the column in which the Hub shows cards, for screens of two dots per pixel
JPEG_QUALITY = 85
FULL_ATTENTION = 3.0  # times the even weight: the least that a film strip's brightest colour stands for
FULL_IMPORTANCE = 0.5  # nats: the same


class Layer(NamedTuple):
    """Maps (T, H, W) of all words, what their colours mean, and the values from the darkest colour to the brightest."""

    maps: np.ndarray
    label: str
    colours: str
    low: float
    high: float


def attention_layer(attention: np.ndarray) -> Layer:
    """Attention (T, H, W) in times the even weight 1 / (H * W)."""
    times_even = attention * math.prod(attention.shape[1:])  # (T, H, W)
    high = max(FULL_ATTENTION, float(times_even.max(initial=0)))
    return Layer(times_even, "attention (1 = even)", "inferno", 1.0, high)


def importance_layer(importance: np.ndarray) -> Layer:
    """Importance (T, H, W) in nats."""
    high = max(FULL_IMPORTANCE, float(importance.max(initial=0)))
    return Layer(importance, "importance (nats)", "viridis", 0.0, high)


def film_strip(
    image: Image.Image, text: str, words: list[str], layers: Sequence[Layer], path: str | os.PathLike | None = None
) -> "Figure":
    """The picture, then for each of the T words a column with one panel per layer, the first on top.

    Each layer has one colour scale for all words. What is at its lowest value or below stays grey.

    Args:
        path: also save the figure there; its ending tells the format.

    Raises:
        OSError: `path` cannot be written.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    shape = min(max(image.width / image.height, 1 / LONGEST), LONGEST)
    width = (PANEL_AREA * min(max(shape, 0.4), 2.5)) ** 0.5  # inches, room for a word above a tall picture
    height = min(PANEL_AREA / width, width / shape)
    panels = len(words) + 1
    rows = math.ceil(panels / PANELS_A_ROW)
    columns = math.ceil(panels / rows)
    heading = textwrap.fill(text, max(20, int(columns * width * 6.5)))
    top = 0.25 + 0.3 * (heading.count("\n") + 1)
    size = (columns * (width + 0.1) + 0.8 * len(layers), rows * (len(layers) * height + 0.35) + top)
    figure = Figure(size, dpi=DOTS, layout="constrained")
    figure.suptitle(heading, fontsize=17, parse_math=False)
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    axes = figure.subplots(rows * len(layers), columns, squeeze=False, subplot_kw=bare)

    dots = int(max(width, height) * DOTS)
    pixels = (dots, round(dots / shape)) if shape > 1 else (round(dots * shape), dots)
    photo = image.resize(pixels, Image.Resampling.LANCZOS, reducing_gap=3.0)
    axes[0, 0].imshow(photo)
    for number, layer in enumerate(layers):
        colours = ScalarMappable(Normalize(layer.low, layer.high, clip=True), layer.colours)
        panel = axes[number :: len(layers)].flatten()[1:]
        for axis, word, values in zip(panel, words, layer.maps):
            axis.imshow(_lit(photo, values, colours))
            if number == 0:
                axis.set_title(word, fontsize=14, pad=4, parse_math=False)
        if words:
            bar = figure.colorbar(colours, ax=list(axes.flatten()), aspect=30 * rows * len(layers), pad=0.01)
            bar.set_label(layer.label, fontsize=11)
    if path is not None:
        figure.savefig(path)
    return figure


def save_strip(figure: "Figure", path: Path) -> None:
    """Writes a film strip, whole or not at all, with the mark that `is_strip` knows it by.

    Args:
        path: its ending says how: .png at full size, .jpg for a web page.
    """
    options: dict[str, Any] = {"format": "png", "metadata": {"Software": MARK}}
    if path.suffix == ".jpg":
        jpeg = {"quality": JPEG_QUALITY, "optimize": True, "comment": JPEG_MARK}
        options = {"format": "jpeg", "dpi": min(DOTS, JPEG_WIDTH / figure.get_figwidth()), "pil_kwargs": jpeg}
    with atomic_write(path, "wb") as file:
        figure.savefig(file, **options)


def is_strip(path: Path) -> bool:
    """Whether a file is there that `save_strip` wrote, by its mark; its name proves nothing."""
    if path.is_symlink():
        return False
    try:
        with Image.open(path) as image:
            place, mark = {"PNG": ("Software", MARK), "JPEG": ("comment", JPEG_MARK)}[image.format or ""]
            return image.info.get(place) == mark
    except Exception:  # no such file, no picture, a damaged one, another format
        return False


def _lit(photo: Image.Image, weights: np.ndarray, colours: Any) -> np.ndarray:
    """The picture in grey, with weights (H, W) stretched over it in a `ScalarMappable`'s colours: (height, width, 3)."""
    smooth = np.asarray(Image.fromarray(weights).resize(photo.size, Image.Resampling.BICUBIC))  # (height, width)
    grey = np.asarray(photo.convert("L"), np.float32)[..., None] / 255  # (height, width, 1)
    alpha = 0.8 * colours.norm(smooth)[..., None] ** 0.7  # (height, width, 1)
    # Tinting keeps the picture's own light and shade visible under the brightest colour.
    return (1 - alpha) * (0.1 + 0.65 * grey) + alpha * colours.to_rgba(smooth)[..., :3] * (0.7 + 0.3 * grey)
