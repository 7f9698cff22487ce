"""Writes the folder of a Hugging Face Space that runs the demo."""

import json
import os
import re
import shutil
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from .atomic import atomic_folder
from .demo import TITLE, import_gradio
from .hub import COPIED, checked_config
from .runtime import EXPORT_FILE, is_export

PACKAGE = Path(__file__).parent
CHECKPOINT = "checkpoint"  # a folder in the Space
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
EXPORTED = ("*.json", "*.onnx", "*.onnx.data", "*.xml", "*.bin")
ONLY_TORCH = ("torch", "torchvision", "transformers", "safetensors")
LICENCE = ("license", "license_name", "license_link")
README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
pinned: false
{licence}---

# {title}

This Space is for everyone who wants to see what the captioner does: drop a picture, read its caption, and point at a word to see
which regions it comes from. It runs the model `{checkpoint}` with the code in `hf_attncap`. Uploads are deleted after a few
minutes.
"""
APP = '''"""The demo of hf_attncap."""

{imports}from hf_attncap import Captioner
from hf_attncap.demo import build_demo, launch_demo

captioner = Captioner.from_pretrained({model})
demo = build_demo(captioner)

if __name__ == "__main__":
    launch_demo(demo, host="0.0.0.0")
    demo.block_thread()
'''
PYTHON = "3.12"


def export_space(checkpoint: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Writes a folder that can be pushed to a Space of the Hub: `README.md`, `app.py`, `requirements.txt`, the code and the model.

    Args:
        checkpoint: a folder of a saved model, or a folder that `attncap export` wrote; it is copied. Or the name of a Hub
            repository, such as "user/model"; the Space then loads it from the Hub.
        out: the folder to write; it must not exist or be empty. It is written atomically.

    Returns:
        `out` as a path.

    Raises:
        FileNotFoundError: `checkpoint` is neither a folder nor such a name, or a file of the model is missing.
        FileExistsError: `out` exists and is not an empty folder.
        ValueError: `checkpoint` holds another kind of model.
        ImportError: gradio is not installed.
    """
    name, source = str(checkpoint), Path(checkpoint)
    if not source.is_dir() and not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"'{name}' is neither a folder nor the name of a Hub repository, such as user/model.")
    exported = is_export(name)
    if source.is_dir() and not exported:
        checked_config(source)
    with atomic_folder(out) as folder:
        if source.is_dir():
            (folder / CHECKPOINT).mkdir()
            patterns = EXPORTED if exported else (*COPIED, "config.json", "processor_config.json")
            for file in {file for pattern in patterns for file in source.glob(pattern)}:
                shutil.copyfile(file, folder / CHECKPOINT / file.name)
        shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=_not_code)
        model = f'Path(__file__).parent / "{CHECKPOINT}"' if source.is_dir() else repr(name)
        imports = "from pathlib import Path\n\n" if source.is_dir() else ""
        (folder / "app.py").write_text(APP.format(model=model, imports=imports), encoding="utf-8")
        (folder / "requirements.txt").write_text(
            "".join(f"{line}\n" for line in _requirements(source if exported else None)), encoding="utf-8"
        )
        readme = README.format(
            title=TITLE,
            gradio=import_gradio().__version__,
            python=PYTHON,
            licence=_licence(source),
            checkpoint=CHECKPOINT if source.is_dir() else name,
        )
        (folder / "README.md").write_text(readme, encoding="utf-8")
    return Path(out)


def _not_code(folder: str, names: list[str]) -> set[str]:
    """The parts of the package that a Space does not need: the released checkpoint and compiled files."""
    return {name for name in names if name in ("__pycache__", "checkpoint") and (Path(folder) / name).is_dir()}


def _requirements(export: Path | None) -> list[str]:
    """The packages of the demo, without gradio, whose version the README names."""
    needed = [line for line in requires(PACKAGE.name) or [] if "extra ==" not in line]
    if export is None:
        return needed
    runtime = {"onnx": "onnxruntime", "openvino": "openvino"}[
        json.loads((export / EXPORT_FILE).read_text(encoding="utf-8"))["format"]
    ]
    return [line for line in needed if re.split(r"[^\w-]", line)[0] not in ONLY_TORCH] + [runtime]


def _licence(source: Path) -> str:
    """The licence fields of the checkpoint's card, as lines of YAML."""
    card: dict[str, Any] = (metadata_load(source / "README.md") or {}) if (source / "README.md").is_file() else {}
    return "".join(f"{field}: {json.dumps(card[field])}\n" for field in LICENCE if card.get(field))
