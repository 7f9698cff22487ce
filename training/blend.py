"""Blend checkpoints of one captioner: `python -m training.blend FIRST SECOND ... --output OUT` averages their weights."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_attncap import AttnCapForConditionalGeneration

from .record import RECORD, blended, hand_on


def blend(checkpoints: Sequence[str | Path], out: str | Path, shares: Sequence[float] | None = None) -> Path:
    """Write the mean of the weights of checkpoints to `out`, with the processor and the settings of the last.

    Worth a try where they learned on from the same one: between what they began with and what they came to often lies a captioner
    that overfits less than any and knows more (Wortsman et al., 2022, "Robust fine-tuning of zero-shot models" and "Model soups").

    Args:
        shares: of each in the mean, in any unit; `None` for equal ones. Choose them on validation images.

    Raises:
        ValueError: if there are not as many shares as checkpoints, one is not positive, or weights differ; the first is named.
    """
    shares = [1.0] * len(checkpoints) if shares is None else shares
    if len(shares) != len(checkpoints) or min(shares) <= 0:
        given = ", ".join(f"{share:g}" for share in shares)
        raise ValueError(f"The shares are {given}: give {len(checkpoints)} above 0, one for each checkpoint.")
    model: Any = AttnCapForConditionalGeneration.from_pretrained(checkpoints[-1], dtype=torch.float32)
    own = model.state_dict()
    mean = {name: value * (shares[-1] / sum(shares)) for name, value in own.items() if value.is_floating_point()}
    for checkpoint, share in zip(checkpoints[:-1], shares):
        other = AttnCapForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
        for name in own.keys() | other.keys():
            if name not in own or name not in other or own[name].shape != other[name].shape:
                raise ValueError(
                    f"'{name}' of {checkpoint} and of {checkpoints[-1]} differ in shape: blend checkpoints of one captioner."
                )
        for name, value in mean.items():
            value += other[name] * (share / sum(shares))
    model.load_state_dict(own | mean)
    model.save_pretrained(out)
    hand_on(checkpoints[-1], out)
    (Path(out) / RECORD).write_text(json.dumps(blended(checkpoints, shares), indent=1) + "\n", encoding="utf-8")
    return Path(out)


def main() -> int:
    parser = argparse.ArgumentParser(description="Average the weights of checkpoints of one captioner.")
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--output", required=True)
    parser.add_argument("--shares", type=float, nargs="+", help="of each checkpoint in the mean, in any unit; default: equal ones")
    arguments = parser.parse_args()
    try:
        print(blend(arguments.checkpoints, arguments.output, arguments.shares))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
