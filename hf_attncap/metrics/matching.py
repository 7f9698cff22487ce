"""Bringing together the images of two files, whatever names the files give them."""

from dataclasses import dataclass
from itertools import product

from .files import SHORT, CaptionFileError, Naming, Predictions, References, note, some


@dataclass(frozen=True)
class Matched:
    """The images that have both: two mappings with the references' ids as keys, in the predictions' order, and all notes."""

    references: dict[str, list[str]]
    predictions: dict[str, str]
    notes: list[str]


def match(references: References, predictions: Predictions) -> Matched:
    """Bring together the images that have both references and a prediction.

    Every name that one file gives its images (`image_id`, `path`; of COCO annotations also `file_name`; of Karpathy's file
    `cocoid`, `imgid`, `filename`) is compared, as text, with every name of the other, and the pair of names that brings
    most predictions to references is taken. Only if none brings any, file names (or else the ids) are compared without
    their folders and then without their endings; and only then these short forms with all other names.

    Raises:
        CaptionFileError: no prediction has a reference, or two pairs of names are equally good and disagree.
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
            f"predictions fit references by {theirs} (predictions: {ours}) as well as by {rival[0]} (predictions: {rival[1]}), "
            "and not to the same images; give each prediction the file name of its image"
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
    """How far two ways of naming are from what the files themselves say: 0 both as written, 1 shortened alike, 2 otherwise."""
    short = [name in SHORT for name in pair]
    return 0 if not any(short) else 1 if pair[0] == pair[1] else 2


def _samples(names: dict[str, Naming]) -> str:
    return " or ".join(f"{kind} ({some(list(naming.ids)[:2])})" for kind, naming in names.items() if kind not in SHORT)
