"""The maps of a frozen backbone, computed once and kept on disk in half precision."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

BATCH = 32


def cached_features(encoder, image_processor, dataset: Dataset, folder: str) -> np.ndarray:
    """The backbone's maps of all images, (images, D, h, w) float16, memory-mapped.

    Kept under a name made of the backbone's weights, the image processing and the dataset, so that another of these never
    finds a stale file. A file appears under its name only when it is whole.

    Raises:
        ValueError: if a map does not fit half precision.
    """
    path = Path(folder) / f"{_fingerprint(encoder.backbone, image_processor, dataset)}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        _compute(encoder, image_processor, dataset, partial)
        partial.replace(path)
    return np.load(path, mmap_mode="r")


def _fingerprint(backbone: torch.nn.Module, image_processor, dataset: Dataset) -> str:
    digest = hashlib.sha256(json.dumps(image_processor.to_dict(), sort_keys=True, default=str).encode())
    digest.update(dataset._fingerprint.encode())
    digest.update(str(backbone).encode())  # padding is not among the weights
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()[:32]


@torch.inference_mode()
def _compute(encoder, image_processor, dataset: Dataset, path: Path) -> None:
    maps = None
    encoder.eval()
    device = next(encoder.parameters()).device
    for start in tqdm(range(0, len(dataset), BATCH), desc="backbone features", mininterval=10):
        images = dataset[start : start + BATCH]["image"]
        pixel_values = image_processor(images, return_tensors="pt")["pixel_values"].to(device)  # (B, 3, height, width)
        features = encoder.features(pixel_values)  # (B, D, h, w)
        if not features.abs().max() < torch.finfo(torch.float16).max:
            raise ValueError(
                f"The backbone's map of images {start} to {start + len(images) - 1} does not fit half precision: train "
                "without `feature_cache`."
            )
        if maps is None:
            shape = (len(dataset), *features.shape[1:])
            maps = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        maps[start : start + len(images)] = features.half().cpu().numpy()
    if maps is not None:
        maps.flush()
