"""Settings of a wrong type give one sentence, in a YAML file and on the command line. Unused settings are reported."""

import json
import logging
import os
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import yaml
from hf_attncap.training.arguments import GROUPS, parse_arguments
from hf_attncap.training.train import main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Seq2SeqTrainingArguments

from hf_attncap import AttnCapConfig

TRANSFORMERS = {item.name for item in fields(Seq2SeqTrainingArguments)}
OPTIONS = sorted({item.name for group in GROUPS for item in fields(group) if item.init})
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name in TRANSFORMERS)) for name in OPTIONS]  # three minutes together
HINTS = {name: hint for group in GROUPS for name, hint in get_type_hints(group).items()}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**12),
    st.floats(),
    st.sampled_from(["", " ", "x", "no", "None", "[]", "{}", "{", "1e-4", "nan", "../..", "a,b", "5 %", "\u00e9"]),
    st.dates(),
    st.lists(st.sampled_from(["x", 1, None, True, [1]]), max_size=2),
    st.dictionaries(st.sampled_from(["x", "a_b"]), st.sampled_from(["x", 1, None]), max_size=2),
)
WORDS = ["", "x", "[]", "{", "nan", "-", "1.5.2", "None", '{"a": 1}', "[1]", "\u00e9", "a b"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Options of a run whose training file does not exist, so that settings that pass all checks end with that error."""
    folder = tmp_path_factory.mktemp("settings")
    return folder, ["--train_file", str(folder / "none.csv"), "--output_dir", str(folder / "out"), "--use_cpu", "True"]


def run(argv: list[str], capsys) -> str:
    """The error that a command line prints."""
    environment = dict(os.environ)
    try:
        code = main(argv)
    finally:
        os.environ.clear()  # transformers sets some for libraries that it would start
        os.environ.update(environment)
    error = capsys.readouterr().err
    assert code == 2 and error.count("error: ") == 1 and error.strip().splitlines()[-1].startswith("error: ")
    return error


@pytest.mark.parametrize("name", EACH)
@given(value=VALUES)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_a_config_file_gives_one_sentence(name, value, data, capsys):
    folder, argv = data
    (folder / "a.yaml").write_text(yaml.safe_dump({name: value}))
    argv = [word for word, before in zip(argv[::2], argv[1::2]) if word != f"--{name}" for word in (word, before)]
    run(["--config", str(folder / "a.yaml"), *argv], capsys)


@pytest.mark.parametrize("name", EACH)
def test_any_text_on_the_command_line_gives_one_sentence(name, data, capsys):
    for word in WORDS:
        run([*data[1], f"--{name}={word}"], capsys)
    run([*data[1], f"--{name}"], capsys)


@pytest.mark.parametrize("name", [name for name in OPTIONS if {int, float} & {HINTS[name], *get_args(HINTS[name])}])
def test_text_for_a_number_is_refused_with_the_name_of_the_setting(name, data, capsys):
    if str in get_args(HINTS[name]):
        return
    error = run([*data[1], f"--{name}", "many"], capsys)
    assert f"--{name}" in error and "many" in error
    (data[0] / "a.yaml").write_text(f"{name}: many\n")
    error = run([*data[1], "--config", str(data[0] / "a.yaml")], capsys)
    assert "a.yaml: " in error and f"--{name}" in error and "many" in error


MODEL_CONFIG = {
    "no JSON": ("{'a': 1}", "which is not JSON"),
    "no mapping": ("[1]", "it must be a mapping"),
    "unknown": ('{"a": 1}', "AttnCapConfig has no a"),
    "vocabulary": ('{"vocab_size": 9}', "follows from the vocabulary"),
    "none of the architecture": ('{"dtype": "float16"}', "not part of the architecture"),
}


@pytest.mark.parametrize(("text", "message"), MODEL_CONFIG.values(), ids=MODEL_CONFIG)
def test_wrong_model_config_is_refused(text, message, data, capsys):
    assert message in run([*data[1], "--model_config", text], capsys)


@pytest.mark.parametrize("text", ["", " 5", " [a]", " {dropout: much}", " {1: 2}", "\n  dropout:", " {backbone: [x]}"])
def test_wrong_model_config_in_a_file_is_refused(text, data, capsys):
    (data[0] / "a.yaml").write_text(f"model_config:{text}\nmin_count: 2\n")
    error = run(["--config", str(data[0] / "a.yaml"), *data[1]], capsys)
    # Types of known fields are checked when a captioner is made, after the data are found.
    assert ("none.csv" in error) is (text in ("", " {dropout: much}", "\n  dropout:", " {backbone: [x]}"))


CHECKPOINT = {"model_name_or_path": "there"}
WARNED = [
    ({**CHECKPOINT, "min_count": 2}, "`min_count` is not used"),
    ({**CHECKPOINT, "tokenizer_kind": "bpe"}, "`tokenizer_kind` is not used"),
    ({**CHECKPOINT, "image_size": 100}, "`image_size` is not used"),
    (
        {"model_config": '{"trainable_blocks": 2}'},
        "`trainable_blocks` in `model_config` is not used: it needs `freeze_backbone",
    ),
    ({"model_config": '{"max_word_distance": 2}'}, "`max_word_distance` in `model_config` is not used"),
]
REFUSED = [
    ({**CHECKPOINT, "word_vectors": "captions"}, "`word_vectors` is not used: it is for a new captioner"),
    ({**CHECKPOINT, "backbone_weights": "DEFAULT"}, "`backbone_weights` is not used: it is for a new captioner"),
    ({"extend_vocabulary": True}, "`extend_vocabulary` is not used: it is for a checkpoint"),
    ({"samples_per_image": 3}, "`samples_per_image` is not used: it needs `self_critical`"),
    ({"cross_entropy_weight": 0.3}, "`cross_entropy_weight` is not used: it needs `self_critical`"),
    ({"train_split": "train"}, "`train_split` is not used"),
    ({"validation_split": "val"}, "`validation_split` is not used"),
    ({"validation_image_dir": "x"}, "`validation_image_dir` is not used"),
    ({"remove_unused_columns": True}, "`remove_unused_columns` is not used: it is set by this trainer"),
    ({"include_num_input_tokens_seen": True}, "`include_num_input_tokens_seen` is not used"),
    ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy` is not used: it sorts rows by length"),
]


def words_of(values: dict) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize("in_file", [False, True], ids=["command line", "file"])
@pytest.mark.parametrize(("values", "message"), WARNED, ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_settings_without_effect_are_a_warning(values, message, in_file, data, caplog):
    folder, argv = data
    more = words_of(values)
    if in_file:
        parsed = {k: json.loads(v) if k == "model_config" else v for k, v in values.items()}
        (folder / "a.yaml").write_text(yaml.safe_dump(parsed))
        more = ["--config", str(folder / "a.yaml")]
    with caplog.at_level(logging.WARNING):
        parse_arguments([*argv, *more])
    assert message in caplog.text


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_settings_that_are_a_mistake_are_refused(values, message, data, capsys):
    assert message in run([*data[1], *words_of(values)], capsys)


def test_used_settings_and_defaults_give_no_warning(data, caplog):
    used = {
        "min_count": 2,
        "image_size": 64,
        "eval_strategy": "no",
        "num_logged_images": 0,
        "num_train_epochs": 2,
        "image_dir": "x",
    }
    with caplog.at_level(logging.WARNING):
        parse_arguments([*data[1], *words_of(used)])
        parse_arguments([*data[1], "--model_name_or_path", "there", "--extend_vocabulary", "True", "--min_count", "2"])
    assert "not used" not in caplog.text


def test_rules_name_existing_settings():
    from hf_attncap.training.unused_options import MODEL_CONFIG_RULES, RULES

    known = set(OPTIONS)
    assert not {name for rule in RULES for name in rule.options} - known
    assert not {name for rule in MODEL_CONFIG_RULES for name in rule.options} - {item.name for item in fields(AttnCapConfig)}
