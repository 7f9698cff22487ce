"""Blend two checkpoints of one captioner: `python -m training.blend FIRST SECOND OUT --share 0.75` averages their weights."""

import argparse
import sys
from pathlib import Path

import torch

from hf_attncap import AttnCapForConditionalGeneration

from .record import hand_on


def blend(first: str | Path, second: str | Path, out: str | Path, share: float) -> Path:
    """Write (1 - share) * first + share * second to `out`, with the processor, the settings and the record of the second.

    Worth a try where the second learned on from the first: between what it began with and what it came to often lies a captioner
    that overfits less than the one and knows more than the other (Wortsman et al., 2022, "Robust fine-tuning of zero-shot models").

    Args:
        share: of the second, 0 to 1; choose it on validation images.

    Raises:
        ValueError: if the share is none, or the two have different weights, the first of which is named.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` is {share:g}: it must be between 0 and 1.")
    model = AttnCapForConditionalGeneration.from_pretrained(second, dtype=torch.float32)
    own = model.state_dict()
    other = AttnCapForConditionalGeneration.from_pretrained(first, dtype=torch.float32).state_dict()
    for name in own.keys() | other.keys():
        if name not in own or name not in other or own[name].shape != other[name].shape:
            raise ValueError(f"'{name}' of {first} and of {second} differ in shape: blend checkpoints of one captioner.")
    blended = {name: torch.lerp(other[name], own[name], share) if own[name].is_floating_point() else own[name] for name in own}
    model.load_state_dict(blended)
    model.save_pretrained(out)
    hand_on(second, out)
    return Path(out)


def main() -> int:
    parser = argparse.ArgumentParser(description="Average the weights of two checkpoints of one captioner.")
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("out")
    parser.add_argument("--share", type=float, default=0.5, help="of the second checkpoint, 0 to 1")
    arguments = parser.parse_args()
    try:
        print(blend(arguments.first, arguments.second, arguments.out, arguments.share))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
