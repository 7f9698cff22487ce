"""The options of a training run. The command line overrides the YAML file."""

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
    """The captioner to start from: a checkpoint, or a new one made of pretrained parts."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint to start from. Default: a new captioner."})
    model_config: str = field(
        default="{}",
        metadata={"help": "Fields of AttnCapConfig: a mapping in YAML, JSON on the command line. The two are merged."},
    )
    backbone_weights: str | None = field(
        default=None, metadata={"help": "New captioner: name of torchvision weights, or a file with a state dict."}
    )
    word_vectors: str | None = field(
        default=None,
        metadata={
            "help": "New captioner: a word2vec, GloVe or fastText text file, or `captions` to train vectors on the training "
            "captions. They are frozen unless `model_config` has `freeze_word_embeddings: false`."
        },
    )
    tokenizer_kind: Literal["word", "bpe"] = field(default="word", metadata={"help": "New captioner: words, or word pieces (BPE)."})
    min_count: int = field(
        default=5, metadata={"help": "New captioner or `extend_vocabulary`: how often a word must occur to enter the vocabulary."}
    )
    extend_vocabulary: bool = field(
        default=False,
        metadata={
            "help": "Checkpoint: add words of the training captions to its vocabulary that occur at least `min_count` times."
        },
    )
    image_size: int = field(default=224, metadata={"help": "New captioner: images are resized to squares of this side, in pixels."})

    def __post_init__(self) -> None:
        for name in ("min_count", "image_size"):
            if getattr(self, name) < 1:
                raise SettingError(f"`{name}` is {getattr(self, name)}: it must be at least 1.")


@dataclass
class DataArguments:
    """The captioned images."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Images and captions: a dataset on the Hub, or a folder that `save_to_disk` wrote."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset, if it has several."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Images and captions: a folder with metadata.jsonl, or with such subfolders `train` and `validation`."},
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Images and captions: Parquet, CSV or JSON files, Karpathy's splits, COCO's annotations or WebDataset shards. "
            "A pattern such as 'shards/*.tar' names several files."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same for validation. Karpathy's file holds both."})
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder that relative image paths refer to. Default: the folder of the data file."}
    )
    validation_image_dir: str | None = field(
        default=None, metadata={"help": "The same for the validation images. Default: `image_dir`."}
    )
    train_split: str | None = field(
        default=None,
        metadata={
            "help": "Split of a dataset or Karpathy's file; join several with '+'. Default: train, and restval if it exists."
        },
    )
    validation_split: str | None = field(
        default=None, metadata={"help": "The same for validation. Default: validation or val, if it exists."}
    )
    validation_share: float = field(
        default=0.0, metadata={"help": "Share of the training images to validate on. Every run uses the same ones."}
    )
    image_column: str | None = field(
        default=None,
        metadata={"help": "Column of images or of their paths. Default: image, or the only one with a usual name (path, ...)."},
    )
    captions_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of captions: a list of strings per image, or one string (rows of the same image are merged). "
            "Join several columns with '+'. Default: captions, or the only one with a usual name (caption, text, ...)."
        },
    )
    image_id_column: str | None = field(
        default=None,
        metadata={"help": "Column of image ids. Default: image_id, if it exists. Empty: the file identifies an image."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Stream training images from shards, Parquet files or a dataset. Needs `max_steps`."}
    )
    skip_broken_images: bool = field(
        default=False, metadata={"help": "Report and leave out images that cannot be read or have no caption, instead of stopping."}
    )
    inspect: bool = field(
        default=False, metadata={"help": "Read all data, report what they hold and every problem, and do not train."}
    )
    captions_per_image: int = field(default=5, metadata={"help": "Captions per image and training step."})
    max_caption_words: int = field(default=20, metadata={"help": "Longer training captions are truncated."})
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder for features of the frozen backbone, computed once. Default: compute them at every step."},
    )
    augment: bool = field(default=False, metadata={"help": "Crop and recolour training images at random, mildly."})
    mirror: bool = field(
        default=False,
        metadata={"help": "Mirror half of the training images, and swap 'left' and 'right' in their English captions."},
    )
    cached_views: int = field(
        default=1,
        metadata={
            "help": "With `feature_cache`: views per training image, which alternate by epoch. The first is the image itself, the "
            "others are changed by `augment` and `mirror`."
        },
    )


@dataclass
class CaptionTrainingArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` and the options that this package adds."""

    encoder_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the backbone. Default: `learning_rate`."}
    )
    input_dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout of regions and word embeddings, in addition to the model's `dropout` before the output layer."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Evaluate and save an exponential moving average of the weights with this decay. Default: none."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better `metric_for_best_model`. Default: never."},
    )
    num_logged_images: int = field(
        default=4,
        metadata={
            "help": "Validation images whose captions and attention are saved to `output_dir/samples` at every evaluation. 0: none."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "`last`: resume from the last checkpoint in `output_dir`, if there is one. Or the folder of a checkpoint."
        },
    )
    self_critical: bool = field(
        default=False,
        metadata={"help": "Self-critical training: maximise CIDEr-D of sampled captions. Needs a trained checkpoint."},
    )
    samples_per_image: int = field(default=5, metadata={"help": "Self-critical training: sampled captions per image, at least 2."})
    cross_entropy_weight: float = field(
        default=0.0,
        metadata={"help": "Self-critical training: weight of the cross-entropy, 0 to 1. The self-critical loss gets the rest."},
    )

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except Exception as error:  # values, files, packages and devices raise many kinds
            raise SettingError(" ".join(str(error).split()) or type(error).__name__) from error
        if self.label_smoothing_factor:
            raise SettingError(
                "`label_smoothing_factor` would withhold the labels, which the model's loss needs: set "
                "`label_smoothing` in `model_config` instead."
            )
        metric = self.metric_for_best_model
        if metric not in (None, "loss", "eval_loss") and not self.predict_with_generate:
            raise SettingError(f"`metric_for_best_model: {metric}` needs generated captions: set `predict_with_generate`.")
        name = (metric or "loss").removeprefix("eval_")
        if name not in (known := ["loss", *CaptionMetrics({"": ["a"]}).score({"": "a"})]):
            raise SettingError(f"`metric_for_best_model: {metric}` is unknown: use one of {', '.join(known)}.")
        if not 0 <= self.input_dropout < 1:
            raise SettingError(f"`input_dropout` is {self.input_dropout}: it must be at least 0 and below 1.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise SettingError(f"`ema_decay` is {self.ema_decay}: it must be between 0 and 1, 0.999 for example.")
        if self.num_logged_images < 0:
            raise SettingError(f"`num_logged_images` is {self.num_logged_images}: it must be at least 0.")
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
            return
        if self.samples_per_image < 2:
            raise SettingError(
                f"`samples_per_image` is {self.samples_per_image}: it must be at least 2, as the other samples are the baseline."
            )
        if not 0 <= self.cross_entropy_weight <= 1:
            raise SettingError(f"`cross_entropy_weight` is {self.cross_entropy_weight}: it must be between 0 and 1.")
        if self.input_dropout:
            raise SettingError("`input_dropout` has no effect in self-critical training: leave it out.")

    def _check_trackers(self) -> None:
        """The Trainer would raise only after all data are loaded."""
        try:
            for tracker in get_reporting_integration_callbacks(self.report_to):
                tracker()
        except (ValueError, RuntimeError, ImportError, TypeError) as error:
            raise SettingError(f"`report_to`: {error}") from error


GROUPS = (ModelArguments, DataArguments, CaptionTrainingArguments)


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, CaptionTrainingArguments]:
    """The options from `--config FILE.yaml` (a path, or the name of a config in the package) and from the command line.

    Raises:
        SettingError: the config file is missing or is not a mapping; a setting is unknown, of the wrong type, contradictory, or
            has no effect and must be a mistake. Other settings without effect are a warning.
    """
    parser = Parser(GROUPS, prog="attncap train")
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


def _check_data(data: DataArguments, training: CaptionTrainingArguments) -> None:
    given = [name for name in ("dataset_name", "data_dir", "train_file") if getattr(data, name)]
    if not given:
        raise SettingError("No training images: give `--train_file`, `--dataset_name` or `--data_dir`.")
    if len(given) > 1:
        raise SettingError(f"`{given[0]}` and `{given[1]}` both name the training images: give one of them.")
    if data.validation_file and not data.train_file:
        raise SettingError(f"`validation_file` needs `train_file`; with `{given[0]}` set `validation_split`.")
    if data.validation_file and data.validation_share:
        raise SettingError("`validation_file` and `validation_share` both name the validation images: give one of them.")
    if not 0 <= data.validation_share < 1:
        raise SettingError(f"`validation_share` is {data.validation_share:g}: it must be at least 0 and below 1.")
    if data.streaming and training.max_steps <= 0 and not data.inspect:
        raise SettingError("The length of a stream is unknown: with `streaming` set `--max_steps`.")
    _check_views(data)
    for setting in ("captions_per_image", "max_caption_words"):
        if getattr(data, setting) < 1:
            raise SettingError(f"`{setting}` is {getattr(data, setting)}: it must be at least 1.")
    for other, on in (("feature_cache", data.feature_cache), ("self_critical", training.self_critical)):
        if data.streaming and on:
            raise SettingError(f"`{other}` needs all training images at once: leave out `streaming` or `{other}`.")


def _check_views(data: DataArguments) -> None:
    changed = "augment" if data.augment else "mirror" if data.mirror else None
    if data.cached_views < 1:
        raise SettingError(f"`cached_views` is {data.cached_views}: it must be at least 1.")
    if data.cached_views > 1 and not (data.feature_cache and changed):
        raise SettingError("`cached_views` needs `feature_cache` and `augment` or `mirror`, which make the views differ.")
    if data.feature_cache and changed and data.cached_views == 1:
        raise SettingError(
            f"`{changed}` changes images at every epoch, but `feature_cache` reads them once: set `cached_views: 4`, or "
            f"leave out `{changed}` or the cache."
        )
