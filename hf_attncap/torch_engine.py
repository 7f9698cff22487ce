"""Loads a checkpoint and generates captions with torch and transformers."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id
from PIL import Image
from torch.backends.mps import is_macos_or_newer
from transformers import AutoConfig, GenerationConfig

from .captions_attncap import generate_captions
from .checkpoint_checks import check_files, check_parts, check_weights
from .configuration_attncap import AttnCapConfig
from .engine import GeneratedCaptions, check_sampling, unknown_argument
from .importance import word_importance
from .modeling_attncap import AttnCapForConditionalGeneration
from .optimize import optimize_for_inference
from .processing_attncap import AttnCapProcessor
from .runtime import EXPORT_FILE, GRAPHS, is_export

try:  # huggingface_hub needs one of them
    from huggingface_hub.utils import httpx
except ImportError:
    import httpx  # pyright: ignore[reportMissingImports]

NAMING_HINT = "name a folder with a config.json, or a captioner on the Hub as owner/name"
# Arguments of `generate` beside the generation settings. The captioner sets those in OWN_ARGUMENTS itself.
FURTHER_ARGUMENTS = {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "repeatable_token_ids"}
OWN_ARGUMENTS = {
    "return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states",
}  # fmt: skip


def load_model(
    source: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    optimize: Literal["auto", False],
    compile: bool = False,
    **hub: Any,
) -> tuple[AttnCapForConditionalGeneration, AttnCapProcessor]:
    """The model and the processor of a folder or Hub repository; arguments and errors as in `Captioner.from_pretrained`.

    `hub` are its arguments for the Hub: `revision`, `token`, `cache_dir` and `local_files_only`.
    """
    if is_export(source):
        raise OSError(f"'{source}' is an export: give the checkpoint that it was made from.")
    if any(Path(source, f"{GRAPHS[-1]}.{ending}").is_file() for ending in ("onnx", "xml")):
        raise OSError(f"'{source}' has the graphs of an export, but no {EXPORT_FILE}: export the checkpoint again.")
    is_folder = os.path.isdir(source)
    if is_folder and hub.get("revision") is not None:
        raise ValueError(f"'{source}' is a folder, which has no revisions: leave `revision` out, or name a Hub repository.")
    if not is_folder:
        _check_repository(source)
    device = _check_device(device or _default_device())
    chosen: dict[str, Any] = {} if dtype is None else {"dtype": _check_dtype(dtype, device)}
    if device.type == "mps" and compile:
        raise ValueError("`compile=True` is not supported on MPS: leave it out, or give another `device`.")
    problem = None if is_folder or hub.get("local_files_only") else _hub_problem()
    hub = {name: value for name, value in hub.items() if value is not None}
    if problem:
        hub["local_files_only"] = True
    model: Any
    try:
        model, processor = _load_parts(source, is_folder, chosen, hub)
    except Exception as error:  # of any kind: the libraries expect other content of the files
        if is_folder:
            raise OSError(f"The folder '{source}' cannot be loaded as a captioner: {error}") from error
        # After the first line, the library gives hints that do not apply here.
        reason = str(error).partition("\n")[0] if isinstance(error, OSError) else str(error)
        if problem and isinstance(error, OSError):
            reason = f"it does not answer: {problem}; files are missing in the cache"
        raise OSError(
            f"'{source}' is not a folder and cannot be loaded from the Hub ({reason.rstrip('.')}): {NAMING_HINT}."
        ) from error
    processor.image_processor.warn_of_other_statistics(model.config)
    if optimize == "auto":
        model = optimize_for_inference(model, compile)
    # Convolutions of MPS are made for contiguous weights.
    model = model.to(device, memory_format=torch.contiguous_format) if device.type == "mps" else model.to(device)
    return model, processor


def _load_parts(source: str, is_folder: bool, chosen: dict[str, Any], hub: dict[str, Any]) -> tuple[Any, Any]:
    """Loads and checks model and processor; the error of a damaged file names it."""
    is_own = Path(source) == Path(__file__).parent / "checkpoint"  # the checks take 0.2 s
    if is_folder and not is_own:
        check_files(Path(source))
    with _naming("config.json", is_folder):
        config = AutoConfig.from_pretrained(source, **hub)
    if not isinstance(config, AttnCapConfig):
        raise ValueError(f"it is of type '{config.model_type}', not 'attncap'.")
    if is_folder and not is_own:
        check_weights(Path(source), config)
    with _naming("generation_config.json or the weights", is_folder):
        model: Any = AttnCapForConditionalGeneration.from_pretrained(source, config=config, use_safetensors=True, **chosen, **hub)
    with _naming("tokenizer.json, tokenizer_config.json or processor_config.json", is_folder):
        processor: Any = AttnCapProcessor.from_pretrained(source, **hub)
    if not is_own:
        check_parts(model, processor)
    return model, processor


@contextmanager
def _naming(files: str, is_folder: bool) -> Iterator[None]:
    """Adds the names of the files and a way out to errors, except to those of the Hub about a missing file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and not is_folder:
            raise
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise ValueError(f"{files} cannot be used ({reason}): correct the value, or copy or download the file again.") from error


def _check_repository(name: str) -> None:
    """Raises a FileNotFoundError for a name that no repository of a captioner can have: these have an owner."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(f"'{name}' is not a folder: {NAMING_HINT}.") from None
    if "/" not in name:
        raise FileNotFoundError(f"There is no folder '{name}', and a name on the Hub has an owner: {NAMING_HINT}.")


def _hub_problem() -> str | None:
    """Why the Hub cannot be reached, after a single attempt; None if it answers.

    The library would try again for half a minute, for each file.
    """
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except httpx.TransportError as error:
        return str(error) or type(error).__name__
    return None


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _check_dtype(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise ValueError(f"`dtype` is {dtype!r}: give 'float32', 'bfloat16' or 'float16'. For int8, use `attncap export`.")
    if device.type == "mps" and (known == torch.float64 or (known == torch.bfloat16 and not is_macos_or_newer(14, 0))):
        raise ValueError(f"`dtype` is {dtype!r}, which MPS does not support on this Mac: give 'float32' or 'float16'.")
    return dtype


def _check_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"The device '{device}' cannot be used ({reason}): leave it out or give 'cpu'.") from error


@cache
def _generate_arguments() -> set[str]:
    return {name for name in GenerationConfig().to_dict() if not name.startswith("_")} | FURTHER_ARGUMENTS


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

    @property
    def scale(self) -> None:
        return None  # torchvision resizes to other values than Pillow

    def check_arguments(self, num_beams: int, generate_kwargs: Mapping[str, Any]) -> None:
        known = _generate_arguments()
        for name in generate_kwargs:
            if name in OWN_ARGUMENTS:
                raise ValueError(f"`{name}` is an argument of `generate` that the captioner sets itself: leave it out.")
            if name not in known:
                raise ValueError(unknown_argument(name, known))
        check_sampling(generate_kwargs, bool(self.model.generation_config.do_sample))

    def try_settings(self, **settings: Any) -> None:
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the captions that follow are sampled as if this had not run
            self.generate([Image.new("RGB", (8, 8))], **{**settings, "explain": False, "attention": False})

    @torch.inference_mode()
    def generate(
        self,
        images: list[Image.Image],
        prompt: str | None,
        num_beams: int,
        num_return_sequences: int,
        explain: bool,
        attention: bool = True,
        **generate_kwargs: Any,
    ) -> GeneratedCaptions:
        inputs = self.processor(images=images, text=prompt, return_tensors="pt").to(self.model.device)
        encoded = self.model.get_encoder()(inputs.pop("pixel_values"))  # (B, N, C)
        found = generate_captions(
            self.model,
            **inputs,
            encoder_outputs=encoded,
            output_attentions=attention,
            num_beams=num_beams,
            num_return_sequences=num_return_sequences,
            tokenizer=self.tokenizer,
            **generate_kwargs,
        )
        importance = word_importance(self.model, found["sequences"][:, 0], encoded) if explain else None  # (B, T, H, W)
        maps, weights = found["attention"], found["word_attention"]
        return GeneratedCaptions(
            sequences=found["sequences"].cpu().numpy(),
            # numpy has no bfloat16, and MPS has no float64
            **{name: found[name].float().cpu().numpy().astype(np.float64) for name in ("scores", "lowest", "entropy")},
            attention=None if maps is None else maps.float().cpu().numpy(),
            word_attention=None if weights is None else weights.float().cpu().numpy(),
            importance=None if importance is None else importance.cpu().numpy(),
        )
