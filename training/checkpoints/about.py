"""`about.yaml`: your own text about a checkpoint, for its card.

    title: My captioner
    summary: What it is and for whom.
    intended_use: What it is for, and what it is not for.
    selection: How the checkpoint and its settings were chosen.  # shown below the scores
    license: other                           # of the weights, as the Hub names licences
    license_name: my-license                 # only with `license: other`: an id for it,
    license_link: https://...                # and its URL
    repository: user/name                    # on the Hub
    base_model: user/name                    # if it was fine-tuned from another model
    datasets:                                # one for each measured file, in their order
      - {name: Flickr8k, id: flickr8k, split: validation}  # id and split as on the Hub, both optional
    independent: [lines with scores that others measured, shown below the scores and never in the metadata]
    origins: [sentences on data, initial weights and their licences]

Every field is optional.
"""

from pathlib import Path
from typing import Any

import yaml

from hf_attncap.hub import ABOUT

TEXTS = (
    "title", "summary", "intended_use", "selection", "license", "license_name", "license_link", "repository", "base_model",
)  # fmt: skip
LISTS = ("independent", "origins")
FIELDS = sorted((*TEXTS, "datasets", *LISTS))


def read_about(folder: Path) -> dict[str, Any]:
    """The fields of the `about.yaml` in a folder. Empty if there is no file.

    Raises:
        ValueError: it is not valid YAML, or has other fields or values than those above.
    """
    file = folder / ABOUT
    return parse_about(file.read_text(encoding="utf-8"), str(file)) if file.exists() else {}


def parse_about(text: str, place: str) -> dict[str, Any]:
    """The fields of an `about.yaml` with this text; `place` names it in errors.

    Raises:
        ValueError: as `read_about`.
    """
    try:
        about = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{place} is not valid YAML: {' '.join(str(error).split())}.") from error
    about = {} if about is None else about
    if not isinstance(about, dict):
        raise ValueError(f"{place} is not a mapping: write its fields as `name: value`.")
    if unknown := about.keys() - set(FIELDS):
        raise ValueError(f"{place} has unknown fields ({', '.join(sorted(map(str, unknown)))}): use {', '.join(FIELDS)}.")
    for name, value in about.items():
        if name in TEXTS and not isinstance(value, str):
            raise ValueError(f"{place}: `{name}` is {value!r:.60}; expected a text.")
        if name in LISTS and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise ValueError(f"{place}: `{name}` is {value!r:.60}; expected a list of texts.")
        if name == "datasets" and not (isinstance(value, list) and all(map(_is_dataset, value))):
            raise ValueError(
                f"{place}: `datasets` is {value!r:.60}; expected a list with one entry for each measured file, such as "
                "`[{name: Flickr8k, id: flickr8k, split: validation}]`, where id and split are optional."
            )
    if about.keys() & {"license_name", "license_link"} and about.get("license") != "other":
        raise ValueError(f"{place}: `license_name` and `license_link` need `license: other`; add that, or remove them.")
    return about


def _is_dataset(value: Any) -> bool:
    known = isinstance(value, dict) and {"name"} <= value.keys() <= {"name", "id", "split"}
    return known and all(isinstance(text, str) for text in value.values())


def check_count(about: dict[str, Any], sets: int, folder: Path) -> None:
    """Raise a ValueError if `datasets` does not have one entry for each of the measured files."""
    if "datasets" in about and len(about["datasets"]) != sets:
        raise ValueError(
            f"{folder / ABOUT}: `datasets` lists {len(about['datasets'])}, but {sets} file{'s' * (sets > 1)} are measured: list "
            "one for each file, in the same order."
        )
