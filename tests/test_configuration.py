"""A configuration holds the architecture's choices, survives a file, and refuses what cannot work with the way out."""

import json
from dataclasses import fields

import pytest
import torchvision
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hf_attncap.configuration_attncap import AttnCapConfig


def test_defaults():
    config = AttnCapConfig()
    assert (config.backbone, config.backbone_padding, config.grid_size) == ("resnet152", "torch", None)
    assert (config.encoder_channels, config.word_embed_dim, config.hidden_size, config.attention_dim) == (512, 256, 512, 512)
    assert (config.word_attention, config.gate, config.deep_output) == ("score", True, True)
    assert (config.alpha_c, config.label_smoothing, config.dropout) == (1.0, 0.0, 0.5)
    assert config.freeze_backbone and not config.freeze_word_embeddings and not config.tie_word_embeddings
    assert config.use_cache and config.is_encoder_decoder and config.model_type == "attncap"
    tokens = (config.pad_token_id, config.bos_token_id, config.eos_token_id, config.unk_token_id, config.decoder_start_token_id)
    assert tokens == (0, 1, 2, 3, 1)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"backbone": "vit_b_16"}, "'vit_b_16', a transformer.*use a CNN.*'resnet152'"),
        ({"backbone": "swin_v2_t"}, "'swin_v2_t', a transformer.*use a CNN"),
        ({"backbone": "maxvit_t"}, "'maxvit_t', a transformer.*use a CNN"),
        ({"backbone": "resnet153"}, "'resnet153', which torchvision does not have: use one of .*resnet152"),
        ({"backbone": "deeplabv3_resnet50"}, "does not have: use one of"),
        ({"backbone_padding": "valid"}, "backbone_padding.*'torch', 'same'"),
        ({"word_attention": "both"}, "word_attention.*'none', 'score', 'channel', 'history'"),
        ({"grid_size": 0}, "`grid_size` is 0, but it must be a positive side"),
        ({"grid_size": (7, 0)}, "`grid_size` is .7, 0., but it must be a positive side"),
        ({"grid_size": (7, 7, 7)}, "`grid_size`.*pair"),
        *(
            ({name: 0}, f"`{name}` is 0, but it must be at least 1")
            for name in (
                "encoder_channels",
                "vocab_size",
                "word_embed_dim",
                "hidden_size",
                "attention_dim",
                "max_word_distance",
            )
        ),
        ({"dropout": 1.0}, r"`dropout` is 1.0, but it must be in \[0, 1\)"),
        ({"dropout": -0.1}, "`dropout` is -0.1"),
        ({"label_smoothing": 1.0}, r"`label_smoothing` is 1.0, but it must be in \[0, 1\)"),
        ({"alpha_c": -1.0}, "`alpha_c` is -1.0, but .*cannot be negative"),
        ({"image_mean": [0.5, 0.5]}, "`image_mean`.*3 colour channels"),
        ({"image_std": [0.5] * 4}, "`image_std`.*3 colour channels"),
        ({"image_std": [0.5, 0.0, 0.5]}, "`image_std`.*must be positive"),
        ({"hidden_size": "large"}, "hidden_size.*expected int"),
        ({"pad_token_id": None}, "`pad_token_id` is None.*set it to the tokenizer's `pad_token_id`"),
        ({"decoder_start_token_id": None}, "`decoder_start_token_id` is None.*set it to the tokenizer's `bos_token_id`"),
        *(
            ({"vocab_size": 50, name: value}, f"`{name}` is {shown}, but the vocabulary has the ids 0 to 49.*as in the tokenizer")
            for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "unk_token_id")
            for value, shown in ((50, "50"), (-1, "-1"))
        ),
        ({"eos_token_id": [2, 10_000]}, r"`eos_token_id` is \[2, 10000\], but the vocabulary has the ids 0 to 9999"),
        ({"freeze_backbone": False, "trainable_blocks": 0}, "`trainable_blocks` is 0: set `freeze_backbone` to train none"),
        ({"vocab_size": 3}, r"`unk_token_id` is 3, .*\(`vocab_size` is 3\)"),
        (
            {"tie_word_embeddings": True, "freeze_word_embeddings": True},
            "set `freeze_word_embeddings=False` or `tie_word_embeddings=False`",
        ),
        (
            {"tie_word_embeddings": True, "deep_output": False},
            r"`hidden_size` \(512\) against `word_embed_dim` \(256\): make the two equal, set `deep_output=True`",
        ),
    ],
    ids=str,
)
def test_invalid_settings_are_rejected(settings, sentence):
    with pytest.raises(StrictDataclassError, match=f"(?s){sentence}"):
        AttnCapConfig(**settings)


@pytest.mark.parametrize("settings, cause", [({"vocab_size": 0}, ValueError), ({"vocab_size": "many"}, TypeError)])
def test_cause_of_the_validation_error(settings, cause):
    with pytest.raises(StrictDataclassError) as caught:
        AttnCapConfig(**settings)
    assert not isinstance(caught.value, ValueError) and type(caught.value.__cause__) is cause


@pytest.mark.parametrize(
    "settings",
    [
        {"grid_size": 7},
        {"grid_size": (7, 5)},
        {"grid_size": [14]},
        {"dropout": 0},
        {"alpha_c": 0},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": True, "deep_output": False, "hidden_size": 256},
        {"unk_token_id": None, "bos_token_id": None, "eos_token_id": None},
        {"eos_token_id": [2, 9_999], "pad_token_id": 9_999},
        {"vocab_size": 4},
        {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]},
    ],
    ids=str,
)
def test_settings_at_the_limits_are_valid(settings):
    config = AttnCapConfig(**settings)
    assert all(getattr(config, name) == value for name, value in settings.items())


def test_all_torchvision_cnns_and_no_transformers_are_backbones():
    names = torchvision.models.list_models(module=torchvision.models)
    refused = set()
    for name in names:
        try:
            AttnCapConfig(backbone=name)
        except StrictDataclassError:
            refused.add(name)
    assert refused == {name for name in names if name.split("_")[0] in ("vit", "swin", "maxvit")}
    assert len(refused) > 10 and len(names) - len(refused) > 60


def test_config_of_an_earlier_version_loads_unless_its_backbone_was_dilated():
    assert not hasattr(AttnCapConfig.from_dict({"dilate_last_stage": False}), "dilate_last_stage")
    with pytest.raises(ValueError, match="`dilate_last_stage` is no longer supported: load this checkpoint"):
        AttnCapConfig.from_dict({"dilate_last_stage": True})


OTHERS = {
    "backbone": "mobilenet_v2",
    "backbone_padding": "same",
    "freeze_backbone": False,
    "trainable_blocks": 2,
    "freeze_batch_norm": False,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.25, 0.125],
    "encoder_channels": 9,
    "grid_size": [3, 4],
    "vocab_size": 77,
    "word_embed_dim": 8,
    "hidden_size": 7,
    "attention_dim": 6,
    "word_attention": "channel",
    "max_word_distance": 5,
    "gate": False,
    "deep_output": False,
    "freeze_word_embeddings": True,
    "dropout": 0.25,
    "alpha_c": 0.5,
    "label_smoothing": 0.1,
    "confidence": {"weights": {"score": 2.0, "lowest": 0.25}, "bias": 1, "threshold": 0.5, "images": 40},
    "use_cache": False,
    "unk_token_id": 4,
}


def test_all_fields_are_tested():
    inherited_or_fixed = {"is_encoder_decoder", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"}
    own = {field.name for field in fields(AttnCapConfig) if field.name in AttnCapConfig.__annotations__}
    assert own - inherited_or_fixed - {"decoder_start_token_id"} == set(OTHERS)
    default = AttnCapConfig()
    assert all(getattr(default, name) != value for name, value in OTHERS.items())


def test_save_and_load(tmp_path):
    config = AttnCapConfig(**OTHERS)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["word_attention"] == "channel"
    for loaded in (AttnCapConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, AttnCapConfig)
        assert {name: getattr(loaded, name) for name in OTHERS} == OTHERS


def test_damaged_config_file_is_rejected(tmp_path):
    AttnCapConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "word_attention": "memory"}))
    with pytest.raises(StrictDataclassError, match="word_attention"):
        AttnCapConfig.from_pretrained(tmp_path)
