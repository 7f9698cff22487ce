"""Where captions go wrong, measured against the references: numbers, men and women, doubles, writing, unusual pictures.

Captions are lists of tokens as `hf_attncap.metrics.tokenize` gives them; the words are English.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Tokens = Sequence[str]

AGREE = 3  # references of five that must say a thing before it counts as said of the picture
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
MEN = frozenset({"man", "men", "boy", "boys", "guy", "guys", "gentleman", "gentlemen", "male", "males", "he", "him", "his"})
WOMEN = frozenset({"woman", "women", "girl", "girls", "lady", "ladies", "female", "females", "she", "her"})
GENDERS = {"men": MEN, "women": WOMEN}
SIGNS = frozenset({"sign", "signs", "logo", "text", "letter", "letters", "number", "numbers", "numbered"})
WRITING = SIGNS | {"word", "words", "writing", "written", "read", "reads", "says"}
PARTS = 5


def limits(
    captions: Mapping[str, Tokens], references: Mapping[str, Sequence[Tokens]], cider: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """All measures of this file.

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
    """Of the images to which at least 3 references give the same number from two to six: captions with that number, another, none.

    A caption with several numbers counts by its first.
    """
    found: Counter[str] = Counter()
    for name, caption in captions.items():
        said = Counter(
            number for reference in references[name] for number in {NUMBERS[word] for word in reference if word in NUMBERS}
        )
        agreed = [number for number, times in said.items() if times >= AGREE]
        if len(agreed) != 1:
            continue
        own = next(iter(_numbers(caption)), None)
        found["same" if own == agreed[0] else "none" if own is None else "other"] += 1
    return {"images": found.total(), **{kind: found[kind] for kind in ("same", "other", "none")}}


def doubles(captions: Mapping[str, Tokens]) -> dict[str, int]:
    """Captions in which the same two words stand on both sides of "and", as in "a man and a man"."""
    doubled = sum(
        any(
            word == "and" and place >= 2 and caption[place - 2 : place] == caption[place + 1 : place + 3]
            for place, word in enumerate(caption)
        )
        for caption in captions.values()
    )
    return {"images": len(captions), "doubled": doubled}


def genders(captions: Mapping[str, Tokens], references: Mapping[str, Sequence[Tokens]]) -> dict[str, dict[str, int]]:
    """What captions say of images where at least 3 references speak of men or boys and none of women or girls, and the reverse.

    Returns:
        For `men` and `women`, the number of `images` and of captions that speak of the `same`, of the `other`, of `both` or of
        `neither`.
    """
    table = {gender: Counter() for gender in GENDERS}
    for name, caption in captions.items():
        said = {gender: sum(_speaks(words, reference) for reference in references[name]) for gender, words in GENDERS.items()}
        for gender, other in (("men", "women"), ("women", "men")):
            if said[gender] >= AGREE and not said[other]:
                own, wrong = _speaks(GENDERS[gender], caption), _speaks(GENDERS[other], caption)
                table[gender]["both" if own and wrong else "same" if own else "other" if wrong else "neither"] += 1
    kinds = ("same", "other", "both", "neither")
    return {gender: {"images": found.total(), **{kind: found[kind] for kind in kinds}} for gender, found in table.items()}


def writing(
    captions: Mapping[str, Tokens], references: Mapping[str, Sequence[Tokens]], cider: Mapping[str, float]
) -> dict[str, Any]:
    """The images of whose writing (signs, letters, numbers) a reference speaks: captions that do too, and mean CIDEr there."""
    names = [name for name in captions if any(_speaks(WRITING, reference) for reference in references[name])]
    return {
        "images": len(names),
        "mentioned": sum(_speaks(WRITING, captions[name]) for name in names),
        "cider": _mean([cider[name] for name in names]),
    }


def unusual(references: Mapping[str, Sequence[Tokens]], cider: Mapping[str, float]) -> dict[str, Any]:
    """Mean CIDEr in fifths of the images, from those whose references use the most common words to those with the rarest.

    Common is a word by the number of images whose references have it; an image goes by the mean over the logarithms of its words.
    """
    words = {name: {word for reference in own for word in reference} for name, own in references.items()}
    images = Counter(word for own in words.values() for word in own)
    common = {name: _mean([float(np.log(images[word])) for word in own]) for name, own in words.items()}
    order = sorted(cider, key=lambda name: -common[name])
    fifths = [_mean([cider[name] for name in part.tolist()]) for part in np.array_split(np.array(order, dtype=object), PARTS)]
    return {"images": len(order), "cider_by_fifth": fifths}


def _numbers(caption: Tokens) -> list[int]:
    """The different numbers of a caption, in order."""
    return list(dict.fromkeys(NUMBERS[word] for word in caption if word in NUMBERS))


def _speaks(words: frozenset[str], caption: Tokens) -> bool:
    return not words.isdisjoint(caption)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
