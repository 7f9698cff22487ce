"""The photographs and the exported folders that scripts measure. It does not import torch, whose memory a script may measure."""

import importlib.util
import io
from pathlib import Path

from PIL import Image

EXAMPLES = ("chelsea.png", "coffee.png", "motorcycle_left.png", "astronaut.png", "rocket.jpg")  # of scikit-image


def photographs(folder: Path | None) -> list[Path]:
    """The photographs in a folder; by default the five of scikit-image that the README captions."""
    if folder is not None:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise FileNotFoundError("The photographs of scikit-image are not installed: install `.[examples]`, or give --photographs.")
    return [Path(package.origin).parent / "data" / name for name in EXAMPLES]


def decoded(photograph: bytes) -> Image.Image:
    return Image.open(io.BytesIO(photograph)).convert("RGB")


def exported_name(folder: Path) -> str:
    """The name of an exported captioner in the tables."""
    return f"exported, {folder.name}"
