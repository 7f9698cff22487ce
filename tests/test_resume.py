"""Runs that are killed or that meet a full disk, a loss that is not finite or an unreadable image, and resume afterwards."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hf_attncap.training.data.augmentation import Augmentation, EpochRandomness, augment_rows
from hf_attncap.training.data.checks import Decoding
from hf_attncap.training.data.collator import CaptionCollator
from hf_attncap.training.train import main
from hf_attncap.training.trainers.caption_trainer import CaptionTrainer
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_attncap import AttnCapProcessor
from hf_attncap.atomic import UNFINISHED

ROOT = Path(__file__).parent.parent
COLOURS = ["red", "green", "blue", "white", "black"]
MODEL = {
    "backbone": "mobilenet_v3_small",
    "encoder_channels": 24,
    "hidden_size": 32,
    "attention_dim": 16,
    "word_attention": "history",
    "word_embed_dim": 16,
    "dropout": 0.4,
    "alpha_c": 0.0,
}
LIMIT = 300  # seconds for a process


def picture(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="PNG")
    return buffer.getvalue()


def captions(colour: str) -> list[str]:
    return [f"a {colour} square", f"there is a {colour} square", f"a plain {colour} picture", f"the square is {colour}"]


def write_data(folder: Path, split: str = "train") -> Path:
    """Five image files with four captions each and a table with their paths: three batches of two per epoch."""
    folder.mkdir()
    lines = []
    for seed, colour in enumerate(COLOURS):
        (folder / f"{colour}.png").write_bytes(picture(seed))
        lines.append(json.dumps({"image": f"{colour}.png", "captions": captions(colour), "image_id": f"{split}-{colour}"}))
    table = folder / f"{split}.jsonl"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def validation(tmp_path_factory) -> dict[str, Path]:
    return {"validation_file": write_data(tmp_path_factory.mktemp("data") / "pictures", "validation")}


def options(table: Path, output: Path, **more: Any) -> list[str]:
    values = {
        "train_file": table,
        "output_dir": output,
        "model_config": json.dumps(MODEL),
        "min_count": 1,
        "image_size": 32,
        "captions_per_image": 2,  # of four
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 2,  # in the middle of epochs: they have three steps
        "logging_steps": 1,
        "num_logged_images": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **more,
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def warm(table, tmp_path_factory) -> Path:
    """A captioner after a short training on cached features."""
    output = tmp_path_factory.mktemp("warm")
    assert main(options(table, output, save_strategy="no", num_train_epochs=6, feature_cache=output / "cache")) == 0
    return output


@pytest.fixture
def stages(warm, tmp_path) -> dict[str, dict[str, Any]]:
    started = {"model_name_or_path": warm}
    critical = {**started, "model_config": '{"dropout": 0.4}', "self_critical": True, "cross_entropy_weight": 0.3}
    return {
        "decoder": {"feature_cache": tmp_path / "cache"},
        "encoder": {**started, "augment": True, "model_config": '{"freeze_backbone": false, "dropout": 0.4}'},
        "self-critical": {**critical, "feature_cache": tmp_path / "cache"},
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def steps_of(output: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in output.glob("checkpoint-*"))


class Interruption(Exception):
    pass


@pytest.fixture
def interrupted(monkeypatch):
    """`interrupted(at)` makes runs end suddenly before step `at + 1`, until `interrupted(None)`."""
    last: list[int | None] = [None]
    step = CaptionTrainer.training_step

    def training_step(self, *args, **kwargs):
        if last[0] is not None and self.state.global_step >= last[0]:
            raise Interruption
        return step(self, *args, **kwargs)

    monkeypatch.setattr(CaptionTrainer, "training_step", training_step)

    def set_last(at: int | None) -> None:
        last[0] = at

    return set_last


@pytest.mark.parametrize(
    ("stage", "at", "more"),
    [
        ("decoder", 5, {}),
        # Two steps per epoch.
        pytest.param("decoder", 3, {"gradient_accumulation_steps": 2, "ema_decay": 0.8, "save_steps": 1}, marks=pytest.mark.slow),
        ("encoder", 2, {}),
        pytest.param("encoder", 5, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}, marks=pytest.mark.slow),
        ("self-critical", 5, {"ema_decay": 0.8}),
        # At the end of an epoch, whose evaluation the resumed run does not repeat.
        ("decoder", 3, {"eval_strategy": "epoch", "save_steps": 1}),
    ],
    ids=["decoder", "accumulation and average", "encoder", "encoder, workers", "self-critical", "evaluation"],
)
def test_interrupted_run_ends_like_an_uninterrupted_one(stages, table, validation, tmp_path, interrupted, stage, at, more):
    settings = {**stages[stage], **more, **(validation if "eval_strategy" in more else {})}
    whole, output = tmp_path / "whole", tmp_path / "broken"
    assert main(options(table, whole, **settings)) == 0
    interrupted(at)
    with pytest.raises(Interruption):
        main(options(table, output, **settings))
    kept = steps_of(output)
    assert kept and max(kept) <= at and not (output / "model.safetensors").exists()
    interrupted(None)
    assert main(options(table, output, resume_from_checkpoint="last", **settings)) == 0
    assert_same(whole, output)
    assert json.loads((whole / f"checkpoint-{kept[-1]}" / "config.json").read_text())["use_cache"] is True


def test_resuming_a_finished_run_makes_no_step(stages, table, tmp_path):
    output, settings = tmp_path / "run", {**stages["decoder"], "max_steps": 4}
    assert main(options(table, output, **settings)) == 0
    expected = weights(output)
    (output / "model.safetensors").unlink()
    assert main(options(table, output, resume_from_checkpoint="last", **settings)) == 0
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 4
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(output).items())


def test_evaluation_does_not_change_training(stages, table, validation, tmp_path):
    settings = {**stages["decoder"], **validation}
    assert main(options(table, tmp_path / "without", **settings)) == 0
    assert main(options(table, tmp_path / "with", **settings, eval_strategy="steps", eval_steps=1)) == 0
    assert_same(tmp_path / "without", tmp_path / "with")


def test_every_evaluation_has_the_same_captions(stages, table, validation, tmp_path):
    """Two of four captions are sampled. With a learning rate of zero, the evaluation loss is the same in each epoch."""
    settings = {**stages["decoder"], **validation, "learning_rate": 0.0, "eval_strategy": "epoch", "save_strategy": "no"}
    assert main(options(table, tmp_path, **settings)) == 0
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 4 and len(set(losses)) == 1
    assert len({entry["loss"] for entry in history if "loss" in entry}) > 3  # training samples other captions each time


def test_early_stopping_continues_after_resuming(stages, table, validation, tmp_path, interrupted):
    """With a learning rate of zero nothing improves, so with a patience of three the fourth evaluation ends the run."""
    settings = {**stages["decoder"], **validation, "learning_rate": 0.0, "num_train_epochs": 8}
    settings |= {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "loss", "captions_per_image": 4}
    patient = {**settings, "early_stopping_patience": 3}

    def epochs(output: Path) -> float:
        return json.loads((output / "trainer_state.json").read_text())["epoch"]

    assert main(options(table, tmp_path / "whole", **patient)) == 0
    assert epochs(tmp_path / "whole") == 4
    interrupted(6)
    with pytest.raises(Interruption):
        main(options(table, tmp_path / "broken", **patient))
    interrupted(None)
    assert main(options(table, tmp_path / "broken", resume_from_checkpoint="last", **patient)) == 0
    assert epochs(tmp_path / "broken") == 4
    # The checkpoint has the end of the run, so resuming trains nothing. With a higher patience it continues.
    assert main(options(table, tmp_path / "broken", resume_from_checkpoint="last", **patient)) == 0
    assert epochs(tmp_path / "broken") == 4
    more = {**settings, "early_stopping_patience": 4}
    assert main(options(table, tmp_path / "broken", resume_from_checkpoint="last", **more)) == 0
    assert epochs(tmp_path / "broken") == 5
    # From a checkpoint of a run without early stopping, counting starts at zero.
    assert main(options(table, tmp_path / "other", **{**settings, "num_train_epochs": 1})) == 0
    assert main(options(table, tmp_path / "other", resume_from_checkpoint="last", **{**patient, "num_train_epochs": 2})) == 0
    assert epochs(tmp_path / "other") == 2


def test_best_and_newest_checkpoints_are_kept(stages, table, validation, tmp_path):
    """The highest loss counts as the best here, so the best checkpoint is not always the newest; only the best remains."""
    output = tmp_path / "run"
    each = {**validation, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    best = {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True, "save_total_limit": 1}
    kept: list[list[int]] = []

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            kept.append(steps_of(output))

    real = CaptionTrainer.__init__

    def with_watch(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.add_callback(Watch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CaptionTrainer, "__init__", with_watch)
        assert main(options(table, output, **stages["decoder"], **each, **best)) == 0
    state = json.loads((output / "trainer_state.json").read_text())
    evaluated = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    losses = dict(enumerate(evaluated[:4], 1))  # the last entry is the evaluation of the best checkpoint
    best_then = [max(list(losses)[:step], key=lambda step: losses[step]) for step in range(1, 5)]
    assert kept == [sorted({best, step}) for step, best in enumerate(best_then, 1)] and any(len(steps) == 2 for steps in kept)
    assert steps_of(output) == best_then[-1:] and not (output / UNFINISHED).exists()
    assert state["best_model_checkpoint"] == str(output / f"checkpoint-{best_then[-1]}")
    assert_same(output / f"checkpoint-{best_then[-1]}", output)


def test_checkpoints_without_optimizer(stages, table, tmp_path):
    assert main(options(table, tmp_path, **stages["decoder"], save_only_model=True)) == 0
    assert steps_of(tmp_path) == [2, 4, 6, 8, 9]
    assert not list(tmp_path.glob("checkpoint-*/optimizer.pt")) and not (tmp_path / UNFINISHED).exists()


def test_randomness_depends_on_seed_epoch_and_image():
    def epoch(seed: int, number: float) -> EpochRandomness:
        randomness, state = EpochRandomness(seed), type("State", (), {"epoch": number})
        randomness.on_train_begin(None, state, None)
        randomness.on_epoch_begin(None, state, None)
        return randomness

    def drawn(randomness: EpochRandomness, name: str) -> tuple[float, float]:
        with randomness.now.torch_seed(name):
            return randomness.now.generator(name).random(), float(torch.rand(()))

    before = torch.get_rng_state()
    assert drawn(epoch(1, 0), "a") == drawn(epoch(1, 0.7), "a")
    others = [drawn(epoch(1, 0), "a"), drawn(epoch(1, 1), "a"), drawn(epoch(2, 0), "a"), drawn(epoch(1, 0), "b")]
    assert len({own for own, _ in others}) == len({torchs for _, torchs in others}) == len(others)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_captions_and_crops_depend_on_the_epoch_and_not_on_the_worker(warm, workers):
    """Also with persistent workers, which get no messages after they have started."""
    rows = Dataset.from_dict(
        {
            "image": [{"bytes": picture(seed), "path": None} for seed in range(len(COLOURS))],
            "captions": [captions(colour) for colour in COLOURS],
            "image_id": COLOURS,
        }
    ).with_transform(Decoding())
    randomness, state = EpochRandomness(7), type("State", (), {"epoch": 0})
    collate = CaptionCollator(AttnCapProcessor.from_pretrained(warm), captions_per_image=2, randomness=randomness)
    loader = torch.utils.data.DataLoader(
        augment_rows(rows, Augmentation(32, randomness)),
        batch_size=2,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    randomness.on_train_begin(None, state, None)
    randomness.on_epoch_begin(None, state, None)
    epochs = [list(loader), list(loader)]
    randomness.on_epoch_begin(None, state, None)
    epochs.append(list(loader))
    for first, again, second in zip(*epochs):
        assert torch.equal(first["pixel_values"], again["pixel_values"]) and torch.equal(first["labels"], again["labels"])
        assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert any(
        first["labels"].shape != second["labels"].shape or not torch.equal(first["labels"], second["labels"])
        for first, _, second in zip(*epochs)
    )


# Kills itself at the `sys.argv[2]`-th training step, file saved by torch (after a part of it), or final file that is
# moved to its place.
RUN = """
import os, pathlib, signal, sys
import torch
from hf_attncap.training.train import main
from hf_attncap.training.trainers.caption_trainer import CaptionTrainer

where, at = sys.argv[1], int(sys.argv[2])
owner, name = {"step": (CaptionTrainer, "training_step"), "save": (torch, "save"), "end": (pathlib.Path, "replace")}[where]
real, calls = getattr(owner, name), []

def deadly(*args, **kwargs):
    if where != "end" or args[0].parent.name == "files":
        calls.append(0)
    if len(calls) == at:
        if where == "save":
            real(*args, **kwargs)
            os.truncate(args[1], 100)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

setattr(owner, name, deadly)
sys.exit(main(sys.argv[3:]))
"""


def killed(where: str, at: int, argv: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, where, str(at), *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def test_killed_while_a_checkpoint_is_written(stages, table, tmp_path):
    """A resumed run does not find an unfinished checkpoint, and removes it when it starts."""
    settings, output = {**stages["decoder"], "max_steps": 5}, tmp_path / "killed"
    whole = tmp_path / "whole"
    assert main(options(table, whole, **settings)) == 0
    killed("save", 6, options(table, output, **settings))  # torch saves four files per checkpoint
    assert steps_of(output) == [2] and (output / UNFINISHED / "checkpoint-4" / "model.safetensors").exists()
    assert main(options(table, output, resume_from_checkpoint="last", **settings)) == 0
    assert_same(whole, output)
    assert steps_of(output) == steps_of(whole) == [2, 4, 5] and not (output / UNFINISHED).exists()
    for step in (2, 4, 5):
        files = [{path.name for path in (run / f"checkpoint-{step}").iterdir()} for run in (whole, output)]
        assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"ema_decay": 0.8}, {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2}])
@pytest.mark.parametrize("stage", ["decoder", "encoder", "self-critical"])
def test_killed_runs_end_like_an_uninterrupted_one(stages, table, tmp_path, stage, more):
    """Killed in a step, in a checkpoint and at the end, and resumed each time."""
    settings = {**stages[stage], **more, "save_steps": 1, "save_total_limit": 2}
    whole, output = tmp_path / "whole", tmp_path / "killed"
    assert main(options(table, whole, **settings)) == 0
    argv = options(table, output, **settings)
    batches = more.get("gradient_accumulation_steps", 1)
    killed("step", batches + 1, argv)
    assert steps_of(output) == [1]
    again = [*argv, "--resume_from_checkpoint", "last"]
    killed("save", 6, again)
    assert steps_of(output) == [1, 2]
    killed("end", 2, again)
    assert steps_of(output) == steps_of(whole) and not (output / "model.safetensors").exists()
    assert main(again) == 0
    assert_same(whole, output)


def assert_ends_in_one_sentence(capsys, *parts: str) -> None:
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and error.endswith(".")
    assert [part for part in parts if part not in error] == [], error


def assert_finite(output: Path) -> None:
    for checkpoint in output.glob("checkpoint-*"):
        assert all(weight.isfinite().all() for weight in weights(checkpoint).values()), checkpoint


@pytest.mark.parametrize("more", [{}, {"ema_decay": 0.8}])
def test_loss_that_is_not_finite_ends_the_run(stages, table, tmp_path, capsys, more):
    wild = {"learning_rate": 1e30, "max_grad_norm": 0, "save_steps": 1}
    assert main(options(table, tmp_path, **stages["decoder"], **wild, **more)) == 2
    ways = ("lower `learning_rate` (now 1e+30)", "set `max_grad_norm` (now 0)", str(tmp_path / "checkpoint-1"))
    assert_ends_in_one_sentence(capsys, "The loss of step 2 is nan", *ways)
    assert steps_of(tmp_path) == [1] and not (tmp_path / "model.safetensors").exists()
    assert_finite(tmp_path)


def test_weights_that_are_not_finite_are_not_saved(stages, table, tmp_path, capsys):
    """The loss is finite, but not the weights after the step, and they are saved before the next loss."""
    wild = {"learning_rate": 1e39, "max_grad_norm": 0}
    for more in ({"save_steps": 1}, {"save_strategy": "no", "max_steps": 1}):
        assert main(options(table, tmp_path, **{**stages["decoder"], **wild, **more})) == 2
        assert_ends_in_one_sentence(capsys, "The weights of step 1 are not finite", "there is no checkpoint to resume from yet")
        assert steps_of(tmp_path) == [] and not (tmp_path / "model.safetensors").exists()


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(step, action)` runs an action before a training step."""
    actions: dict[int, Any] = {}
    real = CaptionTrainer.training_step

    def training_step(self, *args, **kwargs):
        actions.pop(self.state.global_step + 1, lambda: None)()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(CaptionTrainer, "training_step", training_step)
    return actions.__setitem__


@pytest.mark.parametrize("full", ["weights", "optimizer", "end"])
def test_full_disk_ends_the_run_and_the_earlier_checkpoint_stays(stages, table, tmp_path, capsys, at_step, full):
    """A limit of the file size prevents writing the weights, or the optimizer state, which is twice as large."""
    settings = {**stages["encoder"], "max_steps": 5, **({"save_strategy": "no"} if full == "end" else {})}
    output, whole = tmp_path / "full", tmp_path / "whole"
    assert main(options(table, whole, **settings)) == 0
    size, before = (whole / "model.safetensors").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = size // 2 if full != "optimizer" else size + 1000
    at_step(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1])))
    try:
        assert main(options(table, output, **settings)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if full == "end":
        assert_ends_in_one_sentence(capsys, f"The captioner cannot be written to {output}", "MB are free")
        assert not (output / "model.safetensors").exists()
        return
    parts = (f"The checkpoint of step 4 cannot be written to {output}", "MB are free", f"from {output / 'checkpoint-2'}")
    assert_ends_in_one_sentence(capsys, *parts)
    assert steps_of(output) == [2] and not (output / UNFINISHED).exists()
    assert main(options(table, output, resume_from_checkpoint="last", **settings)) == 0
    assert_same(whole, output)


@pytest.mark.parametrize(("fault", "workers"), [("vanished", 0), pytest.param("broken", 2, marks=pytest.mark.slow)])
def test_unreadable_image_ends_the_run_which_resumes_after_repair(stages, tmp_path, capsys, at_step, fault, workers):
    table, output = write_data(tmp_path / "pictures"), tmp_path / "run"
    settings = {**stages["encoder"], "dataloader_num_workers": workers}
    assert main(options(table, tmp_path / "whole", **settings)) == 0
    file = table.parent / "blue.png"
    at_step(3, (lambda: file.unlink()) if fault == "vanished" else (lambda: file.write_bytes(picture(2)[:99])))
    assert main(options(table, output, **settings)) == 2
    assert_ends_in_one_sentence(capsys, "image train-blue: ", "--inspect`", "`--skip_broken_images True` to leave such images out")
    assert steps_of(output) == [2]
    file.write_bytes(picture(2))
    assert main(options(table, output, resume_from_checkpoint="last", **settings)) == 0
    assert_same(tmp_path / "whole", output)
