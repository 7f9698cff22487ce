"""Dropout on what the decoder reads, beside the model's own on what it says; and none at all."""

from typing import Any

import torch
from torch.nn import functional as F


def drop_inputs(captioner: Any, share: float) -> None:
    """In training, drops a share of the values of regions a (B, N, C) and word embeddings e (R, T, E), and scales up the rest.

    Much of the field's practice has it (Luo's ImageCaptioning.pytorch, 0.5 for both). Self-critical training, whose probabilities
    must be the captioner's own, switches it off with all other dropout.
    """

    def drop(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, share, module.training)

    captioner.base_model.encoder.windows.register_forward_hook(drop)
    captioner.get_input_embeddings().register_forward_hook(drop)


def silence(captioner: torch.nn.Module) -> None:
    """No layer behaves by chance or moves statistics. Containers stay in training, which for them means to checkpoint gradients."""
    captioner.train()
    for module in captioner.modules():
        if next(module.children(), None) is None:
            module.eval()
