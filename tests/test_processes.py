"""Several processes, half precision and gradient checkpointing give the results of one process in float32."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from hf_attncap.training.arguments import CaptionTrainingArguments, DataArguments
from hf_attncap.training.data.collator import CaptionCollator
from hf_attncap.training.data.splits import load_data
from hf_attncap.training.train import main
from hf_attncap.training.trainers import self_critical
from hf_attncap.training.trainers.caption_trainer import CaptionTrainer, new_images
from hf_attncap.training.trainers.self_critical import SelfCriticalTrainer, disable_dropout, policy_logits, sample
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from hf_attncap import AttnCapForConditionalGeneration, AttnCapProcessor
from hf_attncap.backbone_attncap import build_backbone

ROOT = Path(__file__).parent.parent
COLOURS = [(220, 30, 30), (30, 200, 40), (40, 60, 220), (240, 240, 240), (10, 10, 10), (230, 220, 30), (150, 30, 160)]
# Two captions per image, of one to ten words, so that batches differ in the number of words.
CAPTIONS = [
    ["red", "a red one"],
    ["a green square that lies all alone on the floor", "the green square lies on the floor"],
    ["a blue square", "blue"],
    ["white", "a white one"],
    ["a black square in the dark of the night", "the black square in the dark"],
    ["yellow", "a yellow one"],
    ["a purple square hangs high on the wall", "the purple square on the wall"],
]
MODEL = {
    "backbone": "mobilenet_v3_small",
    "encoder_channels": 24,
    "hidden_size": 32,
    "attention_dim": 16,
    "word_attention": "history",
    "word_embed_dim": 16,
    "dropout": 0.0,
    "alpha_c": 1.0,  # of 2 x 2 regions at 64 pixels
    "label_smoothing": 0.1,
}


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    """Seven images, a number that no batch size and no number of processes divides."""
    pictures = []
    for index, colour in enumerate(COLOURS):
        image = Image.new("RGB", (64, 64), colour)
        image.paste((120, 120, 120), (0, 0, 8 * index, 32))  # regions differ
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    Dataset.from_dict({"image": pictures, "captions": CAPTIONS}).to_parquet(str(path))
    return path


def options(parquet, output, **more) -> list[str]:
    values = {
        "train_file": parquet,
        "validation_file": parquet,
        "output_dir": output,
        "captions_per_image": 2,
        "per_device_eval_batch_size": 2,
        "predict_with_generate": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "num_logged_images": 0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **more,
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def load(folder) -> Any:
    return AttnCapForConditionalGeneration.from_pretrained(folder)


def history(folder, *names: str) -> list[dict[str, float]]:
    """The logged values of each training step."""
    entries = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [{name: entry[name] for name in names} for entry in entries if "loss" in entry]


def metrics(folder) -> dict[str, float]:
    """The metrics of the last evaluation, without times."""
    found = json.loads((Path(folder) / "metrics.json").read_text())
    times = ("runtime", "per_second", "preparation_time")
    return {name: value for name, value in found.items() if name.startswith("eval_") and not name.endswith(times)}


@pytest.fixture(scope="module")
def new(tmp_path_factory) -> dict[str, Any]:
    """Settings of a new captioner whose random backbone is normalised, so that its features differ between images."""
    torch.manual_seed(0)
    trunk = build_backbone(MODEL["backbone"]).train()
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        for _ in range(10):
            trunk(2 * torch.randn(8, 3, 1, 1) + torch.randn(8, 3, 64, 64))
    path = tmp_path_factory.mktemp("backbone") / "weights.pth"
    torch.save(trunk.state_dict(), path)
    return {"model_config": json.dumps(MODEL), "backbone_weights": path, "min_count": 1, "image_size": 64}


@pytest.fixture(scope="module")
def warm(new, parquet, tmp_path_factory) -> Path:
    """A captioner with different captions for different images."""
    output = tmp_path_factory.mktemp("warm")
    more = {"feature_cache": output / "cache", "per_device_train_batch_size": 7, "num_train_epochs": 30, "learning_rate": 0.01}
    assert main(options(parquet, output, **new, **more, logging_steps=30)) == 0
    found = metrics(output)
    assert found["eval_cider"] > 0.3 and found["eval_distinct_2"] > 0.2, found
    return output


# --- steps ---

# Plain gradient descent, because Adam would hide a wrong factor of the gradients. Clipping hides it too, but the loss and the
# gradient norm before clipping are logged.
STEPS = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "num_train_epochs": 2, "max_grad_norm": 3.0}
# Processes, images per batch and process, accumulated batches.
WAYS = {"one": (1, 4, 1), "one, accumulated": (1, 2, 2), "two": (2, 2, 1), "two, accumulated": (2, 1, 2)}

# Runs several command lines in the same processes. Self-critical samples do not depend on the process of an image: the i-th sample
# takes the i-th most likely word at each step.
RUN = """
import json
import sys
import torch
from hf_attncap.training.train import main
from hf_attncap.training.trainers import self_critical

self_critical.sample_tokens = lambda p: p.topk(5).indices.gather(1, (torch.arange(len(p)) % 5)[:, None])
with open(sys.argv[1]) as file:
    for argv in json.load(file):
        assert main(argv) == 0, argv
"""


def stages(new: dict, warm: Path, cache: Path) -> dict[str, dict]:
    unfrozen = {**STEPS, "model_name_or_path": warm, "model_config": '{"freeze_backbone": false}', "max_grad_norm": 7.0}
    unfrozen["encoder_learning_rate"] = 1e-4
    gentle = {"learning_rate": 1e-5, "encoder_learning_rate": 1e-6, "max_grad_norm": 1000.0}
    return {
        "decoder": {**STEPS, **new, "feature_cache": cache},
        "encoder": unfrozen,
        "checkpointed": {**unfrozen, "gradient_checkpointing": True},
        "self-critical": {**unfrozen, **gentle, "self_critical": True, "cross_entropy_weight": 0.3},
    }


def argv_of(parquet: Path, output: Path, way: str, more: dict) -> list[str]:
    _, size, accumulated = WAYS[way]
    batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
    return options(parquet, output, **more, **batch)


NOISY = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}


@pytest.fixture(scope="module")
def pair(new, warm, parquet, tmp_path_factory) -> Path:
    """Output folders of runs on two processes, which are started once because starting takes longer than the runs."""
    folder = tmp_path_factory.mktemp("pair")
    noisy = {**STEPS, "model_name_or_path": warm, "model_config": '{"dropout": 0.5}', **NOISY}
    del noisy["num_train_epochs"]
    lines = [
        argv_of(parquet, folder / f"{stage} {way}", way, {**more, "ddp_backend": "gloo"})
        for stage, more in stages(new, warm, folder / "cache").items()
        for way in ("two", "two, accumulated")
    ]
    lines += [
        options(parquet, folder / "whole", **noisy),
        options(parquet, folder / "resumed", **noisy, resume_from_checkpoint=folder / "whole" / "checkpoint-2"),
    ]
    (folder / "run.py").write_text(RUN)
    (folder / "lines.json").write_text(json.dumps(lines))
    launch(["torch.distributed.run", "--standalone", "--nproc_per_node", "2", folder / "run.py", folder / "lines.json"])
    return folder


def launch(command: list) -> None:
    """Run `python -m` with a launcher in the root of the repository."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["decoder", "encoder", "checkpointed", "self-critical"])
def test_two_processes_train_and_evaluate_like_one(stage, pair, new, warm, parquet, tmp_path, monkeypatch):
    """Compares losses, gradient norms, weights, scores and evaluation losses, for each way to make batches of four images.

    Each process divides by the words of all and multiplies by their number, which the mean of gradients takes out again. Were
    each to take the mean over its own words, words of a process that has few would count for more; a factor left out would change
    losses and norms by 2. The last batch of an epoch has three images, and two processes fill it up with a fourth one that the
    epoch had before, in training as in evaluation: it must not count.
    """
    likeliest = lambda p: p.topk(5).indices.gather(1, (torch.arange(len(p)) % 5)[:, None])  # noqa: E731
    monkeypatch.setattr(self_critical, "sample_tokens", likeliest)
    more = stages(new, warm, tmp_path / "cache")[stage]
    names = ["loss", "grad_norm", *(["reward", "advantage_std", "sample_length"] if stage == "self-critical" else [])]
    folders = {}
    for way, (processes, *_) in WAYS.items():
        folders[way] = pair / f"{stage} {way}" if processes == 2 else tmp_path / way
        if processes == 1:
            assert main(argv_of(parquet, folders[way], way, more)) == 0
    start = warm
    if stage == "decoder":  # a new captioner
        start = tmp_path / "start"
        assert main(argv_of(parquet, start, "one", {**more, "learning_rate": 0, "num_train_epochs": 1})) == 0
    expected, way_of_one = history(folders["one"], *names), moved(start, folders["one"])
    norms = [entry["grad_norm"] for entry in expected]
    assert len(norms) == 4 and min(norms) < more["max_grad_norm"] < max(norms), f"clipped now and then: {norms}"
    assert stage == "decoder" or any(change.any() for name, change in way_of_one.items() if "backbone" in name)
    for way in list(WAYS)[1:]:
        for entry, other in zip(expected, history(folders[way], *names), strict=True):
            assert other == pytest.approx(entry, rel=2e-3, abs=1e-4), way
        change = moved(start, folders[way])
        assert distance(change, way_of_one) < 0.01, way
        assert metrics(folders[way]) == pytest.approx(metrics(folders["one"]), rel=1e-3), way


def moved(start, folder) -> dict[str, torch.Tensor]:
    """The change of each weight in a run."""
    before = load(start).state_dict()
    return {name: weight - before[name] for name, weight in load(folder).state_dict().items()}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The relative distance of two sets of tensors."""
    difference = sum((found[name] - expected[name]).double().square().sum() for name in expected)
    return float((difference / sum(value.double().square().sum() for value in expected.values())) ** 0.5)


@pytest.mark.slow
def test_processes_have_different_random_numbers_and_restore_them(pair):
    states = [torch.load(pair / "whole" / "checkpoint-2" / f"rng_state_{rank}.pth", weights_only=False) for rank in (0, 1)]
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])
    assert history(pair / "whole", "loss")[2:] == history(pair / "resumed", "loss")[2:]
    whole, resumed = load(pair / "whole").state_dict(), load(pair / "resumed").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_accelerate_starts_two_processes(warm, parquet, tmp_path):
    more = {**STEPS, "model_name_or_path": warm, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    argv = options(parquet, tmp_path / "run", **more)
    start = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    launch([*start, "-m", "hf_attncap.training.train", *argv])
    assert len(history(tmp_path / "run", "loss")) == 4, "seven images make two batches of four per epoch"


# --- the formulas, in one process ---


def test_gradients_of_processes_average_to_those_of_the_whole_batch(warm, parquet, tmp_path, monkeypatch):
    """With parts of different numbers of words; the mean of the means per part would be wrong."""
    trainer, rows = trainer_of(warm, parquet, tmp_path)
    model = trainer.model.double()
    shares = [trainer.data_collator([rows[i] for i in part]) for part in ((0, 3), (1, 4))]  # short captions, long ones
    for share in shares:
        share["pixel_values"] = share["pixel_values"].double()
    words = [(share["labels"] != -100).sum() for share in shares]
    assert words[1] > 2 * words[0]

    def gradients(batch, number) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()
        trainer.compute_loss(model, dict(batch), num_items_in_batch=number).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole = gradients(trainer.data_collator([rows[i] for i in (0, 3, 1, 4)]), sum(words))
    naive = [gradients(share, number) for share, number in zip(shares, words)]
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    shared = [gradients(share, sum(words)) for share in shares]
    mean = {name: (shared[0][name] + shared[1][name]) / 2 for name in whole}
    assert distance(mean, whole) < 1e-6  # the images of the whole batch are float32
    assert distance({name: (naive[0][name] + naive[1][name]) / 2 for name in whole}, whole) > 0.1


@given(st.integers(1, 40), st.integers(1, 5), st.integers(2, 4))
def test_each_image_counts_once_per_epoch(images, size, processes):
    """Compared with the batches of Accelerate."""
    counted = []
    for rank in range(processes):
        *batches, last = BatchSamplerShard(BatchSampler(range(images), size, False), processes, rank)
        new = new_images(images, size, processes, rank)
        counted += [image for batch in batches for image in batch] + last[:new]
    assert sorted(counted) == list(range(images))


@pytest.mark.parametrize("size", [1, 3, 7])
def test_evaluation_loss_is_the_mean_over_all_words(warm, parquet, tmp_path, size):
    """For any batch size, whether or not it mixes short and long captions."""
    trainer, rows = trainer_of(warm, parquet, tmp_path, per_device_eval_batch_size=size)
    total, words = 0.0, 0
    model = load(warm).eval()
    for row in rows:
        batch = trainer.data_collator([row])
        with torch.no_grad():
            number = int((batch["labels"] != -100).sum())
            total, words = total + number * float(model(**batch).loss), words + number
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / words, rel=1e-5)


def test_repeated_images_of_the_last_batch_have_no_reward(warm, parquet, tmp_path, monkeypatch):
    trainer, rows = trainer_of(warm, parquet, tmp_path, SelfCriticalTrainer)
    batch = trainer.data_collator([rows[i] for i in range(3)])
    with torch.no_grad():
        samples = sample(trainer.model.train(), trainer._encode(batch).last_hidden_state, 5)
    monkeypatch.setattr(self_critical, "sample", lambda captioner, regions, k: samples[: 5 * len(regions)])
    trainer._samples = 15

    def loss(pictures: int, ids: int) -> float:
        trainer._sums.zero_()
        inputs = {"pixel_values": batch["pixel_values"][:pictures], "image_ids": batch["image_ids"][:ids], "labels": None}
        return float(trainer.compute_loss(trainer.model, inputs).detach())

    for new in (1, 2):
        assert loss(3, new) == pytest.approx(loss(new, new), rel=1e-4) and trainer._sums[0] == 5 * new
    assert loss(3, 3) != pytest.approx(loss(2, 2), rel=1e-2) and loss(3, 0) == 0 and trainer._sums[0] == 0


def trainer_of(warm, parquet, output, trainer_class=CaptionTrainer, **settings) -> tuple[CaptionTrainer, Any]:
    critical = trainer_class is SelfCriticalTrainer
    rows = load_data(DataArguments(train_file=str(parquet))).train
    processor = AttnCapProcessor.from_pretrained(warm)
    arguments = CaptionTrainingArguments(
        str(output),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        self_critical=critical,
        **settings,
    )
    trainer = trainer_class(
        model=load(warm),
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=CaptionCollator(processor, 2, with_image_ids=critical),
        processing_class=processor,
        **({"references": dict(zip(rows["image_id"], CAPTIONS))} if critical else {}),
    )
    return trainer, rows


# --- precisions and memory ---


def test_gradient_checkpointing_does_not_change_the_steps(new, warm, parquet, tmp_path):
    more = {**stages(new, warm, tmp_path / "cache")["encoder"], "num_train_epochs": 1}
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        assert main(argv_of(parquet, tmp_path / name, "one", {**more, "gradient_checkpointing": checkpointing})) == 0
    plain, checkpointed = (history(tmp_path / name, "loss", "grad_norm") for name in ("plain", "checkpointed"))
    for entry, other in zip(plain, checkpointed, strict=True):
        assert other == pytest.approx(entry, rel=1e-4)
    weights = [load(tmp_path / name).state_dict() for name in ("plain", "checkpointed")]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


def test_bfloat16_trains_close_to_float32(new, warm, parquet, tmp_path):
    """The first step's loss within 2 %; weights and checkpoints stay in float32."""
    more = {**stages(new, warm, tmp_path / "cache")["encoder"], "num_train_epochs": 1}
    for name in (False, True):
        assert main(argv_of(parquet, tmp_path / str(name), "one", {**more, "bf16": name})) == 0
    whole, half = (history(tmp_path / str(name), "loss")[0]["loss"] for name in (False, True))
    assert half != whole and half == pytest.approx(whole, rel=0.02)
    saved = load_file(tmp_path / "True" / "model.safetensors")
    assert {weight.dtype for weight in saved.values() if weight.is_floating_point()} == {torch.float32}
    fine = [weight for weight in saved.values() if weight.is_floating_point()]
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in fine), "bfloat16 would lose small steps"


def test_float16_needs_a_gpu(warm, parquet, tmp_path, capsys):
    argv = options(parquet, tmp_path, model_name_or_path=warm, fp16=True)
    assert main(argv) == 2
    assert "`fp16` needs a GPU" in capsys.readouterr().err


def test_half_precision_sampling_and_loss_use_the_same_probabilities(warm, parquet, tmp_path):
    """Compares log p of each word in sampling and in the loss, both with autocast."""
    trainer, rows = trainer_of(warm, parquet, tmp_path, SelfCriticalTrainer, bf16=True)
    model, end = trainer.model, trainer.model.config.decoder_start_token_id
    disable_dropout(model)
    with torch.no_grad(), trainer.accelerator.autocast():
        regions = trainer._encode(trainer.data_collator([rows[i] for i in range(7)])).last_hidden_state
        samples = sample(model, regions, 5)  # (R, T)
        learnt = policy_logits(model, model(encoder_outputs=(regions,), labels=samples).logits).log_softmax(-1)  # (R, T, V)
        state, drawn, words = None, [], torch.full((len(samples), 1), end)
        for t in range(samples.shape[1]):
            out = model(encoder_outputs=(regions,), decoder_input_ids=words, past_key_values=state, use_cache=True)
            drawn.append(policy_logits(model, out.logits[:, -1]).log_softmax(-1))
            state, words = out.past_key_values, samples[:, t, None].clamp(min=0)
    assert learnt.dtype == torch.float32
    said = samples != -100
    place = samples.clamp(min=0)[..., None]
    difference = (learnt.gather(2, place) - torch.stack(drawn, 1).gather(2, place)).squeeze(2)[said]
    assert difference.abs().max() < 0.1 and difference.abs().mean() < 0.02
