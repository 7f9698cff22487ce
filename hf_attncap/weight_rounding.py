"""Rounds the weights of convolutions to int8 so that their outputs change little.

Rounding each weight to the nearest int8 level changes the regions of the released checkpoint by 13 %. The method of this module
(Frantar et al., 2023, "GPTQ", arXiv 2210.17323) changes them by 4 %: later weights compensate the rounding errors of earlier ones.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

LEVELS = 127  # int8 without -128
POSITIONS = 128  # about this many positions of the input of a convolution are used per image
DAMPING = 0.01  # added to the diagonal, relative to its mean


@torch.no_grad()
def round_convolutions(encoder: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Replace the weights of all convolutions, in place, by multiples of (largest weight of the output channel) / 127.

    Args:
        encoder: in evaluation mode and float32, with batch norm folded.
        batches: inputs of the encoder.
    """
    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    products: dict[nn.Module, torch.Tensor] = {}

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        products[module] = products.get(module, 0) + _input_products(module, inputs[0])  # type: ignore[arg-type]

    handles = [module.register_forward_hook(add) for module in convolutions]
    try:
        for batch in batches:
            encoder(batch)
    finally:
        for handle in handles:
            handle.remove()
    for module in convolutions:
        weight = module.weight.unflatten(0, (module.groups, -1)).flatten(2)  # (G, out, d)
        module.weight.copy_(_rounded(weight, products[module]).reshape(module.weight.shape))


def _input_products(module: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """X X^T (G, d, d) for the d inputs of each output of a convolution in G groups, summed over images and positions."""
    options = {"dilation": module.dilation, "padding": module.padding, "stride": module.stride}
    columns = F.unfold(x, module.kernel_size, **options)  # (B, G * d, positions)
    columns = columns[..., :: max(columns.shape[-1] // POSITIONS, 1)].unflatten(1, (module.groups, -1))  # (B, G, d, p)
    columns = columns.permute(1, 2, 0, 3).flatten(2)  # (G, d, B * p)
    return columns @ columns.mT


def _rounded(weight: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Weights (G, out, d) as multiples of a scale per output channel, given the products (G, d, d) of the inputs."""
    weight = weight.double()
    largest = weight.abs().amax(dim=-1, keepdim=True)  # (G, out, 1)
    scale = (largest / LEVELS).clamp(min=1e-12)
    keeps_scale = weight.abs() == largest  # (G, out, d): the largest weights stay, because they set the scale
    products = products.double()
    diagonal = products.diagonal(dim1=-2, dim2=-1)  # (G, d), a view
    diagonal += DAMPING * diagonal.mean(dim=-1, keepdim=True) + 1e-9
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(products))  # (G, d, d)
    factor = torch.linalg.cholesky(inverse, upper=True)  # (G, d, d)
    rounded = torch.zeros_like(weight)
    for i in range(weight.shape[-1]):
        w = weight[..., i]  # (G, out)
        q = (w / scale[..., 0]).round().clamp(-LEVELS, LEVELS) * scale[..., 0]  # (G, out)
        rounded[..., i] = torch.where(keeps_scale[..., i], largest[..., 0] * w.sign(), q)
        error = (w - rounded[..., i]) / factor[:, i, i, None]  # (G, out)
        weight[..., i + 1 :] -= error[..., None] * factor[:, None, i, i + 1 :]
    return rounded
