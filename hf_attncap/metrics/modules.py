"""Where the metrics lie that `evaluate.load` can take from this package, without the Hub."""

from pathlib import Path

_FOLDER = Path(__file__).parent / "evaluate_modules"


def evaluate_module(name: str) -> str:
    """The folder of a metric for `evaluate.load(evaluate_module("caption_scores"))`; nothing is fetched from anywhere.

    Args:
        name: "caption_scores" (BLEU, ROUGE-L and CIDEr of captions against references) or "caption_diversity" (how varied
            and well-formed captions are, without references).

    Raises:
        ValueError: there is no such metric; those that are there are named.
    """
    known = sorted(script.stem for script in _FOLDER.glob("*/*.py"))
    if name not in known:
        raise ValueError(f"There is no metric '{name}' for `evaluate.load` here, only {' and '.join(known)}.")
    return str(_FOLDER / name)
