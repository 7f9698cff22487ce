"""The captioner that a run starts from: a checkpoint, or a new one made of pretrained parts."""

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration, AttnCapImageProcessor, AttnCapProcessor
from hf_attncap.word_vectors import read_word_vectors

from .arguments import ModelArguments, SettingError
from .data.checks import list_names
from .data.inspection import advise_on_words
from .data.vocabulary import build_tokenizer, describe_coverage, extend_vocabulary, repeatable_tokens
from .data.word_vectors import write_word_vectors
from .processes import run_on_main_rank

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 21  # 20 words and the end token


def build_captioner(
    arguments: ModelArguments, captions: list[list[str]], output: Path
) -> tuple[AttnCapForConditionalGeneration, AttnCapProcessor]:
    """The model and its processor.

    Args:
        captions: of each training image. A new captioner gets its vocabulary from them.
        output: the folder of the run, where word vectors that are learned from the captions are saved.

    Raises:
        SettingError: the checkpoint, the backbone weights or the word vectors cannot be used.
    """
    settings: dict[str, Any] = arguments.model_config  # type: ignore[assignment]
    sentences = [caption for row in captions for caption in row]
    if arguments.model_name_or_path:
        return _load_captioner(arguments, sentences)
    if arguments.backbone_weights is None:
        logger.warning("the backbone of the new captioner is not pretrained: set `--backbone_weights` or `--model_name_or_path`")
    try:
        tokenizer = build_tokenizer(sentences, arguments.tokenizer_kind, min_count=arguments.min_count)
    except ValueError as error:
        raise SettingError(str(error)) from error
    _log_coverage(arguments, tokenizer, sentences)
    try:
        config = AttnCapConfig(vocab_size=len(tokenizer), **settings)
    except StrictDataclassError as error:
        raise SettingError(f"model_config: {error}") from error
    vectors = _word_vectors(arguments.word_vectors, config, sentences, tokenizer, output)
    freeze = settings.get("freeze_word_embeddings", True)
    try:
        found = None if vectors is None else read_word_vectors(vectors, tokenizer.get_vocab(), config.word_embed_dim)
        model = AttnCapForConditionalGeneration.from_pretrained_parts(
            config, arguments.backbone_weights, found, freeze_word_embeddings=freeze
        )
    except (StrictDataclassError, ValueError) as error:
        raise SettingError(str(error)) from error
    model.generation_config.update(max_new_tokens=MAX_NEW_TOKENS, num_beams=3, no_repeat_ngram_size=3)
    _set_repeatable(model, repeatable_tokens(tokenizer, sentences))
    side = {"height": arguments.image_size, "width": arguments.image_size}
    return model, AttnCapProcessor(AttnCapImageProcessor.from_config(config, size=side), tokenizer)


def _load_captioner(arguments: ModelArguments, sentences: list[str]) -> tuple[AttnCapForConditionalGeneration, AttnCapProcessor]:
    """A checkpoint and its processor, whose vocabulary is extended by the training captions on request."""
    path = str(arguments.model_name_or_path)
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise SettingError(f"`model_name_or_path`: {path} has no config.json: give the folder of a saved captioner.")
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
    except RuntimeError as error:  # transformers' list of tensors with other shapes
        raise SettingError(
            f"`model_config`: {path} has weights of other sizes, and sizes can be set only for a new captioner: leave them out."
        ) from error
    model, report = loaded
    model.config.confidence = None  # it was fitted to the weights that training changes
    if other := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise SettingError(
            f"`model_config` changes which layers {path} has ({list_names(other)}), which is possible only for a new captioner: "
            "leave those fields out."
        )
    processor.image_processor.warn_of_other_statistics(model.config)
    tokenizer = processor.tokenizer
    if arguments.extend_vocabulary:
        try:
            words = extend_vocabulary(model, tokenizer, sentences, arguments.min_count)
        except ValueError as error:
            raise SettingError(f"`extend_vocabulary`: {error}") from error
        logger.warning("the vocabulary has %d new words: %s", len(words), list_names(words) or "none")
        if (known := getattr(model.generation_config, "repeatable_token_ids", None)) is not None:
            _set_repeatable(model, sorted({*known, *(repeatable_tokens(tokenizer, sentences) or [])}))
    _log_coverage(arguments, tokenizer, sentences)
    return model, processor


def _log_coverage(arguments: ModelArguments, tokenizer: Any, sentences: list[str]) -> None:
    for sentence in describe_coverage(tokenizer, sentences, advise_on_words(arguments, tokenizer)):
        logger.warning("%s", sentence)


def _set_repeatable(model: Any, tokens: list[int] | None) -> None:
    """Sets which tokens a caption may contain more than once, so that it is saved and loaded with the generation config."""
    if tokens is not None:
        model.generation_config.repeatable_token_ids = tokens
        model.generation_config._from_model_config = False  # loading would drop settings that transformers does not know


def _word_vectors(vectors: str | None, config: AttnCapConfig, sentences: list[str], tokenizer: Any, output: Path) -> str | None:
    """The file of word vectors. `captions` trains them on the captions first."""
    if vectors is None and config.freeze_word_embeddings:
        raise SettingError("`freeze_word_embeddings` would keep random vectors: set `word_vectors` as well, or leave it out.")
    if vectors == "captions":
        path = output / "word_vectors.txt"
        run_on_main_rank(lambda: write_word_vectors(path, sentences, tokenizer, config.word_embed_dim))
        return str(path)
    if vectors is not None and not Path(vectors).is_file():
        raise SettingError(f"No such file of word vectors: {vectors}. `captions` trains them on the training captions.")
    return vectors
