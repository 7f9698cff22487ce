"""Reads predictions and references from caption files.

The format is detected from the content, not from the file name:

- COCO results, a JSON list of rows: `[{"image_id": 12, "caption": "..."}, ...]`
- COCO annotations: `{"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}`
- Karpathy's splits: `{"images": [{"filename", "split", "cocoid" or "imgid", "sentences": [{"raw" or "tokens"}]}, ...]}`
- JSON lines with `image_id` (or `path` or `file_name`) and `caption` (or `captions`, a list), such as the output of
  `attncap caption --json`
- a JSON object: `{"12": "..." or ["...", ...], ...}`

Ids are compared as text: 12 and "12" are the same image. Irregularities that do not prevent the use of a file are listed in
`notes`; others are errors.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

Captions = TypeVar("Captions", str, list[str])

_ROW = 'an object with "image_id" (or "path" or "file_name") and "caption" (or "captions")'
_KINDS = "COCO results or annotations, Karpathy's splits, JSON lines or a JSON object of captions by id"
_ID_KEYS = ("image_id", "path", "file_name")
_KEY = "key"  # the name of an image in a JSON object, which is always text
_SPLIT_NAMES = {"validation": "val"}
TRAINING = "train+restval"
SHORT = ("name without folders", "name without folders and ending")  # kinds of names that are derived from those in a file
_WORD = re.compile(r"\w")
_ENDING = re.compile(r"\.[A-Za-z]\w{1,4}$")  # .jpg, .jpeg, .webp; not the .5 of an id 12.5
_JSON_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


class CaptionFileError(ValueError):
    """A caption file that cannot be used; the message names the file, the position in it and what is expected there."""


@dataclass(frozen=True)
class Naming:
    """One kind of names of a file's images, such as `file_name`.

    Attributes:
        ids: name -> id of the image in the file; no two images share a name.
        type: "numbers" or "text", the type of the names in the file; None for both, or if the format allows only text.
    """

    ids: dict[str, str]
    type: str | None


@dataclass(frozen=True)
class CaptionFile(Generic[Captions]):
    """The captions of a file of predictions (`str` per image) or references (`list[str]`).

    Attributes:
        path: the file.
        captions: id -> caption or captions, in the order of the file, including empty captions.
        names: kind of names -> the names; the ids are first.
        notes: one sentence for each irregularity.
    """

    path: str
    captions: dict[str, Captions]
    names: dict[str, Naming]
    notes: list[str]


Predictions = CaptionFile[str]
References = CaptionFile[list[str]]


class _Row(NamedTuple):
    where: str
    names: dict[str, int | str]  # the id is the first
    captions: list[str]

    @property
    def id(self) -> int | str:
        return next(iter(self.names.values()))


def read_predictions(path: str | os.PathLike[str]) -> Predictions:
    """Reads one caption per image from a file in one of the formats above.

    Raises:
        CaptionFileError: the file cannot be read or is malformed; an image has two different captions (two equal ones are only
            noted); 12 and "12" are both ids.
    """
    name = os.fsdecode(path)
    rows, notes = _rows(name, None)
    ids = _ids(rows)
    captions: dict[str, str] = {}
    again, different = [], []
    for row, id in zip(rows, ids):
        if len(row.captions) != 1:
            raise CaptionFileError(f"{row.where} has {len(row.captions)} captions; a prediction is exactly one")
        if id not in captions:
            captions[id] = row.captions[0]
        else:
            (again if captions[id] == row.captions[0] else different).append(id)
    if different:
        raise CaptionFileError(
            f"{name} has different captions for one image: {some([*dict.fromkeys(different)])}; keep one caption per image (or is "
            "this the file of references?)"
        )
    notes += note(name, "images with the same caption more than once", [*dict.fromkeys(again)])
    notes += note(name, "captions without a word", [id for id, caption in captions.items() if not _WORD.search(caption)])
    return Predictions(name, captions, _namings(rows, ids), notes)


def read_references(path: str | os.PathLike[str], split: str | None = None) -> References:
    """Reads the reference captions from a file in one of the formats above.

    Args:
        path: the file.
        split: the split of a Karpathy file, such as "test"; "val" and "validation" are the same; "train+restval" reads both.
            None reads all splits, which is noted.

    Raises:
        CaptionFileError: the file cannot be read or is malformed; the split does not exist; 12 and "12" are both ids.
    """
    name = os.fsdecode(path)
    rows, notes = _rows(name, split)
    rows, bare = [row for row in rows if row.captions], [str(row.id) for row in rows if not row.captions]
    if not rows:
        raise CaptionFileError(f"{name} has no captions for any of its {len(bare)} images; give a file of references")
    ids = _ids(rows)
    captions: dict[str, list[str]] = {}
    for row, id in zip(rows, ids):
        captions.setdefault(id, []).extend(row.captions)
    notes += note(name, "images without a caption, left out", [id for id in bare if id not in captions])
    notes += note(name, "images with an empty caption", [id for id in captions if not all(map(str.strip, captions[id]))])
    return References(name, captions, _namings(rows, ids), notes)


def read_training(path: str | os.PathLike[str]) -> list[str]:
    """Reads training captions: those of `train` and `restval` of a Karpathy file, all captions of other files.

    Raises:
        CaptionFileError: as `read_references`.
    """
    captions = read_references(path, TRAINING).captions
    return [caption for several in captions.values() for caption in several]


def _rows(path: str, split: str | None) -> tuple[list[_Row], list[str]]:
    """The rows of a file and the notes about it."""
    notes: list[str] = []
    content = read_json(path, _KINDS)
    is_object = isinstance(content, dict)
    if is_object and "images" in content and "annotations" not in content:
        rows, notes = _from_karpathy(path, content["images"], split)
    elif split not in (None, TRAINING):
        raise CaptionFileError(f"{path} has no splits to take {split!r} from, only Karpathy's files have; leave the split out")
    elif is_object and "annotations" in content:
        rows = _from_coco(path, content)
    elif is_object and content.keys() & set(_ID_KEYS) and content.keys() & {"caption", "captions"}:
        rows = [_row(f"{path}, line 1", content)]
    elif is_object:
        places = {id: f"{path}, key {_show(id)}" for id in content}
        rows = [_Row(where, {_KEY: id}, _captions(where, content[id])) for id, where in places.items()]
    elif isinstance(content, JsonLines):
        rows = [_row(f"{path}, line {number}", row) for number, row in content]
    elif isinstance(content, list):
        rows = [_row(f"{path}, row {number}", row) for number, row in enumerate(content, 1)]
    else:
        raise CaptionFileError(f"{path} holds {_kind(content)}; expected {_KINDS}")
    if not rows:
        raise CaptionFileError(f"{path} holds no captions; expected {_KINDS}")
    return rows, notes


class JsonLines(list[tuple[int, Any]]):
    """The values of a JSON lines file with their line numbers."""


def read_json(path: str, expected: str) -> Any:
    """Reads a JSON file, or a JSON lines file as `JsonLines`; "-" is stdin.

    Raises:
        CaptionFileError: the file cannot be read or is malformed; the message ends with what is `expected`.
    """
    text = _read_text(path)
    if not text.strip():
        raise CaptionFileError(f"{path} is empty; expected {expected}")
    try:
        return _parse(text)
    except ValueError as error:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if len(lines) < 2 or not _is_json(lines[0][1]):
            raise CaptionFileError(
                f"{path} is not well-formed JSON: {error}; expected {expected} (`attncap caption --json` prints JSON lines)"
            ) from error
    values = JsonLines()
    for number, line in lines:
        try:
            values.append((number, _parse(line)))
        except ValueError as error:
            raise CaptionFileError(
                f"{path}, line {number} is not well-formed JSON: {error}; expected one object per line"
            ) from error
    return values


def _read_text(path: str) -> str:
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as stream:
            data = stream.read()
    except OSError as error:
        raise CaptionFileError(f"{path} cannot be read ({error.strerror}); check the path") from error
    if data.startswith(b"\x1f\x8b"):
        raise CaptionFileError(f"{path} is compressed; unpack it with gunzip first")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CaptionFileError(f"{path}, line {line} is not UTF-8 text; save the file as UTF-8, uncompressed") from error


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys, of which json.loads would silently keep the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        again = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
        raise ValueError(f"one object has a key more than once: {some(again)}")
    return content


def _is_json(text: str) -> bool:
    try:
        _parse(text)
    except ValueError:
        return False
    return True


def _from_coco(path: str, content: dict[str, Any]) -> list[_Row]:
    """One row per annotation, and one per image without annotations."""
    files: dict[str, dict[str, int | str]] = {}
    bare: dict[str, _Row] = {}
    for number, image in enumerate(_listed(path, content.get("images", []), "images"), 1):
        where = f"{path}, image {number}"
        id = _name(where, image, "id")
        files[str(id)] = {"file_name": _name(where, image, "file_name")} if "file_name" in image else {}
        bare[str(id)] = _Row(where, {"image_id": id}, [])
    rows = []
    for number, annotation in enumerate(_listed(path, content["annotations"], "annotations"), 1):
        row = _row(f"{path}, annotation {number}", annotation)
        id = str(row.id)
        row.names.update(files.get(id, {}))
        rows.append(row)
        bare.pop(id, None)
    return [*rows, *bare.values()]


def _from_karpathy(path: str, images: Any, split: str | None) -> tuple[list[_Row], list[str]]:
    """One row per image of the split. Its id is the first of cocoid, imgid and filename that is unique for all images."""
    places = [(f"{path}, image {number}", image) for number, image in enumerate(_listed(path, images, "images"), 1)]
    counts = Counter(_split(image) for _, image in places)
    known = ", ".join(f"{name} ({count} images)" for name, count in counts.items())
    notes = []
    if split is None and len(counts) > 1:
        notes = [f"{path}: all splits are read, {known}"]
    elif split is not None:
        wanted = {_SPLIT_NAMES.get(name, name) for name in split.split("+")}
        if split == TRAINING and wanted & counts.keys():
            wanted &= counts.keys()  # some files lack one of them
        if missing := wanted - counts.keys():
            raise CaptionFileError(f"{path} has no split {' and '.join(sorted(missing))}; it has {known}")
        places = [(where, image) for where, image in places if _split(image) in wanted]
    names = [{key: _name(where, image, key) for key in ("cocoid", "imgid", "filename") if key in image} for where, image in places]
    for first in ("cocoid", "imgid", "filename"):
        if len({str(row[first]) for row in names if first in row}) == len(names):
            break
    else:
        raise CaptionFileError(f"{path}: every image needs a unique cocoid, imgid or filename")
    rows = []
    for (where, image), row in zip(places, names):
        sentences = _listed(where, image.get("sentences"), "sentences")
        captions = [_sentence(f"{where}, sentence {number}", sentence) for number, sentence in enumerate(sentences, 1)]
        rows.append(_Row(where, {first: row[first], **row}, captions))
    return rows, notes


def _split(image: dict[str, Any]) -> str:
    name = str(image.get("split", "without a name"))
    return _SPLIT_NAMES.get(name, name)


def _sentence(where: str, sentence: dict[str, Any]) -> str:
    """The raw caption, or its tokens joined by spaces."""
    if isinstance(raw := sentence.get("raw"), str):
        return raw
    tokens = sentence.get("tokens")
    if "raw" in sentence or not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise CaptionFileError(f'{where} needs a string "raw" or a list of strings "tokens"')
    return " ".join(tokens)


def _row(where: str, row: Any) -> _Row:
    if not isinstance(row, dict):
        raise CaptionFileError(f"{where} is {_kind(row)}; expected {_ROW}")
    id_key = next((key for key in _ID_KEYS if key in row), "path")
    caption_key = "caption" if "caption" in row else "captions"
    if missing := {id_key, caption_key} - row.keys():
        wanted = '"image_id" (or "path" or "file_name")' if id_key in missing else '"caption" (or "captions")'
        raise CaptionFileError(f"{where} has no {wanted}, only {some(list(row))}; expected {_ROW}")
    names = {key: _name(where, row, key) for key in _ID_KEYS if key in row}
    return _Row(where, names, _captions(f'{where}, "{caption_key}"', row[caption_key]))


def _captions(where: str, value: Any) -> list[str]:
    captions = value if isinstance(value, list) else [value]
    for caption in captions:
        if not isinstance(caption, str):
            raise CaptionFileError(f"{where} {'holds' if value is captions else 'is'} {_kind(caption)}; a caption is text")
    return list(captions)


def _name(where: str, holder: dict[str, Any], key: str) -> int | str:
    name = holder.get(key)
    if isinstance(name, bool) or not isinstance(name, (int, str)):
        found = f'"{key}" is {_kind(name)}' if key in holder else f'there is no "{key}"'
        found += f", {name}" if isinstance(name, float) else ""
        raise CaptionFileError(f"{where}: {found}; expected a whole number or text")
    return name


def _listed(where: str, value: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise CaptionFileError(f'{where}: "{key}" is {_kind(value)}; expected a list of objects')
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            raise CaptionFileError(f'{where}: number {number} of "{key}" is {_kind(item)}; expected an object')
    return value


def _ids(rows: Sequence[_Row]) -> list[str]:
    """The id of each row as text; raises if two different ids are equal as text."""
    first: dict[str, _Row] = {}
    ids = []
    for row in rows:
        ids.append(str(row.id))
        other = first.setdefault(ids[-1], row)
        if type(other.id) is not type(row.id):
            raise CaptionFileError(
                f"{other.where} has the id {_show(other.id)} and {row.where} the id {_show(row.id)}, which are compared as text "
                "and would be the same image; write all ids as numbers or all as text"
            )
    return ids


def _namings(rows: Sequence[_Row], ids: Sequence[str]) -> dict[str, Naming]:
    """All kinds of names that are unique per image: those in the file, then the short forms of the file name, or else of the id."""
    kinds = dict.fromkeys(kind for row in rows for kind in row.names)
    columns = {kind: [(row.names[kind], id) for row, id in zip(rows, ids) if kind in row.names] for kind in kinds}
    longest = next((columns[kind] for kind in ("filename", "file_name") if kind in columns), next(iter(columns.values())))
    bare = [(re.split(r"[/\\]", str(name))[-1], id) for name, id in longest]
    columns |= dict(zip(SHORT, (bare, [(_ENDING.sub("", name), id) for name, id in bare])))
    namings: dict[str, Naming] = {}
    for kind, pairs in columns.items():
        names = {str(name): id for name, id in pairs}
        if all(names[str(name)] == id for name, id in pairs):
            namings[kind] = Naming(names, None if kind in (*SHORT, _KEY) else _type(name for name, _ in pairs))
    return namings


def _type(names: Iterable[int | str]) -> str | None:
    types = set(map(type, names))
    return None if len(types) > 1 else "numbers" if types == {int} else "text"


def note(where: str, what: str, ids: Sequence[str]) -> list[str]:
    """A list with one sentence about some images; empty if there are none."""
    return [f"{where}: {what}: {len(ids)} ({some(ids)})"] if ids else []


def some(names: Sequence[str]) -> str:
    """The first five names, and the number of the others."""
    shown = ", ".join(map(_show, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _show(name: int | str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _kind(value: Any) -> str:
    return _JSON_NAMES.get(type(value), "a number")
