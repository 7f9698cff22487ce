"""The captioner as three ONNX graphs: the encoder, the start of a caption, and one step of the decoder.

Shapes as in docs/model.md: B images, K captions per image, R = B * K, N = H * W regions, t words so far, C region channels, S LSTM
state, A attention space, E word embedding, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .modeling_attncap import AttnCapForConditionalGeneration

IMAGES, CAPTIONS, WORDS = 2, 3, 4  # sizes of the tensors that the graphs are traced with; other sizes work too


class Encoder(nn.Module):
    """Pixels (B, height, width, 3), uint8, to regions (B, N, C). Normalises like the image processor."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: AttnCapForConditionalGeneration, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.encoder = model.model.encoder
        self.register_buffer("mean", mean.view(3, 1, 1))
        self.register_buffer("std", std.view(3, 1, 1))

    def encode(self, pixels: torch.Tensor) -> Any:  # a GridEncoderOutput
        x = (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std  # (B, 3, height, width)
        return self.encoder(x)

    def forward(self, pixels: torch.Tensor) -> Any:
        return self.encode(pixels).last_hidden_state


class Start(nn.Module):
    """Regions (B, N, C) to keys (B, N, A), and h and c (B, S) before the first word."""

    def __init__(self, model: AttnCapForConditionalGeneration):
        super().__init__()
        self.decoder = model.model.decoder

    def forward(self, regions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h, c, keys = self.decoder._init_state(regions, regions.shape[0])
        return keys, h, c


class Step(nn.Module):
    """One step of the decoder: reads one word of each caption.

    Inputs: the words so far (B, K, t), of which only `word_attention="history"` needs more than the newest; h and c before the
    word, (B, K, S) each; keys (B, N, A) and regions (B, N, C).

    Outputs: logits (B, K, V); the log-sum-exp of the logits, and the entropy of their distribution in nats, (B, K) each; h and c
    after the word, (B, K, S) each; alpha (B, K, N); and where there is one, beta (B, K, t) or (B, K, E).
    """

    def __init__(self, model: AttnCapForConditionalGeneration):
        super().__init__()
        self.decoder, self.lm_head = model.model.decoder, model.lm_head

    def forward(self, ids, h, c, keys, regions) -> tuple[torch.Tensor, ...]:
        rows = ids.shape[:2]
        e, u = self.decoder._embed(ids.flatten(0, 1))  # (R, t, E), (R, t, A)
        h, c, z, alpha, beta = self.decoder.step(h.flatten(0, 1), c.flatten(0, 1), keys, regions, e, u)
        logits = self.lm_head(self.decoder.project_output(e[:, -1], h, z))  # (R, V)
        normalizer = logits.logsumexp(dim=-1, keepdim=True)  # (R, 1)
        log_probs = logits - normalizer  # (R, V)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)  # (R)
        outputs = (logits, normalizer.squeeze(-1), entropy, h, c, alpha, *(() if beta is None else (beta,)))
        return tuple(output.unflatten(0, rows) for output in outputs)


@torch.no_grad()
def write_onnx(
    model: AttnCapForConditionalGeneration, size: tuple[int, int], mean: torch.Tensor, std: torch.Tensor, folder: Path
) -> tuple[int, int]:
    """Write `encoder.onnx`, `start.onnx` and `step.onnx`.

    Args:
        model: in evaluation mode and float32.
        size: height and width of the images.
        mean, std: (3) each, of pixels from 0 to 255.
        folder: an existing folder.

    Returns:
        (H, W), the grid of regions.
    """
    dynamic: Any = torch.export.Dim.DYNAMIC
    encoder, start, step = Encoder(model, mean, std).eval(), Start(model).eval(), Step(model).eval()
    pixels = torch.zeros(IMAGES, *size, 3, dtype=torch.uint8)  # (B, height, width, 3)
    encoded = encoder.encode(pixels)
    regions: Any = encoded.last_hidden_state  # (B, N, C)
    keys, h, c = start(regions)
    h, c = (state[:, None].repeat(1, CAPTIONS, 1) for state in (h, c))  # (B, K, S) each
    all_words = model.config.word_attention == "history"
    ids = torch.zeros(IMAGES, CAPTIONS, WORDS if all_words else 1, dtype=torch.long)  # (B, K, t)

    def write(name: str, module: nn.Module, inputs: dict[str, torch.Tensor], dynamic_axes: tuple[int, ...]) -> None:
        """Write a graph; `dynamic_axes` says how many of the first axes of each input can have other sizes."""
        program: Any = torch.onnx.export(
            module,
            tuple(inputs.values()),
            input_names=list(inputs),
            dynamic_shapes=tuple(dict.fromkeys(range(count), dynamic) for count in dynamic_axes),
            verbose=False,
            dynamo=True,
        )
        for node in program.model.graph:
            node.metadata_props.clear()  # stack traces with paths of this machine, which differ between two exports
        program.save(folder / f"{name}.onnx", external_data=False)

    write("encoder", encoder, {"pixels": pixels}, (1,))
    write("start", start, {"regions": regions}, (1,))
    inputs = {"ids": ids, "h": h, "c": c, "keys": keys, "regions": regions}
    write("step", step, inputs, (3 if all_words else 2, 2, 2, 1, 1))
    return encoded.grid_shape
