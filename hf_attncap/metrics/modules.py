"""The folders of this package's metrics for `evaluate.load`."""

from pathlib import Path

_FOLDER = Path(__file__).parent / "evaluate_modules"


def evaluate_module(name: str) -> str:
    """The folder of a metric for `evaluate.load(evaluate_module("caption_scores"))`, which then works offline.

    Args:
        name: "caption_scores" (BLEU, ROUGE-L and CIDEr of captions against references) or "caption_diversity" (diversity
            and well-formedness, without references).

    Raises:
        ValueError: the metric does not exist; the message lists those that do.
    """
    known = sorted(script.stem for script in _FOLDER.glob("*/*.py"))
    if name not in known:
        raise ValueError(f"There is no metric '{name}' for `evaluate.load` here, only {' and '.join(known)}.")
    return str(_FOLDER / name)
