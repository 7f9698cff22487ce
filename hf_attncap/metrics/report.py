"""Evaluation of caption files, and its results as tables and JSON: what `attncap evaluate` and `attncap calibrate` print."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .files import References, read_predictions, read_references, read_training
from .matching import Matched, match
from .score import CaptionMetrics, CaptionScores, compare
from .significance import FEW_IMAGES, Comparison

NOT_PERCENT = {"vocabulary": ".0f", "mean_length": ".2f"}  # in words; all other scores are shown times 100


@dataclass(frozen=True)
class Evaluation:
    """The scores of a file of predictions and their comparison with a baseline."""

    files: dict[str, str]  # "predictions", "references" and, with a baseline, "compared_with"
    scores: CaptionScores
    comparison: dict[str, Comparison]  # empty without a baseline
    notes: list[str]  # one sentence for each irregularity of the files

    def tables(self) -> str:
        """The scores and the comparison as plain text."""
        return score_table(self.scores) + (f"\n\n{comparison_table(self.comparison)}" if self.comparison else "")

    def to_json(self) -> str:
        """The scores, the comparison and the notes as one JSON object."""
        result = {**self.files, "images": len(self.scores.ids), "scores": self.scores.corpus, "notes": self.notes}
        compared = {"comparison": {name: asdict(found) for name, found in self.comparison.items()}} if self.comparison else {}
        return json.dumps(result | compared, indent=1) + "\n"

    def rows_to_json(self) -> str:
        """The scores of each image as JSON lines."""
        return "".join(json.dumps(row) + "\n" for row in self.scores.rows())


def evaluate_files(
    predictions: str,
    references: str,
    *,
    split: str | None = None,
    training: str | None = None,
    baseline: str | None = None,
    meteor: bool = False,
    spice: bool = False,
) -> Evaluation:
    """Scores a file of predictions against a file of references; `hf_attncap.metrics.files` lists the formats.

    Args:
        predictions: one caption per image.
        references: one or more captions per image. Images that are not in all files are left out.
        split: the split of a Karpathy file of references.
        training: the captions that the model was trained on, for the share of novel captions.
        baseline: the predictions of another system, to compare with.
        meteor, spice: also compute these, with pycocoevalcap and Java.

    Raises:
        CaptionFileError: a file cannot be read or is malformed, or the files have no image in common.
        JavaMetricError: METEOR or SPICE cannot be computed here.
    """
    gold = read_references(references, split)
    matched = [match(gold, read_predictions(file)) for file in (predictions, baseline) if file]
    shared = [image_id for image_id in matched[0].references if image_id in matched[-1].references]
    metrics = CaptionMetrics(
        {image_id: gold.captions[image_id] for image_id in shared}, training=read_training(training) if training else None
    )
    scores = [
        metrics.score({image_id: system.predictions[image_id] for image_id in shared}, meteor=meteor, spice=spice)
        for system in matched
    ]
    comparison = compare(scores[1], scores[0]) if baseline else {}
    files = {"predictions": predictions, "references": references} | ({"compared_with": baseline} if baseline else {})
    return Evaluation(files, scores[0], comparison, _notes(files, gold, matched, len(shared)))


def _notes(files: dict[str, str], references: References, matched: list[Matched], shared: int) -> list[str]:
    notes = list(dict.fromkeys(note for system in matched for note in system.notes))
    lost = sum(len(system.references) - shared for system in matched)
    if lost:
        notes.append(f"images with a caption in only one of {files['predictions']} and {files['compared_with']}, left out: {lost}")
    if all(len(captions) == 1 for captions in references.captions.values()):
        notes.append(f"{references.path} has one reference per image; with several, scores are higher and more reliable")
    if len(matched) > 1 and shared < FEW_IMAGES:
        notes.append(f"with {shared} images the interval and p of the comparison are unreliable; use {FEW_IMAGES} or more")
    return notes


def is_own_report(file: Path) -> bool:
    """Whether a file is empty or starts like the JSON of an `Evaluation`."""
    with file.open("rb") as stream:
        head = stream.read(4096)
    try:
        row = json.loads(head.partition(b"\n")[0])
    except ValueError:
        row = None
    is_row = isinstance(row, dict) and {"image_id", "bleu_4", "cider"} <= row.keys()
    return not head or is_row or head.startswith(b'{\n "predictions": ')


def score_table(scores: CaptionScores) -> str:
    """One score per line; times 100 as in published tables, except for numbers of words."""
    rows = [("images", f"{len(scores.ids)}")]
    for name, value in scores.items():
        rows.append((name, format(value, NOT_PERCENT[name]) if name in NOT_PERCENT else f"{100 * value:.2f}"))
    return "\n".join(f"{name:18}{value:>8}" for name, value in rows)


def comparison_table(comparison: Mapping[str, Comparison]) -> str:
    """One score per line, times 100: the baseline (the comparison's first system), this system, the gain, its interval and p."""
    lines = [f"{'':18}{'baseline':>10}{'this':>8}{'gain':>8}{'95 % interval':>20}{'p':>9}"]
    for name, found in comparison.items():
        first, second, gain, low, high = (100 * x for x in (found.first, found.second, found.difference, found.low, found.high))
        lines.append(f"{name:18}{first:10.2f}{second:8.2f}{gain:+8.2f}{f'{low:+.2f} to {high:+.2f}':>20}{found.p:9.4f}")
    return "\n".join(lines)


def calibration_summary(report: Mapping[str, Any]) -> str:
    """The report of `hf_attncap.model_card.calibration.calibrate` as plain text."""
    return "\n".join(line for name, found in report["sets"].items() for line in _set_summary(name, found))


def _set_summary(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    if not found["images"] or found["auroc"][0] is None:
        yield f"{name}: {found['images']} images are too few to measure the confidence on"
        return
    area, raw = (f"{middle:.3f} ({low:.3f} to {high:.3f})" for middle, low, high in (found["auroc"], found["auroc_of_score"]))
    yield f"{name}: {found['images']} images, {100 * found['good']:.0f} % with a good caption"
    yield f"  AUROC {area}, of the score alone {raw}; Brier score {found['brier']:.3f}"
    for kept in found["coverage"][4::5]:
        good = 100 - 100 * kept["risk"]
        yield f"  most confident {100 * kept['coverage']:.0f} %: {good:.0f} % good, CIDEr {100 * kept['cider']:.1f}"
