"""`about.yaml`: the text of a person on a checkpoint, for its card.

    title: My captioner
    summary: What it is and for whom.
    license: other                           # of the weights, as the Hub names licences
    license_name: my-license                 # with `license: other` only: an id for it,
    license_link: https://...                # and where to read it: a URL
    repository: user/name                    # where it will be on the Hub
    base_model: user/name                    # if it is fine-tuned from another
    datasets:                                # one for each measured file, in their order
      - {name: Flickr8k, id: flickr8k, split: validation}  # id and split as on the Hub; both may be missing
    independent: [lines with figures that others measured, shown below the scores and never in the metadata]
    origins: [sentences on data, initial weights and their licences]

Each line may be missing.
"""

from pathlib import Path
from typing import Any

import yaml

ABOUT = "about.yaml"
TEXTS = ("title", "summary", "license", "license_name", "license_link", "repository", "base_model")
LISTS = ("independent", "origins")
LINES = (*TEXTS, "datasets", *LISTS)


def read_about(path: Path) -> dict[str, Any]:
    """The lines of an `about.yaml`. Empty if there is no file.

    Raises:
        ValueError: it is no YAML, or no mapping of the lines above.
    """
    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from error
    about = {} if about is None else about
    check_about(about, str(path))
    return about


def check_about(about: Any, place: str) -> None:
    """Raises a ValueError, naming the place, for what is not the content of an `about.yaml`."""
    if isinstance(about, dict) and "dataset" in about:
        raise ValueError(
            f"{place}: replace `dataset` by `datasets`, a list with one entry for each measured file, such as "
            "`datasets: [{name: Flickr8k, id: flickr8k, split: validation}]`."
        )
    if not isinstance(about, dict) or about.keys() - set(LINES):
        what = ", ".join(sorted(map(str, about.keys() - set(LINES)))) if isinstance(about, dict) else "no mapping"
        raise ValueError(f"{place} has {what}: it may have only {', '.join(sorted(LINES))}, as `name: value`.")
    for name, value in about.items():
        if name in TEXTS:
            _check_text(value, f"{place}: `{name}`")
        elif name == "datasets":
            _check_datasets(value, place)
        elif not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise ValueError(f"{place}: `{name}` is {value!r:.60}; expected a list of texts.")
    if about.keys() & {"license_name", "license_link"} and about.get("license") != "other":
        raise ValueError(f"{place}: `license_name` and `license_link` describe `license: other`; write that, or leave them out.")


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r:.60}; expected a text.")


def _check_datasets(datasets: Any, place: str) -> None:
    if not (isinstance(datasets, list) and all(isinstance(one, dict) for one in datasets)):
        raise ValueError(f"{place}: `datasets` is {datasets!r:.60}; expected a list of mappings, each with a name.")
    for number, one in enumerate(datasets, 1):
        if not {"name"} <= one.keys() <= {"name", "id", "split"}:
            found = ", ".join(map(str, one)) or "nothing"
            raise ValueError(f"{place}: entry {number} of `datasets` has {found}; expected name, and perhaps id and split.")
        for name, value in one.items():
            _check_text(value, f"{place}: `{name}` in entry {number} of `datasets`")


def check_count(about: dict[str, Any], sets: int, place: str) -> None:
    """Raises a ValueError if `datasets` does not have one entry for each of the measured sets."""
    if "datasets" in about and len(about["datasets"]) != sets:
        listed = len(about["datasets"])
        raise ValueError(
            f"{place}: `--images` has {sets} file{'s' * (sets > 1)}, but `datasets` lists {listed}: list one for each, in order."
        )
