"""Pictures in any form become the pixel values that the backbone was trained on."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from hf_attncap.image_processing_attncap import AttnCapImageProcessor

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_default_is_the_backbones_own_preprocessing():
    image = noise(500, 300)
    values = AttnCapImageProcessor()(image, return_tensors="pt")["pixel_values"]
    small = tvf.resize(tvf.pil_to_tensor(image), [224, 224], tvf.InterpolationMode.BILINEAR, antialias=True)
    torch.testing.assert_close(values, ((small / 255 - MEAN) / STD)[None])
    assert values.dtype == torch.float32


def test_edges_of_a_wide_picture_survive():
    pixels = np.full((60, 240, 3), 128, dtype=np.uint8)
    pixels[:, :30] = (255, 0, 0)
    pixels[:, -30:] = (0, 0, 255)
    values = AttnCapImageProcessor(size=32)(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    seen = values * STD + MEAN
    torch.testing.assert_close(seen[:, :, 0], torch.tensor([1.0, 0.0, 0.0])[:, None].expand(3, 32))
    torch.testing.assert_close(seen[:, :, -1], torch.tensor([0.0, 0.0, 1.0])[:, None].expand(3, 32))


def test_pil_numpy_and_torch_agree_in_one_batch():
    image = noise(50, 40)
    array = np.array(image)
    batch = [image, array, torch.from_numpy(array).permute(2, 0, 1), noise(33, 70)]
    values = AttnCapImageProcessor(size=32)(batch, return_tensors="pt")["pixel_values"]
    assert values.shape == (4, 3, 32, 32)
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(values[2], values[0])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_any_colour_mode_becomes_rgb(mode):
    image = noise(40, 50).convert(mode)
    values = AttnCapImageProcessor(size=32)(image, return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, 32, 32)
    assert values.isfinite().all()


def test_settings_survive_saving_and_yield_to_the_call(tmp_path):
    first = AttnCapImageProcessor(size={"height": 32, "width": 48}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    first.save_pretrained(tmp_path)
    second = AttnCapImageProcessor.from_pretrained(tmp_path)
    image = noise(50, 40)
    values = second(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(values, first(image, return_tensors="pt")["pixel_values"])
    assert values.shape == (1, 3, 32, 48)
    assert second(image, size=16, return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)
    assert AttnCapImageProcessor().size != second.size
