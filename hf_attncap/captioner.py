"""Pictures in, captions out, with where the model looked for each word."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, overload

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig

from .confidence import estimate_confidence
from .configuration_attncap import SIGNALS, AttnCapConfig
from .images import ImageError, load_image
from .importance import word_importance
from .modeling_attncap import AttnCapForConditionalGeneration
from .pipeline_attncap import CaptionPieces, check_prompt, generate_captions
from .processing_attncap import AttnCapProcessor
from .visualize import attention_layer, film_strip, importance_layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor

CHECKPOINT = Path(__file__).parent / "checkpoint"
NAMING = "name a folder with a config.json, or a captioner on the Hub as owner/name"
NO_CAPTION = -1e8  # beam search gives about -1e9 to a place of the n-best for which it found nothing
BATCH_PIXELS = 2**26  # of a stream's batch, which is in memory at once


class Alternative(NamedTuple):
    """A further caption for a picture, and its score."""

    text: str
    score: float


@dataclass(eq=False)
class CaptionResult:
    """What was said of one picture, and why. T words, a grid of H x W regions, E embedding components.

    Attributes:
        text: the caption, the prompt included.
        score: transformers' `sequences_scores`, for greedy captions too: the log-probabilities of what was
            generated (end token included, prompt not), summed and divided by its length in tokens to the power
            of the generation config's `length_penalty`. The nearer to 0, the likelier.
        words: the T words of `text`.
        attention: (T, H, W) float32, a map a word: how much the model looked at each region for it, in sum 1.
            The grid lies over the whole picture.
        word_attention: float32. For "history" (T, T), row t: how much what came before word t counted for it, in
            sum 1; column 0 is the start token and column j word j - 1. For "channel" (T, E): the weights of the
            components of the word before. Else None.
        alternatives: further captions, the best first, if they were asked for.
        image: the picture, upright and RGB, in its own proportions.
        importance: (T, H, W) float32, one map per word, in nats: how much the word's log-probability falls when the decoder does
            not see the region and its neighbours; negative where it rises. None unless it was asked for (`Captioner.explain`).
        signals: what the confidence is computed from: "score", "lowest" (the log-probability of the least likely generated token)
            and "entropy" (the mean entropy, in nats, of the distributions that the generated tokens were chosen from).
        confidence: the calibrated probability that `text` is a good caption: one with a CIDEr-D of at least the calibration's
            threshold (0.5) against the references of its image, with the document frequencies of the set of images that the
            calibration was fitted on. It holds for images like those and for the default decoding; with other `beams` it is an
            approximation. `None` if the checkpoint has no calibration, which `attncap calibrate` makes, or with a prompt, since
            the signals are then of the rest of the caption alone.
    """

    text: str
    score: float
    words: list[str]
    attention: np.ndarray = field(repr=False)
    word_attention: np.ndarray | None = field(repr=False)
    alternatives: list[Alternative]
    image: Image.Image = field(repr=False)
    importance: np.ndarray | None = field(default=None, repr=False)
    signals: dict[str, float] = field(repr=False, default_factory=dict)
    confidence: float | None = None

    def plot_attention(self, path: str | os.PathLike | None = None) -> "Figure":
        """A film strip: the picture, then for each word the picture in grey, lit where the model looked most.

        All words share one colour scale: how many times the even weight 1 / (H * W) a region got, from 1 up. A word
        for which the model looked everywhere evenly stays grey.

        Args:
            path: also save the figure there, in place of a file of that name; the ending says how (.png, .pdf, .svg).

        Raises:
            OSError: `path` cannot be written.
        """
        return film_strip(self.image, self.text, self.words, [attention_layer(self.attention)], path)

    def plot_importance(self, path: str | os.PathLike | None = None) -> "Figure":
        """A film strip with two maps per word: its attention, and below it its importance, each with its own colour scale.

        Importance is drawn in nats from 0 up; a word that does not depend on the picture stays grey, and so do regions below 0.

        Args:
            path: as for `plot_attention`.

        Raises:
            OSError: `path` cannot be written.
            ValueError: there is no importance.
        """
        if self.importance is None:
            raise ValueError("This result has no importance: make it with `Captioner.explain` or `explain=True`.")
        layers = [attention_layer(self.attention), importance_layer(self.importance)]
        return film_strip(self.image, self.text, self.words, layers, path)


class Captioner:
    """Captions pictures.

    Example:

    ```python
    captioner = Captioner.from_pretrained()
    result = captioner.caption("photo.jpg")
    print(result.text)
    result.plot_attention("photo_attention.png")
    ```

    Args:
        model: is put in evaluation mode, and used on the device that it is on.
        processor: the one that the model was trained with.
    """

    def __init__(self, model: AttnCapForConditionalGeneration, processor: AttnCapProcessor):
        self.model = model.eval()
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Self:
        """Loads a saved model and its processor.

        Args:
            name_or_path: a folder or a Hugging Face Hub repository. Default: the package's own checkpoint.
            device: such as "cpu" or "cuda:1". Default: "cuda" where there is a GPU, else "cpu".
            dtype: such as "bfloat16". Default: the checkpoint's.

        Raises:
            OSError: there is no such checkpoint, a file of it is missing or damaged, or it is another kind of model.
            ValueError: the device cannot be used.
        """
        if name_or_path is None and not (CHECKPOINT / "config.json").is_file():
            raise FileNotFoundError("This installation has no checkpoint of its own: name a folder or Hub repository.")
        source = str(CHECKPOINT if name_or_path is None else name_or_path)
        is_folder = os.path.isdir(source)
        if not is_folder:
            _check_hub_name(source)
        device = _usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        try:
            config = AutoConfig.from_pretrained(source)
            if not isinstance(config, AttnCapConfig):
                raise ValueError(f"it is of type '{config.model_type}', not 'attncap'.")
            model: Any = AttnCapForConditionalGeneration.from_pretrained(source, config=config, **chosen)
            processor: Any = AttnCapProcessor.from_pretrained(source)
        except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
            if is_folder:
                raise OSError(f"The folder '{source}' cannot be loaded as a captioner: {error}") from error
            # Behind the first line the library's own hints follow, which do not fit here.
            reason = str(error).partition("\n")[0] if isinstance(error, OSError) else str(error)
            raise OSError(
                f"'{source}' is no folder, and cannot be loaded from the Hub as a captioner ({reason.rstrip('.')}): {NAMING}."
            ) from error
        processor.image_processor.warn_of_other_statistics(config)
        return cls(model.to(device), processor)

    @overload
    def caption(
        self,
        images: ImageSource,
        *,
        beams: int | None = ...,
        alternatives: int = ...,
        prompt: str | None = ...,
        batch_size: int = ...,
        allow_private_urls: bool = ...,
        explain: bool = ...,
    ) -> CaptionResult: ...

    @overload
    def caption(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        beams: int | None = ...,
        alternatives: int = ...,
        prompt: str | None = ...,
        batch_size: int = ...,
        allow_private_urls: bool = ...,
        explain: bool = ...,
    ) -> list[CaptionResult]: ...

    def caption(
        self,
        images: ImageSource | list[Any] | tuple[Any, ...],
        *,
        beams: int | None = None,
        alternatives: int = 1,
        prompt: str | None = None,
        batch_size: int = 8,
        allow_private_urls: bool = False,
        explain: bool = False,
    ) -> CaptionResult | list[CaptionResult]:
        """One caption a picture, with where the model looked.

        Args:
            images: a path, URL, PIL image or whatever else `hf_attncap.images.load_image` reads, or a list.
            beams: how many captions to follow at a time; 1 is greedy. Default: as in the checkpoint's generation
                config, and at least `alternatives`.
            alternatives: how many captions a picture gets in all, the best one included; at most `beams`.
            prompt: the beginning of all captions, which they continue.
            batch_size: how many pictures go through the model together.
            allow_private_urls: also fetch from addresses that are not public.
            explain: also find the `importance` of each region for each word, which decodes the caption H * W times more.

        Returns:
            A result, or a list of results for a list.

        Raises:
            ImageError: a picture cannot be read; of a list it is the first such, and its index is named. All are read before
                the first is captioned.
            ValueError: a number below 1, more alternatives than beams, or a prompt with a word that the model
                does not know.
        """
        beams = self._checked_beams(beams, alternatives, prompt, batch_size)
        sources = images if isinstance(images, (list, tuple)) else [images]
        pictures = []
        for number, source in enumerate(sources):
            try:
                pictures.append(load_image(source, allow_private_urls=allow_private_urls))
            except ImageError as error:
                if sources is not images:
                    raise
                raise ImageError(f"images[{number}]: {error}") from error
        results = []
        for start in range(0, len(pictures), batch_size):
            results += self._caption_batch(pictures[start : start + batch_size], prompt, beams, alternatives, explain)
        return results if sources is images else results[0]

    @overload
    def explain(self, images: ImageSource, **options: Any) -> CaptionResult: ...

    @overload
    def explain(self, images: list[Any] | tuple[Any, ...], **options: Any) -> list[CaptionResult]: ...

    def explain(self, images: ImageSource | list[Any] | tuple[Any, ...], **options: Any) -> CaptionResult | list[CaptionResult]:
        """`caption` with `explain=True`: the same results, and which regions each word depends on in their `importance`.

        Args:
            images, options: what `caption` takes.
        """
        return self.caption(images, **options, explain=True)

    def stream(
        self,
        images: Iterable[ImageSource],
        *,
        on_error: Literal["raise", "yield"] = "raise",
        beams: int | None = None,
        alternatives: int = 1,
        prompt: str | None = None,
        batch_size: int = 8,
        allow_private_urls: bool = False,
        explain: bool = False,
    ) -> Iterator[CaptionResult | ImageError]:
        """One result per picture, in the order of the pictures, for any number of them.

        Pictures are read one batch at a time. A batch with more than 64 megapixels takes no further picture. If a batch fails,
        its pictures are captioned one by one, so that a failure costs only the picture that caused it.

        Args:
            images: what `caption` takes, from any iterable. It is read as far as results are taken.
            on_error: what happens with a picture that cannot be read or captioned. "raise": its `ImageError` is raised, after the
                results of the pictures before it. "yield": the error takes the place of its result.

        The other arguments are those of `caption`.

        Raises:
            ImageError: as described for `on_error`.
            ValueError: as `caption`; `images` is a single picture, or `on_error` is neither of the two.
        """
        if on_error not in ("raise", "yield"):
            raise ValueError(f"`on_error` is {on_error!r}, but it must be 'raise' or 'yield'.")
        if isinstance(images, (str, bytes, os.PathLike, Image.Image, np.ndarray, torch.Tensor)):
            raise ValueError("`images` is a single picture: use `caption`, or give a list of pictures.")
        beams = self._checked_beams(beams, alternatives, prompt, batch_size)

        def outcomes() -> Iterator[CaptionResult | ImageError]:
            for batch in _read_batches(images, batch_size, allow_private_urls):
                readable = [item for item in batch if isinstance(item[1], Image.Image)]
                found = iter(self._caption_each(readable, prompt, beams, alternatives, explain))
                for _, picture in batch:
                    outcome = picture if isinstance(picture, ImageError) else next(found)
                    if isinstance(outcome, ImageError) and on_error == "raise":
                        raise outcome
                    yield outcome

        return outcomes()

    def _checked_beams(self, beams: int | None, alternatives: int, prompt: str | None, batch_size: int) -> int:
        """The beams, by default those of the checkpoint; raises a ValueError for arguments that do not fit."""
        if beams is None:
            beams = max(self.model.generation_config.num_beams or 1, alternatives)
        for name, value in (("beams", beams), ("alternatives", alternatives), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}, but it must be at least 1.")
        if alternatives > beams:
            raise ValueError(f"{alternatives} `alternatives` need as many `beams` (now {beams}): raise them.")
        if prompt is not None:
            check_prompt(self.processor.tokenizer, prompt)
        return beams

    def _caption_each(self, named: list[tuple[str, Any]], *settings: Any) -> list[CaptionResult | ImageError]:
        """The results of pictures with their names; where a batch fails, each picture by itself, and errors for those that fail."""
        if not named:
            return []
        try:
            return list(self._caption_batch([picture for _, picture in named], *settings))
        except Exception as error:  # of many kinds: memory, devices, preprocessing
            if len(named) > 1:
                return [outcome for item in named for outcome in self._caption_each([item], *settings)]
            failure = ImageError(f"{named[0][0]} cannot be captioned: {describe_error(error)}")
            failure.__cause__ = error
            return [failure]

    @torch.inference_mode()
    def _caption_batch(
        self, pictures: list[Image.Image], prompt: str | None, beams: int, alternatives: int, explain: bool
    ) -> list[CaptionResult]:
        """B pictures with `alternatives` captions each, the best first."""
        inputs = self.processor(images=pictures, text=prompt, return_tensors="pt").to(self.model.device)
        encoded = self.model.get_encoder()(inputs.pop("pixel_values"))  # (B, N, C)
        found = generate_captions(
            self.model,
            **inputs,
            encoder_outputs=encoded,
            output_attentions=True,
            num_beams=beams,
            num_return_sequences=alternatives,
        )
        falls = word_importance(self.model, found["sequences"][:, 0], encoded) if explain else None  # (B, T, H, W)
        calibration = self.model.config.confidence if prompt is None else None
        signals = {"score": found["scores"], "lowest": found["lowest"], "entropy": found["entropy"]}
        results = []
        for b, picture in enumerate(pictures):
            captions = [CaptionPieces(self.processor.tokenizer, ids) for ids in found["sequences"][b].tolist()]
            pairs = [Alternative(pieces.text, score) for pieces, score in zip(captions, found["scores"][b].tolist())]
            best, weights = captions[0], found["word_attention"]
            attention = best.merge(found["attention"][b, 0])  # (T, H, W)
            if weights is not None:
                weights = best.merge(weights[b, 0], over_words=self.model.config.word_attention == "history")
            others = [other for other in pairs[1:] if other.score > NO_CAPTION]
            importance = None if falls is None else best.add_up(falls[b])  # (T, H, W)
            own = {name: signals[name][b, 0].item() for name in SIGNALS}
            confidence = None if calibration is None else float(estimate_confidence(calibration, own))
            results.append(CaptionResult(*pairs[0], best.words, attention, weights, others, picture, importance, own, confidence))
        return results


def _read_batches(
    images: Iterable[Any], batch_size: int, allow_private_urls: bool
) -> Iterator[list[tuple[str, Image.Image | ImageError]]]:
    """Batches of names and pictures, or the errors of pictures that cannot be read."""
    batch: list[tuple[str, Image.Image | ImageError]] = []
    pixels = 0
    for number, source in enumerate(images):
        name = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else f"images[{number}]"
        try:
            picture = load_image(source, allow_private_urls=allow_private_urls)
            pixels += picture.width * picture.height
        except ImageError as error:
            picture = error
        except Exception as error:  # of many kinds: sources of unknown types, memory
            picture = ImageError(f"{name} cannot be read: {describe_error(error)}")
            picture.__cause__ = error
        batch.append((name, picture))
        if len(batch) == batch_size or pixels > BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def describe_error(error: Exception) -> str:
    """The type of an error of any kind, and what it says."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _check_hub_name(source: str) -> None:
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise FileNotFoundError(f"'{source}' is no folder: {NAMING}.") from None


def _usable(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"The device '{device}' cannot be used ({reason}): leave it out or give 'cpu'.") from error
