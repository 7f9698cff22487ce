"""Diversity and well-formedness of captions as a measurement of the `evaluate` library.

`evaluate` copies this file and parses its imports: each import needs its own line and must name a package.
"""

from typing import Any

import datasets
import evaluate

from hf_attncap.metrics.diversity import diversity
from hf_attncap.metrics.ptb import tokenize

DESCRIPTION = """\
Diversity and well-formedness of captions, without references: distinct words and bigrams, size of the vocabulary, mean length,
repetitions, captions that end in a word like "a" or "with", empty captions, and, given a model's training captions, the fraction of
novel captions. Words are lower-case Penn Treebank words without punctuation.
"""

INPUTS = """
Args:
    predictions: one caption per image, a string.
    training: optional, only in `compute`: the training captions of the model, a list of strings.
Returns:
    distinct_1, distinct_2: distinct words (bigrams) / all words (bigrams), 0 to 1; falls with the number of captions.
    vocabulary: number of distinct words.
    mean_length: words per caption.
    repeated_words: fraction of captions in which a word directly follows itself, 0 to 1.
    repeated_bigrams: fraction of a caption's bigrams that repeat an earlier one, mean over captions, 0 to 1.
    bad_endings: fraction of captions that end in an article, a conjunction or a similar word, 0 to 1.
    empty: fraction of captions without a word, 0 to 1.
    novel: only with `training`: fraction of captions that equal no training caption, 0 to 1.
Example:
    >>> import evaluate
    >>> from hf_attncap.metrics import evaluate_module
    >>> measurement = evaluate.load(evaluate_module("caption_diversity"))
    >>> values = measurement.compute(predictions=["a dog runs", "a dog with a"], training=["A dog runs ."])
    >>> values["bad_endings"], values["novel"]
    (0.5, 0.5)
"""

CITATION = """\
@inproceedings{li2016diversity,
    title = {A Diversity-Promoting Objective Function for Neural Conversation Models},
    author = {Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill},
    booktitle = {NAACL-HLT},
    year = {2016}
}
@inproceedings{vanmiltenburg2018measuring,
    title = {Measuring the Diversity of Automatic Image Descriptions},
    author = {van Miltenburg, Emiel and Elliott, Desmond and Vossen, Piek},
    booktitle = {COLING},
    year = {2018}
}
@inproceedings{welleck2020neural,
    title = {Neural Text Generation with Unlikelihood Training},
    author = {Welleck, Sean and Kulikov, Ilia and Roller, Stephen and Dinan, Emily and Cho, Kyunghyun and Weston, Jason},
    booktitle = {ICLR},
    year = {2020}
}
"""


class CaptionDiversity(evaluate.Measurement):
    """`hf_attncap.metrics.diversity` as an `evaluate` measurement."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds captions, one per row."""  # `evaluate` appends INPUTS
        if predictions is None or isinstance(predictions, str):
            raise TypeError(f"`predictions` must be a list of captions, not {predictions!r:.100}.")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, predictions: list[str], training: list[str] | None = None
    ) -> dict[str, float]:
        if isinstance(training, str):
            raise TypeError("`training` is one string: give a list of captions.")
        for name, captions in (("predictions", predictions), ("training", training or [])):
            for row, caption in enumerate(captions):
                if not isinstance(caption, str):
                    raise TypeError(
                        f"Row {row} of `{name}` is {caption!r:.100}, not a string: give one caption per row, which may be empty."
                    )
        words = None if training is None else [tokenize(caption) for caption in training]
        return diversity([tokenize(caption) for caption in predictions], words)
