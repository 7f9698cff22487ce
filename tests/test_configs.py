"""The configs in the package: they can be parsed, and their stages run one after the other."""

import itertools
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
import torchvision
import yaml
from hf_attncap.training.arguments import CaptionTrainingArguments, DataArguments, ModelArguments, parse_arguments
from hf_attncap.training.settings import CONFIGS
from hf_attncap.training.train import main
from PIL import Image
from torchvision.models import ResNet152_Weights

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration
from hf_attncap.captioner import Captioner
from hf_attncap.efficientnet_lite_attncap import efficientnet_lite

GROUPS = (ModelArguments, DataArguments, CaptionTrainingArguments)
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
STAGES = ("decoder", "encoder", "self_critical")
NEW = [name for name in NAMES if "resnet152" in name]
KARPATHY = {"flickr8k": "images", "coco": "coco"}
# Of the captioners on Flickr8k: what makes their backbone, and which of its blocks learn on.
MOBILENET, LITE = "flickr8k_mobilenet_v2", "flickr8k_efficientnet_lite2"
FLICKR8K = {
    MOBILENET: (torchvision.models.mobilenet_v2, set(range(14, 19))),
    LITE: (partial(efficientnet_lite, "efficientnet_lite2"), {6, 7, 8}),
}

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (240, 240, 240)}
RARE = ["dog", "cat", "house", "tree"]  # twice at most in the captions to learn from: too seldom for the vocabulary
SHORT = {
    "max_steps": 2,
    "eval_steps": 2,
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "save_only_model": True,  # Adam's state of ResNet-152 would be half a gigabyte more
    "num_logged_images": 1,
    "use_cpu": True,
}


def settings_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


def command_of(name: str) -> list[str]:
    """The options of the one command at the head of a config."""
    head = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").partition("\nmodel_config")[0]
    text = re.sub(r"^# ?", "", head, flags=re.M).replace("\\\n", " ")
    (command,) = re.findall(r"^ +attncap train (.*)$", text, flags=re.M)
    return shlex.split(command)


def option(command: list[str], name: str) -> str:
    return command[command.index(f"--{name}") + 1]


def fits(value: Any, wanted: Any) -> bool:
    """Whether a value of a YAML file is of an annotated type, `5e-4` for example being a text there and no number."""
    kinds = get_args(wanted) or (wanted,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_known_and_of_their_types(name, tmp_path):
    settings = settings_of(name)
    hints = {key: value for group in GROUPS for key, value in get_type_hints(group).items()}
    model_config = settings.pop("model_config")
    assert not settings.keys() - hints.keys()
    assert not {key: value for key, value in settings.items() if not fits(value, hints[key])}
    assert not model_config.keys() - {item.name for item in fields(AttnCapConfig)}
    assert AttnCapConfig(vocab_size=100, **model_config).freeze_backbone is model_config.get("freeze_backbone", True)

    argv = ["--config", f"{name}.yaml", "--train_file", "data.json", "--output_dir", str(tmp_path), "--use_cpu", "True"]
    if "cached_views" in settings:
        argv += ["--feature_cache", str(tmp_path)]  # a folder of the reader's, which the head of the file asks for
    model, data, training = parse_arguments(argv)
    assert model.model_config == model_config
    for key, value in settings.items():
        holder = next(group for group in (model, data, training) if hasattr(group, key))
        assert getattr(holder, key) == ([] if (key, value) == ("report_to", "none") else value)
    assert 0 < training.learning_rate < 1e-3
    assert 0 < (training.encoder_learning_rate or 1e-5) <= training.learning_rate


@pytest.mark.parametrize("name", NEW)
def test_the_comment_of_a_config_gives_one_complete_command(name):
    """With the data in reach: the weights are torchvision's own, whose mean and std the captioner then takes."""
    command = command_of(name)
    model, data, training = parse_arguments([*command, "--use_cpu", "True"])
    dataset, _, stage = name.split("_", 2)
    assert option(command, "config") == f"{name}.yaml"
    assert (data.train_file, data.image_dir) == (f"dataset_{dataset}.json", KARPATHY[dataset])
    assert (data.feature_cache is None) == (stage == "encoder")
    if stage == "decoder":
        assert model.model_config["backbone"] == "resnet152" and model.backbone_weights in ResNet152_Weights.__members__
        assert not {"image_mean", "image_std", "backbone_padding"} & model.model_config.keys()
        assert model.min_count == 5 and model.model_name_or_path is None
    else:
        before = command_of(f"{dataset}_resnet152_{STAGES[STAGES.index(stage) - 1]}")
        assert model.model_name_or_path == option(before, "output_dir") != training.output_dir


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """Where a test runs; emptied afterwards, since captioners of this size are not to be kept."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path)


def put_data(folder: Path, dataset: str) -> Path:
    """Six pictures to learn from, two to validate on and one for the test, as Karpathy has them; gives one of the pictures."""
    splits = ["train"] * 4 + ["restval" if dataset == "coco" else "train"] * 2 + ["val"] * 2 + ["test"]
    images, picture = [], folder
    for n, split in enumerate(splits):
        colour = list(COLOURS)[n % 4]
        place = {"filepath": "val2014" if split in ("restval", "val") else "train2014"} if dataset == "coco" else {}
        picture = folder / KARPATHY[dataset] / place.get("filepath", "") / f"{n}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (96, 72), COLOURS[colour]).save(picture)
        rare = RARE[n % 4] if split != "test" else "zebra"
        texts = [f"A {colour} square .", f"a plain {colour} square", f"there is a {colour} square", f"{colour}", f"a {rare}"]
        sentences = [{"raw": text, "tokens": text.lower().replace(" .", "").split(), "imgid": n} for text in texts]
        images.append({**place, "filename": picture.name, "imgid": n, "split": split, "sentences": sentences})
    (folder / f"dataset_{dataset}.json").write_text(json.dumps({"images": images, "dataset": dataset}))
    return picture


def put_weights(path: Path, make: Callable[..., torch.nn.Module]) -> Path:
    """Random weights that a download would have brought; the last batch norm of each block is damped, or 50 blocks overflow."""
    torch.manual_seed(0)
    state = make().state_dict()
    for key in state:
        if key.endswith("bn3.weight"):
            state[key].mul_(0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def flickr8k(folder: Path, captioner: str) -> dict[str, list[str]]:
    """What is to be given with the configs of a captioner on Flickr8k, by their stages."""
    weights = put_weights(folder / "backbone.pth", FLICKR8K[captioner][0])
    begin = {STAGES[0]: ["--backbone_weights", str(weights), "--image_size", "64"]}
    begin |= {stage: ["--model_name_or_path", before] for before, stage in itertools.pairwise(STAGES)}
    data = ["--train_file", "dataset_flickr8k.json", "--image_dir", KARPATHY["flickr8k"], "--feature_cache", "maps"]
    return {
        stage: ["--config", f"{captioner}_{stage}.yaml", *data, *given, "--output_dir", stage] for stage, given in begin.items()
    }


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {key for key in before if not torch.equal(before[key], after[key])}


@pytest.mark.slow
@pytest.mark.parametrize("captioner", [*FLICKR8K, "coco_resnet152"])
def test_stages_run_from_data_to_captions(captioner, folder, monkeypatch):
    dataset = captioner.partition("_")[0]
    picture = put_data(folder, dataset)
    if captioner in FLICKR8K:
        commands = flickr8k(folder, captioner)
    else:
        # Where torchvision finds what it has downloaded before.
        monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
        file = Path(ResNet152_Weights.DEFAULT.url).name
        put_weights(folder / "torch" / "hub" / "checkpoints" / file, torchvision.models.resnet152)
        commands = {stage: command_of(f"{captioner}_{stage}") for stage in STAGES}
        commands["decoder"] += ["--image_size", "64"]
    short = [word for key, value in SHORT.items() for word in (f"--{key}", str(value))]
    states, outputs = [], [Path(option(commands[stage], "output_dir")) for stage in STAGES]
    for stage, output in zip(STAGES, outputs):
        assert main([*commands[stage], *short]) == 0
        metrics = json.loads((output / "metrics.json").read_text())
        assert np.isfinite(metrics["train_loss"]) and np.isfinite(metrics["eval_loss"]) and "eval_cider" in metrics
        assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 2
        states.append(AttnCapForConditionalGeneration.from_pretrained(output).state_dict())
        for checkpoint in output.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    decoder_stage, encoder_stage, last = states
    backbone = {key for key in last if ".backbone." in key}
    assert backbone & moved(decoder_stage, encoder_stage) and not any(
        "running" in key for key in moved(decoder_stage, encoder_stage)
    )
    learned = backbone & moved(encoder_stage, last)
    assert moved(encoder_stage, last) - backbone
    if captioner in FLICKR8K:
        assert {int(key.split(".")[4]) for key in learned} == FLICKR8K[captioner][1] and not any(
            "running" in key for key in learned
        )
    else:
        assert not learned

    trained = Captioner.from_pretrained(outputs[-1], device="cpu")
    vocabulary = trained.processor.tokenizer.get_vocab()
    # "red" is there often enough only with the second red picture, which of COCO's is in restval.
    assert vocabulary.keys() >= {"a", "square", "red"} and not vocabulary.keys() & {*RARE, "zebra"}
    expected = list(ResNet152_Weights.DEFAULT.transforms().mean)
    if captioner in FLICKR8K:
        expected = settings_of(f"{captioner}_decoder")["model_config"]["image_mean"]
    assert trained.processor.image_processor.image_mean == pytest.approx(expected)
    result = trained.caption(picture, prompt="a red")
    assert result.text.startswith("a red") and result.attention.shape == (len(result.words), 2, 2)
    assert set(result.words) <= vocabulary.keys()
