"""Checks of an untrusted checkpoint: its files before they are loaded, and model and processor before they are used.

transformers itself initialises weights that are missing or do not fit randomly, and allocates memory for any sizes in a config.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .configuration_attncap import AttnCapConfig
from .modeling_attncap import AttnCapForConditionalGeneration
from .processing_attncap import AttnCapProcessor

AGAIN = "copy or download it again"
SAVE = "save the model and its processor there with `save_pretrained`"
JSON_FILES = ("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json")
JSON_FILES += ("tokenizer_config.json", "special_tokens_map.json", "model.safetensors.index.json")
REQUIRED = (("config.json",), ("processor_config.json", "preprocessor_config.json"), ("tokenizer.json",))
MAX_SIDE = 4096  # of the images that the model sees
MAX_GRID = 1024
# The lowest and highest default values of generation. Callers may ask for more.
LIMITS = {
    "num_beams": (1, 256), "num_return_sequences": (1, 256), "max_new_tokens": (1, 10_000), "max_length": (1, 10_000),
    "min_length": (0, 10_000), "min_new_tokens": (0, 10_000), "no_repeat_ngram_size": (0, 10_000),
}  # fmt: skip
NUMBERS = ("length_penalty", "temperature", "top_p", "repetition_penalty")
TOKENS = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens")
TOKENS += ("forced_bos_token_id", "forced_eos_token_id", "repeatable_token_ids")


def check_files(folder: Path) -> None:
    """Checks that the files of a checkpoint exist, and that its JSON files contain objects.

    Raises:
        ValueError: names the file and says what to do.
    """
    for names in REQUIRED:
        if not any((folder / name).is_file() for name in names):
            raise ValueError(f"{names[0]} is missing: {SAVE}.")
    if not any(folder.glob("model*.safetensors")):
        raise ValueError(f"model.safetensors is missing, and other kinds of weights are not read: {SAVE}.")
    for path in (folder / name for name in JSON_FILES):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path.name} is not JSON ({error}): {AGAIN}.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path.name} holds a {type(content).__name__}, not a JSON object: {AGAIN}.")


def check_weights(folder: Path, config: AttnCapConfig) -> None:
    """Compares the weights in a folder with those of the config's model, without reading or allocating any.

    Raises:
        ValueError: names the file and the weights, and says what to do.
    """
    if not (config.dtype is None or isinstance(config.dtype, torch.dtype)):
        raise ValueError(f"config.json: `dtype` is {config.dtype!r:.40}, which torch does not have: set it to 'float32'.")
    try:
        with torch.device("meta"):
            model = AttnCapForConditionalGeneration(config)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]  # torch adds a trace
        raise ValueError(f"config.json: there is no model of these sizes ({reason:.200}): {AGAIN}.") from error
    expected = model.state_dict()
    found: dict[str, tuple[str, list[int], str]] = {}  # file, shape and dtype by name
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118, which is no dictionary
                    part = weights.get_slice(name)
                    found[name] = path.name, part.get_shape(), part.get_dtype()
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path.name} is damaged or truncated ({error}): {AGAIN}.") from error
    files = ", ".join(sorted({file for file, _, _ in found.values()}))
    for name, (file, shape, dtype) in found.items():
        if name in expected and list(expected[name].shape) != shape:
            raise ValueError(
                f"{file} has `{name}` of the shape {tuple(shape)}, but the config needs {tuple(expected[name].shape)}: use the "
                "config.json that belongs to these weights."
            )
        if name in expected and expected[name].is_floating_point() and not dtype.startswith(("F", "BF")):
            raise ValueError(f"{file} has `{name}` of the type {dtype}, which is not a floating-point type: {AGAIN}.")
    missing = sorted(set(expected) - set(found) - set(model.all_tied_weights_keys))
    extra = sorted(set(found) - set(expected))
    for names, problem in ((missing, "lacks"), (extra, "also has")):
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"{files} {problem} the weights {listed}: use the config.json that belongs to these weights.")


def check_parts(model: AttnCapForConditionalGeneration, processor: AttnCapProcessor) -> None:
    """Checks that the weights are finite, that tokenizer and model match, and that the settings are in range.

    Raises:
        ValueError: names the file and says what to do.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"model.safetensors has values in `{name}` that are not finite: use weights of an earlier training step."
            )
    config = model.config
    grid = [config.grid_size] if isinstance(config.grid_size, int) else config.grid_size or []
    if max(grid, default=0) > MAX_GRID:
        raise ValueError(f"config.json: `grid_size` is {config.grid_size}: set it to at most {MAX_GRID}.")
    _check_tokenizer(config, processor.tokenizer)
    _check_image_processor(processor.image_processor)
    _check_generation(model)


def _check_tokenizer(config: AttnCapConfig, tokenizer: Any) -> None:
    V = config.vocab_size
    if len(tokenizer) != V or max(tokenizer.get_vocab().values(), default=0) >= V:
        raise ValueError(
            f"tokenizer.json has {len(tokenizer)} tokens, but the model has {V}: use the tokenizer that the model was trained with."
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for name, ids in (("pad_token_id", [config.pad_token_id]), ("eos_token_id", ends)):
        own = getattr(tokenizer, name)
        if own is not None and own not in ids and ids != [None]:
            raise ValueError(
                f"tokenizer.json: `{name}` is {own}, but {ids[0]} in config.json: use the tokenizer of the training run."
            )


def _check_image_processor(image_processor: Any) -> None:
    size = dict(image_processor.size)
    sides: list[Any] = [size.get("height"), size.get("width")]
    if image_processor.do_resize and not all(_is_number(side) and 1 <= side <= MAX_SIDE for side in sides):
        raise ValueError(
            f"processor_config.json: `size` is {sides[0]} x {sides[1]}: set `height` and `width` to values from 1 to {MAX_SIDE}."
        )
    for name in ("image_mean", "image_std"):
        values = getattr(image_processor, name)
        values = list(values) if isinstance(values, (list, tuple)) else [values]
        if not all(_is_number(value) and (name == "image_mean" or value > 0) for value in values):
            raise ValueError(f"processor_config.json: `{name}` is {values}: set it to that of the model's config.")


def _check_generation(model: AttnCapForConditionalGeneration) -> None:
    settings, V = model.generation_config, model.config.vocab_size
    for name, (low, high) in LIMITS.items():
        value = getattr(settings, name, None)
        if value is not None and not (isinstance(value, int) and low <= value <= high):
            raise ValueError(f"generation_config.json: `{name}` is {value!r:.40}: set it to a whole number from {low} to {high}.")
    for name in NUMBERS:
        value = getattr(settings, name, None)
        if value is not None and not _is_number(value):
            raise ValueError(f"generation_config.json: `{name}` is {value!r:.40}: set it to a number.")
    for name in TOKENS:
        value = getattr(settings, name, None)
        ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if not all(isinstance(token, int) and 0 <= token < V for token in ids):
            raise ValueError(f"generation_config.json: `{name}` is {value!r:.40}: set it to ids from 0 to {V - 1}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


__all__ = ["check_files", "check_parts", "check_weights"]
