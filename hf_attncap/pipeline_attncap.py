"""`pipeline("image-captioning")`: captions of images with their scores and, on request, the attention of each word."""

import base64
import io
import os
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save

from .image_files_attncap import open_image, upright

try:  # transformers needs one of them
    from huggingface_hub.utils import httpx
except ImportError:
    import httpx  # pyright: ignore[reportMissingImports]


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
    - `timeout`: of a download, in seconds; none by default.
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
            inputs: an image: PIL image, path, URL or base64 string; or a dictionary of an image and a prompt,
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
            ValueError: an image cannot be read; the number of prompts differs from the number of images; the model does not know
                a word of a prompt; `generate` does not know an argument.
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
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if text is not None and prompt is not None:
            raise ValueError("`text` and `prompt` are two names of the same option: give one of them.")
        twice = sorted(set(generate_kwargs or {}) & set(kwargs))
        if twice:
            raise ValueError(f"{', '.join(twice)}: given directly and in `generate_kwargs`: give it once.")
        text = prompt if text is None else text
        given = {"text": text, "timeout": timeout}
        return (
            {name: value for name, value in given.items() if value is not None},
            {**(generate_kwargs or {}), **kwargs},
            {},
        )

    def preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_: Any, text: str = "", timeout: float | None = None
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
        source = os.fspath(input_) if isinstance(input_, os.PathLike) else input_
        try:
            image = source if isinstance(source, Image.Image) else open_image(_stream(source, timeout))
            image = upright(image).convert("RGB")
        except Exception as error:
            raise ValueError(f"This image cannot be read: {source!r:.200}. {error}") from error
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
        tensors: dict[str, Any] = {name: None if value is None else value[0] for name, value in model_outputs.items()}
        regions, weights = tensors["attention"], tensors["word_attention"]
        captions = []
        for k, ids in enumerate(tensors["sequences"].tolist()):
            pieces = CaptionPieces(self.tokenizer, ids)
            caption = {"generated_text": pieces.text, "score": tensors["scores"][k].item()}
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


def _stream(source: Any, timeout: float | None) -> BinaryIO:
    """The content of a path, URL or base64 string."""
    if not isinstance(source, str):
        raise TypeError("Give a PIL image, a path, a URL or a base64 string.")
    if source.startswith(("http://", "https://")):
        return io.BytesIO(httpx.get(source, timeout=timeout, follow_redirects=True).raise_for_status().content)
    if os.path.isfile(source):
        return io.BytesIO(Path(source).read_bytes())
    try:
        payload = source.partition(",")[2] if source.startswith("data:image/") else source
        return io.BytesIO(base64.b64decode("".join(payload.split()), validate=True))
    except ValueError as error:
        raise ValueError(f"It is not a file, a URL or base64 ({error}).") from error


def _with_prompts(images: Any, prompts: list[str] | tuple[str, ...]) -> list[dict[str, Any]]:
    if not isinstance(images, (list, tuple)) or len(images) != len(prompts):
        count = f"{len(images)} images" if isinstance(images, (list, tuple)) else "an input that is not a list"
        raise ValueError(f"`text` is a list of {len(prompts)} for {count}: give one string for all images, or one per image.")
    return [{"images": image, "text": prompt} for image, prompt in zip(images, prompts)]


def check_prompt(tokenizer: Any, prompt: str) -> None:
    """Raises a ValueError if a prompt is not a string or has words that the model does not know."""
    if not isinstance(prompt, str):
        raise ValueError(f"The prompt must be one string, got {prompt!r:.200}.")
    unknown = [word for word in prompt.split() if tokenizer.unk_token_id in tokenizer(word)["input_ids"]]
    if unknown:
        raise ValueError(f"The model does not know {', '.join(unknown)} in the prompt {prompt!r}: rephrase it.")


@torch.no_grad()
def generate_captions(
    model: Any,
    pixel_values: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    output_attentions: bool = False,
    encoder_outputs: Any = None,
    **generate_kwargs: Any,
) -> dict[str, Any]:
    """Calls `model.generate` and adds scores and, on request, attention, for every decoding method.

    Args:
        model: `AttnCapForConditionalGeneration`.
        pixel_values: (B, 3, height, width).
        input_ids, attention_mask: (B, t), the prompts, left-padded and without start token; t may be 0.
        output_attentions: also compute the attention, in one further forward pass over the captions.
        encoder_outputs: the encoder's output with `grid_shape`, instead of `pixel_values`.
        generate_kwargs: arguments of `generate`.

    Returns:
        For k = `num_return_sequences` captions per image:

        - `sequences` (B, k, T + 1), start token first
        - `scores` (B, k): `sequences_scores`, for greedy search and sampling too
        - `lowest` (B, k): the log-probability of the least likely generated token
        - `entropy` (B, k): the mean entropy, in nats, of the distributions of the generated tokens
        - `attention` (B, k, T, H, W) and `word_attention` (B, k, T, T) or (B, k, T, E) as `caption_attentions`, or None

        `lowest` and `entropy` use the model's distributions before logits processors, and include the end token.
    """
    if encoder_outputs is None:
        encoder_outputs = model.get_encoder()(pixel_values)  # (B, N, C)
    out = model.generate(
        encoder_outputs=encoder_outputs,
        input_ids=input_ids,
        attention_mask=attention_mask,
        **{**generate_kwargs, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    )
    batch = encoder_outputs.last_hidden_state.shape[0]
    regions = weights = None
    if output_attentions:
        regions, weights = _attentions(model, out.sequences, encoder_outputs, attention_mask)
    found = {
        "sequences": out.sequences,
        **_signals(model, out, generate_kwargs),
        "attention": regions,
        "word_attention": weights,
    }
    return {name: None if rows is None else rows.unflatten(0, (batch, -1)) for name, rows in found.items()}


def _attentions(
    model: Any, sequences: torch.Tensor, encoder_outputs: Any, prompt_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`caption_attentions` of sequences (R, T + 1) with padded prompts, whose mask is (B, t)."""
    if prompt_mask is None or prompt_mask.all():
        return model.caption_attentions(sequences, encoder_outputs=encoder_outputs)
    rows, steps = sequences.shape[0], sequences.shape[1] - 1
    is_word = torch.ones_like(sequences[:, :-1])  # (R, T)
    is_word[:, 1 : 1 + prompt_mask.shape[1]] = prompt_mask.repeat_interleave(rows // prompt_mask.shape[0], 0)
    regions, weights = model.caption_attentions(sequences, encoder_outputs=encoder_outputs, decoder_attention_mask=is_word)
    # A word after padding was chosen at the last word before the padding.
    step = torch.arange(steps, device=sequences.device)  # (T)
    chosen_at = torch.where(is_word.bool(), step, 0).cummax(dim=1).values  # (R, T)
    row = torch.arange(rows, device=sequences.device)[:, None]  # (R, 1)
    return regions[row, chosen_at], None if weights is None else weights[row, chosen_at]


def _signals(model: Any, out: Any, generate_kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`scores`, `lowest` and `entropy` (R) of the output of `generate`."""
    settings = dict(generate_kwargs)
    config, _ = model._prepare_generation_config(settings.pop("generation_config", None), **settings)
    logits = torch.stack(out.logits, dim=1)  # (rows, steps, V)
    beams = getattr(out, "beam_indices", None)  # (R, T), -1 after the end
    if beams is None:
        tokens = out.sequences[:, -logits.shape[1] :]  # (R, T)
        generated = _until_end(tokens, config.eos_token_id)  # (R, T)
    else:
        tokens = out.sequences[:, -beams.shape[1] :][:, : logits.shape[1]]  # (R, T)
        beams = beams[:, : logits.shape[1]]  # (R, T)
        generated = beams >= 0  # (R, T)
        logits = logits[beams.clamp(min=0), torch.arange(beams.shape[1], device=logits.device)]  # (R, T, V)
    log_probs = logits.float().log_softmax(dim=-1)  # (R, T, V)
    chosen = log_probs.gather(-1, tokens[..., None]).squeeze(-1).where(generated, 0)  # (R, T)
    entropies = torch.special.entr(log_probs.exp()).sum(dim=-1).where(generated, 0)  # (R, T)
    count = generated.sum(dim=1).clamp(min=1)  # (R)
    scores = getattr(out, "sequences_scores", None)  # (R)
    if scores is None:
        scores = chosen.sum(dim=1) / count**config.length_penalty  # (R)
    return {"scores": scores, "lowest": chosen.amin(dim=1), "entropy": entropies.sum(dim=1) / count}


def _until_end(tokens: torch.Tensor, ends: Any) -> torch.Tensor:
    """(R, T): which tokens (R, T) are not after the end token."""
    is_end = torch.isin(tokens, torch.tensor([] if ends is None else ends, device=tokens.device))  # (R, T)
    return is_end.cumsum(dim=1) - is_end.long() == 0


class CaptionPieces:
    """The text of a generated sequence, and the tokens of each of its words.

    Args:
        tokenizer: a word or subword tokenizer.
        ids: the T + 1 tokens of the sequence, start token first. Special tokens belong to no word.

    Attributes:
        text: the caption.
        words: its W words.
    """

    def __init__(self, tokenizer: Any, ids: list[int]):
        special = set(tokenizer.all_special_ids)
        positions = [position for position, token in enumerate(ids) if token not in special]
        pieces = [ids[position] for position in positions]
        self.text: str = tokenizer.decode(pieces)
        self.words = self.text.split()
        last = len(self.words) - 1
        # The number of words from a token onward gives its word, both for tokenizers that mark the beginning of a word ("▁do",
        # "g") and for those that mark its continuation ("do", "##g").
        words_left = [len(tokenizer.decode(pieces[n:]).split()) for n in range(len(pieces))]
        self._word_of = {position: min(last + 1 - left, last) for position, left in zip(positions, words_left) if self.words}

    def merge(self, rows: torch.Tensor, over_words: bool = False) -> np.ndarray:
        """Averages rows of tokens over the tokens of each word.

        Args:
            rows: (T, ...); row t belongs to token t + 1 as in `caption_attentions`.
            over_words: the columns of rows (T, T) are tokens too; sum them over the tokens of each word. Weights between the tokens
                of one word are dropped.

        Returns:
            float32 (W, ...); each row sums to 1. With `over_words` (W, W): column 0 is the start token and column j word j - 1.
        """
        values = rows.float().cpu().numpy()  # (T, ...)
        mean = self._tokens_of_words(len(values))  # (W, T)
        total = np.zeros((len(values), 1 + len(self.words)), dtype=np.float32)  # (T, 1 + W)
        total[0, 0] = 1
        for position, word in self._word_of.items():
            total[position : position + 1, 1 + word] = 1  # the last token is not an input and has no column
        mean /= mean.sum(axis=1, keepdims=True)
        merged = np.tensordot(mean, values, axes=1)  # (W, ...)
        if over_words:
            merged = np.tril(merged @ total[:, :-1])  # (W, W)
        return merged / merged.sum(axis=tuple(range(1, merged.ndim)), keepdims=True)

    def add_up(self, rows: torch.Tensor) -> np.ndarray:
        """Sums rows (T, ...), row t of token t + 1, over the tokens of each word: float32 (W, ...)."""
        values = rows.float().cpu().numpy()  # (T, ...)
        return np.tensordot(self._tokens_of_words(len(values)), values, axes=1)  # (W, ...)

    def _tokens_of_words(self, tokens: int) -> np.ndarray:
        """(W, T) float32: 1 if token t + 1 is a part of the word, else 0."""
        parts = np.zeros((len(self.words), tokens), dtype=np.float32)  # (W, T)
        for position, word in self._word_of.items():
            parts[word, position - 1] = 1
        return parts


__all__ = ["AttnCapPipeline", "CaptionPieces", "check_prompt", "generate_captions"]
