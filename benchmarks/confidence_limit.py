"""How well do two references of an image predict whether its caption is good? Compared with the checkpoint's own score.

    python -m benchmarks.confidence_limit hf_attncap/checkpoint --images validation.parquet --output confidence_limit.json

`attncap calibrate` calls a caption good if its CIDEr-D against the references of its image is at least 0.5. People describe an
image in different ways, so a caption that is good against some references may not be good against others. This script splits the
references of each image: a judge sees the caption and two of them, and the caption counts as good or not against the rest. The
judge's value is the CIDEr-D against its two. Its AUROC shows how well two human descriptions predict the label.
Figures are means over all splits, with the lowest and the highest. Images with fewer than five references are skipped. Of more
than five, the first five are used.
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
from hf_attncap.atomic import atomic_write
from hf_attncap.metrics import CaptionMetrics

REFERENCES, JUDGE = 5, 2


def good_by_split(references: Mapping[str, Sequence[str]], captions: Mapping[str, str]) -> dict[tuple[int, ...], np.ndarray]:
    """Whether captions are good (I, bool) against the other three references, for each choice of two of the five.

    Args:
        references: five per image id.
        captions: of the same images.
    """
    found = {}
    for judges in itertools.combinations(range(REFERENCES), JUDGE):
        others = [place for place in range(REFERENCES) if place not in judges]
        found[judges] = _cider(references, captions, others) >= GOOD_CIDER
    return found


def judge(
    references: Mapping[str, Sequence[str]], captions: Mapping[str, str], good: Mapping[tuple[int, ...], np.ndarray]
) -> list[float]:
    """The AUROC of two references as a judge of captions, one value per split of `good_by_split`."""
    return [auroc(_cider(references, captions, judges), labels) for judges, labels in good.items()]


def _cider(references: Mapping[str, Sequence[str]], captions: Mapping[str, str], places: Sequence[int]) -> np.ndarray:
    """The CIDEr-D (I) of captions against some of their references."""
    scores = CaptionMetrics({name: [own[place] for place in places] for name, own in references.items()}).score(captions)
    found = dict(zip(scores.ids, scores.per_image["cider"].tolist()))
    return np.array([found[name] for name in references])


def report(checkpoint: str, file: str) -> dict[str, Any]:
    """What references know of the captions of a checkpoint, and what the caption's own score knows of the same images."""
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
    return {"images": len(references), "two_references": _summary(judge(references, chosen, good)), "score": _summary(of_score)}


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"auroc": float(np.mean(values)), "lowest": min(values), "highest": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--images", required=True, help="captioned images that the checkpoint was not trained on")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = report(args.checkpoint, args.images)
    print(json.dumps(found, indent=1))
    if args.output:
        with atomic_write(args.output) as file:
            file.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (OSError, SettingError) as error:
        sys.exit(f"error: {error}")
