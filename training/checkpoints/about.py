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

Every line is optional.
"""

from pathlib import Path
from typing import Any

import yaml

from hf_attncap.hub import ABOUT

TEXTS = (
    "title", "summary", "intended_use", "selection", "license", "license_name", "license_link", "repository", "base_model",
)  # fmt: skip
LISTS = ("independent", "origins")
FIELDS = (*TEXTS, "datasets", *LISTS)


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
    if isinstance(about, dict) and "dataset" in about:
        raise ValueError(
            f"{place}: replace `dataset` by `datasets`, a list with one entry for each measured file, such as "
            "`datasets: [{name: Flickr8k, id: flickr8k, split: validation}]`."
        )
    if not isinstance(about, dict):
        raise ValueError(f"{place} is not a mapping: write its fields as `name: value`.")
    if unknown := about.keys() - set(FIELDS):
        raise ValueError(f"{place} has unknown fields ({', '.join(sorted(map(str, unknown)))}): use {', '.join(sorted(FIELDS))}.")
    for name, value in about.items():
        if name in TEXTS:
            _check_text(value, f"{place}: `{name}`")
        elif name == "datasets":
            _check_datasets(value, place)
        elif not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise ValueError(f"{place}: `{name}` is {value!r:.60}; expected a list of texts.")
    if about.keys() & {"license_name", "license_link"} and about.get("license") != "other":
        raise ValueError(f"{place}: `license_name` and `license_link` need `license: other`; add that, or remove them.")
    return about


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r:.60}; expected a text.")


def _check_datasets(datasets: Any, place: str) -> None:
    if not (isinstance(datasets, list) and all(isinstance(one, dict) for one in datasets)):
        raise ValueError(f"{place}: `datasets` is {datasets!r:.60}; expected a list of mappings, each with a name.")
    for number, one in enumerate(datasets, 1):
        if not {"name"} <= one.keys() <= {"name", "id", "split"}:
            found = ", ".join(map(str, one)) or "nothing"
            raise ValueError(f"{place}: entry {number} of `datasets` has {found}; expected name, and optionally id and split.")
        for name, value in one.items():
            _check_text(value, f"{place}: `{name}` in entry {number} of `datasets`")


def check_count(about: dict[str, Any], sets: int, folder: Path) -> None:
    """Raise a ValueError if `datasets` does not have one entry for each of the measured files."""
    if "datasets" in about and len(about["datasets"]) != sets:
        raise ValueError(
            f"{folder / ABOUT}: `datasets` lists {len(about['datasets'])}, but {sets} file{'s' * (sets > 1)} are measured: list "
            "one for each file, in the same order."
        )
