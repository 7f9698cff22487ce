"""The image processor gives the pixel values that the backbone expects, for all kinds of images."""

import numpy as np
import pytest
import torch
from hf_attncap.training.arguments import ModelArguments
from hf_attncap.training.model import build_captioner
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration, AttnCapProcessor, Captioner
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


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (224, 224), (641, 427)])
def test_images_in_memory_and_arrays_get_the_same_values(size):
    image, processor = noise(*size), AttnCapImageProcessor()
    values, expected = (processor(given, return_tensors="pt")["pixel_values"] for given in (image, tvf.pil_to_tensor(image)))
    assert torch.equal(values, expected) and values.is_contiguous()
    for options in ({"resample": 3}, {"do_resize": False}):
        pair = [image, image.transpose(Image.Transpose.ROTATE_180)]
        values, expected = (
            processor(given, return_tensors="pt", **options)["pixel_values"]
            for given in (pair, [tvf.pil_to_tensor(i) for i in pair])
        )
        assert torch.equal(values, expected)


def test_edges_of_a_wide_image_are_kept():
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


def test_settings_are_saved_and_can_be_overridden_in_a_call(tmp_path):
    first = AttnCapImageProcessor(size={"height": 32, "width": 48}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    first.save_pretrained(tmp_path)
    second = AttnCapImageProcessor.from_pretrained(tmp_path)
    image = noise(50, 40)
    values = second(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(values, first(image, return_tensors="pt")["pixel_values"])
    assert values.shape == (1, 3, 32, 48)
    assert second(image, size=16, return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)
    assert AttnCapImageProcessor().size != second.size


@pytest.mark.parametrize(("mean", "std"), [([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]), (0.5, 0.25)])
def test_a_new_models_processor_has_the_statistics_of_its_config(mean, std):
    config = AttnCapConfig(backbone="mobilenet_v3_small", image_mean=mean, image_std=std)
    image = noise(32, 32)
    values = AttnCapImageProcessor.from_config(config, size=32)(image, return_tensors="pt")["pixel_values"][0]
    expected = tvf.pil_to_tensor(image) / 255 - torch.tensor(mean).expand(3)[:, None, None]
    torch.testing.assert_close(values, expected / torch.tensor(std).expand(3)[:, None, None])


@pytest.mark.parametrize("statistics", [{"image_mean": [0.5, 0.5, 0.5]}, {"image_std": 0.5}])
def test_loading_warns_where_config_and_processor_disagree(tiny_checkpoint, tmp_path, monkeypatch, statistics):
    AttnCapForConditionalGeneration.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    processor = AttnCapProcessor.from_pretrained(tiny_checkpoint)
    said = []
    monkeypatch.setattr("hf_attncap.image_processing_attncap.logger.warning", said.append)
    processor.save_pretrained(tmp_path)
    Captioner.from_pretrained(tmp_path, device="cpu")
    assert not said
    for name, value in statistics.items():
        setattr(processor.image_processor, name, value)
    processor.save_pretrained(tmp_path)
    captioner = Captioner.from_pretrained(tmp_path, device="cpu")
    build_captioner(ModelArguments(model_name_or_path=str(tmp_path), model_config={}), [["a dog"]], tmp_path)
    name = next(iter(statistics))
    assert len(said) == 2 and all(f"`{name}` is [0.5, 0.5, 0.5]" in warning for warning in said)
    assert np.allclose(getattr(captioner.processor.image_processor, name), 0.5), "the processor's are used"
