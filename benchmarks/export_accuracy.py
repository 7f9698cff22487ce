"""How much accuracy does an export cost? CIDEr of exported captioners and of the checkpoint on validation images.

    python -m benchmarks.export_accuracy --exported runs/int8 --images flickr8k/validation.parquet --output accuracy.json

CIDEr is multiplied by 100. `same_captions` counts the captions that are equal to those of the checkpoint with torch.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_attncap.model_card.measure import caption, captioned_images

from hf_attncap import Captioner
from hf_attncap.atomic import write_json
from hf_attncap.captioner import CHECKPOINT


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="default: the released checkpoint")
    parser.add_argument("--exported", type=Path, nargs="*", default=[], help="exported folders of the checkpoint")
    parser.add_argument("--images", nargs="+", required=True, help="files of validation images with captions")
    parser.add_argument("--output", type=Path, help="file for the results, as JSON")
    args = parser.parse_args(argv)
    found = []
    for file in args.images:
        rows = captioned_images(file)
        expected: dict[str, str] = {}
        for folder in (args.checkpoint, *args.exported):
            captions, scores, _ = caption(Captioner.from_pretrained(folder), rows)
            expected = expected or captions
            same = sum(captions[name] == expected[name] for name in expected)
            name = "/".join(Path(file).parts[-2:])
            found.append({"captioner": folder.name, "images": name, "count": len(captions), "same_captions": same})
            found[-1]["cider"] = round(100 * scores["cider"], 2)
            print(found[-1], flush=True)
    if args.output:
        write_json(args.output, found)


if __name__ == "__main__":
    main()
