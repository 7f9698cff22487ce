"""The command line: output, messages and exit codes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import hf_attncap.captioner
import hf_attncap.cli
import hf_attncap.images
from hf_attncap import Captioner
from hf_attncap.cli import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def loud_libraries():
    """Restores transformers' logging, which the commands silence for the whole process."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def results(tiny_checkpoint, pictures):
    return Captioner.from_pretrained(tiny_checkpoint).caption(pictures, num_return_sequences=2)


@pytest.fixture
def broken(tmp_path) -> list[str]:
    """A missing, an empty, a truncated and a non-image file, and a folder."""
    (tmp_path / "empty.jpg").touch()
    Image.effect_noise((100, 100), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "album").mkdir()
    return [str(tmp_path / name) for name in ("missing.jpg", "empty.jpg", "cut.png", "notes.txt", "album")]


def captions(tiny_checkpoint, *arguments) -> int:
    return main(["caption", "--model", str(tiny_checkpoint), *map(str, arguments)])


def test_one_line_per_image_and_nothing_on_stderr(tiny_checkpoint, pictures, results, capfd):
    assert captions(tiny_checkpoint, *pictures, "--batch-size", 2) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == [f"{file}\t{result.text}" for file, result in zip(pictures, results)]
    assert err == ""


def test_further_captions_are_on_tab_indented_lines(tiny_checkpoint, pictures, results, capfd):
    assert captions(tiny_checkpoint, pictures[0], "--num-return-sequences", 2) == 0
    assert capfd.readouterr().out == f"{pictures[0]}\t{results[0].text}\n\t{results[0].alternatives[0].text}\n"


@pytest.mark.usefixtures("coarse_plots")
def test_json_has_scores_words_alternatives_and_plot(tiny_checkpoint, pictures, results, tmp_path, capfd):
    assert captions(tiny_checkpoint, *pictures, "--json", "--num-return-sequences", 2, "--attention", tmp_path) == 0
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    for record, file, result in zip(records, pictures, results):
        assert record == {
            "path": str(file),
            "caption": result.text,
            "score": pytest.approx(result.score, abs=1e-4),
            "confidence": None,
            "words": result.words,
            "alternatives": [
                {"caption": other.text, "score": pytest.approx(other.score, abs=1e-4)} for other in result.alternatives
            ],
            "attention_file": str(tmp_path / f"{file.stem}.attention.png"),
        }
    assert len(records) == len(pictures)


def test_prompt_and_beams_reach_the_model(tiny_checkpoint, pictures, capfd):
    assert captions(tiny_checkpoint, pictures[0], "--prompt", "two red dogs", "--num-beams", 1, "--device", "cpu", "--json") == 0
    record = json.loads(capfd.readouterr().out)
    expected = Captioner.from_pretrained(tiny_checkpoint).caption(pictures[0], prompt="two red dogs", num_beams=1)
    assert (record["caption"], record["score"]) == (expected.text, pytest.approx(expected.score, abs=1e-4))
    assert "attention_file" not in record


@pytest.mark.parametrize("batch_size", [1, 8])
def test_unreadable_images_are_reported_and_the_others_captioned(tiny_checkpoint, pictures, results, broken, batch_size, capfd):
    files = [broken[0], pictures[0], *broken[1:], pictures[1]]
    assert captions(tiny_checkpoint, *files, "--batch-size", batch_size) == 1
    out, err = capfd.readouterr()
    assert out.splitlines() == [f"{file}\t{result.text}" for file, result in zip(pictures[:2], results)]
    lines = err.splitlines()
    assert len(lines) == len(broken)
    for file, line, way_out in zip(
        broken, lines, ["check the path", "save or download", "save or download", "save it as", "a folder without images"]
    ):
        assert line.startswith("attncap: ") and file in line and way_out in line


def test_plots_of_images_of_one_name_get_numbers(tiny_checkpoint, pictures, tmp_path, capfd):
    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    files = [folder / "a.png", folder / "more" / "a.png", folder / "A.gif"]
    for file in files:
        Image.new("RGB", (40, 20), "teal").save(file)
    pixels = files[0].read_bytes()
    assert captions(tiny_checkpoint, *files, "--attention", folder) == 0
    assert files[0].read_bytes() == pixels, "a picture was overwritten"
    plots = [folder / "a.attention.png", folder / "a-2.attention.png", folder / "A-3.attention.png"]
    assert all(Image.open(plot).width > 300 for plot in plots)
    assert capfd.readouterr().err.splitlines() == [f"{file}: attention in {plot}" for file, plot in zip(files, plots)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["more", "a.png", "A.gif", *(s.name for s in plots)])


@pytest.mark.usefixtures("coarse_plots")
def test_plots_replace_only_earlier_plots(tiny_checkpoint, pictures, tmp_path, capfd):
    out = tmp_path / "out"
    assert captions(tiny_checkpoint, pictures[0], "--attention", out) == 0
    plot = out / "wide.attention.png"
    first = plot.read_bytes()
    plot.write_bytes(first[:-8])  # truncated, but the mark is still there
    assert captions(tiny_checkpoint, pictures[0], "--attention", out) == 0
    assert len(plot.read_bytes()) == len(first) and len(list(out.iterdir())) == 1

    Image.new("RGB", (9, 9)).save(plot)  # another program's file of the same name
    (out / "wide-2.attention.png").write_text("notes")
    (out / "wide-3.attention.png").mkdir()
    (out / "wide-4.attention.png").symlink_to(tmp_path / "elsewhere.png")
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert captions(tiny_checkpoint, pictures[0], "--attention", out) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (out / "wide-5.attention.png").is_file() and not (tmp_path / "elsewhere.png").exists()

    # A plot that is an input is not replaced by the plot of another image.
    mine, other = tmp_path / "x.attention.png", tmp_path / "x.jpg"
    mine.write_bytes(first)
    other.write_bytes(pictures[0].read_bytes())
    assert captions(tiny_checkpoint, other, mine, "--attention", tmp_path) == 0
    assert mine.read_bytes() == first and (tmp_path / "x-2.attention.png").is_file()


def test_plots_of_images_with_long_names(tiny_checkpoint, pictures, tmp_path, capfd):
    file = tmp_path / ("ü" * 120 + ".jpg")
    file.write_bytes(pictures[0].read_bytes())
    assert captions(tiny_checkpoint, file, "--attention", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").glob("*.attention.png"))) == 1


@pytest.mark.usefixtures("coarse_plots")
def test_failure_of_a_plot_does_not_stop_captioning(tiny_checkpoint, pictures, results, monkeypatch, tmp_path, capfd):
    draw = hf_attncap.captioner.CaptionResult.plot_attention
    broken = [pictures[1]]

    def fail(result, path=None):
        if result.image.size == Image.open(broken[0]).size:
            raise ValueError("no room for a word")
        return draw(result, path)

    monkeypatch.setattr(hf_attncap.captioner.CaptionResult, "plot_attention", fail)
    assert captions(tiny_checkpoint, *pictures, "--attention", tmp_path) == 1
    out, err = capfd.readouterr()
    assert out.splitlines() == [f"{file}\t{result.text}" for file, result in zip(pictures, results)]
    assert f"attncap: {pictures[1]}: its attention cannot be plotted: ValueError: no room for a word" in err.splitlines()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grey.attention.png", "wide.attention.png"]


def test_failure_of_an_image_does_not_stop_captioning(tiny_checkpoint, pictures, results, monkeypatch, capfd):
    caption, bad = Captioner._caption_batch, Image.open(pictures[1]).size

    def fail(captioner, batch, *arguments):
        if bad in [picture.size for picture in batch]:
            raise RuntimeError("out of memory")
        return caption(captioner, batch, *arguments)

    monkeypatch.setattr(Captioner, "_caption_batch", fail)
    assert captions(tiny_checkpoint, *pictures) == 1
    out, err = capfd.readouterr()
    assert out.splitlines() == [f"{pictures[n]}\t{results[n].text}" for n in (0, 2)]
    assert err.splitlines() == [f"attncap: {pictures[1]} cannot be captioned: RuntimeError: out of memory"]


def test_batches_are_limited_in_pixels(tiny_checkpoint, pictures, monkeypatch, capfd):
    sizes, caption = [], Captioner._caption_batch
    monkeypatch.setattr(hf_attncap.images, "MAX_BATCH_PIXELS", 10_000)
    monkeypatch.setattr(
        Captioner, "_caption_batch", lambda self, batch, *rest: sizes.append(len(batch)) or caption(self, batch, *rest)
    )
    assert captions(tiny_checkpoint, *pictures, *pictures) == 0
    assert sizes == [2, 2, 2]  # of 9,600, 7,500 and 1,600 pixels


def test_paths_with_line_breaks_are_printed_on_one_line(tiny_checkpoint, pictures, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    names = ["a  b.jpg", "[set] 1.jpg", "line\nbreak.jpg", "tab\t.jpg", "-x.jpg"]
    for name in names:
        Path(name).write_bytes(pictures[0].read_bytes())
    broken = ["two  spaces.jpg", "broken\nline.jpg"]
    for name in broken:
        Path(name).touch()
    assert main(["caption", "--model", str(tiny_checkpoint), "--", *names, *broken]) == 1
    out, err = capfd.readouterr()
    shown = ["a  b.jpg", "[set] 1.jpg", "line\\nbreak.jpg", "tab\\t.jpg", "-x.jpg"]
    assert [line.split("\t")[0] for line in out.splitlines()] == shown
    assert [line.split(" is empty")[0] for line in err.splitlines()] == ["attncap: two  spaces.jpg", "attncap: broken\\nline.jpg"]


def test_unwritable_plot_folder_is_reported(tiny_checkpoint, pictures, capfd):
    assert captions(tiny_checkpoint, pictures[1], "--attention", pictures[0]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert str(pictures[0]) in err and "give another --attention" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "'./nowhere' is not a folder: name a folder with a config.json, or a captioner on the Hub"),
        (["--device", "toaster"], "device 'toaster' cannot be used"),
        (["--prompt", "two zebra"], "does not know zebra"),
    ],
)
def test_impossible_options_are_reported_in_one_sentence(tiny_checkpoint, pictures, arguments, message, capfd):
    assert captions(tiny_checkpoint, pictures[0], *arguments) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("attncap: ") and message in err and err.count("\n") == 1


def test_model_that_is_neither_folder_nor_on_the_hub(pictures, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["caption", "--model", "missing/folder", str(pictures[0])]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("attncap: 'missing/folder' is not a folder and cannot be loaded from the Hub")
    assert "it does not answer" in err, "the cause"
    assert err.endswith("name a folder with a config.json, or a captioner on the Hub as owner/name.\n") and len(err) < 320


def test_invalid_config_is_reported_in_one_sentence(tiny_checkpoint, pictures, tmp_path, capfd):
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": config["vocab_size"]}))
    assert captions(folder, pictures[0]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"attncap: The folder '{folder}' cannot be loaded") and "`pad_token_id` is" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["caption"], "required: PATH"),
        (["caption", "a.jpg", "--num-beams", "0"], "at least 1"),
        (["caption", "a.jpg", "--batch-size", "many"], "at least 1"),
        (["caption", "a.jpg", "--num-beams", "2", "--num-return-sequences", "3"], "needs --num-beams 3 or more"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_exits_without_a_traceback(tiny_checkpoint, pictures, monkeypatch, capfd):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_attncap.images, "load_image", interrupt)
    assert captions(tiny_checkpoint, *pictures) == 130
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_paths_that_are_not_utf8_are_printed_unchanged(tiny_checkpoint, pictures, tmp_path, capfdbinary):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    Path(os.fsdecode(path)).write_bytes(pictures[0].read_bytes())
    assert captions(tiny_checkpoint, os.fsdecode(path)) == 0
    assert capfdbinary.readouterr().out.startswith(path + b"\t")


def test_export_hub(tiny_checkpoint, tmp_path, capfd):
    out = tmp_path / "hub"
    assert main(["export-hub", str(tiny_checkpoint), str(out)]) == 0
    assert "auto_map" in json.loads((out / "config.json").read_text())
    assert capfd.readouterr() == (f"{out}\n", "")
    assert main(["export-hub", str(tiny_checkpoint), str(out)]) == 1
    assert str(out) in capfd.readouterr().err


def test_closed_pipe_exits_without_a_traceback(tiny_checkpoint, pictures, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert captions(tiny_checkpoint, *pictures) == 141
        print("what Python flushes at exit")
    assert capfd.readouterr().err == ""


def test_old_option_names_warn_and_work(tiny_checkpoint, pictures, capfd):
    outputs = []
    for names in (("--num-beams", "--num-return-sequences"), ("--beams", "--n-best")):
        assert captions(tiny_checkpoint, pictures[0], names[0], 4, names[1], 2) == 0
        outputs.append(capfd.readouterr())
    assert outputs[0].out == outputs[1].out and outputs[0].err == ""
    assert outputs[1].err.splitlines() == [
        "attncap: --beams is deprecated: use --num-beams",
        "attncap: --n-best is deprecated: use --num-return-sequences",
    ]
    assert main(["card", "nowhere", "--images", "a.parquet", "b.parquet", "--pictures", "c.jpg"]) == 1
    err = capfd.readouterr().err
    assert "--images is deprecated: use --eval-data" in err and "--pictures is deprecated: use --example-images" in err
    with pytest.raises(SystemExit, match="2"):
        main(["calibrate", "nowhere"])
    assert "the following arguments are required: --eval-data" in capfd.readouterr().err


BLOCKED = """
import sys
sys.modules |= dict.fromkeys(sys.argv[1].split(","))
from hf_attncap.cli import main
sys.exit(main(sys.argv[2:]))
"""


def run_without(packages: str, *arguments) -> subprocess.CompletedProcess:
    """The command line in a process in which importing some packages fails."""
    command = [sys.executable, "-c", BLOCKED, packages, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_captioning_needs_no_optional_package(tiny_checkpoint, pictures, results):
    optional = "matplotlib,jinja2,datasets,accelerate,gensim,evaluate,skimage"
    done = run_without(optional, "caption", "--model", tiny_checkpoint, pictures[0])
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{pictures[0]}\t{results[0].text}\n", "")


def test_missing_packages_are_named_with_the_command_that_installs_them(tiny_checkpoint, pictures, tmp_path):
    for packages, arguments, extra in (
        ("matplotlib", ["caption", "--model", tiny_checkpoint, pictures[0], "--attention", tmp_path], "plot"),
        ("datasets", ["train", "--output_dir", tmp_path], "train"),
        ("datasets", ["calibrate", tiny_checkpoint, "--eval-data", "none.parquet"], "train"),
    ):
        done = run_without(packages, *arguments)
        assert done.returncode == 1 and done.stdout == "", arguments
        assert done.stderr.startswith("attncap: ") and done.stderr.count("\n") == 1, done.stderr
        assert f'pip install "hf_attncap[{extra}]"' in done.stderr and packages in done.stderr
    assert not list(tmp_path.iterdir())


def test_train_reports_missing_settings(tmp_path, capsys):
    assert main(["train", "--config", "finetune.yaml", "--output_dir", str(tmp_path)]) == 2
    assert "give `--train_file`, `--dataset_name` or `--data_dir`" in capsys.readouterr().err
    assert main(["train", "--config", "fientune.yaml", "--output_dir", str(tmp_path)]) == 2
    assert "No such config file: fientune.yaml. The package has " in capsys.readouterr().err


def test_average_and_pack_write_checkpoints(tiny_checkpoint, tmp_path, capsys):
    mean, half = tmp_path / "mean", tmp_path / "half"
    assert main(["average", str(tiny_checkpoint), str(tiny_checkpoint), "--output", str(mean), "--weights", "1", "3"]) == 0
    assert main(["pack", str(mean), str(half)]) == 1
    assert "do not fit float16" in capsys.readouterr().err
    file = mean / "model.safetensors"
    save_file({name: tensor.clamp(-100, 100) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert main(["pack", str(mean), str(half), "--generation", '{"num_beams": 2}']) == 0
    assert capsys.readouterr().out == f"{half}\n"
    assert json.loads((half / "generation_config.json").read_text())["num_beams"] == 2
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (mean, half)]
    assert sizes[1] < 0.6 * sizes[0]

    assert main(["average", str(tiny_checkpoint), str(mean), "--output", str(mean)]) == 1
    assert "is not an empty folder" in capsys.readouterr().err
    for wrong, said in (("{", "is not JSON"), ("[1]", "is not a JSON object")):
        with pytest.raises(SystemExit, match="2"):
            main(["pack", str(mean), str(tmp_path / "wrong"), "--generation", wrong])
        assert said in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()
