"""Exporting: what is written, what is refused and why, damaged folders, missing packages, int8."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from hf_attncap import Captioner
from hf_attncap.cli import main
from hf_attncap.export import export_checkpoint

SMALL = {"word_attention": "score", "backbone": "squeezenet1_1"}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of pictures, and a text file that is not one."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for number in range(6):
        blocks = Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        blocks.resize((96, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    (folder / "about.txt").write_text("text")
    return folder


@pytest.fixture
def exported(make_export, tmp_path):
    """A copy of an exported folder, to damage."""
    return shutil.copytree(make_export("onnx", **SMALL), tmp_path / "copy")


@pytest.fixture
def checkpoint(make_checkpoint, tmp_path):
    """A copy of a checkpoint, to change."""
    return shutil.copytree(make_checkpoint(**SMALL), tmp_path / "checkpoint")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"format": "tflite"}, "`format` is 'tflite', but it must be one of onnx, openvino"),
        ({"dtype": "float16"}, "`dtype` is 'float16', but it must be one of float32, bfloat16, int8"),
        ({"dtype": "bfloat16"}, "ONNX Runtime cannot compute in bfloat16 on CPUs: choose the format openvino"),
        ({"calibration": "photographs"}, "only used with the dtype int8, but the dtype is float32: leave it out"),
        ({"dtype": "int8", "calibration": "missing"}, "'missing' is not a folder"),
        ({"dtype": "int8", "calibration": "."}, "'.' has no images"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(make_checkpoint, tmp_path, monkeypatch, options, message):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        export_checkpoint(make_checkpoint(**SMALL), "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_not_replaced(make_checkpoint, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["export", str(make_checkpoint(**SMALL)), str(tmp_path)]) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "file, change, message",
    [
        (
            "generation_config.json",
            {"bad_words_ids": [[5]]},
            r"sets `bad_words_ids` to \[\[5\]\], which exported captioners do not",
        ),
        ("generation_config.json", {"do_sample": True}, "sets `do_sample` to True"),
        ("generation_config.json", {"forced_eos_token_id": 2}, "sets `forced_eos_token_id` to 2"),
        ("tokenizer_config.json", {"clean_up_tokenization_spaces": True}, "`clean_up_tokenization_spaces`"),
        (
            "processor_config.json",
            {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
            "has a `do_center_crop` that exported captioners do not",
        ),
        ("processor_config.json", {"do_resize": False}, "has a `size` that exported captioners do not"),
    ],
)
def test_settings_that_an_exported_captioner_does_not_have_are_refused(checkpoint, tmp_path, file, change, message):
    pytest.importorskip("onnxscript")
    config = json.loads((checkpoint / file).read_text())
    (config["image_processor"] if file == "processor_config.json" else config).update(change)
    (checkpoint / file).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_its_extra(make_checkpoint, exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'needs ONNX Runtime: pip install "hf_attncap\[onnx\]"'):
        Captioner.from_pretrained(exported)
    assert main(["export", str(make_checkpoint(**SMALL)), str(tmp_path / "out")]) == 1
    assert 'The export to onnx needs more packages: pip install "hf_attncap[onnx]"' in capsys.readouterr().err
    about = json.loads((exported / "export.json").read_text())
    (exported / "export.json").write_text(json.dumps({**about, "format": "openvino"}))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r'needs OpenVINO: pip install "hf_attncap\[openvino\]"'):
        Captioner.from_pretrained(exported)


def test_a_folder_of_a_newer_version_is_refused(exported):
    about = json.loads((exported / "export.json").read_text())
    (exported / "export.json").write_text(json.dumps({**about, "version": 99, "new": 1}))
    with pytest.raises(ValueError, match="was exported by a newer version of hf_attncap: update the package"):
        Captioner.from_pretrained(exported)


@pytest.mark.parametrize("file", ["export.json", "tokenizer.json", "encoder.onnx", "step.onnx"])
@pytest.mark.parametrize("damage", ["missing", "cut off", "other"])
def test_a_damaged_folder_is_one_clear_error(exported, file, damage, capsys):
    path = exported / file
    if damage == "missing" and file == "export.json":
        pytest.skip("it is then no exported folder")
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "cut off" else b"{}")
    assert main(["caption", "--model", str(exported), "a.png"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(exported) in error and "export" in error


def test_device_and_dtype_of_an_exported_captioner_cannot_be_chosen(exported):
    with pytest.raises(ValueError, match="was exported for the CPU, but `device` is 'cuda': leave it out"):
        Captioner.from_pretrained(exported, device="cuda")
    with pytest.raises(ValueError, match="leave `dtype` out"):
        Captioner.from_pretrained(exported, dtype="bfloat16")
    Captioner.from_pretrained(exported, device="cpu")


@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_int8_captions_are_close_to_those_of_float32(make_checkpoint, photographs, tmp_path, format, calibrated, capsys):
    for package in {"onnx": ("onnxruntime",), "openvino": ("openvino", "nncf")}[format]:
        pytest.importorskip(package)
    checkpoint, out = make_checkpoint(**SMALL), tmp_path / "out"
    command = ["export", str(checkpoint), str(out), "--format", format, "--dtype", "int8"]
    assert main([*command, *(["--calibration", str(photographs)] if calibrated else [])]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    exact, rounded = (Captioner.from_pretrained(folder).engine for folder in (checkpoint, out))
    images = [Image.open(photographs / f"{number}.png") for number in range(6)]
    expected, found = (engine.generate(images, None, 2, 1, False) for engine in (exact, rounded))
    first = abs(expected.attention[:, 0, 0] - found.attention[:, 0, 0])  # of the first step, which all captions share
    assert 0 < first.mean() < 0.02
    encoder = (out / ("encoder.onnx" if format == "onnx" else "encoder.bin")).stat().st_size
    share = encoder / (checkpoint / "model.safetensors").stat().st_size
    assert share < 0.4 if calibrated else 0.4 < share < 0.6 if format == "onnx" else share > 0.8


@pytest.mark.parametrize("command", [["pack"], ["export"], ["average"]], ids=lambda command: command[0])
def test_an_export_is_not_a_checkpoint(command, make_export, tmp_path, capsys):
    folder = str(make_export("onnx", **SMALL))
    inputs = [folder, folder] if command == ["average"] else [folder]
    assert main([*command, *inputs, *(["--output"] if command == ["average"] else []), str(tmp_path / "out")]) == 1
    assert f"'{folder}' is an export: give the checkpoint that it was made from" in capsys.readouterr().err


def test_a_missing_tokenizer_is_named(make_export, tmp_path):
    shutil.copytree(make_export("onnx", **SMALL), tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").unlink()
    with pytest.raises(OSError, match=r"tokenizer\.json is missing"):
        Captioner.from_pretrained(tmp_path / "damaged")
