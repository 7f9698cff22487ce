"""The high-level API: `Captioner` captions images. Importing it needs neither torch nor transformers; loading a model does."""

import functools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypeVar, overload

import numpy as np
from PIL import Image

from .confidence_attncap import SIGNALS, estimate_confidence
from .engine import Engine
from .image_workers import MAX_WORKERS, read_images
from .images import ImageError, Reading, describe_error, is_tensor, make_batches
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
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Loads a saved model and its processor.

        Args:
            name_or_path: a folder or a Hugging Face Hub repository. Default: the checkpoint in this package. A folder that
                `attncap export` wrote runs on the CPU without torch, in the dtype of the export; the captioner then has no `model`
                and `processor`.
            device: such as "cpu", "cuda:1" or "mps". Default: "cuda" if an NVIDIA or AMD GPU is available, else "mps" if an Apple
                GPU is, else "cpu".
            dtype: such as "bfloat16". Default: the checkpoint's.
            optimize: "auto" makes the model faster (`optimize_for_inference`), with the same captions in float32;
                `captioner.model` can then be neither trained nor saved. False keeps the model as it was saved.
            compile: also compile the encoder, with `optimize="auto"`. The first batch of each size then takes up to a minute. Not
                on MPS.
            revision: a branch, tag or commit of the Hub repository. Default: its main branch.
            token: for private repositories. Default: the token of `hf auth login`; False sends none.
            cache_dir: the folder for files from the Hub. Default: that of huggingface_hub.
            local_files_only: use only files that are in the cache. Files in the cache are also used if the Hub cannot be reached.

        Raises:
            OSError: the checkpoint does not exist, one of its files is missing or damaged, it is another kind of model, or the Hub
                cannot be reached and the checkpoint is not in the cache.
            ImportError: an exported folder needs a package that is not installed.
            ValueError: the device or the dtype cannot be used, `optimize` has another value, `compile` is given with
                `optimize=False`, `revision` is given for a folder, or an exported folder is given with a GPU, a dtype, `compile`,
                `token` or `cache_dir`.
        """
        if optimize not in ("auto", False):
            raise ValueError(f"`optimize` is {optimize!r}, but it must be 'auto' or False.")
        if compile and not optimize:
            raise ValueError('`compile=True` needs `optimize="auto"`: leave one of them out.')
        if name_or_path is None and not (CHECKPOINT / "config.json").is_file():
            raise FileNotFoundError("This installation contains no checkpoint: name a folder or Hub repository.")
        source = str(CHECKPOINT if name_or_path is None else name_or_path)
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
        if is_export(source):
            return cls._from_export(source, device, dtype, compile, hub)
        from .torch_engine import load_model

        return cls(*load_model(source, device, dtype, optimize, compile, **hub, local_files_only=local_files_only))

    @classmethod
    def _from_export(cls, folder: str, device: Any, dtype: Any, compile: bool, hub: dict[str, Any]) -> Self:
        if device is not None and str(device) != "cpu":
            raise ValueError(f"'{folder}' was exported for the CPU, but `device` is '{device}': leave it out.")
        if dtype is not None:
            raise ValueError(f"The dtype of '{folder}' was fixed by the export: leave `dtype` out, or export the checkpoint again.")
        if compile:
            raise ValueError(f"'{folder}' is an export, which is compiled already: leave `compile` out.")
        for name, value in hub.items():
            if value is not None:
                raise ValueError(f"'{folder}' is an exported folder and not on the Hub: leave `{name}` out.")
        captioner = cls.__new__(cls)  # an exported captioner has neither model nor processor
        captioner._exported = ExportedModel(folder)
        return captioner

    @overload
    def caption(self, images: ImageSource, **options: Any) -> CaptionResult: ...

    @overload
    def caption(self, images: list[Any] | tuple[Any, ...], **options: Any) -> list[CaptionResult]: ...

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
        attention: bool = True,
        **generate_kwargs: Any,
    ) -> CaptionResult | list[CaptionResult]:
        """Captions one image or a list of images.

        Args:
            images: a path, URL, PIL image or anything else that `hf_attncap.images.load_image` reads; or a list of them. A list is
                read and captioned one batch at a time.
            num_beams: beam width; 1 is greedy search. Default: the checkpoint's, at least `num_return_sequences`; 1 with
                `do_sample=True`.
            num_return_sequences: captions per image, including the best one; at most `num_beams`, or any number if captions are
                sampled without beams.
            prompt: the beginning of all captions, which the model continues.
            batch_size: images per forward pass. A batch ends early once its images exceed 64 megapixels.
            allow_private_urls: also fetch URLs that lead to private addresses.
            explain: also compute the `importance` of each region for each word. This decodes the caption H * W more times.
            attention: False leaves out the attention maps. Without `explain`, the results then hold no image either, so that
                those of many large images need little memory.
            generate_kwargs: further arguments of transformers' `generate`, such as `max_new_tokens`, `length_penalty`,
                `repetition_penalty`, or `do_sample=True` with `temperature`, `top_k` and `top_p`. None means the checkpoint's
                value. An exported folder supports those in `hf_attncap.numpy_search.CHANGEABLE`. Random choices follow
                `torch.manual_seed`, in an exported folder `numpy.random.seed`.

        Returns:
            A result; for a list of images, a list of results.

        Raises:
            ImageError: an image cannot be read. For a list, the message gives the index of the image, and the captions of the
                images before it are lost; `stream` keeps them.
            ValueError: a number is out of range, `num_return_sequences` exceeds `num_beams`, the model does not know a word of the
                prompt, or the model has no such argument.
        """
        settings = self._check_settings(
            batch_size,
            num_beams,
            generate_kwargs,
            num_return_sequences=num_return_sequences,
            prompt=prompt,
            explain=explain,
            attention=attention,
        )
        is_list = isinstance(images, (list, tuple))
        results: list[CaptionResult] = []
        read = read_images(images if is_list else [images], self._reading(settings, allow_private_urls))
        for batch in make_batches(read, batch_size):
            loaded = []
            for _, image in batch:
                if isinstance(image, ImageError) and is_list:
                    raise ImageError(f"images[{len(results) + len(loaded)}]: {image}") from image
                if isinstance(image, ImageError):
                    raise image
                loaded.append(image)
            results += self._caption_batch(loaded, settings)
        return results if is_list else results[0]

    @overload
    def explain(self, images: ImageSource, **options: Any) -> CaptionResult: ...

    @overload
    def explain(self, images: list[Any] | tuple[Any, ...], **options: Any) -> list[CaptionResult]: ...

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
        workers: int = 0,
        num_beams: int | None = None,
        num_return_sequences: int = 1,
        prompt: str | None = None,
        batch_size: int = 8,
        allow_private_urls: bool = False,
        explain: bool = False,
        attention: bool = True,
        **generate_kwargs: Any,
    ) -> Iterator[CaptionResult | ImageError]:
        """Captions any number of images, one batch at a time, and yields the results in the order of the images.

        If a batch fails, its images are captioned one by one, so that only the image that causes the failure is lost.

        Args:
            images: any iterable of what `caption` takes. It is read as far as the batch whose results you consume, with `workers`
                one batch further. If it raises an error, that is raised after the results of the images before.
            on_error: what happens if an image cannot be read or captioned. "raise": its `ImageError` is raised after the results
                of the images before it. "yield": the error is yielded in place of a result.
            workers: processes that read and decode files, URLs and bytes while the model captions the images before. They start
                with the first result and end with the iterator, at its `close()` at the latest. 0 reads in this process. If a
                process dies, for example because a decoder crashes, the image that it read is an `ImageError`.

        The other arguments are those of `caption`.

        Raises:
            ImageError: see `on_error`.
            ValueError: as `caption`; or `images` is a single image; or `on_error` has another value.
        """
        if on_error not in ("raise", "yield"):
            raise ValueError(f"`on_error` is {on_error!r}, but it must be 'raise' or 'yield'.")
        if isinstance(images, (str, bytes, os.PathLike, Image.Image, np.ndarray)) or is_tensor(images):
            raise ValueError("`images` is a single image: use `caption`, or give a list of images.")
        if not _is_whole(workers, 0) or workers > MAX_WORKERS:
            raise ValueError(f"`workers` is {workers}, but it must be an integer from 0 to {MAX_WORKERS}.")
        settings = self._check_settings(
            batch_size,
            num_beams,
            generate_kwargs,
            num_return_sequences=num_return_sequences,
            prompt=prompt,
            explain=explain,
            attention=attention,
        )
        if generate_kwargs:
            self.engine.try_settings(**settings)  # or each image would fail
        reading = self._reading(settings, allow_private_urls)

        def outcomes() -> Iterator[CaptionResult | ImageError]:
            with closing(read_images(images, reading, workers, batch_size)) as read:
                for batch in make_batches(read, batch_size):
                    done = deque(self._caption_readable(batch, settings))
                    del batch  # or its images would stay in memory while those of the next batch are read
                    while done:
                        if isinstance(done[0], ImageError) and on_error == "raise":
                            raise done[0]
                        yield done.popleft()

        return outcomes()

    def _check_settings(
        self, batch_size: int, num_beams: int | None, generate_kwargs: dict[str, Any], **settings: Any
    ) -> dict[str, Any]:
        """The arguments of `Engine.generate` beside the images; raises a ValueError for those that are out of range."""
        engine, count = self.engine, settings["num_return_sequences"]
        generate_kwargs = {name: value for name, value in generate_kwargs.items() if value is not None}
        samples = generate_kwargs.get("do_sample", False)
        if num_beams is None:
            num_beams = 1 if samples else max(engine.default_beams, count)
        numbers = {"num_beams": num_beams, "num_return_sequences": count, "batch_size": batch_size}
        for name, value in numbers.items():
            if not _is_whole(value, 1):
                raise ValueError(f"`{name}` is {value}, but it must be an integer, at least 1.")
        if count > num_beams and not (samples and num_beams == 1):
            raise ValueError(f"`num_beams` is {num_beams}, but `num_return_sequences` is {count}: raise `num_beams` to that.")
        if settings["prompt"] is not None:
            check_prompt(engine.tokenizer, settings["prompt"])
        engine.check_arguments(num_beams, generate_kwargs)
        return {"num_beams": num_beams, **settings, **generate_kwargs}

    def _reading(self, settings: dict[str, Any], allow_private_urls: bool) -> Reading:
        """How to read images: in their own size for results that keep them."""
        keeps = settings["attention"] or settings["explain"]
        return Reading(allow_private_urls, None if keeps else self.engine.scale)

    def _caption_readable(self, batch: list[tuple[str, Any]], settings: dict[str, Any]) -> list[CaptionResult | ImageError]:
        """Results of a batch of (name, image), with the `ImageError` of each image that could not be read in its place."""
        found = iter(self._caption_each([item for item in batch if isinstance(item[1], Image.Image)], settings))
        return [image if isinstance(image, ImageError) else next(found) for _, image in batch]

    def _caption_each(self, named: list[tuple[str, Any]], settings: dict[str, Any]) -> list[CaptionResult | ImageError]:
        """Results of a batch of (name, image); if the batch fails, each image is captioned alone and its own failure returned."""
        if not named:
            return []
        try:
            return list(self._caption_batch([image for _, image in named], settings))
        except Exception as error:  # anything: memory, device, preprocessing
            if len(named) > 1:
                return [outcome for item in named for outcome in self._caption_each([item], settings)]
            failure = ImageError(f"{named[0][0]} cannot be captioned: {describe_error(error)}")
            failure.__cause__ = error
            return [failure]

    def _caption_batch(self, images: list[Image.Image], settings: dict[str, Any]) -> list[CaptionResult]:
        """Captions B images in one forward pass."""
        engine = self.engine
        found = engine.generate(images, **settings)
        calibration = engine.calibration if settings["prompt"] is None else None
        signals = {"score": found.scores, "lowest": found.lowest, "entropy": found.entropy}
        results = []
        for b, image in enumerate(images):
            captions = [CaptionPieces(engine.tokenizer, ids) for ids in found.sequences[b].tolist()]
            pairs = [Alternative(pieces.text, score) for pieces, score in zip(captions, found.scores[b].tolist())]
            best, attention, weights, importance = captions[0], found.attention, found.word_attention, found.importance
            if attention is not None:
                attention = best.merge(attention[b, 0])  # (T, H, W)
            if weights is not None:
                weights = best.merge(weights[b, 0], over_words=engine.word_attention == "history")
            if importance is not None:
                importance = best.add_up(importance[b])  # (T, H, W)
            others = [other for other in pairs[1:] if other.score > NO_CAPTION]
            own = {name: signals[name][b, 0].item() for name in SIGNALS}
            confidence = None if calibration is None else float(estimate_confidence(calibration, own))
            kept = None if attention is None and importance is None else image
            results.append(CaptionResult(*pairs[0], best.words, attention, weights, others, kept, importance, own, confidence))
        return results


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and value >= least
