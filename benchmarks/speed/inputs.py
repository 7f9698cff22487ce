"""The photographs and the exported folders that scripts measure.

This module does not import torch, because a script may measure the memory that torch needs.
"""

import importlib.util
import io
from pathlib import Path

from PIL import Image

EXAMPLES = ("chelsea.png", "coffee.png", "motorcycle_left.png", "astronaut.png", "rocket.jpg")  # of scikit-image


def find_photographs(folder: Path | None) -> list[Path]:
    """The photographs in a folder; by default the five of scikit-image that the README captions."""
    if folder is not None:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if not found:
            raise FileNotFoundError(f"The folder '{folder}' has no .jpg or .png files: name a folder of photographs.")
        return found
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise FileNotFoundError("The photographs of scikit-image are not installed: install `.[examples]`, or give --photographs.")
    return [Path(package.origin).parent / "data" / name for name in EXAMPLES]


def decode_image(photograph: bytes) -> Image.Image:
    """The RGB image of an image file."""
    return Image.open(io.BytesIO(photograph)).convert("RGB")


def exported_name(folder: Path) -> str:
    """The name of an exported captioner in the tables."""
    return f"exported, {folder.name}"
