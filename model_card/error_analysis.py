"""Counts frequent errors of captions: wrong numbers, wrong genders, repetitions, missed writing, rare words.

What an image shows is taken from its references. Captions are lists of tokens from `hf_attncap.metrics.tokenize`, in English.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Tokens = Sequence[str]

AGREE = 3  # references that must mention something before it counts as shown
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
MEN = frozenset({"man", "men", "boy", "boys", "guy", "guys", "gentleman", "gentlemen", "male", "males", "he", "him", "his"})
WOMEN = frozenset({"woman", "women", "girl", "girls", "lady", "ladies", "female", "females", "she", "her"})
GENDERS = {"men": MEN, "women": WOMEN}
SIGNS = frozenset({"sign", "signs", "logo", "text", "letter", "letters", "number", "numbers", "numbered"})
WRITING = SIGNS | {"word", "words", "writing", "written", "read", "reads", "says"}
PARTS = 5


def analyse_errors(
    captions: Mapping[str, Tokens], references: Mapping[str, Sequence[Tokens]], cider: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """The results of all functions below, by name.

    Args:
        captions: by image id.
        references: of the same images.
        cider: of each caption.
    """
    return {
        "numbers": numbers(captions, references),
        "genders": genders(captions, references),
        "doubles": doubles(captions),
        "writing": writing(captions, references, cider),
        "unusual": unusual(references, cider),
    }


def numbers(captions: Mapping[str, Tokens], references: Mapping[str, Sequence[Tokens]]) -> dict[str, Any]:
    """Counts captions that give the right number, another number or none.

    Covers images for which at least 3 references agree on one number from two to six. The first number of a caption counts.
    """
    found: Counter[str] = Counter()
    for name, caption in captions.items():
        votes = Counter(number for reference in references[name] for number in set(_numbers(reference)))
        agreed = [number for number, times in votes.items() if times >= AGREE]
        if len(agreed) == 1:
            own = next(iter(_numbers(caption)), None)
            found["same" if own == agreed[0] else "none" if own is None else "other"] += 1
    return {"images": found.total(), **{kind: found[kind] for kind in ("same", "other", "none")}}


def doubles(captions: Mapping[str, Tokens]) -> dict[str, int]:
    """Counts captions with the same two words before and after "and", such as "a man and a man"."""
    doubled = sum(
        any(
            word == "and" and place >= 2 and caption[place - 2 : place] == caption[place + 1 : place + 3]
            for place, word in enumerate(caption)
        )
        for caption in captions.values()
    )
    return {"images": len(captions), "doubled": doubled}


def genders(captions: Mapping[str, Tokens], references: Mapping[str, Sequence[Tokens]]) -> dict[str, dict[str, int]]:
    """Counts captions that mention the right gender, the other one, both or neither.

    Covers images for which at least 3 references mention men or boys and none mentions women or girls, and the reverse.

    Returns:
        For `men` and `women`, the number of `images` and of captions that mention the `same`, the `other`, `both` or `neither`.
    """
    table = {gender: Counter() for gender in GENDERS}
    for name, caption in captions.items():
        votes = {gender: sum(_mentions(words, reference) for reference in references[name]) for gender, words in GENDERS.items()}
        for gender, other in (("men", "women"), ("women", "men")):
            if votes[gender] >= AGREE and not votes[other]:
                right, wrong = _mentions(GENDERS[gender], caption), _mentions(GENDERS[other], caption)
                table[gender]["both" if right and wrong else "same" if right else "other" if wrong else "neither"] += 1
    kinds = ("same", "other", "both", "neither")
    return {gender: {"images": found.total(), **{kind: found[kind] for kind in kinds}} for gender, found in table.items()}


def writing(
    captions: Mapping[str, Tokens], references: Mapping[str, Sequence[Tokens]], cider: Mapping[str, float]
) -> dict[str, Any]:
    """Counts images whose writing (signs, letters, numbers) a reference mentions, and captions that mention it; mean CIDEr."""
    names = [name for name in captions if any(_mentions(WRITING, reference) for reference in references[name])]
    return {
        "images": len(names),
        "mentioned": sum(_mentions(WRITING, captions[name]) for name in names),
        "cider": _mean([cider[name] for name in names]),
    }


def unusual(references: Mapping[str, Sequence[Tokens]], cider: Mapping[str, float]) -> dict[str, Any]:
    """Mean CIDEr per fifth of the images, from common to rare words in the references.

    The frequency of a word is the number of images with it in a reference. Images are sorted by the mean log frequency of their
    words.
    """
    words = {name: {word for reference in own for word in reference} for name, own in references.items()}
    images = Counter(word for own in words.values() for word in own)
    common = {name: _mean([float(np.log(images[word])) for word in own]) for name, own in words.items()}
    order = sorted(cider, key=lambda name: -common[name])
    fifths = [_mean([cider[name] for name in part.tolist()]) for part in np.array_split(np.array(order, dtype=object), PARTS)]
    return {"images": len(order), "cider_by_fifth": fifths}


def _numbers(caption: Tokens) -> list[int]:
    """The numbers of a caption, in order."""
    return [NUMBERS[word] for word in caption if word in NUMBERS]


def _mentions(words: frozenset[str], caption: Tokens) -> bool:
    return not words.isdisjoint(caption)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
