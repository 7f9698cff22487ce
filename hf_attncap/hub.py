"""Exports a checkpoint to a folder for the Hugging Face Hub with remote code, which loads without this package."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .atomic import atomic_folder
from .configuration_attncap import AttnCapConfig

CODE = Path(__file__).parent
MODEL_CLASSES = {
    "AutoConfig": "configuration_attncap.AttnCapConfig",
    "AutoModel": "modeling_attncap.AttnCapModel",
    "AutoModelForImageTextToText": "modeling_attncap.AttnCapForConditionalGeneration",
}
IMAGE_PROCESSOR_CLASS = {"AutoImageProcessor": "image_processing_attncap.AttnCapImageProcessor"}
PROCESSOR_CLASS = {"AutoProcessor": "processing_attncap.AttnCapProcessor"}
# With exactly one entry, `pipeline(model=...)` needs no task.
CUSTOM_PIPELINES = {
    "image-to-text": {
        "impl": "pipeline_attncap.AttnCapPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}
REQUIRED = {
    "config.json": "the configuration",
    "processor_config.json": "the processor",
    "tokenizer.json": "the tokenizer",
    "model*.safetensors": "the weights",
}
# Files that the package writes beside model and processor; the card is rendered from them.
RESULTS, POINTING, RECORD, ABOUT = "results.json", "pointing.json", "training.json", "about.yaml"
CALIBRATION, CALIBRATION_CHART = "calibration.json", "calibration.jpg"
COPIED = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    RESULTS,
    POINTING,
    CALIBRATION,
    CALIBRATION_CHART,
    RECORD,
    ABOUT,
    "picture_*.jpg",
)
# `save_pretrained` of a model with remote code copies the files that the model's file imports. This adds the pipeline to them.
PIPELINE_IMPORT = """

from typing import TYPE_CHECKING  # noqa: E402

if TYPE_CHECKING:
    from .pipeline_attncap import AttnCapPipeline  # noqa: F401
"""


def export_to_hub(checkpoint: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Writes a folder that can be pushed to the Hub.

    `pipeline("image-to-text", model=out, trust_remote_code=True)` and the Auto classes load it without this package. If the package
    is installed, its own classes are used. The checkpoint is not changed. Optimizer states and logs are not copied.

    Args:
        checkpoint: a folder with a saved model and its processor.
        out: the folder to write; it must not exist or be empty. It is written atomically.

    Returns:
        `out` as a path.

    Raises:
        FileNotFoundError: `checkpoint` is not a folder, or lacks the configuration, weights, processor or tokenizer.
        FileExistsError: `out` exists and is not an empty folder.
        ValueError: `checkpoint` holds another kind of model.
    """
    source, target = Path(checkpoint), Path(out)
    config = checked_config(source)
    processor = _read(source / "processor_config.json")
    processor["auto_map"] = PROCESSOR_CLASS
    processor["image_processor"] = {**processor["image_processor"], "auto_map": IMAGE_PROCESSOR_CLASS}
    with atomic_folder(target) as folder:
        for file in [
            *(path for pattern in COPIED for path in source.glob(pattern)),
            *CODE.glob("*_attncap.py"),
        ]:
            shutil.copyfile(file, folder / file.name)
        with (folder / "modeling_attncap.py").open("a", encoding="utf-8") as modeling:
            modeling.write(PIPELINE_IMPORT)
        _write(
            folder / "config.json",
            {**config, "auto_map": MODEL_CLASSES, "custom_pipelines": CUSTOM_PIPELINES},
        )
        _write(folder / "processor_config.json", processor)
    return target


def checked_config(source: Path) -> dict[str, Any]:
    """The checkpoint's configuration; raises if it is not a captioner or a file is missing."""
    if not source.is_dir():
        raise FileNotFoundError(f"'{source}' is not a folder: name the folder of a saved model and its processor.")
    config = _read(source / "config.json") if (source / "config.json").is_file() else {}
    kind = config.get("model_type", AttnCapConfig.model_type)
    if kind != AttnCapConfig.model_type:
        raise ValueError(f"'{source}' holds a model of type '{kind}': only '{AttnCapConfig.model_type}' can be exported.")
    missing = [f"{what} ({pattern})" for pattern, what in REQUIRED.items() if not any(source.glob(pattern))]
    if missing:
        raise FileNotFoundError(
            f"'{source}' lacks {', '.join(missing)}: save the model and its processor there with `save_pretrained`."
        )
    return config


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


__all__ = ["export_to_hub"]
