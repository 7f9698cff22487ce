"""`attncap pack`: store the weights of a checkpoint in half precision."""

import json
from pathlib import Path
from typing import Any

import torch

from hf_attncap.atomic import atomic_folder, refuse_occupied
from hf_attncap.torch_engine import load_model

from .record import copy_metadata


def pack(checkpoint: str | Path, out: str | Path, generation: dict[str, Any] | None = None) -> Path:
    """Write a copy of a checkpoint to `out` with weights in float16, which halves its size. The training record is copied too.

    transformers takes the dtype from the configuration, which says float32, so the model still loads in float32 for fine-tuning.

    Args:
        checkpoint: folder or Hub name of a captioner.
        out: the folder to create.
        generation: settings that replace those of `generation_config.json`. They remove the calibrated confidence.

    Raises:
        ValueError: a weight does not fit float16, or a generation setting does not exist.
        FileExistsError: `out` exists and is not an empty folder.
        OSError: the checkpoint cannot be loaded.
    """
    refuse_occupied(out)
    model: Any = load_model(str(checkpoint), "cpu", "float32", optimize=False)[0]
    largest = torch.finfo(torch.float16).max
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.abs().max() <= largest:
            raise ValueError(f"'{name}' in {checkpoint} has values up to {tensor.abs().max():.3g}, which do not fit float16.")
    if unknown := model.generation_config.update(**(generation or {})):
        raise ValueError(f"Unknown generation settings: {', '.join(unknown)}.")
    if generation:
        model.config.confidence = None  # it was calibrated for captions with the old settings
    with atomic_folder(out) as folder:
        model.half().save_pretrained(folder)
        copy_metadata(checkpoint, folder)
        config = folder / "config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    return Path(out)
