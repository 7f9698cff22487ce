"""BLEU, ROUGE-L and CIDEr of captions, as a metric of the `evaluate` library.

`evaluate` copies this file and parses its imports: each import needs its own line and must name a package.
"""

from typing import Any

import datasets
import evaluate

from hf_attncap.metrics import CaptionMetrics

DESCRIPTION = """\
BLEU-1 to BLEU-4, ROUGE-L and CIDEr of image captions as in pycocoevalcap, on the same Penn Treebank words (lower-case, without
punctuation), without Java. CIDEr is CIDEr-D: it weights n-grams by how few images have them in their references. So its value
depends on the set of images, and for a single image it is 0 by definition.
"""

INPUTS = """
Args:
    predictions: one caption per image, a string; an empty one scores 0.
    references: one or more reference captions per image, a list of strings; their number may vary.
Returns:
    bleu_1, bleu_2, bleu_3, bleu_4: 0 to 1, of the corpus, with the reference length closest to each prediction's.
    rouge_l: 0 to 1, mean over images, beta 1.2.
    cider: 0 to 10, mean over images; 0 for a single image.
Example:
    >>> import evaluate
    >>> from hf_attncap.metrics import evaluate_module
    >>> metric = evaluate.load(evaluate_module("caption_scores"))
    >>> scores = metric.compute(
    ...     predictions=["a dog runs", "two men sit"], references=[["A dog runs .", "a dog"], ["Two men sit", "two men on a bench"]]
    ... )
    >>> round(scores["bleu_1"], 3)
    1.0
"""

CITATION = """\
@inproceedings{papineni2002bleu,
    title = {{BLEU}: a Method for Automatic Evaluation of Machine Translation},
    author = {Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
    booktitle = {ACL},
    year = {2002}
}
@inproceedings{lin2004rouge,
    title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
    author = {Lin, Chin-Yew},
    booktitle = {Text Summarization Branches Out},
    year = {2004}
}
@inproceedings{vedantam2015cider,
    title = {{CIDEr}: Consensus-based Image Description Evaluation},
    author = {Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
    booktitle = {CVPR},
    year = {2015}
}
@article{chen2015coco,
    title = {Microsoft {COCO} Captions: Data Collection and Evaluation Server},
    author = {Chen, Xinlei and Fang, Hao and Lin, Tsung-Yi and Vedantam, Ramakrishna and Gupta, Saurabh and Doll{\\'a}r, Piotr and
              Zitnick, C. Lawrence},
    journal = {arXiv:1504.00325},
    year = {2015}
}
"""

SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")


class CaptionScores(evaluate.Metric):
    """`hf_attncap.metrics.CaptionMetrics` as an `evaluate` metric, with rows instead of image ids."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            reference_urls=["https://github.com/tylin/coco-caption"],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds one caption and its references per image."""  # `evaluate` appends INPUTS
        for name, rows in (("predictions", predictions), ("references", references)):
            if rows is None or isinstance(rows, str):
                raise TypeError(f"`{name}` must be a list with one entry per image, not {rows!r:.100}.")
        for row, captions in enumerate(references):
            if isinstance(captions, str):  # would count as a list of letters
                raise TypeError(f"The references of row {row} are one string: give a list of captions for each image.")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, predictions: list[str], references: list[list[str]]
    ) -> dict[str, float]:
        for row, captions in enumerate(references):
            if not captions or None in captions:
                raise ValueError(
                    f"Row {row} has {'None among its' if captions else 'no'} references: give it one or more captions."
                )
        scores = CaptionMetrics(dict(enumerate(references))).score(dict(enumerate(predictions)))
        return {name: scores[name] for name in SCORES}
