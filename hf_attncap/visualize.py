"""Attention plots: an image and, for each word of its caption, the image in grey with the regions of that word in colour."""

import math
import os
import textwrap
from collections.abc import Collection, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from .atomic import atomic_write
from .html_page import is_own_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS_PER_ROW = 6
PANEL_AREA = 5.3  # square inches, for images of any shape
DPI = 150
MAX_ASPECT_RATIO = 20.0  # longer images are squashed
MARK = "hf_attncap"  # in the metadata of saved plots
JPEG_MARK = f"Software: {MARK}".encode()
JPEG_WIDTH = 1600  # pixels: twice the width of the column in which the Hub shows cards, for high-resolution screens
JPEG_QUALITY = 85
MIN_ATTENTION_SCALE = 3.0  # times uniform: the brightest colour stands for at least this
MIN_IMPORTANCE_SCALE = 0.5  # nats: the same for importance
MAX_STEM_BYTES = 200  # file systems usually allow names of 255 bytes


class Layer(NamedTuple):
    """Maps (T, H, W) of all words, what their colours mean, and the values of the darkest and the brightest colour."""

    maps: np.ndarray
    label: str
    colours: str
    low: float
    high: float


def attention_layer(attention: np.ndarray) -> Layer:
    """The layer of attention maps (T, H, W), relative to uniform attention."""
    relative = attention * math.prod(attention.shape[1:])  # (T, H, W)
    high = max(MIN_ATTENTION_SCALE, float(relative.max(initial=0)))
    return Layer(relative, "attention (1 = uniform)", "inferno", 1.0, high)


def importance_layer(importance: np.ndarray) -> Layer:
    """The layer of importance maps (T, H, W), in nats."""
    high = max(MIN_IMPORTANCE_SCALE, float(importance.max(initial=0)))
    return Layer(importance, "importance (nats)", "viridis", 0.0, high)


def require_matplotlib() -> None:
    """Raises an ImportError that says how to install matplotlib if it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(f'Plots need matplotlib: pip install "hf_attncap[plot]" ({error})') from error


def plot_layers(
    image: Image.Image, text: str, words: list[str], layers: Sequence[Layer], path: str | os.PathLike | None = None
) -> "Figure":
    """Plots the image, then one column per word with one panel per layer; also saves the figure if there is a path."""
    require_matplotlib()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    aspect = min(max(image.width / image.height, 1 / MAX_ASPECT_RATIO), MAX_ASPECT_RATIO)
    width = (PANEL_AREA * min(max(aspect, 0.4), 2.5)) ** 0.5  # inches; a word must fit above a tall image
    height = min(PANEL_AREA / width, width / aspect)
    panels = len(words) + 1
    rows = math.ceil(panels / PANELS_PER_ROW)
    columns = math.ceil(panels / rows)
    heading = textwrap.fill(text, max(20, int(columns * width * 6.5)))
    top = 0.25 + 0.3 * (heading.count("\n") + 1)
    size = (columns * (width + 0.1) + 0.8 * len(layers), rows * (len(layers) * height + 0.35) + top)
    figure = Figure(size, dpi=DPI, layout="constrained")
    figure.suptitle(heading, fontsize=17, parse_math=False)
    axes = figure.subplots(rows * len(layers), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()  # laid out faster than axes without ticks

    longest = int(max(width, height) * DPI)
    pixels = (longest, round(longest / aspect)) if aspect > 1 else (round(longest * aspect), longest)
    photo = image.resize(pixels, Image.Resampling.LANCZOS, reducing_gap=3.0)
    axes[0, 0].imshow(photo)
    for number, layer in enumerate(layers):
        colours = ScalarMappable(Normalize(layer.low, layer.high, clip=True), layer.colours)
        panel = axes[number :: len(layers)].flatten()[1:]
        for axis, word, values in zip(panel, words, layer.maps):
            axis.imshow(_overlay(photo, values, colours))
            if number == 0:
                axis.set_title(word, fontsize=14, pad=4, parse_math=False)
        if words:
            bar = figure.colorbar(colours, ax=list(axes.flatten()), aspect=30 * rows * len(layers), pad=0.01)
            bar.set_label(layer.label, fontsize=11)
    if path is not None:
        figure.savefig(path)
    return figure


def _overlay(photo: Image.Image, weights: np.ndarray, colours: Any) -> np.ndarray:
    """The image in grey with weights (H, W), upsampled and coloured by a `ScalarMappable`: (height, width, 3)."""
    smooth = np.asarray(Image.fromarray(weights).resize(photo.size, Image.Resampling.BICUBIC))  # (height, width)
    grey = np.asarray(photo.convert("L"), np.float32)[..., None] / 255  # (height, width, 1)
    alpha = 0.8 * colours.norm(smooth)[..., None] ** 0.7  # (height, width, 1)
    # Multiplying by the grey values keeps the image visible under the brightest colour.
    return (1 - alpha) * (0.1 + 0.65 * grey) + alpha * colours.to_rgba(smooth)[..., :3] * (0.7 + 0.3 * grey)


def save_plot(figure: "Figure", path: Path) -> None:
    """Writes a plot atomically, with a mark in its metadata by which `is_own_plot` recognises it.

    Args:
        path: .png for full size, .jpg for a web page.
    """
    options: dict[str, Any] = {"format": "png", "metadata": {"Software": MARK}}
    if path.suffix == ".jpg":
        jpeg = {"quality": JPEG_QUALITY, "optimize": True, "comment": JPEG_MARK}
        options = {"format": "jpeg", "dpi": min(DPI, JPEG_WIDTH / figure.get_figwidth()), "pil_kwargs": jpeg}
    with atomic_write(path, "wb") as file:
        figure.savefig(file, **options)


def is_own_plot(path: Path) -> bool:
    """Whether `save_plot` wrote this file, according to the mark in its metadata."""
    if path.is_symlink():
        return False
    try:
        with Image.open(path) as image:
            field, mark = {"PNG": ("Software", MARK), "JPEG": ("comment", JPEG_MARK)}[image.format or ""]
            return image.info.get(field) == mark
    except Exception:  # no file, not an image, a damaged one, another format
        return False


def plot_path(source: str, kind: str, folder: Path, taken: Collection[str]) -> Path:
    """FOLDER/STEM.KIND.png for an image's path or URL; see `output_paths`."""
    return output_paths(source, [f".{kind}.png"], folder, taken)[0]


def output_paths(source: str, endings: Sequence[str], folder: Path, taken: Collection[str]) -> list[Path]:
    """FOLDER/STEM followed by each ending, for an image's path or URL; all have the same stem.

    It is STEM-2, STEM-3, ... if one of the paths is `taken` or a file that this package did not write.

    Args:
        taken: paths that must not be used, as `path_key` gives them.
    """
    stem = Path(urlsplit(source).path if "://" in source else source).stem
    stem = os.fsencode(stem)[:MAX_STEM_BYTES].decode(errors="ignore") or "image"
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    choices = ([folder / f"{name}{ending}" for ending in endings] for name in names)
    return next(paths for paths in choices if all(_may_write(path, taken) for path in paths))


def _may_write(path: Path, taken: Collection[str]) -> bool:
    is_own = is_own_page if path.suffix == ".html" else is_own_plot
    return path_key(path) not in taken and (is_own(path) or not os.path.lexists(path))


def path_key(path: str | Path) -> str:
    """The same string for all spellings of a path, also on file systems that do not distinguish A.png from a.png."""
    return os.path.realpath(path).casefold()
