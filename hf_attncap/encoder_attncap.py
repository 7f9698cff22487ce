"""The encoder: an image to the grid of regions that the decoder attends to.

Shapes as in docs/model.md: B images, N = H * W regions, D backbone channels, C region channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from .backbone_attncap import build_backbone, count_channels, run_checkpointed
from .configuration_attncap import AttnCapConfig

CPU_IMAGES = 16  # at most that many images per pass on CPUs, because larger batches take longer per image


@dataclass
class GridEncoderOutput(ModelOutput):
    """Output of the encoder.

    Attributes:
        last_hidden_state: the regions a, (B, N, C), row by row of the grid.
        grid_shape: (H, W) with N = H * W.
        hidden_states: with `output_hidden_states`, the regions before and after pooling, (B, h * w, C) and (B, N, C).
    """

    last_hidden_state: torch.Tensor | None = None
    grid_shape: tuple[int, int] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class GridEncoder(nn.Module):
    """A torchvision backbone, a 1x1 convolution with C output channels and optional pooling to a fixed grid."""

    main_input_name = "pixel_values"
    _gradient_checkpointing_func: Any

    def __init__(self, config: AttnCapConfig):
        super().__init__()
        self.backbone = build_backbone(config.backbone, config.backbone_padding)
        for module in self.backbone.modules():
            module.keep_torchvision_init = True  # type: ignore[assignment]
        # Checkpoints have the output convolution under the name "windows".
        self.windows = nn.Conv2d(count_channels(self.backbone), config.encoder_channels, kernel_size=1)
        grid = config.grid_size
        self.pool = nn.Identity() if grid is None else nn.AdaptiveAvgPool2d(grid if isinstance(grid, int) else tuple(grid))
        blocks = len(self.blocks())
        if (config.trainable_blocks or 0) > blocks:
            raise ValueError(
                f"`trainable_blocks` is {config.trainable_blocks}, but {config.backbone} has {blocks} blocks: lower it, or set "
                "None to train all of them."
            )
        self.frozen_blocks = blocks if config.freeze_backbone else blocks - (config.trainable_blocks or blocks)
        self.batch_norm_frozen = config.freeze_batch_norm
        self.gradient_checkpointing = False
        self.train()  # puts frozen blocks in evaluation mode

    def train(self, mode: bool = True):
        """Set the training mode, except for frozen blocks and frozen batch norm, whose statistics must not change."""
        super().train(mode)
        for number, block in enumerate(self.blocks()):
            for module in block.modules():
                if number < self.frozen_blocks or (self.batch_norm_frozen and isinstance(module, nn.modules.batchnorm._BatchNorm)):
                    module.training = False
        return self

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the backbone in order: its children, where a sequence counts as its own children."""
        children = [list(child) if isinstance(child, nn.Sequential) else [child] for child in self.backbone.children()]
        return [block for blocks in children for block in blocks]

    def freeze(self) -> None:
        """Disable the gradients of frozen blocks."""
        for block in self.blocks()[: self.frozen_blocks]:
            block.requires_grad_(False)

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute the output of the last frozen block (B, D', h', w') for images (B, 3, height, width), which can be cached.

        If all blocks are trained, it is the output of the last block, (B, D, h, w).
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"`pixel_values` must be (B, 3, height, width), but its shape is {tuple(pixel_values.shape)}.")
        x = pixel_values.to(self.windows.weight.dtype)  # (B, 3, height, width)
        return self._run_blocks(self.blocks()[: self.frozen_blocks or None], x)  # (B, D', h', w')

    def _run_blocks(self, blocks: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
        is_inference = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if is_inference and x.device.type == "cpu" and len(x) > CPU_IMAGES:
            return torch.cat([self._run_blocks(blocks, part) for part in x.split(CPU_IMAGES)])
        for block in blocks:
            has_layers = next(block.children(), None) is not None
            if self.gradient_checkpointing and self.training and has_layers and x.requires_grad:
                x = run_checkpointed(block, x, self._gradient_checkpointing_func)
            else:
                x = block(x)
        return x

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        backbone_features: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> GridEncoderOutput:
        """Compute the regions of images (B, 3, height, width), or of their cached `features` (B, D', h', w')."""
        if backbone_features is None:
            if pixel_values is None:
                raise ValueError("The encoder needs `pixel_values` (B, 3, height, width) or `backbone_features` (B, D', h', w').")
            backbone_features = self.features(pixel_values)  # (B, D', h', w')
        f = backbone_features.to(self.windows.weight.dtype)  # (B, D', h', w')
        if self.frozen_blocks:
            f = self._run_blocks(self.blocks()[self.frozen_blocks :], f)  # (B, D, h, w)
        unpooled = self.windows(f).flatten(2).mT  # (B, h * w, C)
        grid = self.pool(unpooled.mT.unflatten(-1, f.shape[-2:]))  # (B, C, H, W)
        a = grid.flatten(2).mT  # (B, N, C)
        hidden_states = (unpooled, a) if output_hidden_states else None
        return GridEncoderOutput(last_hidden_state=a, grid_shape=tuple(grid.shape[-2:]), hidden_states=hidden_states)


__all__ = ["GridEncoder", "GridEncoderOutput"]
