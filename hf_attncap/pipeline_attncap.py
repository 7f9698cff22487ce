"""`pipeline("image-captioning")`: captions of images with their scores and, on request, the attention of each word."""

import os
from collections.abc import Generator, Iterable, Mapping
from typing import Any

from torch.utils.data import Dataset
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save

from .captions_attncap import generate_captions
from .images_attncap import load_image
from .words_attncap import CaptionPieces, check_prompt


class AttnCapPipeline(Pipeline):
    """Captions images.

    ```python
    captioner = pipeline("image-captioning", model=folder)
    captioner("dog.jpg")  # [{"generated_text": "a dog runs on the beach", "score": -0.61}]
    captioner(["dog.jpg", image], text="a dog", num_beams=3, output_attentions=True, batch_size=2)
    ```

    Options, given to `pipeline(...)` for all calls or to a single call:

    - `text` (or `prompt`): the beginning of the captions: one string, or one per image. "" by default.
    - `output_attentions`: also return the attention, False by default.
    - `timeout`: of a download, in seconds; 30 by default.
    - `allow_private_urls`: also fetch URLs that lead to private addresses, False by default.
    - `generate_kwargs`, or flat: arguments of the model's `generate`, such as `num_beams`, `max_new_tokens`, `do_sample` or
      `num_return_sequences`. Defaults are those of the model's generation config.
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = False
    processor: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model.eval()  # a model in training mode would apply dropout

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Captions one image or many.

        Args:
            inputs: an image, in any form that `Captioner.caption` takes; or a dictionary of an image and a prompt,
                `{"images": image, "text": "a dog"}`; or a list or tuple of these; or a dataset, generator or other iterable of
                these, which is read lazily.
            kwargs: the options above, and the pipeline's `batch_size` (1 by default) and `num_workers`.

        Returns:
            For an image, a list of dictionaries, one per returned sequence, best first with beam search. For a list of images, a
            list of such lists. For other iterables, an iterator over such lists. A dictionary has

            - `generated_text`: the caption, including the prompt.
            - `score`: what `generate` calls `sequences_scores`: the sum of the log-probabilities of the generated tokens (with
              the end token, without the prompt) / their number ** `length_penalty`.

            and with `output_attentions`, for the W words of the caption including the prompt,

            - `words`: list of W strings; subword tokens are merged.
            - `attention`: float32 array (W, height, width of the grid), one map per word; each map sums to 1.
            - `word_attention`: float32 array. With `word_attention="history"` in the config (W, W): row w holds the weights of
              the words before word w, which sum to 1; column 0 is the start token and column j word j - 1. With "channel":
              (W, E). Otherwise None.

        Raises:
            ValueError: an image cannot be read or its URL is refused (then an `ImageError`); the number of prompts differs from the
                number of images; the model does not know a word of a prompt; `generate` does not know an argument.
        """
        for name in ("text", "prompt"):
            if isinstance(kwargs.get(name), (list, tuple)):
                inputs = _with_prompts(inputs, kwargs.pop(name))
        if isinstance(inputs, (list, tuple)):
            return super().__call__(list(inputs), **kwargs) if inputs else []
        if isinstance(inputs, Iterable) and not isinstance(inputs, (str, Mapping, Dataset, Generator)):
            inputs = (item for item in inputs)
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        text: str | None = None,
        prompt: str | None = None,
        timeout: float | None = None,
        allow_private_urls: bool | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if text is not None and prompt is not None:
            raise ValueError("`text` and `prompt` are two names of the same option: give one of them.")
        twice = sorted(set(generate_kwargs or {}) & set(kwargs))
        if twice:
            raise ValueError(f"{', '.join(twice)}: given directly and in `generate_kwargs`: give it once.")
        text = prompt if text is None else text
        given = {"text": text, "timeout": timeout, "allow_private_urls": allow_private_urls}
        return (
            {name: value for name, value in given.items() if value is not None},
            {**(generate_kwargs or {}), **kwargs},
            {},
        )

    def preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_: Any, text: str = "", timeout: float | None = None, allow_private_urls: bool = False
    ) -> dict[str, Any]:
        """Loads one image as `pixel_values` (1, 3, height, width). The prompt stays text, to be padded with its batch."""
        if isinstance(input_, Mapping):
            if not {"images"} <= set(input_) <= {"images", "text"}:
                raise ValueError(
                    f"The input is a dictionary with the keys {', '.join(map(repr, input_))}: give `images` and optionally `text`. "
                    "For a dataset, give its column, `dataset['image']`."
                )
            input_, text = input_["images"], input_.get("text", text)
        check_prompt(self.tokenizer, text)
        image = load_image(input_, allow_private_urls=allow_private_urls, timeout=timeout)
        return {
            "pixel_values": self.processor(images=image, return_tensors="pt")["pixel_values"],
            "text": text,
        }

    def _forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_tensors: dict[str, Any], **generate_kwargs: Any
    ) -> dict[str, Any]:
        texts = input_tensors["text"]
        prompts = self.processor(text=[texts] if isinstance(texts, str) else texts, return_tensors="pt").to(self.device)
        return generate_captions(self.model, input_tensors["pixel_values"], **prompts, **generate_kwargs)

    def postprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_outputs: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The captions of one image."""
        sequences, scores = model_outputs["sequences"][0], model_outputs["scores"][0]  # (k, T + 1), (k)
        regions, weights = (  # (k, T, H, W), and (k, T, T) or (k, T, E)
            None if rows is None else rows[0].float().cpu().numpy()
            for rows in (model_outputs["attention"], model_outputs["word_attention"])
        )
        captions = []
        for k, ids in enumerate(sequences.tolist()):
            pieces = CaptionPieces(self.tokenizer, ids)
            caption = {"generated_text": pieces.text, "score": scores[k].item()}
            if regions is not None:
                caption["words"] = pieces.words
                caption["attention"] = pieces.merge(regions[k])
                over_words = self.model.config.word_attention == "history"
                caption["word_attention"] = None if weights is None else pieces.merge(weights[k], over_words)
            captions.append(caption)
        return captions

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves the model and the processor, for `pipeline("image-captioning", model=save_directory)`.

        A model that was loaded with remote code is saved with it; other models are saved without code.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)
        if self.model._auto_class is not None and getattr(self.model.config, "custom_pipelines", None):
            custom_object_save(self, save_directory)


def _with_prompts(images: Any, prompts: list[str] | tuple[str, ...]) -> list[dict[str, Any]]:
    if not isinstance(images, (list, tuple)) or len(images) != len(prompts):
        count = f"{len(images)} images" if isinstance(images, (list, tuple)) else "an input that is not a list"
        raise ValueError(f"`text` is a list of {len(prompts)} for {count}: give one string for all images, or one per image.")
    return [{"images": image, "text": prompt} for image, prompt in zip(images, prompts)]


__all__ = ["AttnCapPipeline"]
