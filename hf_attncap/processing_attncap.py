"""Images and captions to the model's inputs, and the model's ids back to text."""

from collections.abc import Sequence
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs

MAX_TARGET_WORDS = 20
IGNORED_LABEL = -100  # the label that the cross-entropy passes over


class AttnCapTextKwargs(TextKwargs, total=False):
    """Text arguments of a call; `max_target_length` is the number of words that a row of labels may have."""

    max_target_length: int


class AttnCapProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of a call to `AttnCapProcessor` beyond images and text."""

    text_kwargs: AttnCapTextKwargs  # pyright: ignore[reportIncompatibleVariableOverride]
    # transformers 5.17 reads it and fails where it is missing.
    _defaults = {}  # pyright: ignore[reportGeneralTypeIssues]


class AttnCapProcessor(ProcessorMixin):
    """An image processor and a tokenizer as one: images, prompts and captions in, model inputs out.

    `decode` and `batch_decode` are the tokenizer's: ids back to text.

    Args:
        image_processor (`AttnCapImageProcessor`): makes `pixel_values`.
        tokenizer (`PreTrainedTokenizerFast`): pads on the left, and has a pad and an end token.
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
        """Prepares what is given of images, prompts and captions; everything returned has a batch axis B.

        Args:
            images: one picture or a list of B.
            text: the prompts, beginnings for the captions to continue: a list of B, or one for all images.
                They get no special tokens and, unless `padding` says otherwise, are padded to the longest.
                "" is no prompt.
            text_target: the captions to learn from: a list of B, or one string.
            max_target_length: how many words of a caption are kept, 20 by default. A caption that is cut gets
                no end token: its last word is not where the sentence ends.
            return_tensors: "pt" or "np"; without it, token ids are lists.
            kwargs: further arguments of the image processor and, for prompts, of the tokenizer; flat or in
                `images_kwargs` and `text_kwargs`.

        Returns:
            `BatchFeature` with, for what was given, `pixel_values` (B, 3, H, W) float32; `input_ids` and
            `attention_mask` (B, T) int64, T = 0 if no prompt has a word; `labels` (B, T) int64, words and end
            token, padded with -100 on the right.

        Raises:
            ValueError: nothing was given; text is no string or list of strings; not one prompt or caption for
                each image; `max_target_length` is below 1.
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
        """Each caption's first `max_words` words, the end token if those are all, and -100 on the right."""
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
    """`values` as a list, if they are strings and one for each of `rows` images (None: any number)."""
    if not isinstance(values, (list, tuple)) or not values or any(not isinstance(v, str) for v in values):
        raise ValueError(f"`{name}` must be a string or a non-empty list of strings, got {values!r:.200}.")
    if rows is not None and len(values) != rows:
        raise ValueError(f"`{name}` has {len(values)} entries for {rows} images: give one for each image.")
    return list(values)


__all__ = ["AttnCapProcessor"]
