"""`attncap average`: average the weights of several checkpoints of one captioner."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_attncap.atomic import atomic_folder, refuse_occupied, write_json
from hf_attncap.hub import RECORD
from hf_attncap.torch_engine import load_model

from .record import averaged_record, copy_metadata


def average_checkpoints(checkpoints: Sequence[str | Path], out: str | Path, weights: Sequence[float] | None = None) -> Path:
    """Write the weighted mean of the checkpoints' parameters to `out`, with the processor and the settings of the last one.

    Useful for a checkpoint and checkpoints that were fine-tuned from it: the average often overfits less than each of them
    (Wortsman et al., 2022, "Robust fine-tuning of zero-shot models" and "Model soups").

    Args:
        checkpoints: folders or Hub names of checkpoints of one captioner.
        out: the folder to create.
        weights: the weight of each checkpoint in the mean, in any unit. Default: equal weights. Choose them on validation images.

    Raises:
        ValueError: the number of weights differs from that of the checkpoints, one is not positive, or the parameters differ in
            name or shape.
        FileExistsError: `out` exists and is not an empty folder.
        OSError: a checkpoint cannot be loaded.
    """
    weights = [1.0] * len(checkpoints) if weights is None else weights
    if len(weights) != len(checkpoints) or not all(0 < weight < math.inf for weight in weights):
        given = ", ".join(f"{weight:g}" for weight in weights)
        raise ValueError(f"The weights are {given}: give {len(checkpoints)} finite weights above 0, one for each checkpoint.")
    refuse_occupied(out)
    model = _load(checkpoints[-1])
    own = model.state_dict()
    mean = {name: value * (weights[-1] / sum(weights)) for name, value in own.items() if value.is_floating_point()}
    for checkpoint, weight in zip(checkpoints[:-1], weights):
        other = _load(checkpoint).state_dict()
        for name in own.keys() | other.keys():
            if name not in own or name not in other or own[name].shape != other[name].shape:
                raise ValueError(
                    f"{checkpoint} and {checkpoints[-1]} differ in the shape of '{name}': average checkpoints of one captioner."
                )
        for name, value in mean.items():
            value += other[name] * (weight / sum(weights))
    model.load_state_dict(own | mean)
    model.config.confidence = None  # it was calibrated for the weights of the last checkpoint
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        copy_metadata(checkpoints[-1], folder)
        write_json(folder / RECORD, averaged_record(checkpoints, weights))
    return Path(out)


def _load(checkpoint: str | Path) -> Any:
    return load_model(str(checkpoint), "cpu", "float32", optimize=False)[0]
