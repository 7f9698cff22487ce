"""Pictures in, captions out, with where the model looked for each word."""

import math
import os
import textwrap
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoConfig

from .configuration_attncap import AttnCapConfig
from .images import load_image
from .modeling_attncap import AttnCapForConditionalGeneration
from .processing_attncap import AttnCapProcessor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHECKPOINT = Path(__file__).parent / "checkpoint"
NO_CAPTION = -1e8  # beam search gives about -1e9 to a place of the n-best for which it found nothing

PANELS_A_ROW = 6
PANEL_AREA = 5.3  # square inches, whatever the shape of the picture
DOTS = 150  # an inch
FULL_SCALE = 4.0  # times the even weight: the least that a film strip's brightest colour stands for


class Alternative(NamedTuple):
    """A further caption for a picture, and its score."""

    text: str
    score: float


@dataclass(eq=False)
class CaptionResult:
    """What was said of one picture, and why. T words, a grid of H x W regions, E embedding components.

    Attributes:
        text: the caption, the prompt included.
        score: the sum of the log-probabilities of what was generated (the end token included, the prompt not), divided
            by its length in tokens to the power of the generation config's `length_penalty`: transformers'
            `sequences_scores`, for greedy captions too. Nearer to 0 is more likely.
        words: the T words of `text`, those of the prompt included.
        attention: (T, H, W) float32, one map a word: how much the model looked at each region for it, in sum 1. The
            grid lies over the whole picture.
        word_attention: for `word_attention="history"` (T, T) float32: row t tells how much each earlier word counted for
            word t, in sum 1; column 0 is the start of the sentence and column j word j - 1. For "channel" (T, E), the
            weights of the components of the word before. Else None.
        alternatives: further captions, the best first, if they were asked for.
        image: the picture, upright and RGB, in its own proportions.
    """

    text: str
    score: float
    words: list[str]
    attention: np.ndarray = field(repr=False)
    word_attention: np.ndarray | None = field(repr=False)
    alternatives: list[Alternative]
    image: Image.Image = field(repr=False)

    def plot_attention(self, path: str | os.PathLike | None = None) -> "Figure":
        """A film strip: the picture, then for each word the picture in grey, lit where the model looked.

        All words share one colour scale: how many times the even weight 1 / (H * W) a region got.

        Args:
            path: also save the figure there; the ending says how (.png, .pdf, .svg).

        Raises:
            OSError: `path` cannot be written.
        """
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure

        shape = self.image.width / self.image.height
        width = (PANEL_AREA * min(max(shape, 0.4), 2.5)) ** 0.5
        height = min(PANEL_AREA / width, width / shape)
        panels = len(self.words) + 1
        rows = math.ceil(panels / PANELS_A_ROW)
        columns = math.ceil(panels / rows)
        heading = textwrap.fill(self.text, max(20, int(columns * width * 6.5)))
        top = 0.25 + 0.3 * (heading.count("\n") + 1)
        figure = Figure(
            figsize=(columns * (width + 0.1) + 0.8, rows * (height + 0.35) + top),
            dpi=DOTS,
            layout="constrained",
        )
        figure.suptitle(heading, fontsize=17, parse_math=False)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes:
            axis.axis("off")

        times_even = self.attention * self.attention[0].size if self.words else self.attention  # (T, H, W)
        scale = PowerNorm(0.8, 0, max(FULL_SCALE, float(times_even.max(initial=0))))
        photo = ImageOps.contain(self.image, (int(max(width, height) * DOTS),) * 2, Image.Resampling.LANCZOS)
        axes[0].imshow(photo)
        for axis, word, weights in zip(axes[1:], self.words, times_even, strict=False):
            axis.imshow(_lit(photo, scale(weights), colormaps["inferno"]))
            axis.set_title(word, fontsize=14, pad=4, parse_math=False)
        if self.words:
            bar = figure.colorbar(ScalarMappable(scale, "inferno"), ax=list(axes), aspect=30 * rows, pad=0.01)
            bar.set_label("attention (1 = even)", fontsize=11)
        if path is not None:
            figure.savefig(path)
        return figure


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
        model: is put in evaluation mode and used on the device that it is on.
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
            name_or_path: a folder, or a repository on the Hugging Face Hub. Default: the checkpoint that comes with the
                package.
            device: such as "cpu" or "cuda:1". Default: "cuda" where there is a GPU, else "cpu".
            dtype: such as "bfloat16". Default: the checkpoint's.

        Raises:
            OSError: there is no such checkpoint, or a file of it is missing or damaged.
            ValueError: the checkpoint is of another kind of model, or the device is not to be had.
        """
        if name_or_path is None and not (CHECKPOINT / "config.json").is_file():
            raise FileNotFoundError(
                "This installation of hf_attncap comes without a checkpoint: name a folder or a repository on the Hub."
            )
        source = str(CHECKPOINT if name_or_path is None else name_or_path)
        device = _usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        config = AutoConfig.from_pretrained(source)
        if not isinstance(config, AttnCapConfig):
            raise ValueError(
                f"{source} holds a model of type '{config.model_type}': give one of type 'attncap'."
            )
        chosen: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        model = AttnCapForConditionalGeneration.from_pretrained(source, config=config, **chosen)
        return cls(model.to(device), AttnCapProcessor.from_pretrained(source))

    @overload
    def caption(self, images: list | tuple, **options: Any) -> list[CaptionResult]: ...

    @overload
    def caption(self, images: Any, **options: Any) -> CaptionResult: ...

    def caption(
        self,
        images: Any,
        *,
        beams: int | None = None,
        alternatives: int = 1,
        prompt: str | None = None,
        batch_size: int = 8,
        allow_private_urls: bool = False,
    ) -> CaptionResult | list[CaptionResult]:
        """One caption a picture, with where the model looked.

        Args:
            images: whatever `hf_attncap.images.load_image` reads (path, URL, bytes, PIL image, array, tensor), or a list.
            beams: how many captions to follow at a time; 1 is greedy. Default: as the checkpoint's generation config
                says, and at least `alternatives`.
            alternatives: how many captions a picture gets in all, the best one included; at most `beams`.
            prompt: the beginning of all captions, which they continue.
            batch_size: how many pictures go through the model together.
            allow_private_urls: also fetch from addresses that are not public.

        Returns:
            A result, or a list of results for a list.

        Raises:
            ImageError: a picture cannot be read. All are read before the first is captioned.
            ValueError: a number below 1, more alternatives than beams, or a prompt with words that the model does not know.
        """
        if beams is None:
            beams = max(self.model.generation_config.num_beams or 1, alternatives)
        for name, value in (("beams", beams), ("alternatives", alternatives), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}, but it must be at least 1.")
        if alternatives > beams:
            raise ValueError(
                f"{alternatives} `alternatives` need as many beams, but `beams` is {beams}: raise it or leave it out."
            )
        if prompt is not None:
            self._check_prompt(prompt)
        several = isinstance(images, (list, tuple))
        sources = images if several else [images]
        pictures = [load_image(source, allow_private_urls=allow_private_urls) for source in sources]
        results = []
        for start in range(0, len(pictures), batch_size):
            results += self._caption_batch(pictures[start : start + batch_size], prompt, beams, alternatives)
        return results if several else results[0]

    def _check_prompt(self, prompt: str) -> None:
        if not isinstance(prompt, str):
            raise ValueError(f"`prompt` must be one string for all pictures, got {prompt!r:.200}.")
        tokenizer = self.processor.tokenizer
        unknown = [word for word in prompt.split() if tokenizer.unk_token_id in tokenizer(word).input_ids]
        if unknown:
            raise ValueError(
                f"The prompt {prompt!r} has words that the model does not know: {', '.join(unknown)}."
            )

    @torch.inference_mode()
    def _caption_batch(
        self, pictures: list[Image.Image], prompt: str | None, beams: int, alternatives: int
    ) -> list[CaptionResult]:
        """B pictures, R = B * alternatives captions; the R / B of a picture are adjacent rows, the best first."""
        inputs = self.processor(images=pictures, text=prompt, return_tensors="pt").to(self.model.device)
        seen = self.model.model.encoder(inputs.pop("pixel_values"))
        out: Any = self.model.generate(
            encoder_outputs=seen,
            **inputs,
            num_beams=beams,
            num_return_sequences=alternatives,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=beams == 1,
        )
        scores = out.sequences_scores if beams > 1 else self._greedy_scores(out)  # (R)
        best = out.sequences[::alternatives]  # (B, 1 + T)
        maps, weights = self.model.caption_attentions(
            best, encoder_outputs=seen
        )  # (B, T, H, W), (B, T, .) or None

        tokens = [self._tokens(row) for row in out.sequences.tolist()]
        texts = [self.processor.decode(row, skip_special_tokens=True) for row in tokens]
        found = [Alternative(*each) for each in zip(texts, scores.tolist(), strict=True)]
        results = []
        for b, picture in enumerate(pictures):
            first, *others = found[b * alternatives : (b + 1) * alternatives]
            words, groups = _merge_pieces(self.processor, tokens[b * alternatives])
            attention = _mean_rows(maps[b].float().cpu().numpy(), groups)
            word_attention = None if weights is None else weights[b].float().cpu().numpy()
            if word_attention is not None and self.model.config.word_attention == "history":
                word_attention = _sum_columns(word_attention, groups)
            if word_attention is not None:
                word_attention = _mean_rows(word_attention, groups)
            others = [other for other in others if other.score > NO_CAPTION]
            results.append(CaptionResult(*first, words, attention, word_attention, others, picture))
        return results

    def _tokens(self, sequence: list[int]) -> list[int]:
        """The tokens of the caption alone: behind the start token and up to the end token."""
        end = self.processor.tokenizer.eos_token_id
        return sequence[1 : sequence.index(end) if end in sequence else None]

    def _greedy_scores(self, out: Any) -> torch.Tensor:
        """(R) scores as beam search computes them, from what greedy search (or sampling) generated."""
        config = self.model.generation_config
        processed, logits = torch.stack(out.scores, dim=1), torch.stack(out.logits, dim=1)  # (R, T, V)
        chosen = out.sequences[:, -processed.shape[1] :]  # (R, T)
        # Beams process log-probabilities where greedy search processes logits: the normaliser is what differs.
        log_probs = processed.gather(2, chosen[..., None]).squeeze(2) - logits.logsumexp(dim=2)  # (R, T)
        is_end = chosen == self.processor.tokenizer.eos_token_id  # (R, T)
        after_end = is_end.cumsum(dim=1) - is_end.long() > 0  # (R, T)
        length = (~after_end).sum(dim=1)  # (R)
        penalty = 1.0 if config.length_penalty is None else config.length_penalty
        return log_probs.masked_fill(after_end, 0).sum(dim=1) / length**penalty


def _usable(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"The device '{device}' cannot be used here ({reason}): leave it out or give 'cpu'."
        ) from error


def _merge_pieces(processor: AttnCapProcessor, tokens: list[int]) -> tuple[list[str], list[list[int]]]:
    """The words of a caption, and of each the places of its tokens: a new word is where decoding more gives one more."""
    prefixes = [processor.decode(tokens[: end + 1], skip_special_tokens=True) for end in range(len(tokens))]
    so_far = list(accumulate((len(prefix.split()) for prefix in prefixes), max))
    groups = [list(group) for _, group in groupby(range(len(tokens)), key=lambda t: max(so_far[t], 1))]
    text = prefixes[-1].split() if tokens else []
    ends = [0, *(so_far[group[-1]] for group in groups)]
    return [" ".join(text[a:b]) for a, b in zip(ends, ends[1:], strict=False)], groups


def _mean_rows(weights: np.ndarray, groups: list[list[int]]) -> np.ndarray:
    """(T tokens, ...) weights -> (T words, ...): the mean over a word's tokens, in sum 1."""
    merged = np.stack([weights[group].mean(axis=0) for group in groups]) if groups else weights[:0]
    return merged / merged.sum(axis=tuple(range(1, merged.ndim)), keepdims=True)


def _sum_columns(weights: np.ndarray, groups: list[list[int]]) -> np.ndarray:
    """(T tokens, T tokens) weights of start token and tokens -> (T tokens, T words): the sum over a word's tokens.

    A word's later tokens also read its earlier ones; that part is left out, since it says nothing of other words.
    """
    starts = [[0], *([t + 1 for t in group] for group in groups[:-1])]
    merged = [weights[:, group].sum(axis=1) for group in starts]
    merged = np.stack(merged, axis=1) if groups else weights[:0, :0]
    for word, group in enumerate(groups):
        merged[group, word + 1 :] = 0
    return merged


def _lit(photo: Image.Image, weights: np.ndarray, colours: Any) -> np.ndarray:
    """The picture in grey, coloured by weights in [0, 1] (H, W) that are stretched over it; (height, width, 3) in [0, 1]."""
    smooth = Image.fromarray(np.asarray(weights, np.float32)).resize(photo.size, Image.Resampling.BICUBIC)
    weight = np.asarray(smooth).clip(0, 1)  # (height, width)
    grey = np.asarray(photo.convert("L"), np.float32)[..., None] / 255  # (height, width, 1)
    alpha = 0.85 * weight[..., None]
    # Tinting keeps the picture's own light and shade visible under the brightest colour.
    return (1 - alpha) * (0.1 + 0.65 * grey) + alpha * colours(weight)[..., :3] * (0.7 + 0.3 * grey)
