"""The processor: images, prompts and captions to model inputs, and token ids back to text."""

from collections.abc import Sequence
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs

MAX_TARGET_WORDS = 20
IGNORED_LABEL = -100  # the cross-entropy ignores this label


class AttnCapTextKwargs(TextKwargs, total=False):
    """Text arguments of a call; `max_target_length` is the maximum number of words in a row of labels."""

    max_target_length: int


class AttnCapProcessorKwargs(ProcessingKwargs, total=False):
    """Further arguments of a call to `AttnCapProcessor`."""

    text_kwargs: AttnCapTextKwargs  # pyright: ignore[reportIncompatibleVariableOverride]
    # transformers 5.17 needs this attribute.
    _defaults = {}  # pyright: ignore[reportGeneralTypeIssues]


class AttnCapProcessor(ProcessorMixin):
    """Combines an image processor and a tokenizer. `decode` and `batch_decode` are those of the tokenizer.

    Args:
        image_processor (`AttnCapImageProcessor`): computes `pixel_values`.
        tokenizer (`PreTrainedTokenizerFast`): must pad on the left and have a pad and an end token.
    """

    valid_processor_kwargs = AttnCapProcessorKwargs

    def __init__(self, image_processor, tokenizer):
        super().__init__(image_processor, tokenizer)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares images, prompts and captions, each optional. All outputs have a batch axis B.

        Args:
            images: one image or a list of B.
            text: the prompts, which the captions continue: a list of B, or one string for all images. Prompts get no special
                tokens and are padded to the longest, unless `padding` is given. "" means no prompt.
            text_target: the training captions: a list of B, or one string.
            max_target_length: the maximum number of words per caption, 20 by default. Truncated captions get no end token.
            return_tensors: "pt" or "np"; without it, token ids are lists.
            kwargs: further arguments of the image processor and, for prompts, of the tokenizer; flat or in `images_kwargs` and
                `text_kwargs`.

        Returns:
            `BatchFeature` with `pixel_values` (B, 3, H, W) float32 for images; `input_ids` and `attention_mask` (B, T) int64 for
            prompts, with T = 0 if all are empty; `labels` (B, T) int64 for captions: words and end token, right-padded with -100.

        Raises:
            ValueError: no input; text is not a string or a list of strings; the numbers of images, prompts and captions differ;
                `max_target_length` is below 1.
        """
        merged: dict[str, dict[str, Any]] = self._merge_kwargs(
            AttnCapProcessorKwargs,  # pyright: ignore[reportArgumentType]
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )
        text_kwargs = merged["text_kwargs"]
        captions = text_kwargs.pop("text_target", None)
        max_words = text_kwargs.pop("max_target_length", MAX_TARGET_WORDS)
        if images is None and text is None and captions is None:
            raise ValueError("Nothing to process: give `images`, `text` (prompts) or `text_target` (captions).")

        data: dict[str, Any] = {}
        if images is not None:
            data.update(self.image_processor(images, **merged["images_kwargs"]))  # pixel_values (B, 3, H, W)
        rows = len(data["pixel_values"]) if images is not None else None
        if text is not None:
            prompts = [text] * (rows or 1) if isinstance(text, str) else _strings("text", text, rows)
            text_kwargs.setdefault("add_special_tokens", False)
            text_kwargs.setdefault("padding", True)
            data.update(self.tokenizer(prompts, **text_kwargs))  # input_ids, attention_mask (B, T)
        if captions is not None:
            captions = _strings("text_target", [captions] if isinstance(captions, str) else captions, rows)
            data["labels"] = self._labels(captions, max_words)  # (B, T)
        return BatchFeature(data, tensor_type=text_kwargs.get("return_tensors"))

    def _labels(self, captions: list[str], max_words: int) -> list[list[int]]:
        """The first `max_words` words of each caption, the end token if none was cut off, and -100 as right padding."""
        if not isinstance(max_words, int) or max_words < 1:
            raise ValueError(f"`max_target_length` must be a number of words, at least 1, got {max_words!r}.")
        encoded = self.tokenizer(captions, add_special_tokens=False, padding=False, verbose=False)
        labels = []
        for row, ids in enumerate(encoded["input_ids"]):
            word_of = encoded.word_ids(row)
            kept = [token for token, word in zip(ids, word_of, strict=True) if word < max_words]
            labels.append(kept if len(kept) < len(ids) else [*kept, self.tokenizer.eos_token_id])
        longest = max(map(len, labels))
        return [ids + [IGNORED_LABEL] * (longest - len(ids)) for ids in labels]


def _strings(name: str, values: Sequence[str], rows: int | None) -> list[str]:
    """`values` as a list; raises unless they are strings, one for each of `rows` images (None: any number)."""
    if not isinstance(values, (list, tuple)) or not values or any(not isinstance(v, str) for v in values):
        raise ValueError(f"`{name}` must be a string or a non-empty list of strings, got {values!r:.200}.")
    if rows is not None and len(values) != rows:
        raise ValueError(f"`{name}` has {len(values)} entries for {rows} images: give one for each image.")
    return list(values)


__all__ = ["AttnCapProcessor"]
