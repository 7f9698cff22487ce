"""How varied and well-formed captions are, as a measurement of the `evaluate` library.

`evaluate` copies this file away and reads its imports line by line: each stands on a line of its own and names a package.
"""

from typing import Any

import datasets
import evaluate

from hf_attncap.metrics.diversity import diversity
from hf_attncap.metrics.ptb import tokenize

DESCRIPTION = """\
How varied and well-formed captions are, without any reference: distinct words and word pairs, the size of the vocabulary, the mean
length, repetitions, captions that break off behind a word like "a" or "with", empty ones, and, where the captions that a model
learned from are given, how many captions are new. Words are Penn Treebank words, lower-cased, without punctuation.
"""

INPUTS = """
Args:
    predictions: one caption an image, a string.
    training: optional, only in `compute`: the captions that the model learned from, a list of strings.
Returns:
    distinct_1, distinct_2: distinct words and word pairs over all of them, 0 to 1; they fall as captions grow in number.
    vocabulary: number of distinct words.
    mean_length: words a caption.
    repeated_words: share of captions in which a word directly follows itself, 0 to 1.
    repeated_bigrams: share of a caption's word pairs that it has said before, mean over captions, 0 to 1.
    bad_endings: share of captions that end in an article, a conjunction or the like, 0 to 1.
    empty: share of captions without a word, 0 to 1.
    novel: only with `training`: share of captions that are no training caption, word for word, 0 to 1.
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
    """`hf_attncap.metrics.diversity` under the names of `evaluate`."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add captions, one a row."""  # `evaluate` writes the inputs behind
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
                        f"Row {row} of `{name}` is {caption!r:.100}, no string: give one caption a row, be it an empty one."
                    )
        words = None if training is None else [tokenize(caption) for caption in training]
        return diversity([tokenize(caption) for caption in predictions], words)
