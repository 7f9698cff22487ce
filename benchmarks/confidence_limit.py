"""How well can a caption's quality be predicted at all? Two references of the image as a predictor, compared with the score.

    python -m benchmarks.confidence_limit hf_attncap/checkpoint --images validation.parquet --output confidence_limit.json

For `attncap calibrate`, a caption is good if its CIDEr-D against the references of its image is at least 0.5. References differ, so
a caption that is good against some may not be good against others. This script splits the references of each image: the label
(good or not) comes from three of them, the predictor is the CIDEr-D against the other two. Its AUROC shows how well two human
descriptions predict the label. Results are the mean, minimum and maximum over all splits. Images with fewer than five references
are skipped; of more than five, the first five are used.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hf_attncap.model_card.calibration import GOOD_CIDER, auroc
from hf_attncap.model_card.measure import caption, captioned_images
from hf_attncap.training.arguments import SettingError

from hf_attncap import Captioner
from hf_attncap.atomic import write_json
from hf_attncap.metrics import CaptionMetrics

REFERENCES, JUDGE = 5, 2


def good_by_split(references: Mapping[str, Sequence[str]], captions: Mapping[str, str]) -> dict[tuple[int, ...], np.ndarray]:
    """Whether captions are good (I, bool) against three of the five references, by the two others.

    Args:
        references: five per image id.
        captions: of the same images.
    """
    found = {}
    for judges in itertools.combinations(range(REFERENCES), JUDGE):
        others = [place for place in range(REFERENCES) if place not in judges]
        found[judges] = _cider(references, captions, others) >= GOOD_CIDER
    return found


def auroc_of_references(
    references: Mapping[str, Sequence[str]], captions: Mapping[str, str], good: Mapping[tuple[int, ...], np.ndarray]
) -> list[float]:
    """The AUROC of the CIDEr-D against two references, for each split of `good_by_split`."""
    return [auroc(_cider(references, captions, judges), labels) for judges, labels in good.items()]


def _cider(references: Mapping[str, Sequence[str]], captions: Mapping[str, str], places: Sequence[int]) -> np.ndarray:
    """The CIDEr-D (I) of captions against some of their references."""
    scores = CaptionMetrics({name: [own[place] for place in places] for name, own in references.items()}).score(captions)
    found = dict(zip(scores.ids, scores.per_image["cider"].tolist()))
    return np.array([found[name] for name in references])


def report(checkpoint: str, file: str) -> dict[str, Any]:
    """The AUROC of two references and of the caption score, on the captions of a checkpoint."""
    rows = captioned_images(file)
    captions, _, signals = caption(Captioner.from_pretrained(checkpoint), rows)
    score = dict(zip(captions, (float(signal["score"]) for signal in signals)))
    references = {name: own[:REFERENCES] for name, own in zip(rows["image_id"], rows["captions"]) if len(own) >= REFERENCES}
    if len(references) < 2:
        raise SettingError(f"{file} has {len(references)} images with {REFERENCES} references: at least 2 are needed.")
    chosen = {name: captions[name] for name in references}
    own = np.array([score[name] for name in references])  # (I)
    good = good_by_split(references, chosen)
    of_score = [auroc(own, labels) for labels in good.values()]
    return {
        "images": len(references),
        "two_references": _summary(auroc_of_references(references, chosen, good)),
        "score": _summary(of_score),
    }


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"auroc": float(np.mean(values)), "lowest": min(values), "highest": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--images", required=True, help="captioned images that the checkpoint was not trained on")
    parser.add_argument("--output", type=Path, help="file for the results, as JSON")
    args = parser.parse_args()
    found = report(args.checkpoint, args.images)
    print(json.dumps(found, indent=1))
    if args.output:
        write_json(args.output, found)


if __name__ == "__main__":
    try:
        main()
    except (OSError, SettingError) as error:
        sys.exit(f"error: {error}")
