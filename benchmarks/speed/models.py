"""Makes captioners with random weights, and writes one as a checkpoint, for example for `attncap export`.

    python -m benchmarks.speed.models resnet152 runs/random152

Its captions have 16 tokens.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration, AttnCapImageProcessor, AttnCapProcessor, Captioner
from hf_attncap.captioner import CHECKPOINT
from hf_attncap.optimize import optimize_for_inference

TOKENS = 16  # generated per caption where the length is forced
BACKBONES = ("mobilenet_v3_large", "resnet50", "resnet152")
LARGEST = "resnet152"


def random_model(backbone: str | None = None, checkpoint: Path = CHECKPOINT, **config: Any) -> AttnCapForConditionalGeneration:
    """A captioner with random weights and the sizes of a checkpoint, except its backbone and what `config` changes."""
    torch.manual_seed(0)
    sizes = AttnCapConfig.from_pretrained(checkpoint).to_dict()
    if backbone is not None:
        sizes |= {"backbone": backbone, "backbone_padding": "torch", "trainable_blocks": None}
    model = AttnCapForConditionalGeneration(AttnCapConfig.from_dict({**sizes, "confidence": None, **config}))
    model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model.eval()


@torch.inference_mode()
def encode(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """The regions (B, N, C) of images (B, 3, height, width)."""
    return model.get_encoder()(pixel_values).last_hidden_state


@torch.inference_mode()
def generate(model: Any, regions: Any, **settings: Any) -> torch.Tensor:
    """The tokens of captions of regions (B, N, C)."""
    return model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=regions), **settings)


def force_length(model: AttnCapForConditionalGeneration, tokens: int = TOKENS) -> None:
    """Make `generate` give all captions of a model this many tokens."""
    model.generation_config.update(min_new_tokens=tokens, max_new_tokens=tokens)


def million_parameters(config: AttnCapConfig) -> float:
    """Parameters of the trained model, in millions; the optimised copy has other ones."""
    return round(sum(parameter.numel() for parameter in AttnCapForConditionalGeneration(config).parameters()) / 1e6, 1)


def random_captioner(backbone: str, checkpoint: Path, dtype: torch.dtype, device: str) -> Captioner:
    """A captioner with random weights whose captions have 16 tokens."""
    model: Any = random_model(backbone, checkpoint)
    force_length(model)
    fast: Any = optimize_for_inference(model.to(device, dtype))
    return Captioner(fast, AttnCapProcessor.from_pretrained(checkpoint))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="such as resnet152")
    parser.add_argument("folder", type=Path, help="the folder to write")
    args = parser.parse_args()
    model = random_model(args.backbone)
    force_length(model)
    model.save_pretrained(args.folder)
    processor = AttnCapProcessor.from_pretrained(CHECKPOINT)
    AttnCapProcessor(AttnCapImageProcessor.from_config(model.config), processor.tokenizer).save_pretrained(args.folder)


if __name__ == "__main__":
    main()
