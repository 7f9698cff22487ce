"""Scores as people read them: plain tables."""

from collections.abc import Mapping

from .score import CaptionScores
from .significance import Comparison

_PLAIN = {"vocabulary": ".0f", "mean_length": ".2f"}  # words; all other scores are shown times 100


def score_table(scores: CaptionScores) -> str:
    """A line a score; times 100, as published tables are, but for the numbers of words."""
    rows = [("images", f"{len(scores.ids)}")] + [(name, _shown(name, value)) for name, value in scores.items()]
    return "\n".join(f"{name:18}{value:>8}" for name, value in rows)


def comparison_table(comparison: Mapping[str, Comparison]) -> str:
    """A line a score, times 100: the other system (the comparison's first), this one, its gain, the gain's 95 % interval and p."""
    lines = [f"{'':18}{'other':>8}{'this':>8}{'gain':>8}{'95 % interval':>20}{'p':>9}"]
    for name, found in comparison.items():
        first, second, gain, low, high = (100 * x for x in (found.first, found.second, found.difference, found.low, found.high))
        lines.append(f"{name:18}{first:8.2f}{second:8.2f}{gain:+8.2f}{f'{low:+.2f} to {high:+.2f}':>20}{found.p:9.4f}")
    return "\n".join(lines)


def _shown(name: str, value: float) -> str:
    return format(value, _PLAIN[name]) if name in _PLAIN else f"{100 * value:.2f}"
