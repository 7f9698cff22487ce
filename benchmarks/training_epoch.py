"""Compares the training time per caption with that of a plain implementation.

    python benchmarks/training_epoch.py --output training_epoch.json

The model is a frozen ResNet-152 with random weights at 224 pixels, with 49 regions. The captions have the lengths of Flickr8k's.

- Plain: each step runs the backbone, each row has its own image, each word projects the regions again and computes its logits, and
  padding is computed.
- This package: cached backbone features, one or five captions per image, regions projected once, and few steps after the end of
  a caption.

The script checks that both give the same loss and gradients. The time is that of forward pass, backward pass and Adam.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch.nn import functional as F

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration

IMAGES, CAPTIONS, BATCH, SIDE = 32, 5, 32, 224
MEAN_LENGTH, DEVIATION, LONGEST = 12.8, 3.4, 21  # Flickr8k's captions with the end token, truncated after 20 words


def captioner(words: int) -> AttnCapForConditionalGeneration:
    torch.manual_seed(0)
    config = AttnCapConfig(backbone="resnet152", vocab_size=words, freeze_backbone=True, dropout=0.0)
    model = AttnCapForConditionalGeneration(config)
    # Without batch norm statistics, the values of random layers overflow half precision.
    norms = [module for module in model.model.encoder.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = None
    with torch.no_grad():
        model.model.encoder.features(torch.randn(8, 3, SIDE, SIDE))
    return model.train()


def labels(captions: int, words: int) -> torch.Tensor:
    """Return random captions (R, T) with realistic lengths, -100 after their ends."""
    chance = torch.Generator().manual_seed(1)
    lengths = (MEAN_LENGTH + DEVIATION * torch.randn(captions, generator=chance)).round().clamp(3, LONGEST)
    ids = torch.randint(4, words, (captions, int(lengths.max())), generator=chance)
    return ids.masked_fill(torch.arange(ids.shape[1]) >= lengths[:, None], -100)


def plain_loss(model: AttnCapForConditionalGeneration, pixel_values: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Compute the loss with one image per caption, in a loop over words that shares no work."""
    encoder, decoder = model.model.encoder, model.model.decoder
    attention = decoder.attention
    cell = [decoder.cell.weight_ih, decoder.cell.weight_hh, decoder.cell.bias_ih, decoder.cell.bias_hh]
    with torch.no_grad():
        features = encoder.features(pixel_values)  # (R, D, h, w)
    a = encoder(backbone_features=features).last_hidden_state  # (R, N, C)
    inputs = model.prepare_decoder_input_ids_from_labels(words)  # (R, T)
    h, c = torch.tanh(decoder.init_h(a.mean(dim=1))), torch.tanh(decoder.init_c(a.mean(dim=1)))  # (R, S)
    entropy, seen, memory = 0.0, torch.zeros(a.shape[:2]), []
    for t in range(words.shape[1]):
        e = decoder.embed_tokens(inputs[:, t])  # (R, E)
        memory.append(e)
        so_far = torch.stack(memory, dim=1)  # (R, t + 1, E)
        u = attention.word_proj(so_far)  # (R, t + 1, A)
        z, alpha, x, _ = attention(h, attention.region_proj(a), a, so_far, u)  # (R, C), (R, N), (R, E)
        z = torch.sigmoid(decoder.gate(h)) * z  # (R, C)
        h, c = torch.lstm_cell(torch.cat([x, z], dim=-1), (h, c), *cell)  # (R, S)
        logits = model.lm_head(decoder.project_output(e, h, z))  # (R, V)
        entropy = entropy + F.cross_entropy(logits, words[:, t], ignore_index=-100, reduction="sum")
        seen = seen + alpha * (words[:, t, None] != -100)  # (R, N)
    count = (words != -100).sum(dim=1)  # (R)
    uneven = (count * (1 - seen).square().mean(dim=1)).sum()
    return (entropy + model.config.alpha_c * uneven) / count.sum()


def seconds(step: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    step().backward()
    optimizer.step()
    return time.perf_counter() - start


def check_equal(model: AttnCapForConditionalGeneration, pixel_values: torch.Tensor, words: torch.Tensor) -> float:
    """Return the larger difference: of the losses, or of the gradients relative to the largest gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    first = plain_loss(model, pixel_values, words)
    expected = torch.autograd.grad(first, trained)
    with torch.no_grad():
        features = model.model.encoder.features(pixel_values).half().float()
    ours = model(backbone_features=features, labels=words).loss
    found = torch.autograd.grad(ours, trained)
    apart = max(float((a - b).abs().max()) for a, b in zip(found, expected)) / max(float(b.abs().max()) for b in expected)
    return max(apart, abs(ours.item() - first.item()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the training time per caption with that of a plain implementation.")
    parser.add_argument("--words", type=int, default=10_000, help="size of the vocabulary (default: 10000)")
    parser.add_argument("--turns", type=int, default=3, help="number of timed runs (default: 3)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="computation in this type, by autocast")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    model, dtype = captioner(args.words), getattr(torch, args.dtype)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    images = torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    words = labels(IMAGES * CAPTIONS, args.words)  # (160, T)
    apart = check_equal(model, images[:2], words[:2])
    with torch.no_grad():
        cached = torch.cat([model.model.encoder.features(some).half() for some in images.split(8)])  # (32, D, h, w)

    def plain() -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return plain_loss(model, images[:BATCH], words[:BATCH])

    def ours(images: int, captions: int) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return model(backbone_features=cached[:images].float(), labels=words[: images * captions]).loss

        return step

    ways = {"plain": (plain, BATCH), "one caption per image": (ours(BATCH, 1), BATCH)}
    ways["five captions per image"] = (ours(BATCH, CAPTIONS), BATCH * CAPTIONS)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.turns + 1):
        for name, (step, captions) in ways.items():
            spent = seconds(step, optimizer) / captions
            if turn:  # the first warms up
                times[name].append(spent)
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    print(f"{args.dtype}, {torch.get_num_threads()} threads of {os.cpu_count()}, largest difference {apart:.1e}")
    for name, spent in medians.items():
        print(f"{name:32}{1000 * spent:9.1f} ms per caption{medians['plain'] / spent:8.1f} times as fast as plain")
    if args.output:
        result = {
            "date": str(date.today()),
            "torch": torch.__version__,
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "dtype": args.dtype,
            "words": args.words,
            "apart": apart,
            "seconds_a_caption": times,
            "times_as_fast": {name: medians["plain"] / spent for name, spent in medians.items()},
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
