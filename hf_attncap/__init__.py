"""hf_attncap: a small image captioner that shows where it looked, at home in transformers.

Importing the package registers its classes with transformers' Auto classes.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .captioner import Captioner, CaptionResult
    from .configuration_attncap import AttnCapConfig
    from .image_processing_attncap import AttnCapImageProcessor
    from .modeling_attncap import AttnCapForConditionalGeneration, AttnCapModel
    from .pipeline_attncap import AttnCapPipeline
    from .processing_attncap import AttnCapProcessor

__version__ = "0.1.0"

_HOMES = {
    "AttnCapConfig": "configuration_attncap",
    "AttnCapForConditionalGeneration": "modeling_attncap",
    "AttnCapImageProcessor": "image_processing_attncap",
    "AttnCapModel": "modeling_attncap",
    "AttnCapPipeline": "pipeline_attncap",
    "AttnCapProcessor": "processing_attncap",
    "CaptionResult": "captioner",
    "Captioner": "captioner",
}

__all__ = [
    "AttnCapConfig",
    "AttnCapForConditionalGeneration",
    "AttnCapImageProcessor",
    "AttnCapModel",
    "AttnCapPipeline",
    "AttnCapProcessor",
    "CaptionResult",
    "Captioner",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_attncap' has no attribute '{name}'")
    register()
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


def register() -> None:
    """Make transformers' Auto classes and `pipeline` know the captioner; harmless when repeated."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoProcessor,
    )
    from transformers.pipelines import PIPELINE_REGISTRY

    from .configuration_attncap import AttnCapConfig
    from .image_processing_attncap import AttnCapImageProcessor
    from .modeling_attncap import AttnCapForConditionalGeneration, AttnCapModel
    from .pipeline_attncap import AttnCapPipeline
    from .processing_attncap import AttnCapProcessor

    AutoConfig.register("attncap", AttnCapConfig, exist_ok=True)
    AutoModel.register(AttnCapConfig, AttnCapModel, exist_ok=True)
    AutoModelForImageTextToText.register(AttnCapConfig, AttnCapForConditionalGeneration, exist_ok=True)
    image_processors: dict[str, type] = {"torchvision": AttnCapImageProcessor}
    AutoImageProcessor.register(AttnCapConfig, image_processor_classes=image_processors, exist_ok=True)
    AutoProcessor.register(AttnCapConfig, AttnCapProcessor, exist_ok=True)
    if "image-captioning" not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            "image-captioning",
            pipeline_class=AttnCapPipeline,
            pt_model=AutoModelForImageTextToText,
            type="multimodal",
        )


# The Auto classes import torch, which takes seconds: `attncap --help` and what needs no model must not wait for it.
if Path(sys.argv[0]).stem != "attncap" and not (sys.argv[0] == "-m" and "hf_attncap" in sys.orig_argv):
    register()
