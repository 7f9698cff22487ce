"""Loads a checkpoint and generates captions with torch and transformers."""

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig

from .captions_attncap import generate_captions
from .configuration_attncap import AttnCapConfig
from .engine import GeneratedCaptions
from .importance import word_importance
from .modeling_attncap import AttnCapForConditionalGeneration
from .optimize import optimize_for_inference
from .processing_attncap import AttnCapProcessor
from .runtime import is_export

NAMING_HINT = "name a folder with a config.json, or a captioner on the Hub as owner/name"


def load_model(
    source: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    optimize: Literal["auto", False],
    compile: bool = False,
) -> tuple[AttnCapForConditionalGeneration, AttnCapProcessor]:
    """The model and the processor of a folder or Hub repository; arguments and errors as in `Captioner.from_pretrained`."""
    if is_export(source):
        raise OSError(f"'{source}' is an export: give the checkpoint that it was made from.")
    is_folder = os.path.isdir(source)
    if not is_folder:
        try:
            validate_repo_id(source)
        except HFValidationError:
            raise FileNotFoundError(f"'{source}' is not a folder: {NAMING_HINT}.") from None
    device = _check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen: dict[str, Any] = {} if dtype is None else {"dtype": _check_dtype(dtype)}
    try:
        config = AutoConfig.from_pretrained(source)
        if not isinstance(config, AttnCapConfig):
            raise ValueError(f"it is of type '{config.model_type}', not 'attncap'.")
        model: Any = AttnCapForConditionalGeneration.from_pretrained(source, config=config, **chosen)
        processor: Any = AttnCapProcessor.from_pretrained(source)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        if is_folder:
            raise OSError(f"The folder '{source}' cannot be loaded as a captioner: {error}") from error
        # After the first line, the library gives hints that do not apply here.
        reason = str(error).partition("\n")[0] if isinstance(error, OSError) else str(error)
        raise OSError(
            f"'{source}' is not a folder and cannot be loaded from the Hub ({reason.rstrip('.')}): {NAMING_HINT}."
        ) from error
    processor.image_processor.warn_of_other_statistics(config)
    if optimize == "auto":
        model = optimize_for_inference(model, compile)
    return model.to(device), processor


def _check_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise ValueError(f"`dtype` is {dtype!r}: give 'float32', 'bfloat16' or 'float16'. For int8, use `attncap export`.")
    return dtype


def _check_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"The device '{device}' cannot be used ({reason}): leave it out or give 'cpu'.") from error


@dataclass
class TorchEngine:
    """The `Engine` of a model of transformers."""

    model: AttnCapForConditionalGeneration
    processor: AttnCapProcessor

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def default_beams(self) -> int:
        return self.model.generation_config.num_beams or 1

    @property
    def calibration(self) -> dict[str, Any] | None:
        return self.model.config.confidence

    @property
    def word_attention(self) -> str:
        return self.model.config.word_attention

    @torch.inference_mode()
    def generate(
        self, images: list[Image.Image], prompt: str | None, num_beams: int, num_return_sequences: int, explain: bool
    ) -> GeneratedCaptions:
        inputs = self.processor(images=images, text=prompt, return_tensors="pt").to(self.model.device)
        encoded = self.model.get_encoder()(inputs.pop("pixel_values"))  # (B, N, C)
        found = generate_captions(
            self.model,
            **inputs,
            encoder_outputs=encoded,
            output_attentions=True,
            num_beams=num_beams,
            num_return_sequences=num_return_sequences,
        )
        weights = found["word_attention"]
        importance = word_importance(self.model, found["sequences"][:, 0], encoded) if explain else None  # (B, T, H, W)
        return GeneratedCaptions(
            sequences=found["sequences"].cpu().numpy(),
            **{name: found[name].double().cpu().numpy() for name in ("scores", "lowest", "entropy")},  # numpy has no bfloat16
            attention=found["attention"].float().cpu().numpy(),
            word_attention=None if weights is None else weights.float().cpu().numpy(),
            importance=None if importance is None else importance.cpu().numpy(),
        )
