"""Exports a checkpoint to a folder that runs without torch and transformers, with ONNX Runtime or OpenVINO."""

import contextlib
import dataclasses
import importlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import __version__
from .atomic import atomic_folder, refuse_occupied, write_json
from .export_graphs import write_onnx
from .export_web import check_page, read_runtime, write_page
from .export_weights import store_as_float16, store_as_int8
from .images import load_image
from .numpy_search import SearchSettings
from .runtime import EXPORT_FILE, EXPORT_VERSION, GRAPHS, TOKENIZER_FILE
from .torch_engine import load_model

FORMATS, DTYPES = ("onnx", "openvino", "web"), ("float32", "bfloat16", "int8")
EXTRAS = {"onnx": "onnx", "openvino": "openvino", "web": "onnx"}
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}  # by extra
# Generation settings that do not change the captions of greedy and beam search.
WITHOUT_EFFECT = {
    "bos_token_id", "transformers_version", "use_cache", "cache_implementation", "cache_config", "max_cache_len",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "compile_config", "disable_compile", "low_memory", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
}  # fmt: skip
TURNED_OFF = {"encoder_repetition_penalty": 1, "num_beam_groups": 1, "guidance_scale": 1}  # for others, False or 0
DEFAULT_NEW_TOKENS = 20  # of transformers


def export_checkpoint(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    format: str = "onnx",
    dtype: str | None = None,
    calibration: str | os.PathLike | None = None,
    onnxruntime_web: str | os.PathLike | None = None,
) -> Path:
    """Writes a folder that `Captioner.from_pretrained` runs on the CPU without torch and transformers, and with "web" any browser.

    Args:
        checkpoint: a folder with a saved model and its processor, or a name on the Hub.
        out: the folder to write; it must not exist or be empty. It is written atomically.
        format: "onnx", "openvino", or "web": the files of "onnx" and a static page that captions in the visitor's browser.
        dtype: "float32", "bfloat16" (only with "openvino") or "int8". Default: "int8" with "web", else "float32".
        calibration: only with "int8", not with "web": a folder of photographs like those that the model will caption, 200 or more.
            With it, the encoder computes in int8, which is faster and less accurate. Without it, only weights are rounded.
        onnxruntime_web: only with "web": the folder or the .tgz file of the npm package onnxruntime-web. Default: npm downloads it.

    Returns:
        `out` as a path.

    Raises:
        ImportError: a package of the extra `onnx` or `openvino` is missing.
        FileExistsError: `out` exists and is not an empty folder.
        OSError: the checkpoint cannot be loaded.
        ValueError: the arguments contradict each other, there are no photographs, or the checkpoint has a setting that the exported
            captioner does not support.
    """
    dtype = dtype or ("int8" if format == "web" else "float32")
    _check_arguments(format, dtype, calibration, onnxruntime_web)
    refuse_occupied(out)
    web_runtime = read_runtime(onnxruntime_web) if format == "web" else None
    photographs = [] if calibration is None else _photographs(Path(calibration))
    model, processor = load_model(str(checkpoint), "cpu", "float32", "auto")
    settings = _search_settings(model)
    tokenizer = _tokenizer_settings(processor.tokenizer)
    image_processor = _checked_image_processor(processor.image_processor)
    height, width = image_processor.size["height"], image_processor.size["width"]
    mean, std = _statistics(image_processor)
    if web_runtime is not None:
        check_page(processor.tokenizer, image_processor.resample)
    with atomic_folder(out) as folder, tempfile.TemporaryDirectory() as scratch:
        images = _Photographs(photographs, (width, height), Image.Resampling(image_processor.resample))
        with _quiet():
            grid = write_onnx(model, (height, width), mean, std, Path(scratch))
            finish = _finish_openvino if format == "openvino" else _finish_onnx
            for name in GRAPHS:
                finish(Path(scratch) / f"{name}.onnx", folder, dtype, images if name == "encoder" else None)
        processor.tokenizer.backend_tokenizer.save(str(folder / TOKENIZER_FILE))
        about = {
            "version": EXPORT_VERSION,
            "format": "onnx" if format == "web" else format,  # of the graphs
            "dtype": dtype,
            "packages": {"hf_attncap": __version__, **{name: version(name) for name in ("torch", *NEEDED[EXTRAS[format]])}},
            "height": height,
            "width": width,
            "resample": int(image_processor.resample),
            "grid": grid,
            "word_attention": model.config.word_attention,
            "confidence": model.config.confidence,
            "generation": dataclasses.asdict(settings),
            "tokenizer": tokenizer,
        }
        write_json(folder / EXPORT_FILE, about)
        if web_runtime is not None:
            write_page(folder, web_runtime)
    return Path(out)


def _check_arguments(format: str, dtype: str, calibration: Any, onnxruntime_web: Any) -> None:
    if format not in FORMATS:
        raise ValueError(f"`format` is {format!r}, but it must be one of {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` is {dtype!r}, but it must be one of {', '.join(DTYPES)}.")
    if format != "openvino" and dtype == "bfloat16":
        raise ValueError(
            "ONNX Runtime cannot compute in bfloat16 on CPUs: choose the format openvino, or the dtype int8 or float32."
        )
    if calibration is not None and dtype != "int8":
        raise ValueError(f"The calibration folder is only used with the dtype int8, but the dtype is {dtype}: leave it out.")
    if calibration is not None and format == "web":
        raise ValueError("The format web has no int8 encoder, which the calibration folder is for: leave it out.")
    if onnxruntime_web is not None and format != "web":
        raise ValueError(f"onnxruntime-web is only used with the format web, but the format is {format}: leave it out.")
    extra = EXTRAS[format]
    for name in (*NEEDED[extra], *(("nncf",) if (format, dtype) == ("openvino", "int8") else ())):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f'The export to {format} needs more packages: pip install "hf_attncap[{extra}]" ({error})') from error


def _photographs(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"'{folder}' is not a folder: name a folder of photographs for the calibration.")
    known = Image.registered_extensions()
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in known)
    if not found:
        raise ValueError(f"'{folder}' has no images: name a folder of photographs for the calibration.")
    return found


def _search_settings(model: Any) -> SearchSettings:
    """The generation settings; raises a ValueError for one that `numpy_search` does not support."""
    known = {item.name for item in dataclasses.fields(SearchSettings)} | WITHOUT_EFFECT
    for name, value in model.generation_config.to_dict().items():
        if name in known or name.startswith("_") or value is None or value == TURNED_OFF.get(name, False):
            continue
        raise ValueError(
            f"The checkpoint's generation_config.json sets `{name}` to {value!r:.60}, which exported captioners do not support: "
            "remove it, or use the checkpoint without export."
        )
    config, _ = model._prepare_generation_config(None)
    new_tokens = model.generation_config.max_new_tokens
    if new_tokens is None and model.generation_config.max_length is None:
        new_tokens = DEFAULT_NEW_TOKENS
    ends = config.eos_token_id
    return SearchSettings(
        decoder_start_token_id=config.decoder_start_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=[] if ends is None else [ends] if isinstance(ends, int) else list(ends),
        num_beams=config.num_beams or 1,
        max_new_tokens=new_tokens,
        max_length=None if new_tokens is not None else config.max_length,
        length_penalty=config.length_penalty,
        early_stopping=config.early_stopping,
        min_length=config.min_length or 0,
        min_new_tokens=config.min_new_tokens or 0,
        repetition_penalty=config.repetition_penalty or 1.0,
        no_repeat_ngram_size=config.no_repeat_ngram_size or 0,
        suppress_tokens=list(config.suppress_tokens or []),
        repeatable_token_ids=getattr(config, "repeatable_token_ids", None),
    )


def _tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    if tokenizer.clean_up_tokenization_spaces:
        raise ValueError(
            "The checkpoint's tokenizer has `clean_up_tokenization_spaces`, which exported captioners do not support: set it to "
            "false in tokenizer_config.json."
        )
    return {
        "all_special_ids": tokenizer.all_special_ids,
        "unk_token_id": tokenizer.unk_token_id,
        "split_special_tokens": bool(tokenizer.split_special_tokens),
    }


def _checked_image_processor(image_processor: Any) -> Any:
    wrong = [name for name in ("do_center_crop", "do_pad") if getattr(image_processor, name, None)]
    size = image_processor.to_dict()["size"]  # without the unused ways to give a size
    wrong += [] if image_processor.do_resize and set(size) == {"height", "width"} else ["size"]
    if wrong:
        raise ValueError(
            f"The checkpoint's image processor has a `{'` and a `'.join(wrong)}` that exported captioners do not support: they "
            "only resize images to a fixed height and width."
        )
    return image_processor


def _statistics(image_processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (3) that the pixels, from 0 to 255, are normalised with."""
    factor = image_processor.rescale_factor if image_processor.do_rescale else 1.0
    mean, std = (image_processor.image_mean, image_processor.image_std) if image_processor.do_normalize else (0.0, 1.0)
    return torch.ones(3) * torch.tensor(mean) * (1 / factor), torch.ones(3) * torch.tensor(std) * (1 / factor)


class _Photographs:
    """Iterates over photographs as pixels (1, height, width, 3), uint8."""

    def __init__(self, files: list[Path], size: tuple[int, int], resample: Image.Resampling):
        self.files, self.size, self.resample = files, size, resample

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[np.ndarray]:
        for file in self.files:
            yield np.asarray(load_image(file).resize(self.size, self.resample))[None]


def _finish_onnx(graph: Path, folder: Path, dtype: str, photographs: _Photographs | None) -> None:
    """Write an ONNX graph to `folder`. With photographs, which only an encoder has, int8 also applies to activations."""
    if dtype != "int8":
        shutil.copyfile(graph, folder / graph.name)
    elif photographs:
        _quantize_onnx(graph, folder / graph.name, photographs)
    elif graph.stem == "encoder":
        store_as_float16(graph, folder / graph.name)  # int8 would save a fifth of the size and change a tenth of the captions
    else:
        store_as_int8(graph, folder / graph.name)


def _quantize_onnx(graph: Path, target: Path, photographs: _Photographs) -> None:
    """Quantise weights and activations. The ranges of activations come from photographs."""
    from onnxruntime.quantization import (  # pyright: ignore[reportMissingImports]
        CalibrationDataReader,
        QuantType,
        quant_pre_process,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self, pixels: Iterator[np.ndarray]):
            self.pixels = pixels

        def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            found = next(self.pixels, None)
            return None if found is None else {"pixels": found}

    prepared = graph.with_name("prepared.onnx")
    quant_pre_process(graph, prepared, skip_symbolic_shape=True)
    quantize_static(prepared, target, Reader(iter(photographs)), per_channel=True, activation_type=QuantType.QUInt8)


def _finish_openvino(graph: Path, folder: Path, dtype: str, photographs: _Photographs | None) -> None:
    """Convert an ONNX graph to OpenVINO's format in `folder`; int8 applies to an encoder only with photographs."""
    import openvino  # pyright: ignore[reportMissingImports]

    converted = openvino.convert_model(graph)
    if dtype == "int8" and (photographs or graph.stem != "encoder"):
        converted = _quantize_openvino(converted, photographs)
    openvino.save_model(converted, folder / f"{graph.stem}.xml", compress_to_fp16=False)


def _quantize_openvino(graph: Any, photographs: _Photographs | None) -> Any:
    """Quantise weights, and with photographs the activations too."""
    import nncf  # pyright: ignore[reportMissingImports]
    from nncf.quantization.advanced_parameters import (  # pyright: ignore[reportMissingImports]
        AdvancedQuantizationParameters,
        OverflowFix,
    )

    if photographs is None:
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    return nncf.quantize(
        graph,
        nncf.Dataset(list(photographs)),
        subset_size=len(photographs),
        preset=nncf.QuantizationPreset.MIXED,
        # By default, weights get seven bits for CPUs without VNNI, which costs more accuracy.
        advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.DISABLE),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps hints and progress bars of the exporting libraries off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
