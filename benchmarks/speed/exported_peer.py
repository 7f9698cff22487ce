"""Exports vit-gpt2 as `attncap export` exports a captioner, so that it can be timed in the same engine and data type.

The export is as good as that of this package: the keys and values of the cross attention are computed once per image, and those of
the words so far are cached. Int8 applies to the weights of the decoder.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from hf_attncap import export, runtime

from .inputs import decode_image

FINISH = {"onnx": export._finish_onnx, "openvino": export._finish_openvino}
LOAD = {"onnx": runtime._load_onnx, "openvino": runtime._load_openvino}


class Encoder(nn.Module):
    """ViT, and the keys and values of the cross attention of L layers with M heads of D channels."""

    def __init__(self, model: Any):
        super().__init__()
        self.encoder, self.blocks = model.encoder, model.decoder.transformer.h

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values (L, 1, M, N, D) of pixels (1, 3, height, width)."""
        regions = self.encoder(pixel_values).last_hidden_state  # (1, N, M * D)
        layers = [block.crossattention for block in self.blocks]
        both = [layer.c_attn(regions).unflatten(-1, (2, -1, layer.head_dim)) for layer in layers]  # L of (1, N, 2, M, D)
        keys, values = torch.stack(both).permute(3, 0, 1, 4, 2, 5)  # (L, 1, M, N, D) each
        return keys, values


class Step(nn.Module):
    """GPT-2 reads one token, and chooses the most likely next one."""

    def __init__(self, model: Any):
        super().__init__()
        self.decoder = model.decoder

    def forward(self, token, position, keys, values, cross_keys, cross_values):
        """Return the next token (1, 1), and keys and values (L, 1, M, t + 1, D), given those of t tokens."""
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for layer, (k, v, cross_k, cross_v) in enumerate(zip(keys, values, cross_keys, cross_values)):
            cache.self_attention_cache.update(k, v, layer)
            cache.cross_attention_cache.update(cross_k, cross_v, layer)
            cache.is_updated[layer] = True
        # The decoder takes the number of regions from them, and their keys and values from the cache.
        regions = token.new_zeros(1, cross_keys.shape[3], self.decoder.config.n_embd, dtype=keys.dtype)  # (1, N, M * D)
        out = self.decoder(token, position_ids=position, past_key_values=cache, encoder_hidden_states=regions, use_cache=True)
        layers: Any = cache.self_attention_cache.layers
        token = out.logits[:, -1].argmax(dim=-1, keepdim=True)  # (1, 1)
        return token, torch.stack([layer.keys for layer in layers]), torch.stack([layer.values for layer in layers])


class ExportedPeer:
    """An exported vit-gpt2 with random weights. It decodes greedily and returns token ids.

    Args:
        folder: an empty folder for the files.
        format, dtype: as for `attncap export`.
        tokens: the number of tokens per caption.
    """

    def __init__(self, model: Any, processor: Any, folder: Path, format: str, dtype: str, tokens: int):
        self.processor, self.tokens = processor, tokens
        self.start = model.config.decoder_start_token_id
        decoder: Any = model.decoder.config
        self.cache_shape = (decoder.n_layer, 1, decoder.n_head, 0, decoder.n_embd // decoder.n_head)  # (L, 1, M, t, D)
        with export._quiet():
            for name in write_graphs(model, processor, folder):
                FINISH[format](folder / f"{name}.onnx", folder / "out", dtype, None)
                (folder / f"{name}.onnx").unlink()  # hundreds of megabytes
        self._encode, self._step = (LOAD[format](folder / "out", name, dtype) for name in ("encoder", "step"))

    def caption(self, photograph: bytes) -> list[int]:
        """The token ids of a caption of an image file, without the start token."""
        pixels = self.processor(images=decode_image(photograph), return_tensors="np")["pixel_values"]  # (1, 3, height, width)
        cross = self._encode(pixels)  # 2 of (L, 1, M, N, D)
        token, found = np.array([[self.start]]), []
        keys = values = np.zeros(self.cache_shape, np.float32)  # (L, 1, M, t, D)
        for position in range(self.tokens):
            token, keys, values = self._step(token, np.array([[position]]), keys, values, *cross)
            found.append(int(token[0, 0]))
        return found


@torch.no_grad()
def write_graphs(model: Any, processor: Any, folder: Path) -> tuple[str, str]:
    """Write `encoder.onnx` and `step.onnx` of a vit-gpt2 in evaluation mode; return their names."""
    pixels = torch.zeros(1, 3, processor.size["height"], processor.size["width"])
    encoder, step = Encoder(model), Step(model)
    cross = encoder(pixels)
    past = torch.zeros(*cross[0].shape[:3], 3, cross[0].shape[4])  # (L, 1, M, t, D)
    given = (torch.tensor([[model.config.decoder_start_token_id]]), torch.tensor([[3]]), past, past.clone(), *cross)
    length = {3: torch.export.Dim("length", min=1, max=model.decoder.config.n_positions - 1)}
    (folder / "out").mkdir()
    torch.onnx.export(encoder, (pixels,), folder / "encoder.onnx", dynamo=True, external_data=False, verbose=False)
    torch.onnx.export(
        step, given, folder / "step.onnx", dynamo=True, external_data=False, verbose=False,
        dynamic_shapes=(None, None, length, length, None, None),
    )  # fmt: skip
    return "encoder", "step"
