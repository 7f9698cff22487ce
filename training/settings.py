"""Reads settings from a YAML file and the command line, with the types that the options have."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from hf_attncap import AttnCapConfig

CONFIGS = Path(__file__).parent / "configs"


class SettingError(ValueError):
    """A setting that the user must change. The command line shows only its message."""


class Parser(HfArgumentParser):
    """Parser for the options of dataclasses. Errors are a `SettingError` of one sentence."""

    def __init__(self, groups: Iterable[Any], **kwargs: Any):
        super().__init__(groups, **kwargs)
        self._hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
        self.add_argument(
            "--config",
            help=f"YAML file of settings: a path, or a config in the package ({', '.join(sorted(_shipped()))}).",
        )

    def error(self, message: str) -> NoReturn:
        raise SettingError(f"{message.removeprefix('argument ').rstrip('.')}. `--help` lists all settings.")

    def read(self, argv: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings that are given, in the config file or on the command line, and the merged `model_config`."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config", nargs="?", const="")
        known, rest = first.parse_known_args(argv)
        in_file = {} if known.config is None else _read_config(known.config)
        mapping = _mapping(in_file.pop("model_config", None), f"{known.config}: `model_config`")
        settings = self._checked(str(known.config), in_file)
        options, strange = self._given(rest)
        if strange:
            raise SettingError(f"Unknown options: {' '.join(strange)}. `--help` lists all.")
        return settings | options, mapping | _from_json(options.get("model_config", "{}"))

    def _given(self, words: list[str]) -> tuple[dict[str, Any], list[str]]:
        """The options in a command line, without defaults, and the words that belong to no option."""
        absent = object()
        values = argparse.Namespace(**{action.dest: absent for action in self._actions})
        found, strange = self.parse_known_args(words, values)
        return {name: value for name, value in vars(found).items() if value is not absent}, strange

    def _checked(self, path: str, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings of a config file, checked as if they were command-line options."""
        if unknown := {str(name) for name in settings if name not in self._hints}:
            raise SettingError(f"{path}: unknown settings: {', '.join(sorted(unknown))}. `--help` lists all.")
        words: list[str] = []
        whole: dict[str, Any] = {}  # values that the command line cannot express
        several = {action.dest for action in self._actions if action.nargs == "+"}
        for name, value in settings.items():
            kinds = {get_origin(kind) or kind for kind in (self._hints[name], *get_args(self._hints[name]))}
            place = f"{path}: `{name}` is {value!r:.60}"
            if value is None or isinstance(value, list | dict):
                if type(value) not in kinds:
                    raise SettingError(f"{place}: {'leave it out, or give it a value' if value is None else 'it takes one value'}.")
                if name in several and value:
                    words += [f"--{name}", *map(str, value)]
                else:
                    whole[name] = value
            elif not isinstance(value, str | int | float) or (isinstance(value, bool) and bool not in kinds):
                raise SettingError(f"{place}, a {type(value).__name__}: put text in quotes.")
            else:
                words.append(f"--{name}={value}")
        try:
            return self._given(words)[0] | whole
        except SettingError as error:
            raise SettingError(f"{path}: {error}") from error


def _shipped() -> dict[str, Path]:
    """The configs in the package, by name."""
    return {config.name: config for config in CONFIGS.glob("*.yaml")}


def _read_config(path: str) -> dict[str, Any]:
    shipped = _shipped()
    file = Path(path) if Path(path).is_file() else shipped.get(path)
    if file is None:
        raise SettingError(f"No such config file: {path}. The package has {', '.join(sorted(shipped))}.")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise SettingError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise SettingError(f"{path} must consist of `setting: value` lines.")
    return settings


def _from_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise SettingError(
            f"`model_config` is {text!r:.80}, which is not JSON ({error}): write for example '{{\"dropout\": 0.3}}'."
        ) from error
    return _mapping(value, "`model_config`")


def _mapping(value: Any, name: str) -> dict[str, Any]:
    """Checks that a value is a mapping of fields of `AttnCapConfig`; None is an empty mapping."""
    if not isinstance(value, dict | None):
        raise SettingError(f"{name} is {value!r:.80}: it must be a mapping of fields of AttnCapConfig to their values.")
    if unknown := {str(field) for field in value or {}} - {item.name for item in fields(AttnCapConfig)}:
        raise SettingError(f"{name}: AttnCapConfig has no {', '.join(sorted(unknown))}.")
    return value or {}
