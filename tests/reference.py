"""The captioner's mathematics written out image by image, word by word and region by region, in float64.

Slow and plain on purpose, and sharing nothing with the package: it reads the weights by name and knows the formulas alone.
One vector a name, no batches, no cache; padding is simply left out.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_attncap.configuration_attncap import AttnCapConfig
from hf_attncap.modeling_attncap import AttnCapForConditionalGeneration, GridEncoderOutput

PAD, BOS, EOS, UNK = 0, 1, 2, 3
KINDS = ("none", "score", "channel", "history")


@dataclass
class Trace:
    """What happened at each word of one caption."""

    logits: list[Tensor] = field(default_factory=list)  # V each
    regions: list[Tensor] = field(default_factory=list)  # alpha, N each
    words: list[Tensor] = field(default_factory=list)  # beta, one more each time ("history") or E each ("channel")
    states: list[Tensor] = field(default_factory=list)  # h the word leaves, S each
    cells: list[Tensor] = field(default_factory=list)  # c it leaves, S each


class Reference:
    """The decoder, the grid and the loss of a model, from its weights."""

    def __init__(self, model: Any):
        self.config = model.config
        parameters = model.named_parameters(remove_duplicate=False)
        self.weights = {name.removeprefix("model."): value.detach().double() for name, value in parameters}

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self.weights[f"{name}.weight"] @ x
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def lstm(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        w = {name: self.weights[f"decoder.cell.{name}"] for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")}
        i, f, g, o = (w["weight_ih"] @ x + w["bias_ih"] + w["weight_hh"] @ h + w["bias_hh"]).split(len(h))
        c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
        return sigmoid(o) * torch.tanh(c), c

    def word_input(self, q: Tensor, read: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """What the LSTM takes in of the embeddings read so far, and the weights beta."""
        kind, e = self.config.word_attention, read[-1]
        if kind in ("none", "score"):
            return e, None
        u = [self.linear("decoder.attention.word_proj", word) for word in read]
        if kind == "channel":
            beta = softmax(self.linear("decoder.attention.channel_score", torch.tanh(u[-1] + q)))
            return len(e) * beta * e, beta
        bias = self.weights["decoder.attention.distance_bias"]
        scores = []
        for j in range(len(read)):
            distance = len(read) - 1 - j
            score = self.linear("decoder.attention.word_score", torch.tanh(u[j] + q))
            scores.append(score + bias[min(distance, len(bias) - 1)])
        beta = softmax(torch.cat(scores))
        return weighted_sum(beta, read), beta

    def caption(self, regions: Tensor, words: list[int]) -> Trace:
        """Run words (start token first) over the regions (N, C) of one image."""
        config, trace = self.config, Trace()
        mean = average(list(regions))
        h, c = (
            torch.tanh(self.linear("decoder.init_h", mean)),
            torch.tanh(self.linear("decoder.init_c", mean)),
        )
        read: list[Tensor] = []
        for word in words:
            e = self.weights["decoder.embed_tokens.weight"][word]
            read.append(e)
            q = self.linear("decoder.attention.query_proj", h)
            looking_for = q if config.word_attention == "none" else q + self.linear("decoder.attention.word_proj", e)
            scores = []
            for a in regions:
                key = self.linear("decoder.attention.region_proj", a)
                scores.append(self.linear("decoder.attention.region_score", torch.tanh(key + looking_for)))
            alpha = softmax(torch.cat(scores))
            z = weighted_sum(alpha, list(regions))
            if config.gate:
                z = sigmoid(self.linear("decoder.gate", h)) * z
            x, beta = self.word_input(q, read)
            h, c = self.lstm(torch.cat([x, z]), h, c)
            out = h
            if config.deep_output:
                out = self.linear("decoder.word_out", e) + self.linear("decoder.state_out", h)
                out = out + self.linear("decoder.region_out", z)
            trace.logits.append(self.linear("lm_head", out))
            trace.regions.append(alpha)
            trace.states.append(h)
            trace.cells.append(c)
            if beta is not None:
                trace.words.append(beta)
        return trace

    def grid(self, features: Tensor) -> Tensor:
        """Regions (N, C) of one image from the backbone's map (D, h, w)."""
        weight, bias = (
            self.weights["encoder.windows.weight"][:, :, 0, 0],
            self.weights["encoder.windows.bias"],
        )
        _, height, width = features.shape
        size = self.config.grid_size
        rows, columns = (height, width) if size is None else (size, size) if isinstance(size, int) else size
        regions = []
        for top, bottom in spans(height, rows):
            for left, right in spans(width, columns):
                cells = [weight @ features[:, y, x] + bias for y in range(top, bottom) for x in range(left, right)]
                regions.append(average(cells))
        return torch.stack(regions)

    def loss(self, regions: Tensor, labels: list[list[int]], items: int | None = None) -> Tensor:
        """Cross-entropy plus alpha_c * R over labels, -100 where there is none; regions (B, N, C)."""
        config, per_image = self.config, len(labels) // len(regions)
        smoothing = config.label_smoothing
        cross_entropy, uneven, count = torch.zeros(()).double(), torch.zeros(()).double(), 0
        for row, wanted in enumerate(labels):
            words = [config.decoder_start_token_id, *(PAD if word == -100 else word for word in wanted[:-1])]
            trace = self.caption(regions[row // per_image], words)
            seen, real = torch.zeros(regions.shape[1]).double(), 0
            for t, word in enumerate(wanted):
                if word == -100:
                    continue
                log_p = log_softmax(trace.logits[t])
                cross_entropy = cross_entropy - (1 - smoothing) * log_p[word] - smoothing * log_p.sum() / len(log_p)
                seen = seen + trace.regions[t]
                real += 1
            uneven = uneven + real * ((1 - seen) ** 2).sum() / len(seen)
            count += real
        return (cross_entropy + config.alpha_c * uneven) / (count if items is None else items)

    def scorer(self, regions: Tensor) -> Callable[[tuple[int, ...]], Tensor]:
        """log p of the next word after the words so far, for one image (N, C)."""
        return lru_cache(maxsize=None)(lambda words: log_softmax(self.caption(regions, list(words)).logits[-1]))


def softmax(scores: Tensor) -> Tensor:
    weights = (scores - scores.max()).exp()
    return weights / weights.sum()


def log_softmax(scores: Tensor) -> Tensor:
    return scores - scores.max() - (scores - scores.max()).exp().sum().log()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def weighted_sum(weights: Tensor, vectors: list[Tensor]) -> Tensor:
    total = torch.zeros_like(vectors[0])
    for weight, vector in zip(weights, vectors, strict=True):
        total = total + weight * vector
    return total


def average(vectors: list[Tensor]) -> Tensor:
    return weighted_sum(torch.ones(len(vectors), dtype=torch.float64), vectors) / len(vectors)


def spans(size: int, cells: int) -> list[tuple[int, int]]:
    """First and one past the last pixel that each cell of an adaptive average pool covers."""
    return [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]


def greedy(score: Callable, start: list[int], new_words: int, never: tuple[int, ...] = (PAD, BOS, UNK)) -> list[int]:
    words = list(start)
    while len(words) < len(start) + new_words and (words[-1] != EOS or len(words) == len(start)):
        log_p = score(tuple(words)).clone()
        log_p[list(never)] = -torch.inf
        words.append(int(log_p.argmax()))
    return words


def beam_search(
    score: Callable,
    start: list[int],
    beams: int,
    new_words: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    never: tuple[int, ...] = (PAD, BOS, UNK),
) -> list[tuple[float, list[int]]]:
    """Up to `beams` captions with their scores, best first: log p / (words after `start`) ** length_penalty.

    Of the 2 * beams best continuations the first `beams` may end a caption and the best unended ones go on. The search ends at
    `new_words`, when `beams` captions have ended and the best open one cannot overtake the worst of them (judged at its present
    length, or at the greatest one if "never" and longer ones are favoured), or, if `early_stopping` is True, as soon as `beams`
    have ended.
    """
    running: list[tuple[float, list[int]]] = [(0.0, list(start))]
    ended: list[tuple[float, list[int]]] = []
    for length in range(1, new_words + 1):
        candidates = []
        for so_far, words in running:
            log_p = score(tuple(words)).tolist()
            candidates += [(so_far + p, [*words, word]) for word, p in enumerate(log_p) if word not in never]
        candidates = sorted(candidates, reverse=True)[: 2 * beams]
        ends = [words[-1] == EOS or length == new_words for _, words in candidates]
        for (total, words), end in zip(candidates[:beams], ends, strict=False):
            if end:
                ended.append((total / length**length_penalty, words))
        ended = sorted(ended, reverse=True)[:beams]
        running = [candidate for candidate, end in zip(candidates, ends, strict=True) if not end][:beams]
        if not running:
            break
        if len(ended) == beams:
            longest = new_words if early_stopping == "never" and length_penalty > 0 else length
            if early_stopping is True or running[0][0] / longest**length_penalty <= ended[-1][0]:
                break
    return ended


def tiny_model(seed: int = 0, **settings: Any) -> Any:
    """A captioner of a few hundred decoder weights, all random and large enough to matter, in float64.

    What a weight is depends on its name and shape alone: models that differ in one switch share all others.
    """
    config = AttnCapConfig(
        **{
            "backbone": "squeezenet1_1",
            "encoder_channels": 4,
            "vocab_size": 12,
            "word_embed_dim": 5,
            "hidden_size": 6,
            "attention_dim": 3,
            "word_attention": "history",  # of all kinds the one with most to go wrong
            "max_word_distance": 4,
            **settings,
        }
    )
    torch.manual_seed(seed)
    model: Any = AttnCapForConditionalGeneration(config).double().eval()
    for name, parameter in model.named_parameters():
        if "backbone" not in name:
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def load(folder: Any, **kwargs: Any) -> Any:
    return AttnCapForConditionalGeneration.from_pretrained(folder, **kwargs)


def random_regions(images: int, grid: tuple[int, int] = (2, 3), channels: int = 4, seed: int = 1) -> Any:
    """What an encoder would have seen in that many images."""
    generator = torch.Generator().manual_seed(seed)
    regions = torch.randn(images, grid[0] * grid[1], channels, generator=generator, dtype=torch.float64)
    return GridEncoderOutput(last_hidden_state=regions, grid_shape=grid)
