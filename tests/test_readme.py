"""Every command and every Python snippet of the README, docs/metrics.md, docs/fine_tuning.md and training/README.md runs, on
generated data; those of RESULTS.md are at least known."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import skimage
import torch
import torchvision
from datasets import Dataset
from hf_attncap.training.arguments import parse_arguments
from PIL import Image

from hf_attncap import Captioner

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
INSTALL = re.compile(r"python3 -m venv \.venv && \.venv/bin/pip install -q (-e )?\"\.\[\w+\]\" && ")


def blocks(language: str, page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def shell_commands(page: str = "README.md") -> list[str]:
    joined = "\n".join(blocks("bash", page)).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the README's commands expect to find: photographs and captioned data in a clone."""
    path = tmp_path_factory.mktemp("readme")
    for index, name in enumerate(("photo.jpg", "dog.jpg", "beach.jpg")):
        Image.effect_noise((64, 48), 40 + 20 * index).convert("RGB").save(path / name)
    for split, shade in (("train", 0), ("validation", 100)):
        pictures = []
        for row in range(4):
            stream = io.BytesIO()
            Image.new("RGB", (64, 48), (shade + row, 9, 9)).save(stream, "PNG")
            pictures.append({"bytes": stream.getvalue(), "path": None})
        rows = {"image": pictures, "captions": [["a dog runs", "the dog is running"] * 3] * 4}
        Dataset.from_dict(rows).to_parquet(str(path / f"{split}.parquet"))
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), path / "mobilenet_v3_small.pth")
    (path / "vectors.txt").write_text("".join(f"{word} {'0.5 ' * 50}\n" for word in ("a", "dog", "runs", "the")))
    captions = {f"{name}.jpg": ["a dog runs", "the dog is running"] for name in ("photo", "dog", "beach")}
    (path / "captions.jsonl").write_text("".join(json.dumps({"path": k, "captions": v}) + "\n" for k, v in captions.items()))
    (path / "captions.json").write_text(json.dumps(captions))
    karpathy = [
        {"filename": k, "imgid": n, "split": "test", "sentences": [{"raw": v[0]}]} for n, (k, v) in enumerate(captions.items())
    ]
    (path / "karpathy.json").write_text(json.dumps({"images": karpathy}))
    for name in ("results", "other"):
        (path / f"{name}.json").write_text(json.dumps([{"image_id": k, "caption": f"a {name} dog"} for k in captions]))
    for name in ("training", "hf_attncap"):
        (path / name).symlink_to(ROOT / name)
    return path


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(["sh", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_two_commands_set_everything_up():
    commands = [command for command in shell_commands() if INSTALL.match(command)]
    assert len(commands) == 2
    assert any("attncap caption" in command for command in commands) and any("pytest" in command for command in commands)


def test_first_command_captions_photographs_that_packages_carry(tmp_path):
    """Everything behind the installation, with the photographs and the checkpoint that are installed."""
    command = next(c for c in shell_commands() if INSTALL.match(c) and "attncap caption" in c)
    (tmp_path / ".venv").symlink_to(BIN.parent)
    result = run(INSTALL.sub("", command), tmp_path)
    assert result.returncode == 0, result.stderr
    photographs = [word for word in shlex.split(command) if word.endswith((".jpg", ".png"))]
    assert len(result.stdout.strip().splitlines()) == len(photographs) >= 2
    pictures = list((tmp_path / "maps").glob("*.png"))
    assert len(pictures) == len(photographs) and all(Image.open(picture).width > 500 for picture in pictures)


def test_captions_shown_are_those_of_the_checkpoint():
    """The table in the README and the one in RESULTS.md; of photographs that are installed here."""
    captioner, shown = Captioner.from_pretrained(), 0
    data = {"skimage": Path(skimage.__file__).parent / "data", "matplotlib": Path(matplotlib.get_data_path()) / "sample_data"}
    for page, row in (
        ("README.md", r"\| `(\S+)` \| (.+?) \| (0\.\d\d) \|"),
        ("RESULTS.md", r"\| `(\S+)` \| .+? \| (.+?) \| (0\.\d\d) \|"),
    ):
        found = re.findall(rf"^{row}", (ROOT / page).read_text(encoding="utf-8"), flags=re.M)
        assert len(found) >= 5
        for name, text, confidence in found:
            for path in (folder / name for folder in data.values() if (folder / name).exists()):
                result = captioner.caption(path)
                assert result.text == text and result.confidence == pytest.approx(float(confidence), abs=0.02), name
                shown += 1
    assert shown >= 10


def test_shell_commands_in_their_order(folder):
    """One behind the other: what is fine-tuned is then captioned with and exported."""
    for command in shell_commands():
        if INSTALL.match(command):
            continue
        if "attncap train --config" in command:
            command += " --max_steps 1 --per_device_train_batch_size 2 --use_cpu True"
        result = run(command, folder)
        assert result.returncode == 0, f"{command}\n{result.stderr[-3000:]}"
    assert (folder / "hub_folder" / "modeling_attncap.py").exists()
    assert "Flickr8k" in (folder / "hub_folder" / "README.md").read_text(), "what it was fine-tuned from came from"


def test_shell_commands_of_the_metrics(folder):
    for command in shell_commands("docs/metrics.md"):
        result = run(command, folder)
        assert result.returncode == 0, f"{command}\n{result.stderr[-3000:]}"
    assert "cider" in json.loads((folder / "scores.json").read_text())["scores"]


@pytest.mark.slow
def test_shell_commands_of_training(folder):
    """From a folder of pictures to an exported captioner: five commands."""
    pictures, lines = folder / "pictures", []
    pictures.mkdir()
    for n in range(10):
        Image.new("RGB", (64, 48), (20 * n, 90, 200 - 20 * n)).save(pictures / f"{n}.jpg")
        lines.append(json.dumps({"file_name": f"{n}.jpg", "captions": ["a dog runs", f"the dog {n} is running"]}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    commands = shell_commands("training/README.md")
    assert len(commands) == 5
    for command in commands:
        if "attncap train --config" in command:
            command += " --num_train_epochs 1 --per_device_train_batch_size 4 --use_cpu True"
        result = run(command, folder)
        assert result.returncode == 0, f"{command}\n{result.stderr[-3000:]}"
    assert (folder / "runs" / "hub" / "modeling_attncap.py").exists()


def test_commands_of_the_results_name_scripts_and_settings_that_there_are(tmp_path):
    """They take hours: that each script does its work is for its own tests."""
    commands = [shlex.split(command) for command in shell_commands("RESULTS.md")]
    assert len(commands) > 10
    for words in commands:
        if words[:2] == ["attncap", "train"]:
            parse_arguments([*words[2:], "--use_cpu", "True"])  # some are for a GPU
            continue
        if words[0] == "attncap":
            source = ROOT / "hf_attncap" / "cli.py"
        else:
            assert words[0] == "python"
            source = ROOT / (words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1])
        text = source.read_text(encoding="utf-8")
        assert not [word for word in words if word.startswith("--") and f'"{word}"' not in text], words


def test_scores_named_are_those_of_the_package_as_measured():
    results = json.loads((ROOT / "hf_attncap" / "checkpoint" / "results.json").read_text())
    flickr8k, coco = ({kind: f"{100 * value:.1f}" for kind, value in found["scores"].items()} for found in results["sets"])
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "RESULTS.md"))
    assert f"BLEU-4 {flickr8k['bleu_4']} and CIDEr {flickr8k['cider']}" in readme
    assert re.search(rf"CIDEr\s{coco['cider']} on 120", readme)
    figures = rf"{flickr8k['bleu_4']}.*{flickr8k['cider']}.*{coco['cider']}"
    assert re.search(rf"the package's checkpoint\*\* \|.*{figures}", page)


@pytest.mark.parametrize("snippet", blocks("python", "README.md") + blocks("python", "docs/metrics.md"))
def test_python_snippet(snippet, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(snippet, "snippet", "exec"), {"__name__": "readme"})


def test_python_of_fine_tuning(folder, monkeypatch):
    """Its blocks go on from one another; what they save can be loaded."""
    monkeypatch.chdir(folder)
    snippets, names = blocks("python", "docs/fine_tuning.md"), {"__name__": "readme"}
    assert len(snippets) == 2 and "Seq2SeqTrainer(" in snippets[0] and "get_peft_model(" in snippets[1]
    for snippet in snippets:
        exec(compile(snippet, "snippet", "exec"), names)
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= {
        path.name for path in (folder / "runs" / "merged").iterdir()
    }
