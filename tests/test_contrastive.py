"""Contrastive training: its loss and its scores against plain mathematics, and a run as a user starts it."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torchvision.models import mobilenet_v3_small

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration
from training.contrastive import Matcher, contrastive_loss, retrieval
from training.train import main

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (240, 240, 240)}
TRUNK = "model.encoder.backbone."
MODEL = {
    "backbone": "mobilenet_v3_small",
    "encoder_channels": 16,
    "hidden_size": 16,
    "word_embed_dim": 12,
    "attention_dim": 8,
    "freeze_backbone": False,
    "trainable_blocks": 3,
    "freeze_batch_norm": True,
}


def picture(colour: str) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), COLOURS[colour]).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "colours.parquet"
    captions = [[f"a {name} square", f"the square is {name}"] for name in COLOURS]
    Dataset.from_dict({"image": list(map(picture, COLOURS)), "captions": captions}).to_parquet(str(path))
    return path


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """Random weights, with batch norm statistics of plain pictures: without these, all pictures look alike to them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    classifier = mobilenet_v3_small()
    for module in classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean
    with torch.no_grad():
        for _ in range(10):
            classifier(torch.randn(16, 3, 1, 1).expand(16, 3, 64, 64))
    torch.save(classifier.state_dict(), path)
    return path


def options(table: Path, backbone: Path, output: Path, **more: Any) -> list[str]:
    settings = {
        "model_config": json.dumps(MODEL),
        "backbone_weights": backbone,
        "image_size": 64,
        "min_count": 1,
        "contrastive": True,
        "captions_per_image": 2,
        "train_file": table,
        "validation_file": table,
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.003,
        "num_train_epochs": 30,
        "eval_strategy": "no",
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
        **more,
    }
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_loss_is_the_mean_of_two_cross_entropies(pictures, k, seed):
    logits = np.random.default_rng(seed).normal(0, 3, (pictures, pictures * k))
    of_captions = [math.log(sum(math.exp(x) for x in logits[:, r])) - logits[r // k, r] for r in range(pictures * k)]
    of_pictures = [
        math.log(sum(math.exp(x) for x in logits[r // k])) - logits[r // k, r] for r in range(pictures * k)
    ]  # each caption that a picture has is one right answer of k
    expected = (sum(of_captions) / len(of_captions) + sum(of_pictures) / len(of_pictures)) / 2
    assert float(contrastive_loss(torch.from_numpy(logits))) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(st.integers(1, 14), st.integers(1, 3), st.integers(0, 10**6))
def test_retrieval_counts_what_is_nearer(pictures, k, seed):
    random = np.random.default_rng(seed)
    places, captions = random.normal(size=(pictures, 3)), random.normal(size=(pictures * k, 3))
    near = places @ captions.T
    found = retrieval(places, captions)
    for count in (1, 5, 10):
        hits = sum(r // k in sorted(range(pictures), key=lambda i: -near[i, r])[:count] for r in range(pictures * k))
        assert found[f"picture_within_{count}"] == pytest.approx(hits / (pictures * k))
        hits = sum(
            any(r // k == i for r in sorted(range(pictures * k), key=lambda r: -near[i, r])[:count]) for i in range(pictures)
        )
        assert found[f"caption_within_{count}"] == pytest.approx(hits / pictures)


def test_nothing_is_found_where_all_places_are_one():
    assert set(retrieval(np.ones((20, 3)), np.ones((40, 3))).values()) == {0.0}


def test_padding_says_nothing_and_all_places_have_length_one():
    torch.manual_seed(0)
    matcher = Matcher(AttnCapForConditionalGeneration(AttnCapConfig(vocab_size=20, **MODEL))).eval()
    labels = torch.tensor([[5, 6, 7, 2], [8, 2, -100, -100]])
    found = matcher.place_captions(labels)
    torch.testing.assert_close(matcher.place_captions(torch.nn.functional.pad(labels, (0, 3), value=-100)), found)
    torch.testing.assert_close(matcher.place_captions(labels[1:, :2]), found[1:])
    seen = matcher.place_pictures(torch.randn(3, 3, 64, 64), None)
    torch.testing.assert_close(torch.cat([found, seen]).norm(dim=-1), torch.ones(5))


def test_pictures_find_their_captions_and_a_decoder_goes_on_from_there(table, backbone, tmp_path, capsys):
    first, second = tmp_path / "contrastive", tmp_path / "decoder"
    assert main(options(table, backbone, first)) == 0
    metrics = json.loads((first / "metrics.json").read_text())
    assert metrics["eval_picture_within_1"] == metrics["eval_caption_within_1"] == 1
    assert metrics["eval_loss"] < 0.5 * math.log(4)

    before, after = torch.load(backbone), load_file(first / "model.safetensors")
    moved = {name for name in before if name.startswith("features") and not torch.equal(before[name], after[f"{TRUNK}{name}"])}
    numbers = {int(name.split(".")[1]) for name in moved}
    assert numbers == {10, 11, 12} and not any("running" in name for name in moved)
    assert not any("reader" in name for name in after)

    assert main(options(table, backbone, second, model_name_or_path=first)) == 2
    assert "`backbone_weights` is not used: it is for a new captioner" in capsys.readouterr().err
    start = {"backbone_weights": None, "contrastive": False, "model_config": "{}"}
    critical = options(table, backbone, second, model_name_or_path=first, **start, self_critical=True)
    assert main(critical) == 2 and "train its decoder first" in capsys.readouterr().err
    wider = options(table, backbone, second, model_name_or_path=first, **start | {"model_config": json.dumps({"hidden_size": 20})})
    assert main(wider) == 2 and "weights of other sizes" in capsys.readouterr().err

    more = {"model_name_or_path": first, "model_config": json.dumps({"freeze_backbone": True}), "backbone_weights": None}
    assert main(options(table, backbone, second, **more, contrastive=False, num_train_epochs=1)) == 0
    own = load_file(second / "model.safetensors")
    assert all(torch.equal(own[name], after[name]) for name in after if name.startswith(TRUNK))
    stages = json.loads((second / "training.json").read_text())
    assert [stage["settings"].get("contrastive", False) for stage in stages] == [True, False]


def test_cached_maps_and_a_run_that_goes_on_give_the_same_weights(table, backbone, tmp_path, capsys):
    short = {"num_train_epochs": 4, "save_strategy": "epoch", "feature_cache": tmp_path / "maps"}
    assert main(options(table, backbone, tmp_path / "whole", **short)) == 0
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    again = options(table, backbone, tmp_path / "again", **short, resume_from_checkpoint=checkpoint)
    assert main(again) == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any("reader" in name for name in load_file(checkpoint / "model.safetensors"))
    start = {"model_name_or_path": checkpoint, "model_config": "{}", "backbone_weights": None, "contrastive": False}
    assert main(options(table, backbone, tmp_path / "decoder", **start)) == 2
    assert "has no config.json and is no captioner" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"self_critical": True}, "`self_critical` is for a decoder"),
        ({"predict_with_generate": True}, "`predict_with_generate` is for a decoder"),
        ({"input_dropout": 0.1}, "`input_dropout` is for a decoder"),
        ({"metric_for_best_model": "cider"}, "choose by `loss`"),
        ({"gradient_checkpointing": True}, "leave it out"),
        ({"push_to_hub": True}, "a captioner says nothing yet"),
        ({"per_device_train_batch_size": 1}, "set `per_device_train_batch_size` to 2"),
        (
            {"model_config": json.dumps({**MODEL, "freeze_backbone": True, "trainable_blocks": None})},
            "set `freeze_backbone: false`",
        ),
    ],
)
def test_what_does_not_go_together_is_named(table, backbone, tmp_path, capsys, more, message):
    assert main(options(table, backbone, tmp_path / "run", **more)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
