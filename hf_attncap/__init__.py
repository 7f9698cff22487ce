"""hf_attncap: a small image captioner with visible attention, for transformers.

Importing this package and transformers, in either order, registers the captioner with transformers' Auto classes and `pipeline`.
The package does not import transformers itself: `attncap --help` and `hf_attncap.metrics` need neither transformers nor torch.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .captioner import Captioner, CaptionResult
    from .configuration_attncap import AttnCapConfig
    from .image_files_attncap import ImageError
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
    "ImageError": "image_files_attncap",
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
    "ImageError",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_attncap' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


def register() -> None:
    """Registers the captioner with transformers' Auto classes and `pipeline`; a second call changes nothing."""
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


class _RegistrationFinder:
    """An import hook that calls `register` once transformers has been imported.

    It wraps the loaders of transformers and of this package's modules. `register` runs after the outermost of these imports,
    because some classes are not defined earlier.
    """

    running = 0

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "transformers" and not name.startswith(f"{__name__}."):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            self._wrap(spec.loader)
        return spec

    def _wrap(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self.running += 1
            try:
                execute(module)
            finally:
                self.running -= 1
            if not self.running and "transformers" in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                register()

        loader.exec_module = exec_module


if "transformers" in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _RegistrationFinder())
