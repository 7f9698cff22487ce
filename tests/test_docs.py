"""Runs the commands, Python blocks and notebook of the documentation on small data, and compares the outputs that it shows."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import skimage
import torch
import torchvision
from datasets import Dataset
from hf_attncap.training.arguments import parse_arguments
from pages import BIN, PAGES, ROOT, SCRIPT, blocks, check_commands, command_options, read, run, shell_commands
from PIL import Image

INSTALL = re.compile(r"python3 -m venv \.venv && \.venv/bin/pip install -q (-e )?\"\.\[\w+\]\" && ")
PARSED = ("RESULTS.md", "docs/experiments.md")  # pages with commands that take hours: only their arguments are checked
PHOTOGRAPHS = Path(skimage.__file__).parent / "data"


def write_table(path: Path, images: int, shade: int) -> None:
    """A Parquet file of captioned images."""
    pictures = []
    for row in range(images):
        stream = io.BytesIO()
        Image.new("RGB", (64, 48), (shade + row, 9, 9)).save(stream, "PNG")
        pictures.append({"bytes": stream.getvalue(), "path": None})
    captions = [["a dog runs", "the dog is running"] * 3] * images
    ids = [f"{shade}-{row}" for row in range(images)]
    Dataset.from_dict({"image": pictures, "captions": captions, "image_id": ids}).to_parquet(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the commands of the pages name."""
    path = tmp_path_factory.mktemp("docs")
    for name, source in (("cat.png", "chelsea.png"), ("coffee.png", "coffee.png"), ("photo.jpg", "rocket.jpg")):
        shutil.copy(PHOTOGRAPHS / source, path / name)
    for split, shade in (("train", 0), ("validation", 100)):
        write_table(path / f"{split}.parquet", 4, shade)
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), path / "mobilenet_v3_small.pth")
    (path / "vectors.txt").write_text("".join(f"{word} {'0.5 ' * 50}\n" for word in ("a", "dog", "runs", "the")))
    captions = {f"{name}.png": ["a dog runs", "the dog is running"] for name in ("cat", "coffee", "beach")}
    (path / "captions.jsonl").write_text("".join(json.dumps({"path": k, "captions": v}) + "\n" for k, v in captions.items()))
    (path / "captions.json").write_text(json.dumps(captions))
    karpathy = [
        {"filename": k, "imgid": n, "split": "test", "sentences": [{"raw": v[0]}]} for n, (k, v) in enumerate(captions.items())
    ]
    (path / "karpathy.json").write_text(json.dumps({"images": karpathy}))
    for name in ("results", "other"):
        (path / f"{name}.json").write_text(json.dumps([{"image_id": k, "caption": f"a {name} dog"} for k in captions]))
    pictures = path / "pictures"
    pictures.mkdir()
    lines = []
    for n in range(10):
        Image.new("RGB", (64, 48), (20 * n, 90, 200 - 20 * n)).save(pictures / f"{n}.jpg")
        lines.append(json.dumps({"file_name": f"{n}.jpg", "captions": ["a dog runs", f"the dog {n} is running"]}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    for name in ("training", "hf_attncap", "benchmarks"):
        (path / name).symlink_to(ROOT / name)
    return path


def test_readme_has_two_commands_that_set_everything_up():
    commands = [command for command in shell_commands("README.md") if INSTALL.match(command)]
    assert len(commands) == 2 and "attncap caption" in commands[0] and "pytest" in commands[1]
    for mark, command in zip(("# captions", "# tests"), commands):  # .ci/run finds the second by its comment
        assert f"\n{mark}\n{command}\n" in read("README.md")


def test_first_command_prints_the_captions_that_the_readme_shows(tmp_path):
    command = next(command for command in shell_commands("README.md") if INSTALL.match(command))
    (tmp_path / ".venv").symlink_to(BIN.parent)
    result = run(INSTALL.sub("", command), tmp_path)
    assert result.returncode == 0, result.stderr
    printed = [f"{Path(path).name}\t{caption}" for path, caption in (line.split("\t") for line in result.stdout.splitlines())]
    assert printed == blocks("text", "README.md")[0].splitlines()
    plots = list((tmp_path / "maps").glob("*.importance.png"))
    assert len(plots) == len(printed) and all(Image.open(plot).width > 500 for plot in plots)


def test_shell_commands_of_the_readme_run_in_their_order(folder):
    """The fine-tuned checkpoint is then evaluated and exported."""
    first, second = (block for block in blocks("bash", "README.md") if not INSTALL.search(block))
    captioning, training = ([line for line in block.splitlines() if not line.startswith("#")] for block in (first, second))
    assert check_commands(folder, captioning) == blocks("text", "README.md")[1]
    check_commands(folder, training, "--max_steps 1 --per_device_train_batch_size 2 --use_cpu True")
    assert (folder / "hub_folder" / "modeling_attncap.py").exists()
    assert "Flickr8k" in (folder / "hub_folder" / "README.md").read_text(), "the card names the data of the original checkpoint"


def test_shell_commands_of_the_metrics_page_run(folder):
    check_commands(folder, shell_commands("docs/metrics.md"))
    assert "cider" in json.loads((folder / "scores.json").read_text())["scores"]


def test_shell_commands_of_the_page_about_many_images_run(folder, tmp_path):
    """In a folder of their own: they write a caption file beside each image."""
    shutil.copy(folder / "cat.png", tmp_path)
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    last = check_commands(tmp_path, shell_commands("docs/many_images.md"))
    assert last == "", "captions beside the images"
    assert len((tmp_path / "printed.txt").read_text().splitlines()) == 21
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == [f"pictures/{number}.jpg" for number in range(10)]
    assert (tmp_path / "pictures" / "3.txt").read_text() == f"{rows[3]['caption']}\n"
    assert [row["caption"] for row in json.loads((tmp_path / "results.json").read_text())] == [row["caption"] for row in rows]
    assert all((tmp_path / name).exists() for name in ("captions.csv", "captions.parquet", "listed.csv"))


def test_commands_and_python_of_the_explain_page_run(folder, monkeypatch):
    """Except the demo, which the next test starts."""
    commands = shell_commands("docs/explain.md")
    check_commands(folder, [command for command in commands if command.startswith("attncap explain ")])
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        f"{name}{ending}" for name in ("cat", "coffee") for ending in (".html", ".importance.png", ".summary.png")
    ]
    monkeypatch.chdir(folder)
    shown, _ = blocks("python", "docs/explain.md")
    run_block(shown, {})


def test_demo_and_space_of_the_explain_page_run(folder, monkeypatch):
    pytest.importorskip("gradio", reason='pip install "hf_attncap[demo]"')
    others = [command for command in shell_commands("docs/explain.md") if not command.startswith("attncap explain ")]
    (demo,) = (shlex.split(command) for command in others if command.startswith("attncap demo "))
    check_commands(folder, [command for command in others if not command.startswith("attncap demo ")])
    assert (folder / "space_folder" / "app.py").exists()
    monkeypatch.chdir(folder)
    command = [str(BIN / demo[0]), *demo[1:]]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    ) as process:
        try:
            assert process.stdout and process.stdout.readline().startswith("http://127.0.0.1:")
            run_block(blocks("python", "docs/explain.md")[1], {})
        finally:
            process.terminate()


@pytest.mark.slow
def test_fine_tuning_commands_of_the_training_page_run(folder):
    check_commands(folder, fine_tuning_commands(), "--num_train_epochs 1 --per_device_train_batch_size 4 --use_cpu True")
    assert (folder / "runs" / "hub" / "modeling_attncap.py").exists()


def fine_tuning_commands() -> list[str]:
    return blocks("bash", "docs/training.md")[0].splitlines()


def test_other_commands_of_the_training_page_are_valid():
    """Stages and calibration, which tests of their own run; each stage starts from a run before it."""
    commands = [command for command in shell_commands("docs/training.md") if command not in fine_tuning_commands()]
    assert len(commands) == 6
    check_arguments([shlex.split(command, comments=True) for command in commands])


@pytest.mark.parametrize("page", PARSED)
def test_commands_that_take_hours_are_valid(page):
    check_arguments([shlex.split(command, comments=True) for command in shell_commands(page)])


def check_arguments(commands: list[list[str]]) -> None:
    """Each command names a script and options that exist, and checkpoints that an earlier command wrote."""
    written: set[str | None] = {None, "hf_attncap/checkpoint"}
    for words in commands:
        options = {word for word in words if word.startswith("--")}
        used: list[Any] = []
        if words[:2] == ["attncap", "train"]:
            model, _, training = parse_arguments([*words[2:], "--use_cpu", "True"])
            used, new = [model.model_name_or_path], training.output_dir
        elif words[:2] == ["attncap", "average"]:
            place = words.index("--output")
            used, new = words[2:place], words[place + 1]
        elif words[0] == "attncap":
            used, new = [words[2]], words[3] if words[1] == "pack" else None
        else:
            file, new = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1], None
            text = (ROOT / file).read_text(encoding="utf-8")
            assert {option for option in options if f'"{option}"' in text} == options, words
        if words[0] == "attncap" and words[1] != "train":
            assert options <= command_options(words[1]), words
        assert set(used) <= written, words
        written.add(new)


def test_script_of_the_released_checkpoint_runs_valid_commands(tmp_path):
    """The script itself runs, with data that it has to combine; programs that take hours record their arguments instead."""
    for name, rows, shade in (("flickr8k", 3, 0), ("coco", 2, 50)):
        (tmp_path / "data" / name).mkdir(parents=True)
        write_table(tmp_path / "data" / name / "train.parquet", rows, shade)
        write_table(tmp_path / "data" / name / "validation.parquet", 1, shade + 20)
    record = f"""{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]), file=open("commands", "a"))'"""
    python = f'if [ "$1" = - ] || [ "$1" = -c ]; then {sys.executable} "$@"; else {record} python "$@"; fi'
    functions = f'attncap() {{ {record} attncap "$@"; }}; python() {{ {python}; }}; export -f attncap python'
    command = ["bash", "-c", f'{functions}; bash "$0" data weights.pth out', str(ROOT / SCRIPT)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert result.returncode == 0, result.stderr
    rows = {
        name: len(Dataset.from_parquet(str(tmp_path / "out" / f"{name}.parquet"))) for name in ("coco_twice", "coco_once", "both")
    }
    assert rows == {"coco_twice": 7, "coco_once": 5, "both": 2}
    commands = [json.loads(line) for line in (tmp_path / "commands").read_text().splitlines()]
    assert [words[1] for words in commands if words[0] == "attncap"] == [
        "train", "train", "train", "train", "average", "train", "average", "pack", "calibrate", "card",
    ]  # fmt: skip
    check_arguments(
        [[word.replace(f"{ROOT}/", "") for word in words] for words in commands if words[1] not in ("calibrate", "card")]
    )


def run_block(source: str, names: dict[str, Any]) -> None:
    """Runs Python; where a line `print(...)` ends in a comment, the comment must begin with what it prints."""
    lines = source.splitlines()

    def checked_print(*values: object) -> None:
        text = " ".join(map(str, values))
        shown = lines[sys._getframe(1).f_lineno - 1].partition(")  # ")[2]
        assert shown.startswith(text) or not shown, f"prints {text}, the page shows {shown}"

    exec(compile(source, "block", "exec"), names | {"print": checked_print, "__name__": "page"})


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("docs/fine_tuning.md", "docs/explain.md")])
def test_python_blocks_run_and_print_what_the_page_shows(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for block in blocks("python", page):
        run_block(block, {})


def test_python_blocks_of_the_fine_tuning_page_run(folder, monkeypatch):
    """The second block continues the first; the saved model can be loaded."""
    monkeypatch.chdir(folder)
    snippets = blocks("python", "docs/fine_tuning.md")
    assert len(snippets) == 2 and "Seq2SeqTrainer(" in snippets[0] and "get_peft_model(" in snippets[1]
    run_block("\n".join(snippets), {})
    saved = {path.name for path in (folder / "runs" / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= saved


def test_notebook_runs_and_prints_what_it_shows(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "notebook"}
    cells = [cell for cell in json.loads(read("docs/captioning.ipynb"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    for cell in cells:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), "cell", "exec"), names)
        shown = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
        assert printed.getvalue() == shown
