"""`attncap pack`: a trained checkpoint with its weights in half precision, for shipping."""

import json
from pathlib import Path
from typing import Any

import torch

from hf_attncap import Captioner
from hf_attncap.atomic import atomic_folder, refuse_occupied

from .record import hand_on


def pack(checkpoint: str | Path, out: str | Path, generation: dict[str, Any] | None = None) -> Path:
    """Write model and processor to `out`, weights in float16 (half the size), the config saying float32; the record goes along.

    `generation` are settings that replace those of the checkpoint's `generation_config.json`; they remove a calibrated confidence.

    Loaded again the model is in float32, as fine-tuning needs; transformers takes the dtype from the config.

    Raises:
        ValueError: if a weight does not fit float16, or generation has no such setting.
        FileExistsError: `out` is there already and is not an empty folder, such as the checkpoint's own.
        OSError: the checkpoint cannot be loaded.
    """
    refuse_occupied(out)
    model: Any = Captioner.from_pretrained(checkpoint, device="cpu", dtype="float32").model
    largest = torch.finfo(torch.float16).max
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.abs().max() <= largest:
            raise ValueError(f"'{name}' in {checkpoint} has values beyond float16, up to {tensor.abs().max():.3g}.")
    if unknown := model.generation_config.update(**(generation or {})):
        raise ValueError(f"There are no such settings of generation: {', '.join(unknown)}.")
    if generation:
        model.config.confidence = None  # it was fitted to the captions of the checkpoint's own settings
    with atomic_folder(out) as folder:
        model.half().save_pretrained(folder)
        hand_on(checkpoint, folder)
        config = folder / "config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    return Path(out)
