"""Confidence: fitted on half of the images, evaluated on the others, removed when weights or decoding change."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hf_attncap.model_card.build_card import build_card
from hf_attncap.model_card.calibration import auroc, fit_logistic, reliability
from hf_attncap.training.arguments import ModelArguments
from hf_attncap.training.checkpoints.average import average_checkpoints
from hf_attncap.training.checkpoints.pack import pack
from hf_attncap.training.model import build_captioner
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration, AttnCapProcessor, Captioner
from hf_attncap.captions_attncap import generate_captions
from hf_attncap.cli import main
from hf_attncap.confidence_attncap import estimate_confidence
from hf_attncap.hub import export_to_hub

FITTED = {"weights": {"score": 2.0, "lowest": 0.25, "entropy": -0.5}, "bias": 3.0, "threshold": 0.5, "images": 40}


def with_confidence(source: Path, folder: Path, fitted=FITTED) -> Path:
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"confidence": fitted}))
    return folder


@pytest.fixture
def calibrated(tiny_checkpoint, tmp_path) -> Path:
    return with_confidence(tiny_checkpoint, tmp_path / "calibrated")


@pytest.fixture
def packable(calibrated) -> Path:
    """The same checkpoint with weights in the range of float16."""
    model = AttnCapForConditionalGeneration.from_pretrained(calibrated)
    model.model.encoder.windows.weight.data.clamp_(-1, 1)
    model.save_pretrained(calibrated)
    return calibrated


@pytest.fixture(scope="module")
def sixty(tmp_path_factory, tiny_checkpoint) -> Path:
    """60 noise images in a Parquet file; every second one has its generated caption as a reference."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("sixty")
    files = [folder / f"{number}.png" for number in range(60)]
    for file in files:
        blocks = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        blocks.resize((96, 64), Image.Resampling.NEAREST).save(file)
    said = [result.text for result in Captioner.from_pretrained(tiny_checkpoint).caption([str(file) for file in files])]
    captions = [[text if number % 2 else "nothing of this is there", "something else"] for number, text in enumerate(said)]
    images = [{"bytes": file.read_bytes(), "path": None} for file in files]
    path = folder / "sixty.parquet"
    Dataset.from_dict({"image": images, "image_id": [file.stem for file in files], "captions": captions}).to_parquet(str(path))
    return path


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_auroc_is_the_share_of_correctly_ordered_pairs(rows):
    values, good = np.array([value for value, _ in rows], float), np.array([kind for _, kind in rows])
    pairs = [1.0 if g > b else 0.5 if g == b else 0.0 for g in values[good] for b in values[~good]]
    found = auroc(values, good)
    assert math.isnan(found) if not pairs else found == pytest.approx(np.mean(pairs))


def test_fit_recovers_the_weights_of_generated_data():
    random = np.random.default_rng(0)
    features = random.normal([-0.8, -2.0, 2.0], [0.2, 0.8, 0.5], (20_000, 3))
    logits = features @ [4.0, 0.5, -1.0] + 5
    weights, bias = fit_logistic(features, random.random(20_000) < 1 / (1 + np.exp(-logits)))
    assert weights == pytest.approx([4.0, 0.5, -1.0], abs=0.25) and bias == pytest.approx(5, abs=0.4)


def test_fit_minimises_the_penalised_loss():
    random = np.random.default_rng(1)
    features, good = random.normal(size=(60, 2)), random.random(60) < 0.4
    found = torch.tensor([*fit_logistic(features, good)[0], fit_logistic(features, good)[1]], requires_grad=True)
    scale = torch.tensor(features.std(axis=0))
    logits = torch.tensor(features) @ found[:2] + found[2]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(good, dtype=logits.dtype), reduction="sum")
    (loss + ((found[:2] * scale) ** 2).sum() / 2).backward()
    assert found.grad.abs().max() < 1e-5


@pytest.mark.parametrize("features", [np.repeat([[-1e3], [1e3]], 20, axis=0), np.ones((40, 1))], ids=["separable", "constant"])
def test_fit_of_extreme_data_is_finite(features):
    good = np.arange(40) >= 20
    weights, bias = fit_logistic(features, good)
    p = estimate_confidence({"weights": {"score": weights[0]}, "bias": bias}, {"score": features[:, 0]})
    assert np.isfinite(p).all() and p.mean() == pytest.approx(0.5) and (p[20:] >= p[:20]).all()


def test_bins_contain_every_image_once():
    random = np.random.default_rng(2)
    p = random.random(57)
    bins = reliability(p, random.random(57) < p)
    assert sum(b["images"] for b in bins) == 57 and [b["confidence"] for b in bins] == sorted(b["confidence"] for b in bins)


@given(st.lists(st.floats(-5, 0), min_size=2, max_size=9))
def test_confidence_increases_with_the_score_alone(scores):
    found = estimate_confidence({"weights": {"score": 3.0}, "bias": 2.0}, {"score": np.sort(scores)})
    assert (np.diff(found) >= 0).all() and (found >= 0).all() and (found <= 1).all()
    assert found[0] == pytest.approx(1 / (1 + math.exp(-3 * min(scores) - 2)))


def test_confidence_of_a_result_follows_from_its_signals(calibrated, tiny_checkpoint, pictures):
    captioner = Captioner.from_pretrained(calibrated)
    batch = captioner.caption(pictures, num_return_sequences=2)
    for picture, result in zip(pictures, batch):
        signals = result.signals
        logit = 2 * signals["score"] + 0.25 * signals["lowest"] - 0.5 * signals["entropy"] + 3
        assert result.confidence == pytest.approx(1 / (1 + math.exp(-logit))) and signals["score"] == result.score
        assert captioner.caption(picture).confidence == pytest.approx(result.confidence, abs=1e-5)
    assert len({round(result.confidence, 4) for result in batch}) > 1
    assert captioner.caption(pictures[0], prompt="two").confidence is None
    bare = Captioner.from_pretrained(tiny_checkpoint).caption(pictures[0])
    assert bare.confidence is None and bare.text == batch[0].text


@pytest.mark.parametrize("settings", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 1}], ids=["beams", "greedy"])
@pytest.mark.parametrize("prompt", [None, "two red"])
def test_signals_equal_those_of_a_forward_pass_over_the_caption(tiny_checkpoint, pictures, settings, prompt):
    model = AttnCapForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()
    processor = AttnCapProcessor.from_pretrained(tiny_checkpoint)
    images = [Image.open(file).convert("RGB") for file in pictures]
    texts = None if prompt is None else [prompt] * len(images)
    inputs = processor(images=images, text=texts, return_tensors="pt")
    found = generate_captions(model, **inputs, **settings)
    given = 0 if prompt is None else 2
    for image in range(len(images)):
        for k, ids in enumerate(found["sequences"][image]):
            tokens = ids[1:].tolist()
            count = tokens.index(2) + 1 if 2 in tokens else len(tokens)
            with torch.no_grad():
                logits = model(pixel_values=inputs["pixel_values"][image, None], decoder_input_ids=ids[None, :-1]).logits[0]
            steps = logits.log_softmax(-1)[given:count]
            lowest = min(step[token].item() for step, token in zip(steps, tokens[given:count]))
            entropy = -(steps.exp() * steps).sum(-1).mean().item()
            assert found["lowest"][image, k].item() == pytest.approx(lowest, abs=1e-4)
            assert found["entropy"][image, k].item() == pytest.approx(entropy, abs=1e-4)


def test_saving_exporting_and_packing_keep_the_calibration(packable, tmp_path, remote_code):
    model = AttnCapForConditionalGeneration.from_pretrained(packable)
    model.save_pretrained(tmp_path / "saved")
    exported = export_to_hub(packable, tmp_path / "hub")
    packed = pack(packable, tmp_path / "packed")
    for folder in (tmp_path / "saved", exported, packed):
        assert json.loads((folder / "config.json").read_text())["confidence"] == FITTED
        assert AutoConfig.from_pretrained(folder, trust_remote_code=True).confidence == FITTED


def test_other_weights_and_other_decoding_remove_the_calibration(packable, tmp_path):
    faster = pack(packable, tmp_path / "faster", {"num_beams": 2})
    mean = average_checkpoints([packable, packable], tmp_path / "mean")
    tuned, _ = build_captioner(ModelArguments(model_name_or_path=str(packable), model_config={}), [["two red dogs"]], tmp_path)
    configs = [AttnCapConfig.from_pretrained(faster), AttnCapConfig.from_pretrained(mean), tuned.config]
    assert [config.confidence for config in configs] == [None] * 3


@pytest.mark.parametrize(
    "wrong",
    [{}, {"weights": {"score": 1.0}}, {"weights": {"mood": 1.0}, "bias": 0.0}, {"weights": {"score": math.nan}, "bias": 0.0}],
    ids=str,
)
def test_invalid_calibration_is_rejected(wrong):
    with pytest.raises(StrictDataclassError, match="`confidence` is .* run `attncap calibrate`, or set it to None"):
        AttnCapConfig(confidence=wrong)


def test_calibration_is_used_by_caption_and_shown_on_the_card(tiny_checkpoint, sixty, pictures, tmp_path, capsys):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    assert main(["calibrate", str(folder), "--eval-data", str(sixty)]) == 0
    out, err = capsys.readouterr()
    assert "below 200 the confidence is unreliable, use more" in err
    report = json.loads((folder / "calibration.json").read_text())
    fitted, (found,) = report["calibration"], report["sets"].values()
    assert json.loads((folder / "config.json").read_text())["confidence"] == fitted
    assert fitted["images"] + found["images"] == 60 and fitted["threshold"] == 0.5
    assert sum(b["images"] for b in found["reliability"]) == found["images"]
    assert found["coverage"][-1]["risk"] == pytest.approx(1 - found["good"], abs=1e-4)
    assert f"AUROC {found['auroc'][0]:.3f}" in out
    before = Captioner.from_pretrained(tiny_checkpoint).caption(pictures[0])
    after = Captioner.from_pretrained(folder).caption(pictures[0])
    assert after.confidence == pytest.approx(float(estimate_confidence(fitted, before.signals)))
    assert Image.open(folder / "calibration.jpg").format == "JPEG"
    card = str(build_card(folder))
    row = f"| {found['images']} | {found['auroc'][0]:.3f} ("
    assert f"| {sixty.parent.name}/sixty.parquet {row}" in card and "(calibration.jpg)" in card
    (folder / "about.yaml").write_text("datasets: [{name: Noise, split: test}]")
    assert main(["card", str(folder), "--eval-data", str(sixty)]) == 0
    assert f"| Noise, test {row}" in (folder / "README.md").read_text()  # as in the table of scores
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"confidence": None}))
    assert "## Confidence" not in str(build_card(folder))


def test_calibrate_reports_errors_and_writes_nothing(tiny_checkpoint, sixty, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    rows = Dataset.from_parquet(str(sixty))
    rows.select(range(8)).to_parquet(str(tmp_path / "few.parquet"))
    wrong = [["unlike anything that it says"]] * len(rows)
    rows.remove_columns("captions").add_column("captions", wrong).to_parquet(str(tmp_path / "bad.parquet"))
    rows.remove_columns("captions").to_parquet(str(tmp_path / "bare.parquet"))
    for arguments, sentence in [
        ([str(tmp_path / "none"), "--eval-data", str(sixty)], "has no config.json: give the folder"),
        ([str(folder), "--eval-data", str(tmp_path / "few.parquet")], "give more images"),
        ([str(folder), "--eval-data", str(tmp_path / "bad.parquet")], "images for fitting have a good caption"),
        ([str(folder), "--eval-data", str(tmp_path / "bare.parquet")], "captions"),
        ([str(folder), "--eval-data", str(tmp_path / "missing.parquet")], "missing.parquet"),
        ([str(folder), "--eval-data", str(sixty), str(sixty)], "is given twice"),
    ]:
        assert main(["calibrate", *arguments]) == 1
        assert sentence in capsys.readouterr().err
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("hf_attncap.model_card.calibration._draw", fail)  # the name under which the command imports it
    assert main(["calibrate", str(folder), "--eval-data", str(sixty)]) == 1
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_min_confidence_skips_captions_and_reports_them(calibrated, pictures, capfd):
    results = Captioner.from_pretrained(calibrated).caption(pictures)
    order = sorted(range(len(pictures)), key=lambda place: results[place].confidence)
    between = (results[order[0]].confidence + results[order[1]].confidence) / 2
    files = [str(file) for file in pictures]
    command = ["caption", "--model", str(calibrated), *files, "--min-confidence"]
    assert main([*command, f"{between:.6f}", "--json"]) == 0
    out, err = capfd.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    kept = [place for place in range(len(files)) if place != order[0]]
    assert [record["path"] for record in records] == [files[place] for place in kept]
    assert [record["confidence"] for record in records] == pytest.approx([results[place].confidence for place in kept], abs=1e-4)
    assert err == f"attncap: {files[order[0]]}: skipped, its caption has a confidence of {results[order[0]].confidence:.2f}\n"
    assert main([*command, "0"]) == 0 and len(capfd.readouterr().out.splitlines()) == len(files)
    assert main([*command, "1"]) == 0 and capfd.readouterr().out == ""


def test_min_confidence_requires_a_calibration_and_a_probability(tiny_checkpoint, pictures, capfd):
    command = ["caption", "--model", str(tiny_checkpoint), str(pictures[0])]
    assert main([*command, "--min-confidence", "0.5"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and "no calibrated confidence" in err and "`attncap calibrate`" in err
    for wrong in (["1.5"], ["-0.1"], ["nan"], ["high"], ["0.5", "--prompt", "two"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--min-confidence", *wrong])
        assert stopped.value.code == 2
