"""A look through the data before a run: what is in them, and what is wrong with them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers.models import WordLevel

from hf_attncap.processing_attncap import AttnCapProcessor

from ..arguments import DataArguments, ModelArguments, SettingError
from .splits import Split, examine, first, read_splits, shared_images
from .vocabulary import build_tokenizer, describe_coverage, extend_tokenizer, word_coverage

TINY = 32  # pixels of the shorter side: below it hardly anything is to be seen
SAMPLES = 5


def inspect_data(model: ModelArguments, data: DataArguments) -> int:
    """Prints what a run would learn from, without one. All images are read, also those that would be streamed.

    Returns:
        0, or 1 if there are problems.

    Raises:
        SettingError: for data that cannot be read at all, as `load_data`.
    """
    train, validation = read_splits(data)
    splits = {"train": train} | ({"validation": validation} if validation else {})
    problems = shared_images(train, validation) if validation else []
    notes = [] if validation else ["There is no validation split."]
    tokenizer = _tokenizer(model, train)
    known = model.model_name_or_path and not model.extend_vocabulary
    print(f"vocabulary: {len(tokenizer)} tokens" + ("" if known else f" at min_count {model.min_count}"))
    notes += describe_coverage(tokenizer, _captions(train), way_out(model, tokenizer))[1:]
    homes: dict[str, list[str]] = {}
    for role, split in splits.items():
        print(f"\n{role}: {split.name}, {len(split.rows)} images")
        problems += split.problems + split.broken
        notes += split.notes
        if not len(split.rows):
            problems.append(f"{split.name} holds no image that can be used.")
            continue
        _print_captions(split.rows["captions"][:], tokenizer, data.max_words)
        looked = examine(split.rows)
        names = [f"{role} {name}" for name in split.rows["image_id"][:]]
        problems += _print_pictures(split, names, looked)
        notes += _not_rgb(split, names, looked)
        for name, digest in zip(names, looked["digest"][:]):
            homes.setdefault(digest, []).append(name)
    problems += [f"The same picture is there {len(same)} times: {first(same)}." for key, same in homes.items() if key and same[1:]]
    _print_samples(train.rows)
    for title, sentences in (("notes", notes), ("problems", problems)):
        print(f"\n{title}: {len(sentences) or 'none'}")
        for sentence in sentences:
            print(f"  {sentence}")
    return 1 if problems else 0


def way_out(model: ModelArguments, tokenizer: Any) -> str:
    """What to do about words of the training captions that the vocabulary of a run lacks."""
    if model.model_name_or_path is None or model.extend_vocabulary:
        return f"a lower `min_count` than {model.min_count} takes rarer words into the vocabulary"
    if not isinstance(tokenizer.backend_tokenizer.model, WordLevel):
        return "they have characters that the checkpoint's word pieces lack, so train a new captioner, without `model_name_or_path`"
    return "`--extend_vocabulary True` adds those that occur at least `min_count` times"


def _captions(split: Split) -> list[str]:
    return [caption for captions in (split.rows["captions"][:] if len(split.rows) else []) for caption in captions]


def _tokenizer(model: ModelArguments, train: Split) -> Any:
    """The tokenizer that the run would have."""
    try:
        if not model.model_name_or_path:
            return build_tokenizer(_captions(train), model.tokenizer_kind, min_count=model.min_count)
    except ValueError as error:
        raise SettingError(f"{train.name}: {error}") from error
    try:
        tokenizer = AttnCapProcessor.from_pretrained(model.model_name_or_path).tokenizer
        if model.extend_vocabulary:
            extend_tokenizer(tokenizer, _captions(train), model.min_count)
    except (OSError, ValueError) as error:
        raise SettingError(f"`model_name_or_path`: {model.model_name_or_path}: {str(error).splitlines()[0]}") from error
    return tokenizer


def _print_captions(captions: Sequence[Sequence[str]], tokenizer: Any, max_words: int) -> None:
    sentences = [caption for row in captions for caption in row]
    lengths = [len(set(one.word_ids)) for one in tokenizer.backend_tokenizer.encode_batch(sentences, add_special_tokens=False)]
    low, middle, most, high = np.percentile(lengths, [0, 50, 95, 100], method="nearest")
    counts = Counter(len(row) for row in captions)
    print(f"  captions: {len(sentences)}; images by their number: {', '.join(f'{n}: {counts[n]}' for n in sorted(counts))}")
    print(f"  words of a caption: {low} least, {middle} median, {most} at 95 %, {high} most")
    print(f"  longer than max_words {max_words}: {np.mean(np.array(lengths) > max_words):.2%}")
    print(f"  words in the vocabulary: {word_coverage(tokenizer, sentences):.2%}")


def _print_pictures(split: Split, names: list[str], looked: Dataset) -> list[str]:
    """Prints sizes and modes; returns sentences about broken and tiny pictures."""
    rows: list[Any] = list(looked)
    sound = [row for row in rows if not row["problem"]]
    for side in ("width", "height"):
        if sound:
            low, middle, high = np.percentile([row[side] for row in sound], [0, 50, 100], method="nearest")
            print(f"  {side}: {low} to {high} pixels, median {middle}")
    print(f"  modes: {', '.join(f'{mode} {count}' for mode, count in Counter(row['mode'] for row in sound).most_common())}")
    problems = [f"{split.name}: {row['problem']}." for row in rows if row["problem"]]
    tiny = [name for name, row in zip(names, rows) if not row["problem"] and min(row["width"], row["height"]) < TINY]
    return problems + ([f"{split.name}: {len(tiny)} pictures have a side below {TINY} pixels: {first(tiny)}."] if tiny else [])


def _not_rgb(split: Split, names: list[str], looked: Dataset) -> list[str]:
    other = [name for name, mode in zip(names, looked["mode"][:]) if mode not in ("RGB", "")]
    return [f"{split.name}: {len(other)} pictures are not RGB and are converted: {first(other)}."] if other else []


def _print_samples(rows: Dataset) -> None:
    print("\nsamples:")
    chosen = rows.select(np.linspace(0, len(rows) - 1, min(SAMPLES, len(rows)), dtype=int).tolist())
    for name, captions in zip(chosen["image_id"][:], chosen["captions"][:]):
        print(f"  {name}: {' | '.join(captions)}")
