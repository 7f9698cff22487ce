"""Captions of two captioners for the same random images, as a Markdown table.

    python benchmarks/side_by_side.py first/results.json second/results.json

The files are what `attncap card CHECKPOINT --images` leaves in a checkpoint's folder; the images are the same at every call.
"""

import argparse
import json
import random
import sys
from pathlib import Path

SEED, SHOWN = 0, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs=2, type=Path)
    args = parser.parse_args()
    first, second = (json.loads(file.read_text(encoding="utf-8")) for file in args.results)
    shared = sorted(first["captions"].keys() & second["captions"].keys())
    if not shared:
        parser.error("the two files have no image in common")
    print(f"| image | {args.results[0].parent.name} | {args.results[1].parent.name} | a reference |\n|---|---|---|---|")
    for name in random.Random(SEED).sample(shared, min(SHOWN, len(shared))):
        said = [f"{found['captions'][name]} ({100 * found['cider'][name]:.0f})" for found in (first, second)]
        print(f"| {name} | {said[0]} | {said[1]} | {first['references'][name].replace('|', '/')} |")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
