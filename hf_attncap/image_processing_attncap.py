"""The image processor: converts images to RGB, resizes them to a square and normalises them for the backbone."""

from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling
from transformers.utils import logging
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .configuration_attncap import AttnCapConfig

logger = logging.get_logger(__name__)


class AttnCapImageProcessor(TorchvisionBackend):
    """Converts one image or a list of images to `pixel_values` (B, 3, height, width), float32.

    Each class attribute is also an argument of the constructor, is saved by `save_pretrained` and can be overridden in a call.
    Defaults: `do_convert_rgb`; `do_resize` to `size` 224 x 224 with `resample` bilinear (antialiased); `do_rescale` by 1/255;
    `do_normalize` with ImageNet's `image_mean`, `image_std`.

    For a new model, use `from_config`: backbones differ in the mean and standard deviation that they expect. A saved processor
    keeps its own values, even if the model's config has others.

    Images are resized to a square and lose their proportions. They are not cropped: captions also describe the edges.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    do_convert_rgb = True
    do_resize = True
    size: ClassVar[dict[str, int]] = {"height": 224, "width": 224}
    # Most of torchvision's ImageNet weights were trained and evaluated with bilinear, antialiased resizing.
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD

    @classmethod
    def from_config(cls, config: AttnCapConfig, **kwargs: Any) -> Self:
        """The image processor of a new model.

        Args:
            config: the model's config; its `image_mean` and `image_std` are those that the backbone expects.
            kwargs: further arguments of the constructor, such as `size`.
        """
        return cls(image_mean=list(config.image_mean), image_std=list(config.image_std), **kwargs)  # pyright: ignore[reportArgumentType]

    def process_image(self, image: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        """Converts an image to a tensor (channels, height, width)."""
        if device is None and isinstance(image, Image.Image) and image.mode == "RGB" and "transparency" not in image.info:
            # torchvision resizes large images much faster with the channels last, to the same values.
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return super().process_image(image, *args, device=device, **kwargs)

    def rescale_and_normalize(self, images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().rescale_and_normalize(images, *args, **kwargs).contiguous()

    def warn_of_other_statistics(self, config: AttnCapConfig) -> None:
        """Logs a warning if the model's config has another mean or standard deviation."""
        for name in ("image_mean", "image_std"):
            own, other = getattr(self, name), list(getattr(config, name))
            own = [own] * 3 if isinstance(own, (int, float)) else list(own)
            if own != other:
                logger.warning(
                    f"The processor's `{name}` is {own}, but the config's is {other}. The processor's values are used. If the "
                    "model was trained with the config's, save `AttnCapImageProcessor.from_config(config)` in its folder."
                )


__all__ = ["AttnCapImageProcessor"]
