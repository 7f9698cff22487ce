"""`attncap train --inspect`: what a run would train on, and every problem with it."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers.models import WordLevel

from hf_attncap.processing_attncap import AttnCapProcessor

from ..arguments import DataArguments, ModelArguments, SettingError
from .checks import Split, examine_images, list_names
from .splits import find_shared_images, read_splits
from .vocabulary import build_tokenizer, describe_coverage, extend_tokenizer, word_coverage

SMALL = 32  # pixels of the shorter side, below which little can be recognised
SAMPLES = 5


def inspect_data(model: ModelArguments, data: DataArguments) -> int:
    """Prints splits, caption lengths, vocabulary, samples and all problems. Every image is decoded, also those of a stream.

    Returns:
        0, or 1 if there are problems.

    Raises:
        SettingError: the data cannot be read at all, as in `load_data`.
    """
    train, validation = read_splits(data)
    splits = {"train": train} | ({"validation": validation} if validation else {})
    problems = find_shared_images(train, validation) if validation else []
    notes = [] if validation else ["There is no validation split."]
    tokenizer = _tokenizer(model, train)
    fixed = model.model_name_or_path and not model.extend_vocabulary
    print(f"vocabulary: {len(tokenizer)} tokens" + ("" if fixed else f" at min_count {model.min_count}"))
    notes += describe_coverage(tokenizer, _all_captions(train), advise_on_words(model, tokenizer))[1:]
    names_by_digest: dict[str, list[str]] = {}
    for role, split in splits.items():
        print(f"\n{role}: {split.name}, {len(split.rows)} images")
        problems += split.problems + split.broken
        notes += split.notes
        if not len(split.rows):
            problems.append(f"{split.name} holds no usable image.")
            continue
        _print_captions(split.rows["captions"][:], tokenizer, data.max_caption_words)
        examined = examine_images(split.rows)
        names = [f"{role} {name}" for name in split.rows["image_id"][:]]
        faults, remarks = _print_images(split.name, names, list(examined))
        problems += faults
        notes += remarks
        for name, digest in zip(names, examined["digest"][:]):
            names_by_digest.setdefault(digest, []).append(name)
    copies = [names for digest, names in names_by_digest.items() if digest and len(names) > 1]
    problems += [f"The same image occurs {len(names)} times: {list_names(names)}." for names in copies]
    _print_samples(train.rows)
    for title, sentences in (("notes", notes), ("problems", problems)):
        print(f"\n{title}: {len(sentences) or 'none'}")
        for sentence in sentences:
            print(f"  {sentence}")
    return 1 if problems else 0


def advise_on_words(model: ModelArguments, tokenizer: Any) -> str:
    """What to do about words of the training captions that the vocabulary lacks."""
    if model.model_name_or_path is None or model.extend_vocabulary:
        return f"set `min_count` below {model.min_count} to add rarer words to the vocabulary"
    if not isinstance(tokenizer.backend_tokenizer.model, WordLevel):
        return "they have characters that the checkpoint's word pieces lack, so train a new captioner, without `model_name_or_path`"
    return "set `--extend_vocabulary True` to add those that occur at least `min_count` times"


def _all_captions(split: Split) -> list[str]:
    return [caption for captions in (split.rows["captions"][:] if len(split.rows) else []) for caption in captions]


def _tokenizer(model: ModelArguments, train: Split) -> Any:
    """The tokenizer that the run would use."""
    try:
        if not model.model_name_or_path:
            return build_tokenizer(_all_captions(train), model.tokenizer_kind, min_count=model.min_count)
    except ValueError as error:
        raise SettingError(f"{train.name}: {error}") from error
    try:
        tokenizer = AttnCapProcessor.from_pretrained(model.model_name_or_path).tokenizer
        if model.extend_vocabulary:
            extend_tokenizer(tokenizer, _all_captions(train), model.min_count)
    except (OSError, ValueError) as error:
        raise SettingError(f"`model_name_or_path`: {model.model_name_or_path}: {str(error).splitlines()[0]}") from error
    return tokenizer


def _print_captions(captions: Sequence[Sequence[str]], tokenizer: Any, max_words: int) -> None:
    sentences = [caption for row in captions for caption in row]
    lengths = [len(set(one.word_ids)) for one in tokenizer.backend_tokenizer.encode_batch(sentences, add_special_tokens=False)]
    low, middle, most, high = np.percentile(lengths, [0, 50, 95, 100], method="nearest")
    counts = Counter(len(row) for row in captions)
    print(f"  captions: {len(sentences)}; images by number of captions: {', '.join(f'{n}: {counts[n]}' for n in sorted(counts))}")
    print(f"  words per caption: minimum {low}, median {middle}, 95th percentile {most}, maximum {high}")
    print(f"  captions longer than {max_words} words (max_caption_words): {np.mean(np.array(lengths) > max_words):.2%}")
    print(f"  words in the vocabulary: {word_coverage(tokenizer, sentences):.2%}")


def _print_images(source: str, names: list[str], rows: list[Any]) -> tuple[list[str], list[str]]:
    """Prints sizes and modes. Returns problems (broken and small images) and notes (images that are not RGB)."""
    sound = {name: row for name, row in zip(names, rows) if not row["problem"]}
    for side in ("width", "height"):
        if sound:
            low, middle, high = np.percentile([row[side] for row in sound.values()], [0, 50, 100], method="nearest")
            print(f"  {side}: {low} to {high} pixels, median {middle}")
    modes = Counter(row["mode"] for row in sound.values())
    print(f"  modes: {', '.join(f'{mode} {count}' for mode, count in modes.most_common())}")
    problems = [f"{source}: {row['problem']}." for row in rows if row["problem"]]
    if small := [name for name, row in sound.items() if min(row["width"], row["height"]) < SMALL]:
        problems.append(f"{source}: {len(small)} images have a side below {SMALL} pixels: {list_names(small)}.")
    notes = []
    if other := [name for name, row in sound.items() if row["mode"] != "RGB"]:
        notes.append(f"{source}: {len(other)} images are not RGB and will be converted: {list_names(other)}.")
    return problems, notes


def _print_samples(rows: Dataset) -> None:
    print("\nsamples:")
    chosen = rows.select(np.linspace(0, len(rows) - 1, min(SAMPLES, len(rows)), dtype=int).tolist())
    for name, captions in zip(chosen["image_id"][:], chosen["captions"][:]):
        print(f"  {name}: {' | '.join(captions)}")
