"""How does the time of a caption grow with the batch, the tokens, the beams, the vocabulary and the regions?

    python -m benchmarks.speed.scaling --output scaling.json

The model has the sizes of the released checkpoint and random weights. One size changes at a time. The others are one image, 16
tokens, 3 beams, and the checkpoint's vocabulary and regions. "growth" is the exponent p in ms ~ size^p between two rows: 1 is
linear, 0 is constant. Rows with a growth above 1.1 are marked.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_attncap.captioner import CHECKPOINT
from hf_attncap.optimize import optimize_for_inference

from .measure import Candidate, Row, create_parser, parse_options, report, time_candidates
from .models import TOKENS, encode, force_length, generate, random_model

BEAMS, REGIONS = 3, 49
SIZES = {
    "images, encoder": [1, 2, 4, 8, 16, 32],
    "images, decoder": [1, 2, 4, 8, 16, 32],
    "tokens": [4, 8, 16, 32, 64],
    "beams": [1, 2, 4, 8, 16],
    "vocabulary": [1_000, 4_000, 16_000, 64_000],
    "regions": [49, 98, 196, 392],
}
DIVIDED = ("images, encoder", "images, decoder", "tokens", "beams")  # the table also has the time per image, token or beam
QUICK_SIZES = {name: sizes[::2] for name, sizes in SIZES.items()}
SUPERLINEAR = 1.1
COLUMNS = {"what": "what grows", "size": "size", "ms": "ms", "ms_each": "ms each", "growth": "growth", "superlinear": "superlinear"}


def candidate_of(what: str, size: int, model: Any, args: Any) -> Candidate:
    """A call of the encoder or of `generate` in which the size named by `what` is changed."""
    channels, device = model.config.encoder_channels, args.device
    if what == "images, encoder":
        return partial(encode, model, torch.randn(size, 3, args.side, args.side, device=device))
    if what == "vocabulary":
        model = random_model(checkpoint=args.checkpoint, vocab_size=size).to(device)
        force_length(model)
    images, regions = size if what == "images, decoder" else 1, size if what == "regions" else REGIONS
    length = {"max_new_tokens": size, "min_new_tokens": size} if what == "tokens" else {}
    # Words may repeat, because a caption of 64 tokens needs it.
    settings = {"num_beams": size if what == "beams" else BEAMS, "repeatable_token_ids": None, "no_repeat_ngram_size": 0, **length}
    return partial(generate, model, torch.randn(images, regions, channels, device=device), **settings)


def main(argv: Sequence[str] | None = None) -> None:
    options = create_parser(__doc__, __file__)
    options.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="default: the released checkpoint")
    options.add_argument("--side", type=int, default=224, help="height and width of the images (default: %(default)s)")
    args = parse_options(options, argv)
    model = random_model(checkpoint=args.checkpoint)
    force_length(model, TOKENS)
    fast = optimize_for_inference(model).to(args.device)
    rows: list[Row] = []
    for what, sizes in (QUICK_SIZES if args.quick else SIZES).items():
        times = time_candidates({str(size): candidate_of(what, size, fast, args) for size in sizes}, args)
        before: Row | None = None
        for size in sizes:
            row: Row = {"what": what, "size": size, **times[str(size)]}
            if what in DIVIDED:
                row["ms_each"] = round(row["ms"] / size, 4)
            if before is not None:
                row["growth"] = round(math.log(row["ms"] / before["ms"]) / math.log(size / before["size"]), 3)
                row["superlinear"] = "yes" if row["growth"] > SUPERLINEAR else "no"
            rows.append(row)
            before = row
    report(args, COLUMNS, rows)


if __name__ == "__main__":
    main()
