"""`attncap train`: one training run, from its settings to a saved captioner."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed

from hf_attncap import AttnCapForConditionalGeneration, AttnCapProcessor
from hf_attncap.atomic import atomic_files
from hf_attncap.hub import ABOUT, RECORD
from hf_attncap.metrics import caption_compute_metrics

from .arguments import CaptionTrainingArguments, DataArguments, ModelArguments, SettingError, parse_arguments
from .checkpoints.hub_upload import HubSharing
from .checkpoints.record import earlier_stages, provenance, stage
from .data.augmentation import Augmentation, CachedViews, EpochRandomness, add_mirrored_references, augment_rows
from .data.collator import CaptionCollator
from .data.feature_cache import cached_features
from .data.inspection import inspect_data
from .data.splits import CaptionData, load_data
from .model import build_captioner
from .processes import check_processes, run_on_main_rank
from .trainers.caption_trainer import CaptionTrainer
from .trainers.resumable import EarlyStopping, disk_errors, last_checkpoint
from .trainers.sample_captions import SampleCaptions
from .trainers.self_critical import SelfCriticalTrainer

logger = logging.getLogger(__name__)


def train(model_arguments: ModelArguments, data: DataArguments, training: CaptionTrainingArguments) -> dict[str, float]:
    """One run. Saves the captioner, its training record and `metrics.json` in `output_dir`, and returns the metrics.

    Raises:
        SettingError: settings or data cannot be used; on all processes.
    """
    _check_before_loading(model_arguments, training)
    uploads = [HubSharing(training)] if training.push_to_hub else []  # checks the login before anything that takes long
    set_seed(training.seed)
    output = Path(str(training.output_dir))
    checkpoint = _find_checkpoint(training, output)

    splits = load_data(data, training.seed)
    if splits.validation is None:
        _check_without_validation(training)
        logger.warning("there are no validation images: no evaluations, no sample captions and no best checkpoint")
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    captions = splits.captions(training.max_steps * batch)

    model, processor = build_captioner(model_arguments, captions, output)
    if training.encoder_learning_rate is not None and model.config.freeze_backbone:
        logger.warning("`encoder_learning_rate` is not used: set `freeze_backbone: false` in `model_config` to train the backbone")
    earlier, origins = earlier_stages(model_arguments.model_name_or_path), provenance(model_arguments.model_name_or_path)

    trainer = _build_trainer(model, processor, splits, captions, data, training, uploads)
    with _explain_batch_norm_error():
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    images = None if data.streaming else len(splits.train)  # type: ignore[arg-type]

    def save_results() -> None:
        if trainer.is_world_process_zero():
            this = stage((model_arguments, data, training), trainer.state, images, bool(model.config.freeze_backbone))
            _save_results(output, trainer.state, metrics, [*earlier, this], origins)

    trainer.save_model()
    save_results()  # before the evaluation too, so that a failing one does not cost the run
    if splits.validation is not None:
        metrics = {**metrics, **trainer.evaluate()}
        save_results()
    if trainer.is_world_process_zero():
        logger.warning("%s", _summarise(trainer, metrics, output))
    for upload in uploads:
        upload.finish()
    return metrics


def _check_before_loading(model_arguments: ModelArguments, training: CaptionTrainingArguments) -> None:
    """Raises a SettingError for what can be known before the data are read."""
    if training.self_critical and not model_arguments.model_name_or_path:
        raise SettingError("`self_critical` needs a trained captioner: set `--model_name_or_path`.")
    if training.fp16 and training.device.type == "cpu":
        raise SettingError("`fp16` needs a GPU: set `bf16` on a CPU, or leave it out.")
    check_processes(training)


def _find_checkpoint(training: CaptionTrainingArguments, output: Path) -> str | None:
    """The checkpoint to resume from, if any. Makes the output folder, and refuses one that holds another run."""
    wanted = training.resume_from_checkpoint

    def find_last() -> Path | None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError(f"`output_dir`: {output} cannot be created: {error.strerror}.") from error
        return last_checkpoint(output)

    last: Path | None = run_on_main_rank(find_last)
    if wanted is None:
        if last is not None:
            raise SettingError(
                f"`output_dir`: {output} holds an earlier run, {last.name}: resume it with `--resume_from_checkpoint last`, give "
                "another folder, or remove this one."
            )
        return None
    if wanted.lower() not in ("true", "last"):
        if not Path(wanted).is_dir():
            raise SettingError(
                f"`resume_from_checkpoint`: no such checkpoint: {wanted}. `last` resumes from the last one in `output_dir`."
            )
        return wanted
    logger.warning("resuming from %s", last) if last else logger.warning("there is no checkpoint in %s yet: starting anew", output)
    return str(last) if last else None


def _check_without_validation(training: CaptionTrainingArguments) -> None:
    """Raises a SettingError for settings that need validation images."""
    for setting, used, off in (
        ("predict_with_generate", training.predict_with_generate, "false"),
        ("eval_strategy", training.eval_strategy != "no", "no"),
    ):
        if used:
            raise SettingError(
                f"`{setting}` needs validation images and there are none: give `--validation_file`, `--validation_split` or "
                f"`--validation_share 0.05`, or set `{setting}` to {off}."
            )


def _build_trainer(
    model: AttnCapForConditionalGeneration,
    processor: AttnCapProcessor,
    splits: CaptionData,
    captions: list[list[str]],
    data: DataArguments,
    training: CaptionTrainingArguments,
    uploads: list[HubSharing],
) -> CaptionTrainer:
    """The Trainer of a run, with its rows, collators and callbacks."""
    validation = splits.validation
    trainer_class: Any = CaptionTrainer
    if training.self_critical:
        references = dict(zip(splits.train["image_id"], captions))  # type: ignore[index]
        references = add_mirrored_references(references) if data.mirror else references
        trainer_class = partial(SelfCriticalTrainer, references=references)
    model.model.encoder.to(memory_format=torch.channels_last)
    randomness = EpochRandomness(training.seed)
    train_rows, validation_rows = _build_rows(splits, model, processor, data, training, randomness)
    training.remove_unused_columns = False
    training.use_cache = True  # the Trainer would switch it off in the checkpoints
    training.logging_nan_inf_filter = False
    training.dataloader_pin_memory &= training.device.type == "cuda"
    training.prediction_loss_only = not training.predict_with_generate
    patience = training.early_stopping_patience
    collator = CaptionCollator(processor, data.captions_per_image, data.max_caption_words, training.self_critical, randomness)
    scores = None
    if validation and training.predict_with_generate:
        decode = partial(processor.batch_decode, skip_special_tokens=True)
        scores = caption_compute_metrics(validation["captions"][:], decode)
    trainer: CaptionTrainer = trainer_class(
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        data_collator=collator,
        eval_data_collator=replace(collator, randomness=EpochRandomness(training.seed)),  # the same captions at every evaluation
        processing_class=processor,
        compute_metrics=scores,
        callbacks=[randomness, *uploads, *([EarlyStopping(patience)] if patience is not None else [])],
    )
    is_whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)  # this process holds all weights
    if validation and training.num_logged_images and is_whole:
        images = validation.select(range(min(training.num_logged_images, len(validation))))
        trainer.add_callback(SampleCaptions(images, trainer.callback_handler.callbacks))
    return trainer


def _build_rows(
    splits: CaptionData,
    model: AttnCapForConditionalGeneration,
    processor: AttnCapProcessor,
    data: DataArguments,
    training: CaptionTrainingArguments,
    randomness: EpochRandomness,
) -> tuple[Any, Any]:
    """The training and validation rows that the Trainer reads: images, or cached features of the frozen blocks."""
    change = Augmentation(processor.image_processor.size["height"], randomness, data.augment, data.mirror)
    if data.feature_cache is None:
        return augment_rows(splits.train, change) if data.augment or data.mirror else splits.train, splits.validation
    if not model.model.encoder.frozen_blocks:
        raise SettingError(
            "`feature_cache` holds the output of frozen blocks, and the whole backbone is trained: set `freeze_backbone: true` or "
            "`trainable_blocks`, or leave the cache out."
        )

    def compute_features(images: Dataset) -> Any:
        workers = training.dataloader_num_workers
        return cached_features(model.model.encoder, processor.image_processor, images, str(data.feature_cache), workers)

    rows = CachedViews(splits.train, compute_features, data.cached_views, change, randomness)  # type: ignore[arg-type]
    return rows, CachedViews(splits.validation, compute_features) if splits.validation else None


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


def _save_results(output: Path, state: Any, metrics: dict[str, float], stages: list[dict[str, Any]], origins: str | None) -> None:
    """Saves the Trainer's state, `metrics.json`, the training record and the origins of the weights in the output folder."""
    texts = {"metrics.json": json.dumps(metrics, indent=2), RECORD: json.dumps(stages, indent=1)}
    texts |= {ABOUT: origins} if origins and not (output / ABOUT).exists() else {}
    with disk_errors(output, "metrics.json", sum(map(len, texts.values()))), atomic_files(output) as files:
        state.save_to_json(str(files / "trainer_state.json"))
        for name, text in texts.items():
            (files / name).write_text(text + "\n", encoding="utf-8")


def _summarise(trainer: CaptionTrainer, metrics: dict[str, float], output: Path) -> str:
    """One line on how the run ended."""
    state = trainer.state
    scores = [f"{name} {metrics[f'eval_{name}']:.4g}" for name in ("loss", "cider", "bleu_4") if f"eval_{name}" in metrics]
    text = f"step {state.global_step} of {state.max_steps}"
    if state.best_global_step and trainer.args.load_best_model_at_end:
        text += f", best at step {state.best_global_step}"
    on_validation = f"; validation {', '.join(scores)}" if scores else ""
    return f"{text}{on_validation}; the captioner is in {output}, all scores are in {output / 'metrics.json'}"


def main(argv: list[str] | None = None) -> int:
    """Runs `attncap train`; returns the exit code: 2 if settings or data cannot be used, 130 after Ctrl-C."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        model, data, training = parse_arguments(sys.argv[1:] if argv is None else argv)
        if data.inspect:
            return inspect_data(model, data)
        train(model, data, training)
    except SettingError as error:
        message = str(error).rpartition("SettingError: ")[2].strip()  # a worker of a data loader puts its traceback before it
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; `--resume_from_checkpoint last` continues from the last checkpoint", file=sys.stderr)
        return 130  # 128 + the number of the signal, as shells report it
    return 0


if __name__ == "__main__":
    sys.exit(main())
