"""Matches the images of two files, which may name them differently."""

from dataclasses import dataclass
from itertools import product

from .files import SHORT, CaptionFileError, Naming, Predictions, References, note, some


@dataclass(frozen=True)
class Matched:
    """Images with references and a prediction, by the references' ids, in the order of the predictions; and all notes."""

    references: dict[str, list[str]]
    predictions: dict[str, str]
    notes: list[str]


def match(references: References, predictions: Predictions) -> Matched:
    """Finds the images that have both references and a prediction.

    Compares every name that one file has for its images with every name in the other file, as text. The names are `image_id` and
    `path`; in COCO annotations also `file_name`; in Karpathy's file `cocoid`, `imgid` and `filename`. The pair of names with the
    most matches is used. If no pair matches any image, file names (or ids) are compared without folders, then without suffixes,
    and then these short forms with all other names.

    Raises:
        CaptionFileError: no prediction has a reference, or two pairs of names match equally many but different images.
    """
    best, rival, chosen = {}, None, ("", "")
    pairs = sorted(product(references.names, predictions.names), key=_distance)
    for theirs, ours in pairs:
        if best and _distance((theirs, ours)) > _distance(chosen):
            break
        ids, names = references.names[theirs].ids, predictions.names[ours].ids
        found = {id: ids[name] for name, id in names.items() if name in ids}
        if len(found) > len(best):
            best, rival, chosen = found, None, (theirs, ours)
        elif len(found) == len(best) and found != best:
            rival = theirs, ours
    theirs, ours = chosen
    if not best:
        raise CaptionFileError(
            f"no caption of {predictions.path} has a reference; it names its images by {_samples(predictions.names)}, "
            f"{references.path} by {_samples(references.names)}; give each prediction one of the references' names"
        )
    if rival:
        raise CaptionFileError(
            f"predictions match references by {theirs} (predictions: {ours}) as well as by {rival[0]} (predictions: {rival[1]}), "
            "but these are different images; give each prediction the file name of its image"
        )
    notes = [*references.notes, *predictions.notes]
    if chosen != pairs[0]:
        notes.append(f"images are matched by {theirs} in the references and {ours} in the predictions")
    types = references.names[theirs].type, predictions.names[ours].type
    if None not in types and types[0] != types[1]:
        notes.append(
            f"{theirs} is written as {types[0]} in the references, {ours} as {types[1]} in the predictions; compared as text"
        )
    unpaired = references.captions.keys() - best.values()
    notes += note(predictions.path, "images without references, left out", [id for id in predictions.captions if id not in best])
    notes += note(
        references.path,
        f"images without a caption in {predictions.path}, left out",
        [id for id in references.captions if id in unpaired],
    )
    captions = {best[id]: caption for id, caption in predictions.captions.items() if id in best}
    return Matched({id: references.captions[id] for id in captions}, captions, notes)


def _distance(pair: tuple[str, str]) -> int:
    """The priority of a pair of names: 0 both as in the files, 1 both shortened in the same way, 2 otherwise."""
    short = [name in SHORT for name in pair]
    return 0 if not any(short) else 1 if pair[0] == pair[1] else 2


def _samples(names: dict[str, Naming]) -> str:
    return " or ".join(f"{kind} ({some(list(naming.ids)[:2])})" for kind, naming in names.items() if kind not in SHORT)
