"""Images to `pixel_values`: RGB, squashed to a square, scaled and normalised as the backbone was trained."""

from typing import ClassVar

from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


class AttnCapImageProcessor(TorchvisionBackend):
    """Turns one picture or a list of them into `pixel_values` (B, 3, height, width), float32.

    Each class attribute is an argument of the constructor too, is saved with `save_pretrained` and can be
    overridden in a single call. Defaults: `do_convert_rgb`; `do_resize` to `size` 224 x 224 with `resample`
    bilinear (antialiased); `do_rescale` by 1/255; `do_normalize` with ImageNet's `image_mean`, `image_std`.

    The picture is squashed to the square, never cropped: captions speak of what stands at the edges.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    do_convert_rgb = True
    do_resize = True
    size: ClassVar[dict[str, int]] = {"height": 224, "width": 224}
    # Most of torchvision's ImageNet weights were trained and measured with bilinear, antialiased pictures.
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD


__all__ = ["AttnCapImageProcessor"]
