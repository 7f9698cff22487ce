"""`attncap export --format web`: what is written, what is refused and why, without npm and network."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from hf_attncap import Captioner
from hf_attncap.cli import main
from hf_attncap.export import export_checkpoint
from hf_attncap.export_web import PACKAGE, PAGE_FILES, RUNTIME_FILES, VERSION, read_runtime

SMALL = {"word_attention": "score", "backbone": "squeezenet1_1"}


@pytest.fixture
def fake_runtime(tmp_path) -> Path:
    """A folder with the names of ONNX Runtime Web's files, for tests that do not run it."""
    folder = tmp_path / "package"
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": PACKAGE, "version": "9.9.9"}))
    for name in RUNTIME_FILES:
        (folder / "dist" / name).write_text(name)
    return folder


def test_the_folder_is_the_onnx_export_with_a_page(make_checkpoint, fake_runtime, pictures, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    out = tmp_path / "out"
    command = ["export", str(make_checkpoint(**SMALL)), str(out), "--format", "web", "--onnxruntime-web", str(fake_runtime)]
    assert main(command) == 0 and capsys.readouterr().out == f"{out}\n"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    exported = {"export.json", "tokenizer.json", "encoder.onnx", "start.onnx", "step.onnx"}
    licences = {"onnxruntime/LICENSE", "onnxruntime/ThirdPartyNotices.txt"}
    assert files == {*PAGE_FILES, *exported, *licences, "downloads.json", *(f"onnxruntime/{name}" for name in RUNTIME_FILES)}
    about = json.loads((out / "export.json").read_text())
    assert (about["format"], about["dtype"], about["packages"][PACKAGE]) == ("onnx", "int8", "9.9.9")
    assert Captioner.from_pretrained(out).caption(pictures[0]).text
    same = export_checkpoint(make_checkpoint(**SMALL), tmp_path / "onnx", "onnx", "int8")
    for name in exported - {"export.json"}:
        assert (out / name).read_bytes() == (same / name).read_bytes(), name
    downloads = json.loads((out / "downloads.json").read_text())
    assert downloads == {name: (out / name).stat().st_size for name in downloads} and exported < set(downloads)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"format": "onnx", "onnxruntime_web": "x"}, "onnxruntime-web is only used with the format web, but the format is onnx"),
        ({"dtype": "bfloat16"}, "cannot compute in bfloat16"),
        ({"dtype": "int8", "calibration": "."}, "has no int8 encoder, which the calibration folder is for: leave it out"),
        ({"onnxruntime_web": "missing.tgz"}, "'missing.tgz' does not exist"),
        ({"onnxruntime_web": "notes.txt"}, r"'notes.txt' is not a \.tgz file of onnxruntime-web"),
        (
            {"onnxruntime_web": "empty"},
            r"'empty' is not the npm package onnxruntime-web \(it has no package.json, ort.wasm.min.mjs",
        ),
        ({"onnxruntime_web": "other"}, r"'other' is not the npm package onnxruntime-web \(it is the package left-pad\)"),
    ],
)
def test_wrong_arguments_are_refused(make_checkpoint, fake_runtime, tmp_path, monkeypatch, options, message):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    shutil.copytree(fake_runtime, tmp_path / "other")
    (tmp_path / "other" / "package.json").write_text('{"name": "left-pad"}')
    with pytest.raises((ValueError, OSError), match=message):
        export_checkpoint(make_checkpoint(**SMALL), "out", **{"format": "web", **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [None, "echo 'npm error code ENOTFOUND' >&2; exit 1", "exit 0"])
def test_without_npm_or_network_the_error_names_the_option(make_checkpoint, tmp_path, monkeypatch, capsys, script):
    pytest.importorskip("onnxscript")
    if script is not None:
        (tmp_path / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin" if script else str(tmp_path))
    assert main(["export", str(make_checkpoint(**SMALL)), str(tmp_path / "out"), "--format", "web"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--onnxruntime-web" in error
    assert ("ENOTFOUND" if script and "echo" in script else "npm") in error
    assert not (tmp_path / "out").exists()


def test_the_package_is_read_from_npm(onnxruntime_web, monkeypatch):
    monkeypatch.setenv("npm_config_offline", "true")
    found = read_runtime(None)
    with tarfile.open(onnxruntime_web) as archive:
        for name in RUNTIME_FILES:
            assert found[name] == archive.extractfile(f"package/dist/{name}").read()
    assert json.loads(found["package.json"])["version"] == VERSION


@pytest.mark.parametrize(
    "change, message",
    [
        ({"resample": 0}, "resizes to the nearest pixel, which the web page does not support"),
        ({"decoder": {"type": "ByteLevel"}}, "has the decoder ByteLevel, which the web page does not support"),
    ],
)
def test_a_checkpoint_that_the_page_cannot_run_is_refused(make_checkpoint, fake_runtime, tmp_path, change, message):
    pytest.importorskip("onnxscript")
    checkpoint = shutil.copytree(make_checkpoint(**SMALL), tmp_path / "checkpoint")
    file = checkpoint / ("processor_config.json" if "resample" in change else "tokenizer.json")
    content = json.loads(file.read_text())
    if "decoder" in change:
        change["decoder"] |= {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (content["image_processor"] if "resample" in change else content).update(change)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        export_checkpoint(checkpoint, tmp_path / "out", "web", onnxruntime_web=fake_runtime)
