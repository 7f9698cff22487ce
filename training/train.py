"""Train a captioner: `attncap train --config training/configs/FILE.yaml [--option value ...]`."""

import copy
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from transformers import set_seed
from transformers.trainer_utils import has_length

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration, AttnCapImageProcessor, AttnCapProcessor
from hf_attncap.metrics import caption_compute_metrics
from hf_attncap.word_vectors import read_word_vectors

from .arguments import (
    CaptionTrainingArguments,
    DataArguments,
    ModelArguments,
    SettingError,
    parse_arguments,
    refuse_without_validation,
)
from .checkpoints.hub_upload import HubSharing
from .checkpoints.record import ABOUT, RECORD, earlier_stages, provenance, stage
from .data.augmentation import Augmentation, augmented, with_mirrored
from .data.collator import CaptionCollator
from .data.feature_cache import cached_features
from .data.inspection import inspect_data, way_out
from .data.randomness import Chance
from .data.splits import CaptionData, first, load_data
from .data.streaming import load_stream
from .data.views import FeatureRows
from .data.vocabulary import build_tokenizer, describe_coverage, extend_vocabulary, repeatable_tokens
from .data.word_vectors import write_word_vectors
from .processes import check_processes, on_main_process
from .trainers.caption_trainer import CaptionTrainer
from .trainers.checkpoint_files import last_checkpoint, replacing, writing
from .trainers.early_stopping import EarlyStopping
from .trainers.samples import SampleCaptions
from .trainers.self_critical import SelfCriticalTrainer

logger = logging.getLogger(__name__)

# A caption has at most 20 words and an end token.
MAX_NEW_TOKENS = 21


def build_captioner(
    arguments: ModelArguments, captions: list[list[str]], output: Path
) -> tuple[AttnCapForConditionalGeneration, AttnCapProcessor]:
    """The captioner to start from, and its processor; a new one gets its vocabulary from the training captions."""
    settings: dict[str, Any] = arguments.model_config  # type: ignore[assignment]
    sentences = [caption for row in captions for caption in row]
    if arguments.model_name_or_path:
        return _load_captioner(arguments, sentences)
    if arguments.backbone_weights is None:
        logger.warning("a new captioner whose backbone knows nothing yet: give `--backbone_weights`, or `--model_name_or_path`")
    try:
        tokenizer = build_tokenizer(sentences, arguments.tokenizer_kind, min_count=arguments.min_count)
    except ValueError as error:
        raise SettingError(str(error)) from error
    for sentence in describe_coverage(tokenizer, sentences, way_out(arguments, tokenizer)):
        logger.warning("%s", sentence)
    try:
        config = AttnCapConfig(vocab_size=len(tokenizer), **settings)
    except StrictDataclassError as error:
        raise SettingError(f"model_config: {error}") from error
    vectors = _word_vectors(arguments.word_vectors, config, sentences, tokenizer, output)
    freeze = settings.get("freeze_word_embeddings", True)
    try:
        found = None if vectors is None else read_word_vectors(vectors, tokenizer.get_vocab(), config.word_embed_dim)
        model = AttnCapForConditionalGeneration.from_pretrained_parts(
            config, arguments.backbone_weights, found, tokenizer, freeze_word_embeddings=freeze
        )
    except (StrictDataclassError, ValueError) as error:
        raise SettingError(str(error)) from error
    model.generation_config.update(max_new_tokens=MAX_NEW_TOKENS, num_beams=3, no_repeat_ngram_size=3)
    _let_repeat(model, repeatable_tokens(tokenizer, sentences))
    side = {"height": arguments.image_size, "width": arguments.image_size}
    return model, AttnCapProcessor(AttnCapImageProcessor.from_config(config, size=side), tokenizer)


def _load_captioner(arguments: ModelArguments, sentences: list[str]) -> tuple[AttnCapForConditionalGeneration, AttnCapProcessor]:
    """A checkpoint and its processor, with the words of the training captions in its vocabulary if that is wanted."""
    path = str(arguments.model_name_or_path)
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise SettingError(f"`model_name_or_path`: {path} has no config.json and is no captioner: give the folder of a saved one.")
    settings: dict[str, Any] = arguments.model_config  # type: ignore[assignment]
    try:
        # Given to the model's `from_pretrained`, the settings would also enter its generation config.
        config = AttnCapConfig.from_pretrained(path, **settings)
        loaded: Any = AttnCapForConditionalGeneration.from_pretrained(
            path, config=config, dtype=torch.float32, output_loading_info=True
        )
        processor: Any = AttnCapProcessor.from_pretrained(path)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise SettingError(f"`model_name_or_path`: {path} cannot be loaded as a captioner: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:  # of tensors of other shapes, after transformers' list of them
        raise SettingError(
            f"`model_config`: {path} has weights of other sizes, which are chosen when a captioner is made: leave them out."
        ) from error
    model, report = loaded
    model.config.confidence = None  # it was fitted to the weights that change now
    if other := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise SettingError(
            f"`model_config` changes which layers {path} has ({first(other)}), and layers can be chosen only for a new captioner: "
            "leave those fields out."
        )
    processor.image_processor.warn_of_other_statistics(model.config)
    tokenizer = processor.tokenizer
    if arguments.extend_vocabulary:
        try:
            words = extend_vocabulary(model, tokenizer, sentences, arguments.min_count)
        except ValueError as error:
            raise SettingError(f"`extend_vocabulary`: {error}") from error
        logger.warning("%d words are new in the vocabulary: %s", len(words), first(words) or "none")
        if (known := getattr(model.generation_config, "repeatable_token_ids", None)) is not None:
            _let_repeat(model, sorted({*known, *(repeatable_tokens(tokenizer, sentences) or [])}))
    for sentence in describe_coverage(tokenizer, sentences, way_out(arguments, tokenizer)):
        logger.warning("%s", sentence)
    return model, processor


def _let_repeat(model: Any, tokens: list[int] | None) -> None:
    """Sets which tokens a caption may hold more than once, in a form that is saved and loaded."""
    if tokens is not None:
        model.generation_config.repeatable_token_ids = tokens
        model.generation_config._from_model_config = False  # or loading it drops settings that transformers does not know


def _word_vectors(vectors: str | None, config: AttnCapConfig, sentences: list[str], tokenizer: Any, output: Path) -> str | None:
    """The file of word vectors, made first where they are to come from the captions."""
    if vectors is None and config.freeze_word_embeddings:
        raise SettingError("`freeze_word_embeddings` would keep random vectors: give `word_vectors` too, or leave it out.")
    if vectors == "captions":
        path = output / "word_vectors.txt"
        on_main_process(lambda: write_word_vectors(path, sentences, tokenizer, config.word_embed_dim))
        return str(path)
    if vectors is not None and not Path(vectors).is_file():
        raise SettingError(f"No such file of word vectors: {vectors}. `captions` learns them from the training captions.")
    return vectors


def _load(data: DataArguments, training: CaptionTrainingArguments) -> tuple[CaptionData, list[list[str]]]:
    """The splits, and the captions that a vocabulary is made of: all, or those of a stream that training will see."""
    splits = load_stream(data, training.seed) if data.streaming else load_data(data)
    if splits.validation is None:
        refuse_without_validation(training)
        logger.warning("no validation images: the run has no evaluations, no samples and no best checkpoint")
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    return splits, splits.captions(training.max_steps * batch)


def _pictures(
    splits: CaptionData,
    model: AttnCapForConditionalGeneration,
    processor: AttnCapProcessor,
    data: DataArguments,
    training: CaptionTrainingArguments,
    chance: Chance,
) -> tuple[Any, Any]:
    """What the Trainer iterates over for training and for validation: pictures, or the maps of the backbone's frozen blocks."""
    change = Augmentation(processor.image_processor.size["height"], chance, data.augment, data.mirror)
    changed = data.augment or data.mirror
    if data.feature_cache is None:
        return augmented(splits.train, change) if changed else splits.train, splits.validation
    if not model.model.encoder.frozen_blocks:
        raise SettingError(
            "`feature_cache` keeps what frozen blocks make of the pictures, and all of the backbone learns: set "
            "`freeze_backbone: true` or `trainable_blocks`, or leave the cache out."
        )

    def maps(images: Dataset) -> Any:
        workers = training.dataloader_num_workers
        return cached_features(model.model.encoder, processor.image_processor, images, str(data.feature_cache), workers)

    rows = FeatureRows(splits.train, maps, data.cached_views, change, chance)  # type: ignore[arg-type]
    return rows, FeatureRows(splits.validation, maps) if splits.validation else None


def _check_batch_norm(model: AttnCapForConditionalGeneration, processor: AttnCapProcessor, rows: Any, training: Any) -> None:
    """Raises if batch norm would have to learn from a single value: of one image whose map is 1 x 1."""
    if model.config.freeze_backbone or model.config.freeze_batch_norm or not has_length(rows):
        return
    batch, rest = training.train_batch_size, len(rows) % training.train_batch_size
    alone = rest == 1 and not training.dataloader_drop_last and training.world_size == 1  # several processes fill batches up
    if batch > 1 and not alone:
        return
    size = processor.image_processor.size
    with torch.no_grad(), _explain_batch_norm_error():
        copy.deepcopy(model.model.encoder).train()(torch.zeros(1, 3, size["height"], size["width"]))


@contextmanager
def _explain_batch_norm_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise SettingError(
            "`freeze_batch_norm: false` needs more than one value per channel, but one batch has a single image with a 1 x 1 map: "
            "set it to true, set `dataloader_drop_last`, or use larger batches or larger images."
        ) from error


def _caption_scores(images: Dataset, processor: AttnCapProcessor) -> Callable[[Any], dict[str, float]]:
    """The Trainer's `compute_metrics`: generated captions against all captions of each image."""
    return caption_compute_metrics(images["captions"][:], lambda ids: processor.batch_decode(ids, skip_special_tokens=True))


def train(model_arguments: ModelArguments, data: DataArguments, training: CaptionTrainingArguments) -> dict[str, float]:
    """One run: data, captioner, Trainer, saved checkpoint; returns the metrics, which are also in `metrics.json`."""
    _check_start(model_arguments, training)
    sharing = [HubSharing(training)] if training.push_to_hub else []  # before anything that takes long
    set_seed(training.seed)
    output = Path(str(training.output_dir))
    checkpoint = _checkpoint_to_resume(training, output)
    splits, captions = _load(data, training)
    model, processor = build_captioner(model_arguments, captions, output)
    if training.encoder_learning_rate is not None and model.config.freeze_backbone:
        logger.warning(
            "`encoder_learning_rate` is not used: the backbone is frozen; `freeze_backbone: false` in `model_config` trains it"
        )
    earlier, origins = earlier_stages(model_arguments.model_name_or_path), provenance(model_arguments.model_name_or_path)
    trainer = _build_trainer(model, processor, splits, captions, data, training, sharing)
    with _explain_batch_norm_error():
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    images = None if data.streaming else len(splits.train)  # type: ignore[arg-type]

    def save_results() -> None:
        if trainer.is_world_process_zero():
            own = stage((model_arguments, data, training), trainer.state, images, bool(model.config.freeze_backbone))
            _save_results(output, trainer.state, metrics, [*earlier, own], origins)

    trainer.save_model()
    save_results()  # already now: an evaluation that fails must not cost the run
    if splits.validation is not None:
        metrics = {**metrics, **trainer.evaluate()}
        save_results()
    if trainer.is_world_process_zero():
        logger.warning("%s", _summary(trainer, metrics, output))
    for upload in sharing:
        upload.finish()
    return metrics


def _check_start(model_arguments: ModelArguments, training: CaptionTrainingArguments) -> None:
    """Raises a SettingError for what can be known before data are read."""
    if training.self_critical and not model_arguments.model_name_or_path:
        raise SettingError("`self_critical` goes on from a captioner that was trained before: give `--model_name_or_path`.")
    if training.fp16 and training.device.type == "cpu":
        raise SettingError("`fp16` needs a GPU, the CPU would ignore it: set `bf16`, or leave it out.")
    check_processes(training)


def _build_trainer(
    model: AttnCapForConditionalGeneration,
    processor: AttnCapProcessor,
    splits: CaptionData,
    captions: list[list[str]],
    data: DataArguments,
    training: CaptionTrainingArguments,
    sharing: list[HubSharing],
) -> CaptionTrainer:
    """The Trainer of a run, with its rows, collators and callbacks."""
    validation = splits.validation
    trainer_class: Any = CaptionTrainer
    if training.self_critical:
        references = dict(zip(splits.train["image_id"], captions))  # type: ignore[index]
        trainer_class = partial(SelfCriticalTrainer, references=with_mirrored(references) if data.mirror else references)
    model.model.encoder.to(memory_format=torch.channels_last)
    chance = Chance(training.seed)
    train_rows, validation_rows = _pictures(splits, model, processor, data, training, chance)
    training.remove_unused_columns = False
    training.use_cache = True  # the Trainer would switch it off in the checkpoints
    training.logging_nan_inf_filter = False
    training.dataloader_pin_memory &= training.device.type == "cuda"
    training.prediction_loss_only = not training.predict_with_generate
    patience = training.early_stopping_patience
    collator = CaptionCollator(processor, data.captions_per_image, data.max_words, training.self_critical, chance)
    _check_batch_norm(model, processor, train_rows, training)
    trainer: CaptionTrainer = trainer_class(
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        data_collator=collator,
        eval_data_collator=replace(collator, chance=Chance(training.seed)),  # the same captions at every evaluation
        processing_class=processor,
        compute_metrics=_caption_scores(validation, processor) if validation and training.predict_with_generate else None,
        callbacks=[chance, *sharing, *([EarlyStopping(patience)] if patience is not None else [])],
    )
    alone = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)  # a process that has all the weights
    if validation and training.sample_images and alone:
        images = validation.select(range(min(training.sample_images, len(validation))))
        trainer.add_callback(SampleCaptions(images, trainer.callback_handler.callbacks))
    return trainer


def _save_results(output: Path, state: Any, metrics: dict[str, float], stages: list[dict[str, Any]], origins: str | None) -> None:
    """What goes beside the captioner's weights: the Trainer's state, `metrics.json`, the record and where the weights came from."""
    texts = {"metrics.json": json.dumps(metrics, indent=2), RECORD: json.dumps(stages, indent=1)}
    texts |= {ABOUT: origins} if origins and not (output / ABOUT).exists() else {}
    with writing(output, "metrics.json", sum(map(len, texts.values()))), replacing(output) as files:
        state.save_to_json(str(files / "trainer_state.json"))
        for name, text in texts.items():
            (files / name).write_text(text + "\n", encoding="utf-8")


def _checkpoint_to_resume(training: CaptionTrainingArguments, output: Path) -> str | None:
    """The checkpoint to go on from, if any; the output folder is there afterwards, and holds no other run."""
    wanted = training.resume_from_checkpoint

    def make() -> Path | None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError(f"`output_dir`: {output} cannot be made: {error.strerror}.") from error
        return last_checkpoint(output)

    last: Path | None = on_main_process(make)
    if wanted is None:
        if last is not None:
            raise SettingError(
                f"`output_dir`: {output} holds an earlier run, {last.name}: `--resume_from_checkpoint last` goes on from there; "
                "give another folder, or remove this one, to begin anew."
            )
        return None
    if wanted.lower() not in ("true", "last"):
        if not Path(wanted).is_dir():
            raise SettingError(
                f"`resume_from_checkpoint`: no such checkpoint, {wanted}: `last` finds the last one of `output_dir`."
            )
        return wanted
    logger.warning("going on from %s", last) if last else logger.warning("no checkpoint in %s yet: starting anew", output)
    return str(last) if last else None


def _summary(trainer: CaptionTrainer, metrics: dict[str, float], output: Path) -> str:
    """What a run came to, in a line."""
    state = trainer.state
    told = ("loss", "cider", "bleu_4")
    scores = [f"{name} {metrics[f'eval_{name}']:.4g}" for name in told if f"eval_{name}" in metrics]
    said = f"step {state.global_step} of {state.max_steps}"
    if state.best_global_step and trainer.args.load_best_model_at_end:
        said += f", best at step {state.best_global_step}"
    on_validation = f"; on the validation images {', '.join(scores)}" if scores else ""
    return f"{said}{on_validation}; the captioner is in {output}, all scores in {output / 'metrics.json'}"


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        model, data, training = parse_arguments(sys.argv[1:] if argv is None else argv)
        if data.inspect:
            return inspect_data(model, data)
        train(model, data, training)
    except SettingError as error:
        message = str(error).rpartition("SettingError: ")[2].strip()  # a worker that reads images puts its traceback before it
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
