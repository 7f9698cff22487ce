"""Caption metrics (BLEU, ROUGE-L, CIDEr, diversity), significance tests and caption files, without torch."""

from .cider import DocumentFrequencies
from .modules import evaluate_module
from .ptb import tokenize
from .reward import CiderReward
from .score import CaptionMetrics, CaptionScores, compare
from .trainer import caption_compute_metrics

__all__ = [
    "CaptionMetrics",
    "CaptionScores",
    "CiderReward",
    "DocumentFrequencies",
    "caption_compute_metrics",
    "compare",
    "evaluate_module",
    "tokenize",
]
