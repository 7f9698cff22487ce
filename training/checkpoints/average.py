"""`attncap average`: the mean of the weights of checkpoints of one captioner."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_attncap import Captioner
from hf_attncap.atomic import atomic_folder, refuse_occupied

from .record import RECORD, blended, hand_on


def blend(checkpoints: Sequence[str | Path], out: str | Path, shares: Sequence[float] | None = None) -> Path:
    """Write the mean of the weights of checkpoints to `out`, with the processor and the settings of the last.

    Worth a try where they learned on from the same one: between what they began with and what they came to often lies a captioner
    that overfits less than any and knows more (Wortsman et al., 2022, "Robust fine-tuning of zero-shot models" and "Model soups").

    Args:
        shares: of each in the mean, in any unit; `None` for equal ones. Choose them on validation images.

    Raises:
        ValueError: if there are not as many shares as checkpoints, one is not positive, or weights differ; the first is named.
        FileExistsError: `out` is there already and is not an empty folder.
        OSError: a checkpoint cannot be loaded.
    """
    shares = [1.0] * len(checkpoints) if shares is None else shares
    if len(shares) != len(checkpoints) or not all(0 < share < math.inf for share in shares):
        given = ", ".join(f"{share:g}" for share in shares)
        raise ValueError(f"The shares are {given}: give {len(checkpoints)} finite ones above 0, one for each checkpoint.")
    refuse_occupied(out)
    model = _load(checkpoints[-1])
    own = model.state_dict()
    mean = {name: value * (shares[-1] / sum(shares)) for name, value in own.items() if value.is_floating_point()}
    for checkpoint, share in zip(checkpoints[:-1], shares):
        other = _load(checkpoint).state_dict()
        for name in own.keys() | other.keys():
            if name not in own or name not in other or own[name].shape != other[name].shape:
                raise ValueError(
                    f"'{name}' of {checkpoint} and of {checkpoints[-1]} differ in shape: blend checkpoints of one captioner."
                )
        for name, value in mean.items():
            value += other[name] * (share / sum(shares))
    model.load_state_dict(own | mean)
    model.config.confidence = None  # it was fitted to the weights of the last
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        hand_on(checkpoints[-1], folder)
        (folder / RECORD).write_text(json.dumps(blended(checkpoints, shares), indent=1) + "\n", encoding="utf-8")
    return Path(out)


def _load(checkpoint: str | Path) -> Any:
    return Captioner.from_pretrained(checkpoint, device="cpu", dtype="float32").model
