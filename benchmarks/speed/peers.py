"""Other captioners of transformers, with their published sizes and random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    PreTrainedModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from .inputs import decode_image

Build = Callable[[], tuple[PreTrainedModel, Any]]


def vit_gpt2() -> tuple[PreTrainedModel, Any]:
    """nlpconnect/vit-gpt2-image-captioning: ViT base and GPT-2 with cross attention."""
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(), GPT2Config(), decoder_start_token_id=50256, pad_token_id=50256, eos_token_id=50256
    )
    return VisionEncoderDecoderModel(config=config), ViTImageProcessor()


def blip_base() -> tuple[PreTrainedModel, Any]:
    """Salesforce/blip-image-captioning-base: images of 384 pixels."""
    return BlipForConditionalGeneration(BlipConfig(vision_config={"image_size": 384})), BlipImageProcessor()


def git_base() -> tuple[PreTrainedModel, Any]:
    """microsoft/git-base."""
    return GitForCausalLM(GitConfig()), CLIPImageProcessor()


PEERS: dict[str, Build] = {"vit-gpt2": vit_gpt2, "BLIP-base": blip_base, "GIT-base": git_base}


@dataclass
class Peer:
    """A captioner of transformers. It decodes greedily and returns token ids, because there is no tokenizer."""

    model: Any
    processor: Any
    tokens: int

    @classmethod
    def build(cls, name: str, dtype: torch.dtype, device: str, tokens: int) -> "Peer":
        """Make the captioner of a name in `PEERS`. It will generate `tokens` tokens per caption."""
        torch.manual_seed(0)
        model, processor = PEERS[name]()
        return cls(model.eval().to(device, dtype), processor, tokens)  # type: ignore[arg-type]

    @property
    def parameters(self) -> int:
        """The number of parameters, in millions."""
        return round(sum(parameter.numel() for parameter in self.model.parameters()) / 1e6)

    @torch.inference_mode()
    def caption(self, photograph: bytes) -> torch.Tensor:
        """The token ids of a caption of an image file."""
        inputs = self.processor(images=decode_image(photograph), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)  # (1, 3, height, width)
        return self.model.generate(
            pixel_values=pixels, min_new_tokens=self.tokens, max_new_tokens=self.tokens, do_sample=False, num_beams=1
        )
