"""Finds options that a run will not use, before it begins."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, NamedTuple

from hf_attncap import AttnCapConfig


class Rule(NamedTuple):
    """`options` have no effect in runs for which `unused` is true; `why` ends the sentence that reports it.

    With `refuse` it is an error, because the option can only be a mistake. Otherwise it is a warning, because a config file may be
    shared by runs that use the option.
    """

    options: tuple[str, ...]
    unused: Callable[[Any], Any]
    why: str
    refuse: bool = False


# `run` has all settings of a run as attributes. Options that are false or None are never reported.
RULES = (
    # The captioner. (`CaptionTrainingArguments` checks contradictions between training options.)
    Rule(
        ("word_vectors", "backbone_weights"),
        lambda run: run.model_name_or_path,
        "is for a new captioner, and `model_name_or_path` has its own: remove one of them",
        True,
    ),
    Rule(
        ("tokenizer_kind", "image_size"),
        lambda run: run.model_name_or_path,
        "is for a new captioner, and the checkpoint has its own",
    ),
    Rule(
        ("min_count",),
        lambda run: run.model_name_or_path and not run.extend_vocabulary,
        "is for a new vocabulary, and the checkpoint has its own: `extend_vocabulary` adds missing words",
    ),
    Rule(
        ("extend_vocabulary",),
        lambda run: not run.model_name_or_path,
        "is for a checkpoint (`model_name_or_path`); a new captioner takes all words from the captions: remove it",
        True,
    ),
    # The data.
    Rule(
        ("train_split",),
        lambda run: run.train_file and not run.train_file.endswith((".json", ".jsonl")),
        "is for datasets and Karpathy's files, and `train_file` has no splits: remove it",
        True,
    ),
    Rule(
        ("validation_split",),
        lambda run: run.train_file and not (run.validation_file or run.train_file).endswith((".json", ".jsonl")),
        "is for datasets and Karpathy's files, and the validation data are neither: remove it",
        True,
    ),
    Rule(
        ("dataset_config_name",),
        lambda run: (
            not run.dataset_name
            or any(os.path.isfile(os.path.join(run.dataset_name, f)) for f in ("dataset_dict.json", "state.json"))
        ),
        "is for datasets on the Hub (`dataset_name`): remove it",
        True,
    ),
    Rule(
        ("image_dir",),
        lambda run: run.streaming or (run.train_file or "").endswith(".tar"),
        "is for files with paths of images, and these data contain the images",
    ),
    Rule(
        ("validation_image_dir",),
        lambda run: not run.train_file or not (run.validation_file or run.train_file.endswith(".json")),
        "is for the paths in a `validation_file` or a Karpathy file, and there is none: remove it",
        True,
    ),
    Rule(
        ("image_id_column",),
        lambda run: (run.train_file or "").endswith(".tar") and (run.validation_file or ".tar").endswith(".tar"),
        "is for tables: in shards, the names of the members are the ids",
    ),
    # The training.
    Rule(
        ("samples_per_image", "cross_entropy_weight"),
        lambda run: not run.self_critical,
        "needs `self_critical`: set it too, or remove the option",
        True,
    ),
    # Options of transformers that this trainer sets itself, or that would end the run with an error.
    Rule(
        ("remove_unused_columns", "prediction_loss_only", "logging_nan_inf_filter"),
        lambda run: True,
        "is set by this trainer: remove it",
        True,
    ),
    Rule(
        ("batch_eval_metrics", "include_for_metrics", "use_liger_kernel"),
        lambda run: True,
        "has no effect in this trainer: remove it",
        True,
    ),
    Rule(
        ("train_sampling_strategy",),
        lambda run: run.train_sampling_strategy not in ("random", "sequential"),
        "sorts rows by length, which images do not have: remove it",
        True,
    ),
    Rule(
        ("include_num_input_tokens_seen",),
        lambda run: run.include_num_input_tokens_seen != "no",
        "counts the tokens of a text input, which captioners do not have: remove it",
        True,
    ),
)

CHOSEN_BY_VOCABULARY = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "unk_token_id")
ARCHITECTURE = {item.name for item in fields(AttnCapConfig) if item.name in AttnCapConfig.__annotations__}

# The same for fields of `model_config`. `frozen` is None if the checkpoint determines whether the backbone is frozen.
MODEL_CONFIG_RULES = (
    Rule(CHOSEN_BY_VOCABULARY, lambda config: True, "follows from the vocabulary: remove it", True),
    Rule(
        tuple(sorted({item.name for item in fields(AttnCapConfig)} - ARCHITECTURE | {"is_encoder_decoder", "use_cache"})),
        lambda config: True,
        "is not part of the architecture: remove it",
        True,
    ),
    Rule(("trainable_blocks", "freeze_batch_norm"), lambda config: config.frozen, "needs `freeze_backbone: false`"),
    Rule(
        ("max_word_distance",),
        lambda config: config.word_attention not in (None, "history"),
        "needs `word_attention: history`",
    ),
)


def unused_settings(given: Collection[str], *groups: Any) -> tuple[list[str], list[str]]:
    """Sentences about options that are set but not used: errors and warnings.

    Args:
        given: the names of the options in the config file and on the command line.
        groups: the argument dataclasses of the model (with `model_config` as a mapping), the data and the training.
    """
    run = SimpleNamespace(**{name: value for group in groups for name, value in vars(group).items()})
    values = {name: getattr(run, name) for name in given}
    errors, warnings = _apply(RULES, values, run, "`{}`")
    config = run.model_config
    new = not run.model_name_or_path
    known = SimpleNamespace(
        frozen=config.get("freeze_backbone", True if new else None),
        word_attention=config.get("word_attention", "score" if new else None),
    )
    more_errors, more_warnings = _apply(MODEL_CONFIG_RULES, config, known, "`{}` in `model_config`")
    return errors + more_errors, warnings + more_warnings


def _apply(rules: tuple[Rule, ...], values: Mapping[str, Any], run: Any, form: str) -> tuple[list[str], list[str]]:
    errors, warnings = [], []
    for rule in rules:
        for name in rule.options:
            off = values.get(name) is None or values[name] is False
            if not off and rule.unused(run):
                (errors if rule.refuse else warnings).append(f"{form.format(name)} is not used: it {rule.why}.")
    return errors, warnings
