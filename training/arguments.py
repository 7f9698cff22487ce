"""What a training run can be told: YAML file first, command line over it."""

import argparse
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, Seq2SeqTrainingArguments


class SettingError(ValueError):
    """A setting that the user has to change; its message is all that the command line shows."""


@dataclass
class ModelArguments:
    """The captioner to start from: a checkpoint, or a new one of pretrained parts."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from; without it a new captioner is made."}
    )
    model_config: str = field(
        default="{}",
        metadata={"help": "Fields of AttnCapConfig, as a mapping in YAML or JSON on the command line, which is merged over it."},
    )
    backbone_weights: str | None = field(
        default=None, metadata={"help": "New captioner: torchvision weight name, or a state dict on disk."}
    )
    word_vectors: str | None = field(default=None, metadata={"help": "New captioner: word2vec, GloVe or fastText text file."})
    tokenizer_kind: str = field(default="word", metadata={"help": "New captioner: 'word' or 'bpe'."})
    min_count: int = field(default=5, metadata={"help": "New captioner: how often a word must occur to get an id."})
    image_size: int = field(default=224, metadata={"help": "New captioner: side of the square that pictures are scaled to."})


@dataclass
class DataArguments:
    """The captioned pictures: a row an image, with all its captions."""

    train_file: str = field(default="", metadata={"help": "Parquet file of the training images."})
    validation_file: str | None = field(default=None, metadata={"help": "Parquet file of the validation images."})
    image_column: str = field(default="image", metadata={"help": "Column of the pictures."})
    captions_column: str = field(default="captions", metadata={"help": "Column of the captions, a list of strings an image."})
    captions_per_image: int = field(default=5, metadata={"help": "How many captions of an image a training step takes."})
    max_words: int = field(default=20, metadata={"help": "Words of a caption that are learned from."})
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder for the maps of a frozen backbone, computed once; without it, at every step."},
    )
    augment: bool = field(default=False, metadata={"help": "Crop and recolour training pictures at random, mildly."})


@dataclass
class CaptionTrainingArguments(Seq2SeqTrainingArguments):
    """transformers' own arguments, and what they lack."""

    encoder_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the backbone; default: that of the rest."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing_factor:
            raise SettingError(
                "`label_smoothing_factor` would take the labels away from the model, whose loss needs them: set "
                "`label_smoothing` in `model_config` instead."
            )


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, CaptionTrainingArguments]:
    """Arguments from `--config FILE.yaml` and the options behind it, which win.

    Raises:
        SettingError: for a config file that is missing, is no mapping or has unknown keys, which are named.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(argv)
    groups: list[Any] = [ModelArguments, DataArguments, CaptionTrainingArguments]
    parser = HfArgumentParser(groups)
    settings = _read_config(known.config) if known.config else {}
    unknown = set(settings) - {item.name for group in groups for item in fields(group)}
    if unknown:
        raise SettingError(f"{known.config}: no such settings: {', '.join(sorted(unknown))}. `--help` lists all.")
    in_file = settings.pop("model_config", {})
    for action in parser._actions:
        if action.dest in settings:
            action.required = False
    parser.set_defaults(**settings)
    model, data, training = parser.parse_args_into_dataclasses(args=rest)
    model.model_config = {**in_file, **json.loads(model.model_config)}
    if not data.train_file:
        raise SettingError("No training images: give `--train_file`.")
    return model, data, training


def _read_config(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise SettingError(f"No such config file: {path}.")
    settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise SettingError(f"{path} must hold `setting: value` lines.")
    return settings
