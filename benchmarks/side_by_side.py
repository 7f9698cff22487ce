"""Compare two captioners on the same images: captions of random images, and differences of the scores.

    python benchmarks/side_by_side.py first/results.json second/results.json
    python benchmarks/side_by_side.py first/results.json second/results.json \\
        --references flickr8k/validation.parquet coco/validation.parquet

`attncap card CHECKPOINT --eval-data FILE` writes results.json. The images are the same at every call. `--references` takes the
files on which both were measured; a second table then shows the difference of BLEU-4 and CIDEr per set, second minus first, with
95 % intervals and p-values of a paired bootstrap over the images.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_attncap.metrics import CaptionMetrics, compare

SEED, EXAMPLES = 0, 10
COMPARED = {"bleu_4": "BLEU-4", "cider": "CIDEr"}


def read_sets(file: Path) -> list[dict[str, Any]]:
    """The measured sets of a results file."""
    results = json.loads(file.read_text(encoding="utf-8"))
    if "sets" not in results:
        sys.exit(f"error: {file} has no measured sets: write it with `attncap card CHECKPOINT --eval-data FILE`")
    return results["sets"]


def shared_sets(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of each set of the first with the set of the second that shares most images with it, if any."""
    for own in first:
        other = max(second, key=lambda found: len(own["captions"].keys() & found["captions"].keys()))
        if own["captions"].keys() & other["captions"].keys():
            yield own, other


def print_captions(files: list[Path], first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    print(f"| image | {files[0].parent.name} | {files[1].parent.name} | a reference |\n|---|---|---|---|")
    for pair in shared_sets(first, second):
        shared = sorted(pair[0]["captions"].keys() & pair[1]["captions"].keys())
        for name in random.Random(SEED).sample(shared, min(EXAMPLES, len(shared))):
            cells = [f"{found['captions'][name]} ({100 * found['cider'][name]:.0f})" for found in pair]
            print(f"| {name} | {cells[0]} | {cells[1]} | {pair[0]['references'][name].replace('|', '/')} |")


def print_differences(files: list[Path], first: list[dict[str, Any]], second: list[dict[str, Any]], references: list[str]) -> None:
    # This import loads torch.
    from hf_attncap.model_card.measure import captioned_images, name_sets

    print(f"\n| images | score | {files[0].parent.name} | {files[1].parent.name} | difference (95 % interval) | p |")
    print("|---|---|---|---|---|---|")
    for name, file in zip(name_sets(references), references):
        rows = captioned_images(file)
        texts = dict(zip(rows["image_id"], rows["captions"]))
        metrics = CaptionMetrics(texts)
        scores = []
        for path, sets in zip(files, (first, second)):
            found = [own["captions"] for own in sets if own["captions"].keys() == texts.keys()]
            if not found:
                sys.exit(f"error: {path} has no set of the images of {file}: measure both checkpoints on it with `attncap card`")
            scores.append(metrics.score(found[0]))
        comparison = compare(*scores)
        for kind, title in COMPARED.items():
            one = comparison[kind]
            values = [f"{100 * value:.1f}" for value in (one.first, one.second)]
            difference = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in (one.difference, one.low, one.high)))
            print(f"| {name}, {len(texts):,} | {title} | {values[0]} | {values[1]} | {difference} | {one.p:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs=2, type=Path)
    parser.add_argument(
        "--references", nargs="+", metavar="FILE", default=[], help="captioned images, in a format of `attncap train`"
    )
    args = parser.parse_args()
    first, second = (read_sets(file) for file in args.results)
    if not any(shared_sets(first, second)):
        parser.error("the two files have no image in common")
    print_captions(args.results, first, second)
    if args.references:
        print_differences(args.results, first, second, args.references)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
