"""Train a captioner: `python -m training.train --config training/configs/FILE.yaml [--option value ...]`."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration, AttnCapImageProcessor, AttnCapProcessor
from hf_attncap.metrics import caption_compute_metrics

from .arguments import CaptionTrainingArguments, DataArguments, ModelArguments, SettingError, parse_arguments
from .collator import CaptionCollator
from .data import augmented, load_split
from .features import cached_features
from .trainer import CaptionTrainer
from .vocabulary import build_tokenizer, word_coverage

logger = logging.getLogger(__name__)

# A caption has at most 20 words and an end token.
MAX_NEW_TOKENS = 21


class FeatureRows(torch.utils.data.Dataset):
    """Cached maps with the captions of their images."""

    def __init__(self, features, captions: list[list[str]]):
        self.features, self.captions = features, captions

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"backbone_features": self.features[row], "captions": self.captions[row]}


def build_captioner(
    arguments: ModelArguments, captions: list[list[str]]
) -> tuple[AttnCapForConditionalGeneration, AttnCapProcessor]:
    """The captioner to start from, and its processor; a new one gets its vocabulary from the training captions."""
    settings: dict[str, Any] = arguments.model_config  # type: ignore[assignment]
    if arguments.model_name_or_path:
        path = arguments.model_name_or_path
        model: Any = AttnCapForConditionalGeneration.from_pretrained(path, dtype=torch.float32, **settings)
        return model, AttnCapProcessor.from_pretrained(path)
    sentences = [caption for row in captions for caption in row]
    tokenizer = build_tokenizer(sentences, arguments.tokenizer_kind, min_count=arguments.min_count)  # type: ignore[arg-type]
    logger.warning(
        "vocabulary: %d tokens, %.2f %% of the training words",
        len(tokenizer),
        100 * word_coverage(tokenizer, sentences),
    )
    try:
        config = AttnCapConfig(vocab_size=len(tokenizer), **settings)
    except StrictDataclassError as error:
        raise SettingError(f"model_config: {error}") from error
    model = AttnCapForConditionalGeneration.from_pretrained_parts(
        config, arguments.backbone_weights, arguments.word_vectors, tokenizer
    )
    model.generation_config.update(max_new_tokens=MAX_NEW_TOKENS, num_beams=3, no_repeat_ngram_size=3)
    side = {"height": arguments.image_size, "width": arguments.image_size}
    image_processor = AttnCapImageProcessor(size=side, image_mean=config.image_mean, image_std=config.image_std)
    return model, AttnCapProcessor(image_processor, tokenizer)


def _rows(dataset: Dataset, model: AttnCapForConditionalGeneration, processor: AttnCapProcessor, cache: str | None) -> Any:
    """What the Trainer iterates over: pictures, or the maps of a frozen backbone."""
    if cache is None:
        return dataset
    if not model.config.freeze_backbone:
        raise SettingError("`feature_cache` needs a frozen backbone: set `freeze_backbone: true` or leave the cache out.")
    features = cached_features(model.model.encoder, processor.image_processor, dataset, cache)
    return FeatureRows(features, dataset["captions"][:])


def _caption_scores(images: Dataset, processor: AttnCapProcessor) -> Callable[[Any], dict[str, float]]:
    """The Trainer's `compute_metrics`: generated captions against all captions of each image."""
    return caption_compute_metrics(images["captions"][:], lambda ids: processor.batch_decode(ids, skip_special_tokens=True))


def train(model_arguments: ModelArguments, data: DataArguments, training: CaptionTrainingArguments) -> dict[str, float]:
    """One run: data, captioner, Trainer, saved checkpoint; returns the metrics, which are also in `metrics.json`."""
    if training.predict_with_generate and not data.validation_file:
        raise SettingError("`predict_with_generate` captions the validation images: give `--validation_file`.")
    set_seed(training.seed)
    output = Path(str(training.output_dir))
    train_split = load_split(data.train_file, data)
    validation = load_split(data.validation_file, data) if data.validation_file else None
    model, processor = build_captioner(model_arguments, train_split["captions"][:])
    model.model.encoder.to(memory_format=torch.channels_last)
    if data.augment and data.feature_cache:
        raise SettingError(
            "`augment` changes pictures at every reading, which `feature_cache` reads only once: choose one of them."
        )
    if data.augment:
        train_split = augmented(train_split, processor.image_processor.size["height"])
    training.remove_unused_columns = False
    training.prediction_loss_only = not training.predict_with_generate
    trainer = CaptionTrainer(
        model=model,
        args=training,
        train_dataset=_rows(train_split, model, processor, data.feature_cache),
        eval_dataset=_rows(validation, model, processor, data.feature_cache) if validation else None,
        data_collator=CaptionCollator(processor, data.captions_per_image, data.max_words),
        processing_class=processor,
        compute_metrics=_caption_scores(validation, processor) if validation and training.predict_with_generate else None,
    )
    resume = training.resume_from_checkpoint
    if resume is not None and resume.lower() in ("true", "last"):
        resume = get_last_checkpoint(str(output)) if output.is_dir() else None
    result = trainer.train(resume_from_checkpoint=resume)
    metrics = {**result.metrics, **(trainer.evaluate() if validation is not None else {})}
    model.config.use_cache = True  # the Trainer switched it off, and would save that
    trainer.save_model()
    processor.save_pretrained(output)
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        train(*parse_arguments(sys.argv[1:] if argv is None else argv))
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
