"""BLEU and CIDEr-D of lists of tokens, in one call."""

from hf_attncap.metrics.bleu import BleuScores, score_bleu
from hf_attncap.metrics.cider import CiderD, DocumentFrequencies
from hf_attncap.metrics.ngrams import Floats, References


def bleu_scores(references: list, predictions: list) -> BleuScores:
    return score_bleu(References(references).match(predictions))


def cider_scores(references: list, predictions: list, frequencies: DocumentFrequencies | None = None) -> Floats:
    prepared = References(references, frequencies.index if frequencies else None)
    return CiderD(prepared, frequencies).score(prepared.match(predictions))
