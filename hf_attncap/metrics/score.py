"""`CaptionMetrics`: the standard scores of predicted captions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from . import java
from .bleu import corpus_bleu, score_bleu
from .cider import CiderD
from .diversity import diversity
from .ngrams import References
from .ptb import tokenize
from .rouge import RougeL
from .significance import Comparison, Statistics, bootstrap, means, paired_bootstrap

Caption = TypeVar("Caption")  # one, or several of an image

BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")


@dataclass(frozen=True)
class CaptionScores(Mapping[str, float]):
    """The scores of a corpus by name, and of each image.

    `bleu_1` to `bleu_4`, `rouge_l` and `meteor` range from 0 to 1, `cider` from 0 to 10; the others are those of `diversity`.
    Published tables show the scores times 100.

    Attributes:
        corpus: name -> score of the corpus; this object is the same mapping.
        ids: the I images.
        per_image: name -> (I,) float64. BLEU and METEOR of the corpus are not the means over images.
    """

    corpus: dict[str, float]
    ids: list[str]
    per_image: dict[str, np.ndarray]
    statistics: list[Statistics]

    def __getitem__(self, name: str) -> float:
        return self.corpus[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.corpus)

    def __len__(self) -> int:
        return len(self.corpus)

    def __str__(self) -> str:
        return "\n".join(f"{name:18}{value:10.4f}" for name, value in self.corpus.items())

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % intervals of BLEU, ROUGE-L and CIDEr by name; see `significance.bootstrap`."""
        return bootstrap(self.statistics)

    def rows(self) -> Iterator[dict[str, str | float]]:
        """One dictionary per image with `image_id` and the scores, ready for JSON."""
        for place, image_id in enumerate(self.ids):
            yield {"image_id": image_id, **{name: float(values[place]) for name, values in self.per_image.items()}}


class CaptionMetrics:
    """Computes the scores of pycocoevalcap without Java. References are tokenised and counted once.

    Args:
        references: image id -> one or more captions. Ids are compared as text.
        training: the training captions of the model; adds the score `novel`.

    Raises:
        ValueError: there are no images, an image has no references, or 12 and "12" are both ids.
        TypeError: the references of an image are a string, not a list of strings.
    """

    def __init__(self, references: Mapping[Any, Sequence[str]], *, training: Iterable[str] | None = None):
        _check_mapping(references, "references")
        texts = _by_text(references)
        wrong = [image_id for image_id, captions in texts.items() if isinstance(captions, str)]
        if wrong:
            raise TypeError(f"The references of image '{wrong[0]}' are one string: give a list of captions for each image.")
        without = [image_id for image_id, captions in texts.items() if not len(captions)]
        if without or not texts:
            raise ValueError(
                f"{_some(without)} no references: give at least one for each image." if texts else "There are no references."
            )
        self.ids = list(texts)
        self._tokens = [[tokenize(caption) for caption in captions] for captions in texts.values()]
        self._training = None if training is None else [tokenize(caption) for caption in training]
        self._cider = CiderD(References([[_words(tokens) for tokens in captions] for captions in self._tokens]))
        self._rouge = RougeL(self._tokens)

    def score(self, predictions: Mapping[Any, str], *, meteor: bool = False, spice: bool = False) -> CaptionScores:
        """Scores one caption per image.

        Args:
            predictions: image id -> caption, for exactly the images with references. An empty caption scores 0.
            meteor, spice: also compute these, with pycocoevalcap and Java (`pip install "hf_attncap[java]"`).

        Raises:
            ValueError: an image has no prediction, or a prediction has no references; the message lists them.
            hf_attncap.metrics.java.JavaMetricError: METEOR or SPICE cannot be computed here.
        """
        _check_mapping(predictions, "predictions")
        texts = _by_text(predictions)
        self._check(texts)
        tokens = [tokenize(texts[image_id]) for image_id in self.ids]
        matches = self._cider.references.match([_words(caption) for caption in tokens])
        bleu, cider, rouge = score_bleu(matches), self._cider.score(matches), self._rouge.score(tokens)
        per_image = {**dict(zip(BLEU, bleu.per_image.T)), "rouge_l": rouge, "cider": cider}
        corpus = {**dict(zip(BLEU, bleu.corpus.tolist())), "rouge_l": float(rouge.mean()), "cider": float(cider.mean())}
        statistics = [Statistics(BLEU, bleu.statistics, corpus_bleu), means({"rouge_l": rouge, "cider": cider})]
        for name, wanted, score in (("meteor", meteor, java.meteor), ("spice", spice, java.spice)):
            if wanted:
                corpus[name], per_image[name] = score(self._tokens, tokens)
        return CaptionScores({**corpus, **diversity(tokens, self._training)}, self.ids, per_image, statistics)

    def _check(self, predictions: dict[str, str]) -> None:
        missing = [image_id for image_id in self.ids if image_id not in predictions]
        if missing:
            raise ValueError(f"{_some(missing)} no prediction: give a caption, which may be empty, for each image with references.")
        known = set(self.ids)
        unknown = [image_id for image_id in predictions if image_id not in known]
        if unknown:
            raise ValueError(f"{_some(unknown)} no references: leave these predictions out, or add their references.")
        wrong = [image_id for image_id, caption in predictions.items() if not isinstance(caption, str)]
        if wrong:
            raise TypeError(f"The prediction of image '{wrong[0]}' is not a string: give one caption per image.")


def compare(first: CaptionScores, second: CaptionScores, *, resamples: int = 10_000, seed: int = 0) -> dict[str, Comparison]:
    """Compares BLEU, ROUGE-L and CIDEr of two systems, scored by the same `CaptionMetrics`, with a paired bootstrap.

    The interval and p are unreliable with fewer than 100 images.

    Returns:
        Name -> both values, their difference, its 95 % interval and p; see `significance.paired_bootstrap`.

    Raises:
        ValueError: the systems were scored on different images.
    """
    if first.ids != second.ids:
        raise ValueError("The two systems are scored on different images: score both with the same CaptionMetrics.")
    return paired_bootstrap(first.statistics, second.statistics, resamples=resamples, seed=seed)


def _check_mapping(captions: Any, what: str) -> None:
    if not isinstance(captions, Mapping):
        raise TypeError(f"The {what} are a {type(captions).__name__}: give a dict of image ids; `attncap evaluate` reads files.")


def _by_text(captions: Mapping[Any, Caption]) -> dict[str, Caption]:
    """The mapping with its ids as text."""
    texts = {str(image_id): caption for image_id, caption in captions.items()}
    if len(texts) < len(captions):
        twice = [str(image_id) for image_id in captions if not isinstance(image_id, str) and str(image_id) in captions]
        raise ValueError(f"Image '{twice[0]}' occurs twice, as a number and as text: use each id once.")
    return texts


def _words(tokens: list[str]) -> list[str]:
    """The words that BLEU and CIDEr count: "1 1/2", one token with a no-break space, counts as two words."""
    return " ".join(tokens).split()


def _some(ids: list[str]) -> str:
    named = ", ".join(f"'{image_id}'" for image_id in ids[:5])
    return f"{len(ids)} images ({named}{', ...' if len(ids) > 5 else ''}) have" if len(ids) > 1 else f"Image {named} has"
