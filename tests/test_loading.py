"""`Captioner.from_pretrained`: checkpoints, damaged folders, devices, dtypes, and the Hub."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hf_attncap.captioner
from hf_attncap import AttnCapForConditionalGeneration, Captioner, torch_engine


@pytest.fixture(scope="module")
def captioner(tiny_checkpoint) -> Captioner:
    return Captioner.from_pretrained(tiny_checkpoint, device="cpu")


def test_checkpoint_of_the_package_is_the_default(tiny_checkpoint, pictures, captioner, monkeypatch, tmp_path):
    monkeypatch.setattr(hf_attncap.captioner, "CHECKPOINT", tiny_checkpoint)
    assert Captioner.from_pretrained().caption(pictures[0]).text == captioner.caption(pictures[0]).text
    monkeypatch.setattr(hf_attncap.captioner, "CHECKPOINT", tmp_path)
    with pytest.raises(FileNotFoundError, match="name a folder or Hub repository"):
        Captioner.from_pretrained()


def test_half_precision_gives_float_arrays(tiny_checkpoint, pictures):
    captioner = Captioner.from_pretrained(tiny_checkpoint, dtype="bfloat16")
    result = captioner.caption(pictures[0])
    assert captioner.model.dtype == torch.bfloat16 and result.attention.dtype == np.float32
    assert np.allclose(result.attention.sum(axis=(1, 2)), 1)


def damage(folder, what: str) -> None:
    if what == "weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif what == "kind":
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    else:
        (folder / what).unlink()


@pytest.mark.parametrize("what", ["weights", "kind", "config.json", "model.safetensors", "tokenizer.json"])
def test_error_names_a_damaged_checkpoint(tiny_checkpoint, tmp_path, what):
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    damage(folder, what)
    with pytest.raises(OSError, match=f"The folder '{folder}' cannot be loaded as a captioner"):
        Captioner.from_pretrained(folder)


def test_error_names_a_missing_folder_and_an_unusable_device(tiny_checkpoint, tmp_path):
    with pytest.raises(OSError, match="nowhere' is not a folder"):
        Captioner.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="device 'toaster' cannot be used.*give 'cpu'"):
        Captioner.from_pretrained(tiny_checkpoint, device="toaster")


@pytest.mark.parametrize("dtype", ["int8", "nonsense", torch.int8])
def test_a_dtype_that_cannot_be_used_is_named(dtype):
    with pytest.raises(ValueError, match="give 'float32', 'bfloat16' or 'float16'. For int8, use `attncap export`"):
        Captioner.from_pretrained(dtype=dtype)


@pytest.mark.parametrize("gpus, expected", [({"cuda", "mps"}, "cuda"), ({"mps"}, "mps"), (set(), "cpu")])
def test_default_device(tiny_checkpoint, monkeypatch, gpus, expected):
    """There is no MPS here: what would be moved to it is recorded."""
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in gpus)
    monkeypatch.setattr(torch_engine, "_check_device", torch.device)
    monkeypatch.setattr(
        AttnCapForConditionalGeneration, "to", lambda self, device, **options: moved.append((device.type, options)) or self
    )
    Captioner.from_pretrained(tiny_checkpoint)
    assert moved == [(expected, {"memory_format": torch.contiguous_format} if expected == "mps" else {})]


def test_what_mps_does_not_support_is_refused(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(torch_engine, "_check_device", torch.device)
    monkeypatch.setattr(torch_engine, "is_macos_or_newer", lambda *version: False)
    for options, message in (
        ({"dtype": "bfloat16"}, "`dtype` is 'bfloat16', which MPS does not support on this Mac: give 'float32' or 'float16'"),
        ({"dtype": torch.float64}, "MPS does not support"),
        ({"compile": True}, "`compile=True` is not supported on MPS"),
    ):
        with pytest.raises(ValueError, match=message):
            Captioner.from_pretrained(tiny_checkpoint, device="mps", **options)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="The device 'mps' cannot be used"):
        Captioner.from_pretrained(tiny_checkpoint, device="mps")


class NoDouble(TorchDispatchMode):
    """Fails at tensors of float64, which MPS does not have; on the CPU, they are those of the device of the model."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (list, tuple)) else [out]:
            assert not (isinstance(value, torch.Tensor) and value.dtype == torch.float64), f"{func} gives float64"
        return out


@pytest.mark.parametrize("options", [{}, {"num_beams": 1}, {"do_sample": True}, {"prompt": "two red", "explain": True}], ids=str)
def test_captioning_computes_nothing_in_double_precision(captioner, pictures, options):
    """MPS has no float64."""
    with NoDouble():
        results = captioner.caption(pictures, **options)
    assert all(result.text for result in results)


def test_a_name_that_cannot_be_on_the_hub_fails_at_once(monkeypatch):
    monkeypatch.setattr(torch_engine, "_hub_problem", lambda: pytest.fail("the Hub was asked"))
    with pytest.raises(FileNotFoundError, match="There is no folder 'typo', and a name on the Hub has an owner"):
        Captioner.from_pretrained("typo")


def test_an_unreachable_hub_fails_at_once(monkeypatch):
    monkeypatch.setattr(torch_engine.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch_engine.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(OSError, match="from the Hub .it does not answer: .*; files are missing in the cache.: name a"):
        Captioner.from_pretrained("me/captioner")
    assert time.monotonic() - started < 15  # with the library's attempts half a minute


def test_folders_have_no_revision(tiny_checkpoint):
    with pytest.raises(ValueError, match="is a folder, which has no revisions: leave `revision` out"):
        Captioner.from_pretrained(tiny_checkpoint, revision="v1")
    assert Captioner.from_pretrained(tiny_checkpoint, token="secret", cache_dir="nowhere", local_files_only=True).model


def test_revision_token_and_cache_reach_each_file_on_the_hub(tiny_checkpoint, pictures, tmp_path, captioner):
    """The Hub is a server of this test, which knows one revision and requires the token."""
    script = Path(__file__).parent / "fake_hub.py"
    command = [sys.executable, str(script), str(tiny_checkpoint), str(tmp_path / "cache"), str(pictures[0])]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    expected = captioner.caption(pictures[0]).text
    assert found["texts"] == [expected] * 3  # from the server, with `local_files_only`, and without a server
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= set(found["files"])
    assert found["revisions"] == ["v1"] and found["tokens"] == ["Bearer secret"]
    assert found["requests_afterwards"] == 0 and found["seconds_without_server"] < 25
    assert "cannot be loaded from the Hub" in found["other_revision"]
