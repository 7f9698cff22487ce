"""What a training run can be told: YAML file first, command line over it."""

import logging
from dataclasses import dataclass, field
from typing import Literal

from transformers import Seq2SeqTrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from hf_attncap.metrics import CaptionMetrics

from .settings import Parser, SettingError
from .unused_options import unused_settings

logger = logging.getLogger(__name__)


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
    word_vectors: str | None = field(
        default=None,
        metadata={
            "help": "New captioner: word2vec, GloVe or fastText text file; or `captions`: vectors learned from the training "
            "captions, kept as word_vectors.txt in `output_dir`. `freeze_word_embeddings: false` in `model_config` trains them on."
        },
    )
    tokenizer_kind: Literal["word", "bpe"] = field(default="word", metadata={"help": "New captioner: words, or pieces of words."})
    min_count: int = field(
        default=5, metadata={"help": "New captioner, or `extend_vocabulary`: how often a word must occur to get an id."}
    )
    extend_vocabulary: bool = field(
        default=False,
        metadata={
            "help": "Checkpoint: add the words of the training captions that its vocabulary lacks, if they occur at least "
            "`min_count` times."
        },
    )
    image_size: int = field(default=224, metadata={"help": "New captioner: side of the square that pictures are scaled to."})

    def __post_init__(self) -> None:
        for name in ("min_count", "image_size"):
            if getattr(self, name) < 1:
                raise SettingError(f"`{name}` is {getattr(self, name)}: it must be at least 1.")


@dataclass
class DataArguments:
    """The captioned pictures: a row an image, with all its captions."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Captioned pictures: a dataset on the Hub, or a folder written by `save_to_disk`."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset, if it has several."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Captioned pictures: a folder of them with metadata.jsonl, or of such folders `train` and `validation`."},
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Captioned pictures: a Parquet, CSV or JSON lines file, Karpathy's splits or COCO's annotations as JSON, or "
            "WebDataset shards ('shards/*.tar')."
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "The same for validation; Karpathy's file holds that as well."}
    )
    image_dir: str | None = field(
        default=None, metadata={"help": "Where paths of pictures begin; default: the folder of the file that has them."}
    )
    validation_image_dir: str | None = field(
        default=None, metadata={"help": "The same for the validation images; default: `image_dir`."}
    )
    train_split: str | None = field(
        default=None,
        metadata={"help": "Split of a dataset or Karpathy's file, several joined by '+'; default: train, and restval if there."},
    )
    validation_split: str | None = field(
        default=None, metadata={"help": "The same for validation; default: validation or val, if it is there."}
    )
    validation_share: float = field(
        default=0.0, metadata={"help": "Share of the training images that is split off for validation, the same ones in every run."}
    )
    image_column: str | None = field(
        default=None,
        metadata={"help": "Column of the images or of their paths; default: image, or the only one with a usual name (path, ...)."},
    )
    captions_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the captions: a list of strings per image, or one string (rows of the same image are merged). "
            "Join several columns with '+'. Default: captions, or the only one with a usual name (caption, text, ...)."
        },
    )
    image_id_column: str | None = field(
        default=None,
        metadata={"help": "Column that tells images apart; default: image_id, if it is there. Empty: none, their files do."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read training images as they come, from shards, Parquet or a dataset; needs `max_steps`."}
    )
    skip_broken_images: bool = field(
        default=False, metadata={"help": "Leave out and name images without readable picture or caption, instead of stopping."}
    )
    inspect: bool = field(
        default=False, metadata={"help": "Only look through all data and tell what is in them and what is wrong; no training."}
    )
    captions_per_image: int = field(default=5, metadata={"help": "How many captions of an image a training step takes."})
    max_words: int = field(default=20, metadata={"help": "Words of a caption that are learned from."})
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder for the maps of a frozen backbone, computed once; without it, at every step."},
    )
    augment: bool = field(default=False, metadata={"help": "Crop and recolour training pictures at random, mildly."})
    mirror: bool = field(
        default=False,
        metadata={"help": "Mirror half of the training pictures; 'left' and 'right' change places in their English captions."},
    )
    cached_views: int = field(
        default=1,
        metadata={
            "help": "With `feature_cache`: how many views of each training picture are cached and take turns by epoch; the first "
            "is the picture itself, the others are changed by `augment` and `mirror`."
        },
    )


@dataclass
class CaptionTrainingArguments(Seq2SeqTrainingArguments):
    """transformers' own arguments, and what they lack."""

    encoder_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the backbone; default: that of the rest."}
    )
    input_dropout: float = field(
        default=0.0,
        metadata={"help": "Share of regions and word embeddings that training drops, beside the model's own `dropout` of outputs."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Evaluate and save the exponential average of the weights with this decay; default: the weights."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better `metric_for_best_model`; default: never."},
    )
    sample_images: int = field(
        default=4,
        metadata={
            "help": "Captions of so many validation images, with where the model looked, go to `output_dir/samples` at every "
            "evaluation; 0: none."
        },
    )
    self_critical: bool = field(
        default=False,
        metadata={"help": "Learn from CIDEr-D of captions that the model draws, from a trained checkpoint on."},
    )
    samples_per_image: int = field(default=5, metadata={"help": "Self-critical: captions drawn of an image, at least 2."})
    cross_entropy_weight: float = field(
        default=0.0,
        metadata={"help": "Self-critical: share of the cross-entropy (by word) in the loss; the rest goes by caption."},
    )

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except Exception as error:  # of many kinds: values, files, packages, devices
            raise SettingError(" ".join(str(error).split()) or type(error).__name__) from error
        if self.label_smoothing_factor:
            raise SettingError(
                "`label_smoothing_factor` would take the labels away from the model, whose loss needs them: set "
                "`label_smoothing` in `model_config` instead."
            )
        metric = self.metric_for_best_model
        if metric not in (None, "loss", "eval_loss") and not self.predict_with_generate:
            raise SettingError(f"`metric_for_best_model: {metric}` is a score of generated captions: set `predict_with_generate`.")
        name = (metric or "loss").removeprefix("eval_")
        if name not in (known := ["loss", *CaptionMetrics({"": ["a"]}).score({"": "a"})]):
            raise SettingError(f"`metric_for_best_model: {metric}` is none of {', '.join(known)}.")
        if not 0 <= self.input_dropout < 1:
            raise SettingError(f"`input_dropout` is {self.input_dropout}: it must be at least 0 and below 1.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise SettingError(f"`ema_decay` is {self.ema_decay}: it must be between 0 and 1, 0.999 for example.")
        if self.sample_images < 0:
            raise SettingError(f"`sample_images` is {self.sample_images}: it must be at least 0.")
        self._check_early_stopping()
        self._check_self_critical()
        self._check_trackers()

    def _check_early_stopping(self) -> None:
        if self.early_stopping_patience is None:
            return
        if self.early_stopping_patience < 1:
            raise SettingError(f"`early_stopping_patience` is {self.early_stopping_patience}: it must be at least 1.")
        if self.metric_for_best_model is None:
            raise SettingError("`early_stopping_patience` needs `metric_for_best_model`: `cider` or `loss`.")
        if self.eval_strategy == "no":
            raise SettingError("`early_stopping_patience` needs evaluations: set `eval_strategy` to `epoch` or `steps`.")

    def _check_self_critical(self) -> None:
        if not self.self_critical:
            if self.cross_entropy_weight:
                raise SettingError("`cross_entropy_weight` goes with `self_critical`, without which all is cross-entropy.")
            return
        if self.samples_per_image < 2:
            raise SettingError(
                f"`samples_per_image` is {self.samples_per_image}: a sample is judged against the others of its image, so it must "
                "be at least 2."
            )
        if not 0 <= self.cross_entropy_weight <= 1:
            raise SettingError(f"`cross_entropy_weight` is {self.cross_entropy_weight}: it is a share, 0 to 1.")
        if self.input_dropout:
            raise SettingError("`input_dropout` does nothing in self-critical training, which reads inputs whole: leave it out.")

    def _check_trackers(self) -> None:
        """The Trainer would find out when all data are loaded."""
        try:
            for tracker in get_reporting_integration_callbacks(self.report_to):
                tracker()
        except (ValueError, RuntimeError, ImportError, TypeError) as error:
            raise SettingError(f"`report_to`: {error}") from error


GROUPS = (ModelArguments, DataArguments, CaptionTrainingArguments)


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, CaptionTrainingArguments]:
    """Arguments from `--config FILE.yaml`, a path or the name of one of `CONFIGS`, and the options behind it, which win.

    Raises:
        SettingError: for a config file that is missing or is no mapping, for settings that are not known, of a wrong type,
            contradictory, or not used by such a run and hence a mistake. Other unused ones are a warning.
    """
    parser = Parser(GROUPS, prog="attncap train")
    for action in parser._actions:
        if action.dest == "resume_from_checkpoint":
            action.help = "`last`: go on from the last checkpoint in `output_dir`, if there is one; or the folder of a checkpoint."
    settings, fields_of_model = parser.read(argv)
    parser.set_defaults(**settings)
    model, data, training, _ = parser.parse_args_into_dataclasses(args=[])  # the last holds `--config`
    model.model_config = fields_of_model
    _check_data(data, training)
    if not data.inspect:
        errors, warnings = unused_settings(settings.keys() - {"model_config"}, model, data, training)
        if errors:
            raise SettingError(" ".join(errors))
        for warning in warnings:
            logger.warning("%s", warning)
    return model, data, training


def refuse_without_validation(training: CaptionTrainingArguments) -> None:
    """Raises a SettingError if there is anything to do with validation images."""
    wants = {"predict_with_generate": training.predict_with_generate, "eval_strategy": training.eval_strategy != "no"}
    for setting, wanted in wants.items():
        if wanted:
            raise SettingError(
                f"`{setting}` wants validation images and there are none: give `--validation_file`, `--validation_split` or "
                f"`--validation_share 0.05`, or set `{setting}` to {'no' if setting == 'eval_strategy' else 'false'}."
            )


def _check_data(data: DataArguments, training: CaptionTrainingArguments) -> None:
    given = [name for name in ("dataset_name", "data_dir", "train_file") if getattr(data, name)]
    if not given:
        raise SettingError("No training images: give `--train_file`, `--dataset_name` or `--data_dir`.")
    if len(given) > 1:
        raise SettingError(f"`{given[0]}` and `{given[1]}` both name the training images: give one of them.")
    if data.validation_file and not data.train_file:
        raise SettingError(f"`validation_file` goes with `train_file`; of `{given[0]}` set `validation_split`.")
    if data.validation_file and data.validation_share:
        raise SettingError("`validation_file` and `validation_share` both say what to validate on: give one of them.")
    if not 0 <= data.validation_share < 1:
        raise SettingError(f"`validation_share` is {data.validation_share:g}: it must be at least 0 and below 1.")
    if data.train_file and not (data.inspect or data.validation_file or data.validation_share or data.train_file.endswith(".json")):
        refuse_without_validation(training)
    if data.dataset_config_name and not data.dataset_name:
        raise SettingError("`dataset_config_name` goes with `dataset_name`, which is not given.")
    if data.streaming and training.max_steps <= 0 and not data.inspect:
        raise SettingError("A stream has no end that is known: with `streaming` give `--max_steps`.")
    _check_views(data)
    for setting in ("captions_per_image", "max_words"):
        if getattr(data, setting) < 1:
            raise SettingError(f"`{setting}` is {getattr(data, setting)}: it must be at least 1.")
    for other, on in (("feature_cache", data.feature_cache), ("self_critical", training.self_critical)):
        if data.streaming and on:
            raise SettingError(f"`{other}` needs all training images at hand: leave out `streaming` or `{other}`.")


def _check_views(data: DataArguments) -> None:
    changed = "augment" if data.augment else "mirror" if data.mirror else None
    if data.cached_views < 1:
        raise SettingError(f"`cached_views` is {data.cached_views}: it must be at least 1.")
    if data.cached_views > 1 and not (data.feature_cache and changed):
        raise SettingError("`cached_views` goes with `feature_cache` and with `augment` or `mirror`, which make the views differ.")
    if data.feature_cache and changed and data.cached_views == 1:
        raise SettingError(
            f"`{changed}` changes pictures at every reading, which `feature_cache` reads only once: set `cached_views: 4`, for "
            f"example, or leave out `{changed}` or the cache."
        )
