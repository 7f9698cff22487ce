"""Settings that a run will not use, found before it begins."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, NamedTuple

from hf_attncap import AttnCapConfig


class Rule(NamedTuple):
    """`options` do nothing in runs for which `unused` holds; `why` ends the sentence that says so.

    It is an error where the option can only be a mistake, and a warning where a config file or a command is used for several
    runs, of which not all use it.
    """

    options: tuple[str, ...]
    unused: Callable[[Any], Any]
    why: str
    refuse: bool = False


# `run` holds all settings of a run by their names. Options that are off (false, or empty) never are an error.
RULES = (
    # The captioner. (Contradictions between settings of training alone are found by `CaptionTrainingArguments`.)
    Rule(
        ("word_vectors", "backbone_weights"),
        lambda run: run.model_name_or_path,
        "is for a new captioner, `model_name_or_path` has its own: leave one of them out",
        True,
    ),
    Rule(
        ("tokenizer_kind", "image_size"), lambda run: run.model_name_or_path, "is for a new captioner, the checkpoint has its own"
    ),
    Rule(
        ("min_count",),
        lambda run: run.model_name_or_path and not run.extend_vocabulary,
        "is for a new vocabulary, the checkpoint has its own: `extend_vocabulary` adds the words that it lacks",
    ),
    Rule(
        ("extend_vocabulary",),
        lambda run: not run.model_name_or_path,
        "is for a checkpoint (`model_name_or_path`); a new captioner takes all words from the captions: leave it out",
        True,
    ),
    # The data.
    Rule(
        ("train_split",),
        lambda run: run.train_file and not run.train_file.endswith((".json", ".jsonl")),
        "is for datasets and Karpathy's files, and `train_file` has no splits: leave it out",
        True,
    ),
    Rule(
        ("validation_split",),
        lambda run: run.train_file and not (run.validation_file or run.train_file).endswith((".json", ".jsonl")),
        "is for datasets and Karpathy's files, and there is none to validate on: leave it out",
        True,
    ),
    Rule(
        ("dataset_config_name",),
        lambda run: any(os.path.isfile(os.path.join(run.dataset_name or "", f)) for f in ("dataset_dict.json", "state.json")),
        "is for datasets on the Hub, and `dataset_name` is a folder written by `save_to_disk`: leave it out",
        True,
    ),
    Rule(
        ("image_dir",),
        lambda run: run.streaming or (run.train_file or "").endswith(".tar"),
        "is for files with the paths of images, and these data hold the images themselves",
    ),
    Rule(
        ("validation_image_dir",),
        lambda run: not run.train_file or not (run.validation_file or run.train_file.endswith(".json")),
        "is for the paths in a `validation_file` or a Karpathy file, and there is none: leave it out",
        True,
    ),
    Rule(
        ("image_id_column",),
        lambda run: (run.train_file or "").endswith(".tar") and (run.validation_file or ".tar").endswith(".tar"),
        "is for tables: shards have the names of their members as ids",
    ),
    # Kinds of training.
    Rule(
        ("samples_per_image",), lambda run: not run.self_critical, "goes with `self_critical`: set that too, or leave it out", True
    ),
    Rule(
        ("generation_num_beams", "generation_max_length", "generation_config"),
        lambda run: not run.predict_with_generate,
        "is for evaluations that generate captions: set `predict_with_generate` too, or leave it out",
        True,
    ),
    # transformers' own: what one of them means depends on another.
    Rule(("num_train_epochs",), lambda run: run.max_steps > 0, "is overridden by `max_steps`"),
    Rule(("eval_steps",), lambda run: run.eval_strategy != "steps", "goes with `eval_strategy: steps`"),
    Rule(("save_steps",), lambda run: run.save_strategy != "steps", "goes with `save_strategy: steps`"),
    Rule(("logging_steps",), lambda run: run.logging_strategy != "steps", "goes with `logging_strategy: steps`"),
    Rule(("eval_delay", "eval_on_start"), lambda run: run.eval_strategy == "no", "goes with an `eval_strategy`"),
    Rule(("save_total_limit", "save_only_model"), lambda run: run.save_strategy == "no", "is for checkpoints, and none are saved"),
    Rule(
        ("metric_for_best_model", "greater_is_better"),
        lambda run: not (run.load_best_model_at_end or run.early_stopping_patience or run.save_strategy == "best"),
        "has no effect without `load_best_model_at_end` or `early_stopping_patience`: set one of them too",
    ),
    Rule(
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
        lambda run: "adam" not in run.optim and "lion" not in run.optim,
        "is for another `optim`",
    ),
    Rule(("gradient_checkpointing_kwargs",), lambda run: not run.gradient_checkpointing, "goes with `gradient_checkpointing`"),
    Rule(
        ("dataloader_persistent_workers", "dataloader_multiprocessing_context"),
        lambda run: not run.dataloader_num_workers,
        "goes with `dataloader_num_workers`",
    ),
    Rule(
        ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        lambda run: not run.push_to_hub,
        "goes with `push_to_hub`",
    ),
    Rule(("run_name",), lambda run: not run.report_to, "is a name for the service of `report_to`"),
    Rule(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        lambda run: "trackio" not in run.report_to,
        "is for `report_to: trackio`",
    ),
    Rule(("restore_callback_states_from_checkpoint",), lambda run: not run.resume_from_checkpoint, "is for a run that is resumed"),
    # transformers' own: what this trainer decides, or what does not suit images.
    Rule(
        ("do_train", "do_eval", "do_predict"),
        lambda run: True,
        "is for other scripts",
    ),
    Rule(
        ("remove_unused_columns", "prediction_loss_only", "logging_nan_inf_filter", "label_names"),
        lambda run: True,
        "is decided by this trainer: leave it out",
        True,
    ),
    Rule(
        (
            "sortish_sampler",
            "length_column_name",
            "include_for_metrics",
            "batch_eval_metrics",
            "use_liger_kernel",
            "liger_kernel_config",
        ),
        lambda run: True,
        "has no effect in this trainer: leave it out",
        True,
    ),
    Rule(
        ("train_sampling_strategy",),
        lambda run: run.train_sampling_strategy not in ("random", "sequential"),
        "sorts rows by their length, which images do not have: leave it out",
        True,
    ),
    Rule(
        ("include_num_input_tokens_seen",),
        lambda run: run.include_num_input_tokens_seen != "no",
        "counts the tokens of a text input, which captioners do not have: leave it out",
        True,
    ),
)

CHOSEN_BY_VOCABULARY = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "unk_token_id")
ARCHITECTURE = {item.name for item in fields(AttnCapConfig) if item.name in AttnCapConfig.__annotations__}

# The same for fields of `model_config`. `frozen` is None where the checkpoint says whether its backbone is.
MODEL_CONFIG_RULES = (
    Rule(CHOSEN_BY_VOCABULARY, lambda config: True, "follows from the vocabulary: leave it out", True),
    Rule(
        tuple(sorted({item.name for item in fields(AttnCapConfig)} - ARCHITECTURE | {"is_encoder_decoder", "use_cache"})),
        lambda config: True,
        "is no choice of the architecture: leave it out",
        True,
    ),
    Rule(("trainable_blocks", "freeze_batch_norm"), lambda config: config.frozen, "goes with `freeze_backbone: false`"),
    Rule(
        ("max_word_distance",),
        lambda config: config.word_attention not in (None, "history"),
        "goes with `word_attention: history`",
    ),
)


def unused_settings(given: Collection[str], *groups: Any) -> tuple[list[str], list[str]]:
    """Sentences on what is set and not used: errors, and warnings.

    Args:
        given: the names of all settings that were given, in a config file or on the command line.
        groups: the settings: of the model, with `model_config` as a mapping, of the data and of the training.
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
