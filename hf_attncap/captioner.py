"""The high-level API: `Captioner` captions images. Importing it needs neither torch nor transformers; loading a model does."""

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypedDict, TypeVar, Unpack, overload

import numpy as np
from PIL import Image

from .confidence_attncap import SIGNALS, estimate_confidence
from .engine import Engine
from .images import ImageError, describe_error, is_tensor, load_batches, load_image
from .result import Alternative, CaptionResult
from .runtime import ExportedModel, is_export
from .words_attncap import CaptionPieces, check_prompt

if TYPE_CHECKING:
    import torch

    from .modeling_attncap import AttnCapForConditionalGeneration
    from .processing_attncap import AttnCapProcessor

ImageSource: TypeAlias = "str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor"
Method = TypeVar("Method", bound=Callable[..., Any])

CHECKPOINT = Path(__file__).parent / "checkpoint"
NO_CAPTION = -1e8  # beam search gives about -1e9 to sequences that it did not find
OLD_NAMES = {"beams": "num_beams", "alternatives": "num_return_sequences"}  # of arguments; removed in the next release


class CaptionOptions(TypedDict, total=False):
    """The keyword arguments of `Captioner.caption`, which describes them."""

    num_beams: int | None
    num_return_sequences: int
    prompt: str | None
    batch_size: int
    allow_private_urls: bool
    explain: bool


def _accept_old_names(method: Method) -> Method:
    """Lets a method take the arguments in `OLD_NAMES` under their old names, with a FutureWarning."""

    @functools.wraps(method)
    def wrapper(*args: Any, **options: Any) -> Any:
        for old, new in OLD_NAMES.items():
            if old in options:
                if new in options:
                    raise TypeError(f"`{old}` is the old name of `{new}`: give only `{new}`.")
                warnings.warn(f"`{old}` is deprecated: use `{new}`.", FutureWarning, stacklevel=2)
                options[new] = options.pop(old)
        return method(*args, **options)

    return wrapper  # pyright: ignore[reportReturnType]


class Captioner:
    """Captions images.

    Example:

    ```python
    captioner = Captioner.from_pretrained()
    result = captioner.caption("photo.jpg")
    print(result.text)
    result.plot_attention("photo_attention.png")
    ```

    Args:
        model: set to evaluation mode; stays on its device.
        processor: the processor that the model was trained with.
    """

    def __init__(self, model: "AttnCapForConditionalGeneration", processor: "AttnCapProcessor"):
        self.model = model.eval()
        self.processor = processor
        self._exported: ExportedModel | None = None

    @property
    def engine(self) -> Engine:
        """The library that generates the captions, with the loaded model."""
        if self._exported is not None:
            return self._exported
        from .torch_engine import TorchEngine

        return TorchEngine(self.model, self.processor)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike | None = None,
        *,
        device: "str | torch.device | None" = None,
        dtype: "str | torch.dtype | None" = None,
        optimize: Literal["auto", False] = "auto",
        compile: bool = False,
    ) -> Self:
        """Loads a saved model and its processor.

        Args:
            name_or_path: a folder or a Hugging Face Hub repository. Default: the checkpoint in this package. A folder that
                `attncap export` wrote runs on the CPU without torch, in the dtype of the export; the captioner then has no `model`
                and `processor`.
            device: such as "cpu" or "cuda:1". Default: "cuda" if a GPU is available, else "cpu".
            dtype: such as "bfloat16". Default: the checkpoint's.
            optimize: "auto" makes the model faster without changing captions (`optimize_for_inference`); `captioner.model` can
                then be neither trained nor saved. False keeps the model as it was saved.
            compile: also compile the encoder, with `optimize="auto"`. The first batch of each size then takes up to a minute.

        Raises:
            OSError: the checkpoint does not exist, one of its files is missing or damaged, or it is another kind of model.
            ImportError: an exported folder needs a package that is not installed.
            ValueError: the device or the dtype cannot be used, `optimize` has another value, `compile` is given with
                `optimize=False`, or a GPU, a dtype or `compile` is given for an exported folder.
        """
        if optimize not in ("auto", False):
            raise ValueError(f"`optimize` is {optimize!r}, but it must be 'auto' or False.")
        if compile and not optimize:
            raise ValueError('`compile=True` needs `optimize="auto"`: leave one of them out.')
        if name_or_path is None and not (CHECKPOINT / "config.json").is_file():
            raise FileNotFoundError("This installation contains no checkpoint: name a folder or Hub repository.")
        source = str(CHECKPOINT if name_or_path is None else name_or_path)
        if is_export(source):
            return cls._from_export(source, device, dtype, compile)
        from .torch_engine import load_model

        return cls(*load_model(source, device, dtype, optimize, compile))

    @classmethod
    def _from_export(cls, folder: str, device: Any, dtype: Any, compile: bool) -> Self:
        if device is not None and str(device) != "cpu":
            raise ValueError(f"'{folder}' was exported for the CPU, but `device` is '{device}': leave it out.")
        if dtype is not None:
            raise ValueError(f"The dtype of '{folder}' was fixed by the export: leave `dtype` out, or export the checkpoint again.")
        if compile:
            raise ValueError(f"'{folder}' is an export, which is compiled already: leave `compile` out.")
        captioner = cls.__new__(cls)  # an exported captioner has neither model nor processor
        captioner._exported = ExportedModel(folder)
        return captioner

    @overload
    def caption(self, images: ImageSource, **options: Unpack[CaptionOptions]) -> CaptionResult: ...

    @overload
    def caption(self, images: list[Any] | tuple[Any, ...], **options: Unpack[CaptionOptions]) -> list[CaptionResult]: ...

    @_accept_old_names
    def caption(
        self,
        images: "ImageSource | list[Any] | tuple[Any, ...]",
        *,
        num_beams: int | None = None,
        num_return_sequences: int = 1,
        prompt: str | None = None,
        batch_size: int = 8,
        allow_private_urls: bool = False,
        explain: bool = False,
    ) -> CaptionResult | list[CaptionResult]:
        """Captions one image or a list of images.

        Args:
            images: a path, URL, PIL image or anything else that `hf_attncap.images.load_image` reads; or a list of them.
            num_beams: beam width; 1 is greedy search. Default: the checkpoint's, at least `num_return_sequences`.
            num_return_sequences: captions per image, including the best one; at most `num_beams`.
            prompt: the beginning of all captions, which the model continues.
            batch_size: images per forward pass.
            allow_private_urls: also fetch URLs that lead to private addresses.
            explain: also compute the `importance` of each region for each word. This decodes the caption H * W more times.

        Returns:
            A result; for a list of images, a list of results.

        Raises:
            ImageError: an image cannot be read. All images are read before the first one is captioned. For a list, the message
                gives the index of the image.
            ValueError: a number is below 1, `num_return_sequences` exceeds `num_beams`, or the model does not know a word of the
                prompt.
        """
        num_beams = self._check_options(num_beams, num_return_sequences, prompt, batch_size)
        sources = images if isinstance(images, (list, tuple)) else [images]
        loaded = []
        for number, source in enumerate(sources):
            try:
                loaded.append(load_image(source, allow_private_urls=allow_private_urls))
            except ImageError as error:
                if sources is not images:
                    raise
                raise ImageError(f"images[{number}]: {error}") from error
        results = []
        for start in range(0, len(loaded), batch_size):
            results += self._caption_batch(loaded[start : start + batch_size], prompt, num_beams, num_return_sequences, explain)
        return results if sources is images else results[0]

    @overload
    def explain(self, images: ImageSource, **options: Unpack[CaptionOptions]) -> CaptionResult: ...

    @overload
    def explain(self, images: list[Any] | tuple[Any, ...], **options: Unpack[CaptionOptions]) -> list[CaptionResult]: ...

    def explain(self, images: Any, **options: Any) -> Any:
        """`caption` with `explain=True`: the results also have `importance`.

        Args:
            images, options: as for `caption`.
        """
        options["explain"] = True
        return self.caption(images, **options)

    @_accept_old_names
    def stream(
        self,
        images: Iterable[ImageSource],
        *,
        on_error: Literal["raise", "yield"] = "raise",
        num_beams: int | None = None,
        num_return_sequences: int = 1,
        prompt: str | None = None,
        batch_size: int = 8,
        allow_private_urls: bool = False,
        explain: bool = False,
    ) -> Iterator[CaptionResult | ImageError]:
        """Captions any number of images, one batch at a time, and yields the results in the order of the images.

        A batch ends early once its images exceed 64 megapixels. If a batch fails, its images are captioned one by one, so that
        only the image that causes the failure is lost.

        Args:
            images: any iterable of what `caption` takes. Only the batches whose results you consume are read.
            on_error: what happens if an image cannot be read or captioned. "raise": its `ImageError` is raised after the results
                of the images before it. "yield": the error is yielded in place of a result.

        The other arguments are those of `caption`.

        Raises:
            ImageError: see `on_error`.
            ValueError: as `caption`; or `images` is a single image; or `on_error` has another value.
        """
        if on_error not in ("raise", "yield"):
            raise ValueError(f"`on_error` is {on_error!r}, but it must be 'raise' or 'yield'.")
        if isinstance(images, (str, bytes, os.PathLike, Image.Image, np.ndarray)) or is_tensor(images):
            raise ValueError("`images` is a single image: use `caption`, or give a list of images.")
        num_beams = self._check_options(num_beams, num_return_sequences, prompt, batch_size)

        def outcomes() -> Iterator[CaptionResult | ImageError]:
            for batch in load_batches(images, batch_size, allow_private_urls):
                readable = [item for item in batch if isinstance(item[1], Image.Image)]
                found = iter(self._caption_each(readable, prompt, num_beams, num_return_sequences, explain))
                for _, image in batch:
                    outcome = image if isinstance(image, ImageError) else next(found)
                    if isinstance(outcome, ImageError) and on_error == "raise":
                        raise outcome
                    yield outcome

        return outcomes()

    def _check_options(self, num_beams: int | None, num_return_sequences: int, prompt: str | None, batch_size: int) -> int:
        """The number of beams, by default the checkpoint's; raises a ValueError for options that are out of range."""
        if num_beams is None:
            num_beams = max(self.engine.default_beams, num_return_sequences)
        numbers = {"num_beams": num_beams, "num_return_sequences": num_return_sequences, "batch_size": batch_size}
        for name, value in numbers.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value}, but it must be an integer, at least 1.")
        if num_return_sequences > num_beams:
            raise ValueError(
                f"`num_beams` is {num_beams}, but `num_return_sequences` is {num_return_sequences}: raise `num_beams` to that."
            )
        if prompt is not None:
            check_prompt(self.engine.tokenizer, prompt)
        return num_beams

    def _caption_each(self, named: list[tuple[str, Any]], *settings: Any) -> list[CaptionResult | ImageError]:
        """Results of a batch of (name, image); if the batch fails, each image is captioned alone and its own failure returned."""
        if not named:
            return []
        try:
            return list(self._caption_batch([image for _, image in named], *settings))
        except Exception as error:  # anything: memory, device, preprocessing
            if len(named) > 1:
                return [outcome for item in named for outcome in self._caption_each([item], *settings)]
            failure = ImageError(f"{named[0][0]} cannot be captioned: {describe_error(error)}")
            failure.__cause__ = error
            return [failure]

    def _caption_batch(
        self, images: list[Image.Image], prompt: str | None, num_beams: int, num_return_sequences: int, explain: bool
    ) -> list[CaptionResult]:
        """Captions B images in one forward pass."""
        engine = self.engine
        found = engine.generate(images, prompt, num_beams, num_return_sequences, explain)
        calibration = engine.calibration if prompt is None else None
        signals = {"score": found.scores, "lowest": found.lowest, "entropy": found.entropy}
        results = []
        for b, image in enumerate(images):
            captions = [CaptionPieces(engine.tokenizer, ids) for ids in found.sequences[b].tolist()]
            pairs = [Alternative(pieces.text, score) for pieces, score in zip(captions, found.scores[b].tolist())]
            best, weights, importance = captions[0], found.word_attention, found.importance
            attention = best.merge(found.attention[b, 0])  # (T, H, W)
            if weights is not None:
                weights = best.merge(weights[b, 0], over_words=engine.word_attention == "history")
            if importance is not None:
                importance = best.add_up(importance[b])  # (T, H, W)
            others = [other for other in pairs[1:] if other.score > NO_CAPTION]
            own = {name: signals[name][b, 0].item() for name in SIGNALS}
            confidence = None if calibration is None else float(estimate_confidence(calibration, own))
            results.append(CaptionResult(*pairs[0], best.words, attention, weights, others, image, importance, own, confidence))
        return results
