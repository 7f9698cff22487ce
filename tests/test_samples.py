"""Captions of validation images during training: in files, in the log and in trackers."""

import io
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from hf_attncap.training.train import main
from hf_attncap.training.trainers.ema import LIVE_WEIGHTS_FILE
from hf_attncap.training.trainers.sample_captions import SampleCaptions
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from hf_attncap import AttnCapForConditionalGeneration, AttnCapProcessor, Captioner
from hf_attncap.captioner import CaptionResult

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (240, 240, 240)}
TINY = {
    "backbone": "mobilenet_v3_small",
    "encoder_channels": 24,
    "hidden_size": 32,
    "attention_dim": 16,
    "word_embed_dim": 16,
    "alpha_c": 0.0,  # one region at 32 pixels
}


def picture(colour: str) -> bytes:
    """Four by four random blocks, tinted with the colour."""
    random = np.random.default_rng(list(colour.encode()))
    blocks = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    blocks = Image.blend(blocks, Image.new("RGB", blocks.size, COLOURS[colour]), 0.3)
    buffer = io.BytesIO()
    blocks.resize((60, 40), Image.Resampling.NEAREST).save(buffer, format="PNG")
    return buffer.getvalue()


def references(colour: str) -> list[str]:
    return [f"A {colour} square .", f"There is a {colour} square", f"a plain {colour} picture"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with train.parquet and validation.parquet, which have the same images under different ids."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "validation"):
        rows = {
            "image": [{"bytes": picture(name), "path": None} for name in COLOURS],
            "captions": [references(name) for name in COLOURS],
            "image_id": [f"{split}/{name}.png" for name in COLOURS],
        }
        Dataset.from_dict(rows).cast_column("image", ImageColumn()).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def options(data: Path, output: Path, **more) -> list[str]:
    values = {
        "train_file": data / "train.parquet",
        "validation_file": data / "validation.parquet",
        "output_dir": output,
        "model_config": json.dumps(TINY),
        "min_count": 1,
        "image_size": 32,
        "captions_per_image": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "num_logged_images": 2,
        **more,
    }
    if "model_name_or_path" in values:
        del values["model_config"]
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A trained captioner whose generation settings are random sampling."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(options(data, folder, max_steps=25, eval_strategy="no", num_logged_images=0)) == 0
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True, "num_beams": 1}))
    return folder


@pytest.fixture
def quick_drawing(monkeypatch):
    monkeypatch.setattr(CaptionResult, "plot_attention", lambda result: Figure((1, 1)))


def captions_of(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["image_id"]: line["caption"] for line in lines}


def said_by(checkpoint: Path, live: bool = False) -> dict[str, str]:
    captioner = Captioner.from_pretrained(checkpoint, device="cpu")
    if live:
        captioner.model.load_state_dict(load_file(checkpoint / LIVE_WEIGHTS_FILE), strict=False)
    results = captioner.caption([picture(name) for name in list(COLOURS)[:2]])
    return {f"validation/{name}.png": result.text for name, result in zip(COLOURS, results)}


@pytest.mark.slow
def test_every_evaluation_writes_captions_and_plots(data, tmp_path, caplog):
    assert main(options(data, tmp_path)) == 0
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"step-000002", "final"}
    for folder in (tmp_path / "samples").iterdir():
        lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
        assert [line["image_id"] for line in lines] == ["validation/red.png", "validation/green.png"]
        assert [line["references"] for line in lines] == [references("red"), references("green")]
        assert {line["picture"] for line in lines} == {"1-red.jpg", "2-green.jpg"}
        for line in lines:
            assert f"step 2, image {line['image_id']}: {line['caption']}" in caplog.messages
            with Image.open(folder / line["picture"]) as strip:
                assert strip.format == "JPEG" and strip.width > 300
    assert not [message for message in caplog.messages if message.startswith("samples:")]


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"feature_cache": "maps"}, {"streaming": True}], ids=["pictures", "cached maps", "stream"])
def test_captions_equal_those_of_the_saved_captioner(more, tiny_checkpoint, data, tmp_path, quick_drawing, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {**more, "model_name_or_path": tiny_checkpoint, "max_steps": 1, "eval_strategy": "no", "learning_rate": 1e-9}
    assert main(options(data, tmp_path / "run", **more)) == 0
    said = captions_of(tmp_path / "run" / "samples" / "final")
    assert len(set(said.values())) > 1 and said == said_by(tmp_path / "run")


@pytest.mark.slow
def test_captions_come_from_the_ema_weights(data, tmp_path, quick_drawing):
    more = {"ema_decay": 0.999, "save_strategy": "steps", "save_steps": 12, "eval_steps": 12, "max_steps": 12}
    more["learning_rate"] = 0.2  # large enough for different captions of average and live weights
    assert main(options(data, tmp_path, **more)) == 0
    checkpoint = tmp_path / "checkpoint-12"
    said = captions_of(tmp_path / "samples" / "step-000012")
    assert said == said_by(checkpoint) != said_by(checkpoint, live=True)


@pytest.mark.slow
@pytest.mark.parametrize("self_critical", [False, True], ids=["cross-entropy", "self-critical"])
def test_sampling_captions_does_not_change_the_run(self_critical, trained, data, tmp_path, quick_drawing):
    """With random captions between steps that use dropout, sampled references and self-critical samples."""
    more = {"model_name_or_path": trained, "max_steps": 4, "eval_steps": 1, "self_critical": self_critical}
    for name, images in (("without", 0), ("with", 3)):
        assert main(options(data, tmp_path / name, num_logged_images=images, **more)) == 0
    assert not (tmp_path / "without" / "samples").exists()
    assert len(list((tmp_path / "with" / "samples").iterdir())) == 5
    whole, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("without", "with"))
    assert whole == other != (trained / "model.safetensors").read_bytes()


def test_unwritable_samples_are_a_warning_and_training_continues(data, tmp_path, caplog):
    (tmp_path / "samples").write_text("in the way")
    assert main(options(data, tmp_path)) == 0
    assert (tmp_path / "metrics.json").exists()
    warnings = [message for message in caplog.messages if message.startswith("samples:")]
    assert len(warnings) == 2 and "step-000002" in warnings[0] and "NotADirectoryError" in warnings[0]


def test_negative_number_is_refused(data, tmp_path, capsys):
    assert main(options(data, tmp_path, num_logged_images=-1)) == 2
    assert "`num_logged_images` is -1" in capsys.readouterr().err


def evaluate(checkpoint: Path, output: Path, ids: list[str], *, main_process: bool = True, report_to: Any = (), change=None) -> Any:
    """Call the callback after an evaluation at step 7; returns the model."""
    model, processor = AttnCapForConditionalGeneration.from_pretrained(checkpoint), AttnCapProcessor.from_pretrained(checkpoint)
    if change:
        change(model)
    images = [Image.effect_noise((50, 40), 60).convert("RGB") for _ in ids]
    rows = Dataset.from_dict({"image": images, "captions": [["a dog"]] * len(ids), "image_id": ids})
    args = SimpleNamespace(output_dir=str(output), report_to=list(report_to))
    state = SimpleNamespace(is_world_process_zero=main_process, global_step=7)
    model.eval()
    SampleCaptions(rows.cast_column("image", ImageColumn()), []).on_evaluate(
        args, state, None, model=model, processing_class=processor
    )
    return model


def test_any_image_id_gives_a_separate_file_in_the_folder(tiny_checkpoint, tmp_path, quick_drawing):
    ids = ["../a/dog.jpg", "../b/dog.jpg", "https://x.org/p?q=1&r=../..", "", "狗" * 300, "nul\0name"]
    evaluate(tiny_checkpoint, tmp_path, ids)
    folder = tmp_path / "samples" / "step-000007"
    assert list(captions_of(folder)) == ids
    assert len(list(folder.glob("*.jpg"))) == len(ids) and len(list(tmp_path.rglob("*"))) == len(ids) + 3


def test_caption_without_words_has_a_plot(tiny_checkpoint, tmp_path, caplog):
    def say_nothing(model) -> None:
        with torch.no_grad():
            model.lm_head.bias[model.config.eos_token_id] = 1e4

    evaluate(tiny_checkpoint, tmp_path, ["1"], change=say_nothing)
    assert captions_of(tmp_path / "samples" / "step-000007") == {"1": ""}
    assert (tmp_path / "samples" / "step-000007" / "1-1.jpg").exists()
    assert not [message for message in caplog.messages if message.startswith("samples:")]


def test_only_the_main_process_writes_samples(tiny_checkpoint, tmp_path):
    evaluate(tiny_checkpoint, tmp_path, ["1"], main_process=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_tracker_gets_plots_and_captions_with_the_step(package, tiny_checkpoint, tmp_path, quick_drawing, monkeypatch):
    logged = []

    def draw_and_log(entries):
        logged.append((entries, random.random(), np.random.random()))  # trackers choose file names at random

    tracker = SimpleNamespace(Image=lambda path, caption: (Image.open(path).size, caption), log=draw_and_log)
    monkeypatch.setitem(sys.modules, package, tracker)
    before = random.getstate(), np.random.get_state()[1].tolist()
    evaluate(tiny_checkpoint, tmp_path, ["x/1.jpg", "x/2.jpg"], report_to=[package, "mlflow"])
    [(entries, *_)] = logged
    said = captions_of(tmp_path / "samples" / "step-000007")
    assert entries.pop("train/global_step") == 7
    assert {name: caption for name, (_, caption) in entries.items()} == dict(zip(("samples/1-1", "samples/2-2"), said.values()))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize("self_critical", [False, True], ids=["cross-entropy", "self-critical"])
def test_tensorboard_has_curves_captions_and_plots(self_critical, trained, data, tmp_path, quick_drawing):
    reader: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    more = {"report_to": "tensorboard", "predict_with_generate": True, "model_name_or_path": trained}
    assert main(options(data, tmp_path, self_critical=self_critical, **more)) == 0
    scalars: dict[str, list] = {}
    pictures, texts = set(), set()
    for file in tmp_path.rglob("events.out.tfevents.*"):
        events = reader.EventAccumulator(str(file), size_guidance={"images": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
        pictures |= {(tag, event.step) for tag in events.Tags()["images"] for event in events.Images(tag)}
        texts |= {tag for tag in events.Tags()["tensors"] if tag.startswith("samples/")}
    assert [step for step, _ in scalars["train/loss"]] == [1, 2]
    assert ("train/reward" in scalars) == self_critical
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (2, pytest.approx(metrics["eval_cider"])) in scalars["eval/cider"]
    assert pictures == {("samples/1-red", 2), ("samples/2-green", 2)}
    assert texts == {"samples/1-red/text_summary", "samples/2-green/text_summary"}


@pytest.mark.parametrize(("tracker", "message"), [("wandb", "pip install wandb"), ("wandbb", "wandbb is not supported")])
def test_missing_tracker_is_reported_before_data_are_read(tracker, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    assert main(["--train_file", "nowhere.parquet", "--report_to", tracker, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "nowhere" not in error and "Traceback" not in error
