"""The summary picture of a caption: the photograph with the regions that the content words depend on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from .visualize import DPI, MAX_ASPECT_RATIO, MIN_IMPORTANCE_SCALE, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of English captions. Words of other languages all count as content words.
FUNCTION_WORDS = {
    "a", "across", "along", "am", "an", "and", "are", "around", "as", "at", "be", "been", "behind", "being", "between",
    "but", "by", "do", "does", "down", "during", "for", "from", "had", "has", "have", "he", "her", "him", "his", "in",
    "into", "is", "it", "its", "near", "next", "of", "off", "on", "onto", "or", "out", "over", "she", "some", "that", "the",
    "their", "them", "there", "these", "they", "this", "those", "through", "to", "under", "up", "was", "were", "which",
    "while", "who", "with", "without",
}  # fmt: skip
MAX_MARKED = 7
# Okabe and Ito's colours, which colour-blind people can tell apart; the numbers tell the words apart without them.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#cc79a7", "#0072b2")
AREA = 32.0  # square inches of the photograph
LONGEST = 9.0  # inches of its longer side
SIDE_COLUMN = 3.6  # inches for the words beside a tall photograph
LINE = 0.26  # inches
WORD_SIZE, NOTE_SIZE = 12.0, 9.5  # points
BADGE = 0.2  # inches between the centres of two badges


class Mark(NamedTuple):
    """A word that is marked on the photograph: its number, its importance (H, W), and the peak's row and column."""

    number: int
    word: str
    importance: np.ndarray
    row: int
    column: int

    @property
    def peak(self) -> float:
        return float(self.importance[self.row, self.column])


def content_words(words: Sequence[str], importance: np.ndarray) -> tuple[list[Mark], list[str]]:
    """The marks of content words in their order, and "word (peak)" for the content words that are not marked.

    A word is marked if hiding one region lowers its log-probability by at least `MIN_IMPORTANCE_SCALE` nats. If there are more than
    `MAX_MARKED` such words, those with the highest importance are marked.
    """
    peaks = importance.max(axis=(1, 2), initial=-np.inf)  # (T)
    content = [n for n, word in enumerate(words) if word.lower().strip(".,!?;:") not in FUNCTION_WORDS]
    strong = sorted((n for n in content if peaks[n] >= MIN_IMPORTANCE_SCALE), key=lambda n: -peaks[n])[:MAX_MARKED]
    marks = []
    for number, n in enumerate(sorted(strong), start=1):
        row, column = np.unravel_index(importance[n].argmax(), importance.shape[1:])
        marks.append(Mark(number, words[n], importance[n], int(row), int(column)))
    return marks, [f"{words[n]} ({peaks[n]:.2f})" for n in content if n not in strong]


def plot_summary(image: Image.Image, text: str, words: Sequence[str], importance: np.ndarray) -> "Figure":
    """The photograph in colour. Each content word has a number at its most important region, and an outline around the regions
    that reach half of its highest importance. A list names the words with their highest importance, in nats.

    Args:
        importance: (T, H, W), in nats.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    marks, unmarked = content_words(words, importance)
    aspect = min(max(image.width / image.height, 1 / MAX_ASPECT_RATIO), MAX_ASPECT_RATIO)
    scale = min((AREA / aspect) ** 0.5, LONGEST / max(aspect, 1))  # the photograph's height in inches
    width, height = scale * aspect, scale
    beside = aspect < 0.9
    full = width + SIDE_COLUMN if beside else max(width, 5.0)  # inches without margins
    heading = _wrap(text, full, 17)
    lines = _lines(marks, unmarked, SIDE_COLUMN - 0.2 if beside else full)
    top, below = 0.15 + 0.32 * len(heading), 0.15 + LINE * len(lines)
    body = max(height, below) if beside else height + below
    size = (full + 0.4, body + top + 0.2)
    figure = Figure(size, dpi=DPI)
    figure.text(0.2 / size[0], 1 - 0.1 / size[1], "\n".join(heading), fontsize=17, va="top", parse_math=False)
    axis = figure.add_axes((0.2 / size[0], 1 - (top + height) / size[1], width / size[0], height / size[1]))
    _draw_marks(axis, _photo(image, width, height), marks)
    left, start = (0.4 + width, top + 0.1) if beside else (0.2, top + height + 0.15)
    for number, (mark, line) in enumerate(lines):
        y = 1 - (start + LINE * (number + 0.5)) / size[1]
        if mark is not None:
            _draw_badge(figure, mark, (left + 0.1) / size[0], y)
        indent = 0.3 if mark is not None else 0.0
        figure.text((left + indent) / size[0], y, line, fontsize=WORD_SIZE if mark else NOTE_SIZE, va="center", parse_math=False)
    return figure


def _lines(marks: list[Mark], unmarked: list[str], width: float) -> list[tuple[Mark | None, str]]:
    """The list of words, and what the marks mean."""
    lines: list[tuple[Mark | None, str]] = []
    for mark in marks:
        start, *rest = _wrap(mark.word, width - 1.4, WORD_SIZE)
        lines.append((mark, f"{start}{'…' if rest else ''}  {mark.peak:.2f} nats"))
    meaning = "Number: the region that the word depends on most. Outline: at least half of that importance."
    none = f"Hiding a region lowers no content word's log-probability by {MIN_IMPORTANCE_SCALE} nats or more."
    notes = [meaning if marks else none]
    if unmarked:
        notes.append(f"Not marked: {', '.join(unmarked)}.")
    return lines + [(None, line) for note in notes for line in _wrap(note, width, NOTE_SIZE)]


def _wrap(text: str, width: float, size: float) -> list[str]:
    """Lines of at most `width` inches, for a font size in points. A word that is longer is split."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    def fits(line: str) -> bool:
        points, _, _ = text_to_path.get_text_width_height_descent(line, FontProperties(size=size), ismath=False)
        return points / 72 <= 0.97 * width  # rendered letters are rounded to pixels

    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if fits(longer):
            lines[-1] = longer
            continue
        for letter in f" {word}" if lines[-1] else word:
            if letter == " " or not fits(lines[-1] + letter):
                lines.append("")
            lines[-1] += letter.strip()
    return lines


def _photo(image: Image.Image, width: float, height: float) -> Image.Image:
    """The image at the resolution of the figure; `width` and `height` in inches."""
    pixels = max(round(width * DPI), 1), max(round(height * DPI), 1)
    return image.resize(pixels, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _draw_marks(axis: Any, photo: Image.Image, marks: list[Mark]) -> None:
    from matplotlib.patheffects import withStroke

    axis.imshow(photo, aspect="auto")
    axis.set_axis_off()
    for mark in marks:
        smooth = np.asarray(Image.fromarray(mark.importance).resize(photo.size, Image.Resampling.BICUBIC))  # (height, width)
        colour = COLOURS[mark.number - 1]
        lines = axis.contour(smooth, levels=[mark.peak / 2], colors=[colour], linewidths=2)
        lines.set_path_effects([withStroke(linewidth=4, foreground="black")])
    for mark, (x, y) in zip(marks, _places(photo, marks)):
        _draw_badge(axis, mark, x, y)


def _places(photo: Image.Image, marks: list[Mark]) -> list[tuple[float, float]]:
    """The pixel of each badge: the centre of the word's most important region, or next to badges that are already there."""
    step = BADGE * DPI
    shifts = sorted(
        ((dx, dy) for dx in range(-4, 5) for dy in range(-4, 5)), key=lambda shift: (shift[0] ** 2 + shift[1] ** 2, shift)
    )
    placed: list[tuple[float, float]] = []
    for mark in marks:
        rows, columns = mark.importance.shape
        x, y = (mark.column + 0.5) / columns * photo.width, (mark.row + 0.5) / rows * photo.height
        spots = ((x + dx * step, y + dy * step) for dx, dy in shifts)
        inside = [(a, b) for a, b in spots if 0 <= a <= photo.width and 0 <= b <= photo.height]
        free = [spot for spot in inside if all(np.hypot(spot[0] - a, spot[1] - b) >= 0.99 * step for a, b in placed)]
        placed.append((free or inside)[0])
    return placed


def _draw_badge(where: Any, mark: Mark, x: float, y: float) -> None:
    """A number in a disc, at a place in the coordinates of an axis or a figure."""
    disc = {"boxstyle": "circle,pad=0.18", "facecolor": COLOURS[mark.number - 1], "edgecolor": "black", "linewidth": 1}
    colour = "white" if COLOURS[mark.number - 1] == "#0072b2" else "black"
    where.text(x, y, str(mark.number), fontsize=9, weight="bold", color=colour, ha="center", va="center", bbox=disc)
