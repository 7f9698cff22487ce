"""Runs an exported captioner with ONNX Runtime or OpenVINO. Needs neither torch nor transformers."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from .engine import GeneratedCaptions
from .numpy_search import CHANGEABLE, NOT_GENERATED, SearchSettings, change_settings, search
from .occlusion import hidden_squares

EXPORT_FILE, TOKENIZER_FILE = "export.json", "tokenizer.json"
EXPORT_VERSION = 1  # of the folder's layout
GRAPHS = ("encoder", "start", "step")
MAX_SIDE, MAX_BEAMS, MAX_TOKENS = 4096, 256, 10_000  # of the defaults in an export; callers may ask for more
MAX_ELEMENTS = 2**25  # in the regions of one forward pass, which bounds its memory
Graph = Callable[..., list[Any]]  # arrays to arrays


def is_export(folder: str | os.PathLike) -> bool:
    """Whether a folder was written by `attncap export`."""
    return (Path(folder) / EXPORT_FILE).is_file()


class ExportedTokenizer:
    """A tokenizer with the methods of transformers' tokenizers that captions and prompts need."""

    def __init__(self, file: Path, all_special_ids: list[int], unk_token_id: int | None, split_special_tokens: bool):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.encode_special_tokens = split_special_tokens
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.all_special_ids, self.unk_token_id = all_special_ids, unk_token_id

    def __call__(self, text: str) -> dict[str, list[int]]:
        """The tokens of a prompt, without special tokens."""
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=False).ids}

    @property
    def size(self) -> int:
        """The number of tokens."""
        return self._tokenizer.get_vocab_size()

    def decode(self, ids: list[int]) -> str:
        """The text of tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class ExportedModel:
    """An exported captioner, the engine of a `Captioner`.

    Args:
        folder: was written by `attncap export`.

    Raises:
        ImportError: the library that runs the graphs is not installed.
        OSError: a file is missing or damaged.
        ValueError: a newer version of this package wrote the folder.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder)
        try:
            about = _read_about(self._folder / EXPORT_FILE)
            version = about["version"]
            if version > EXPORT_VERSION:
                raise _NewerVersion(f"'{folder}' was exported by a newer version of hf_attncap: update the package.")
            self.word_attention: str = about["word_attention"]
            self.calibration: dict[str, Any] | None = about["confidence"]
            self._settings = SearchSettings(**about["generation"])
            self._size, self._resample = (about["width"], about["height"]), Image.Resampling(about["resample"])
            self._grid: tuple[int, int] = tuple(about["grid"])
            if not (self._folder / TOKENIZER_FILE).is_file():
                raise FileNotFoundError(f"{TOKENIZER_FILE} is missing")
            self.tokenizer = ExportedTokenizer(self._folder / TOKENIZER_FILE, **about["tokenizer"])
            _check_values(about, self._settings, self.tokenizer.size)
            self._load = {"onnx": _load_onnx, "openvino": _load_openvino}[about["format"]]
            self._dtype: str = about["dtype"]
        except (ImportError, _NewerVersion):
            raise
        except Exception as error:  # of json, for missing and wrong entries, and of any kind from tokenizers
            raise OSError(f"'{folder}' is damaged ({type(error).__name__}: {error}): export the checkpoint again.") from error
        self._encode, self._start, self._step = (self._graph(name) for name in GRAPHS)

    def _graph(self, name: str) -> Graph:
        try:
            return self._load(self._folder, name, self._dtype)
        except ImportError:
            raise
        except Exception as error:  # each library raises kinds of its own
            reason = str(error).strip().rpartition("\n")[2]  # OpenVINO's errors begin with places in its code
            raise OSError(f"The graph '{name}' of '{self._folder}' cannot be loaded ({reason}): export again.") from error

    @property
    def default_beams(self) -> int:
        return self._settings.num_beams

    @property
    def scale(self) -> tuple[tuple[int, int], int]:
        return self._size, self._resample

    def check_arguments(self, num_beams: int, generate_kwargs: Mapping[str, Any]) -> None:
        _, sampling = change_settings(self._settings, generate_kwargs)
        if sampling is not None and num_beams > 1:
            raise ValueError(f"Exported captioners sample without beams, but `num_beams` is {num_beams}: leave one of them out.")

    def try_settings(self, **settings: Any) -> None:
        generate_kwargs = {name: value for name, value in settings.items() if name in CHANGEABLE}
        changed, _ = change_settings(self._settings, generate_kwargs)
        changed.longest(1 + len(self._prompt_tokens(settings["prompt"])))

    def _prompt_tokens(self, prompt: str | None) -> list[int]:
        return [] if prompt is None else self.tokenizer(prompt)["input_ids"]

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
        settings, sampling = change_settings(self._settings, generate_kwargs)
        (regions,) = self._encode(self._pixels(images))  # (B, N, C)
        words = self._prompt_tokens(prompt)
        decoder = _Decoder(self, regions)
        tokens, scores = search(
            decoder, settings, len(images), words, num_beams, num_return_sequences, sampling
        )  # (B, k, 1 + T), (B, k)
        generated = tokens["beam"] != NOT_GENERATED  # (B, k, 1 + T)
        count = np.maximum(generated.sum(axis=-1), 1)  # (B, k)
        beams = np.maximum(tokens["beam"][:, :, 1:], 0)  # (B, k, T)
        maps = _select_beams(decoder.attention, beams) if attention else None  # (B, k, T, N)
        return GeneratedCaptions(
            sequences=np.ascontiguousarray(tokens["id"]),
            scores=scores.astype(np.float64),
            lowest=tokens["log_prob"].min(axis=-1, where=generated, initial=0).astype(np.float64),
            entropy=tokens["entropy"].sum(axis=-1, where=generated) / count,
            attention=None if maps is None else maps.reshape(*maps.shape[:3], *self._grid),
            word_attention=_select_beams(decoder.word_attention, beams) if attention and decoder.word_attention else None,
            importance=self._importance(regions, tokens["id"][:, 0]) if explain else None,
        )

    def _pixels(self, images: list[Image.Image]) -> np.ndarray:
        """(B, height, width, 3) uint8."""
        return np.stack([np.asarray(image.resize(self._size, self._resample)) for image in images])

    def _importance(self, regions: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The importance (B, T, H, W) of regions (B, N, C) for captions (B, T + 1), as `word_importance` defines it."""
        B, N, C = regions.shape
        hidden = np.concatenate([np.zeros((1, N), bool), hidden_squares(self._grid)])  # (1 + N, N), first nothing hidden
        image, place = np.divmod(np.arange(B * len(hidden)), len(hidden))  # (B * (1 + N)), (B * (1 + N))
        per_pass = max(MAX_ELEMENTS // (N * C), 1)
        found = []
        for start in range(0, len(image), per_pass):
            some = slice(start, start + per_pass)
            seen = ~hidden[place[some]]  # (v, N)
            whole = regions[image[some]]  # (v, N, C)
            mean = seen[:, None].astype(np.float32) @ whole / np.maximum(seen.sum(axis=1), 1)[:, None, None]  # (v, 1, C)
            without = np.where(seen[..., None], whole, mean.astype(np.float32))  # (v, N, C)
            found.append(self._log_probabilities(without, ids[image[some]]))
        log_p = np.concatenate(found).reshape(B, len(hidden), -1)  # (B, 1 + N, T)
        falls = log_p[:, :1] - log_p[:, 1:]  # (B, N, T)
        return falls.transpose(0, 2, 1).reshape(B, -1, *self._grid)

    def _log_probabilities(self, regions: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """(v, T): the log-probabilities of the tokens of captions (v, T + 1), given regions (v, N, C)."""
        decoder, row = _Decoder(self, regions), np.arange(len(ids))
        found = []
        for length in range(1, ids.shape[1]):
            logits, normalizer, _ = decoder.read(ids[:, None, :length])  # (v, 1, V), (v, 1)
            found.append(logits[row, 0, ids[:, length]] - normalizer[:, 0])
        return np.stack(found, axis=1)


class _Decoder:
    """The decoder's state for K captions of each of B images with regions (B, N, C), and the attention of its steps.

    `attention` and `word_attention` have one array per step, (B, K, N) and (B, K, t) or (B, K, E).
    """

    def __init__(self, model: ExportedModel, regions: np.ndarray):
        self._step, self._regions = model._step, regions
        self._all_words = model.word_attention == "history"
        self._keys, h, c = model._start(regions)  # (B, N, A), (B, S), (B, S)
        self._h, self._c = h[:, None], c[:, None]  # (B, 1, S), (B, 1, S)
        self.attention: list[np.ndarray] = []
        self.word_attention: list[np.ndarray] = []

    def read_prompt(self, ids: np.ndarray, beams: int) -> list[np.ndarray]:
        """Read start token and prompt (t) for `beams` equal captions per image; return logits as `read` does.

        All beams read the prompt, because the graphs take longer for the next word after a change of sizes.
        """
        self._h, self._c = (np.repeat(x, beams, axis=1) for x in (self._h, self._c))  # (B, K, S)
        outputs = []
        for length in range(1, len(ids) + 1):
            outputs = self.read(np.broadcast_to(ids[:length], (len(self._regions), beams, length)))
        return outputs

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        """Read the last token of captions (B, K, t); return logits (B, K, V), their log-sum-exp and entropy (B, K)."""
        read = np.ascontiguousarray(ids if self._all_words else ids[:, :, -1:])
        outputs = self._step(read, self._h, self._c, self._keys, self._regions)
        logits, normalizer, entropy, self._h, self._c, alpha, *beta = outputs
        self.attention.append(alpha)
        self.word_attention += beta
        return [logits, normalizer, entropy]

    def select(self, beams: np.ndarray) -> None:
        """Keep the captions at these indices (B, K) of each image, in this order."""
        image = np.arange(len(beams))[:, None]  # (B, 1)
        self._h, self._c = self._h[image, beams], self._c[image, beams]  # (B, K, S) each


def _select_beams(steps: list[np.ndarray], beams: np.ndarray) -> np.ndarray:
    """Select the beams (B, k, T) from T arrays (B, K, n), one per step: (B, k, T, n), with zeros where a step has fewer columns."""
    B, k, T = beams.shape
    found = np.zeros((B, k, T, steps[T - 1].shape[-1]), np.float32)
    for t, values in enumerate(steps[:T]):
        found[:, :, t, : values.shape[-1]] = np.take_along_axis(values, beams[:, :, t, None], 1)
    return found


class _NewerVersion(ValueError):
    pass


def _read_about(path: Path) -> dict[str, Any]:
    about = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(about, dict):
        raise ValueError(f"{path.name} holds a {type(about).__name__}, not a JSON object")
    return about


def _check_values(about: dict[str, Any], settings: SearchSettings, V: int) -> None:
    """Raises a ValueError for values with which captions would take all memory or time, or cannot be computed."""
    numbers = {"height": about["height"], "width": about["width"], "num_beams": settings.num_beams}
    numbers |= {name: getattr(settings, name) for name in ("max_new_tokens", "max_length") if getattr(settings, name) is not None}
    numbers |= {f"grid[{axis}]": side for axis, side in enumerate(about["grid"])}
    for name, value in numbers.items():
        high = {"num_beams": MAX_BEAMS, "max_new_tokens": MAX_TOKENS, "max_length": MAX_TOKENS}.get(name, MAX_SIDE)
        if not isinstance(value, int) or not 1 <= value <= high:
            raise ValueError(f"`{name}` in {EXPORT_FILE} is {value!r:.40}, but it must be a whole number from 1 to {high}")
    ids = [settings.decoder_start_token_id, settings.pad_token_id, *settings.eos_token_id, *settings.suppress_tokens]
    if not all(isinstance(token, int) and 0 <= token < V for token in ids):
        raise ValueError(f"{EXPORT_FILE} has token ids that are not in {TOKENIZER_FILE}, which has {V} tokens")


def _load_onnx(folder: Path, name: str, dtype: str) -> Graph:
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"'{folder}' needs ONNX Runtime: pip install \"hf_attncap[onnx]\" ({error})") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    # Threads that wait actively take the cores from the other graphs' threads: slower with float32 and on busy machines.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return lambda *arrays: list(session.run(None, dict(zip(names, arrays))))


def _load_openvino(folder: Path, name: str, dtype: str) -> Graph:
    try:
        import openvino  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"'{folder}' needs OpenVINO: pip install \"hf_attncap[openvino]\" ({error})") from error
    # By default, OpenVINO computes in bfloat16 on CPUs that have it.
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32"}
    request = openvino.Core().compile_model(folder / f"{name}.xml", "CPU", hints).create_infer_request()
    lock = Lock()  # a request runs one inference at a time

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        with lock:
            return list(request.infer(arrays, share_inputs=True).values())

    return run
