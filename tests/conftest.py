"""What several test files share: small saved checkpoints and generated pictures."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

# Sums of several threads on a busy machine are not the same to the last bit, as tests of resumed runs want them; and the tests
# themselves run side by side. Set before torch is loaded, here and by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A name that is no folder is then unknown at once, and not after several attempts to reach the Hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from browser import WatchedPage, open_pages, start_chromium
from hf_attncap.training.data.vocabulary import build_tokenizer
from hypothesis import settings
from PIL import Image

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration, AttnCapImageProcessor, AttnCapProcessor

# Property tests try the same examples each time, so that they say the same of the same code; `search` looks for new ones, longer.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=1000, deadline=None)
settings.load_profile("same")

CAPTIONS = [
    "A black dog is running on the beach with two red balls .",
    "Some children are playing near a big house while it rains .",
    "Two red dogs and a child in the rain .",
]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a tiny random captioner and gives its folder: `make_checkpoint(tokenizer="word" or "bpe", **config)`."""

    @cache
    def make(tokenizer: Literal["word", "bpe"] = "word", **config) -> Path:
        words = build_tokenizer(CAPTIONS, tokenizer, min_count=1)
        torch.manual_seed(0)
        model = AttnCapForConditionalGeneration(
            AttnCapConfig(
                encoder_channels=16,
                vocab_size=len(words),
                word_embed_dim=12,
                hidden_size=16,
                attention_dim=8,
                **{"backbone": "mobilenet_v3_small", "word_attention": "history", **config},
            )
        )
        _sharpen(model)
        model.generation_config.update(num_beams=3, max_new_tokens=8, length_penalty=0.7, early_stopping=True)
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        # Wider than high, so that a map with its axes exchanged is noticed: the grid is 2 x 3.
        image_processor = AttnCapImageProcessor(size={"height": 64, "width": 96})
        AttnCapProcessor(image_processor, words).save_pretrained(folder)
        return folder

    return make


@torch.no_grad()
def _sharpen(model: AttnCapForConditionalGeneration) -> None:
    """Makes random weights tell pictures, regions and words apart, and end some captions early."""
    noise = torch.randn(4, 3, 64, 96)
    regions = model.model.encoder.eval()(noise).last_hidden_state
    model.model.encoder.windows.weight.mul_(2 / regions.std())
    model.model.decoder.attention.region_score.weight.mul_(6)
    model.model.decoder.embed_tokens.weight.mul_(3)
    model.lm_head.weight.mul_(3)
    model.lm_head.bias[model.config.eos_token_id] = 1.0


@pytest.fixture
def coarse_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes plots with fewer pixels, which is faster, for tests that do not check the pixels."""
    monkeypatch.setattr("hf_attncap.visualize.DPI", 40)


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """The folder of a tiny random captioner with a word tokenizer and attention over the words so far."""
    return make_checkpoint()


@pytest.fixture
def remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The code of exported folders is copied to a folder of this test alone, and forgotten afterwards."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    forget()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield
    forget()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of three generated pictures: landscape, portrait and a small grey one."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    files = []
    for name, size, mode in (("wide.jpg", (160, 60), "RGB"), ("tall.png", (50, 150), "RGB"), ("grey.png", (40, 40), "L")):
        blocks = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).convert(mode)
        files.append(folder / name)
        blocks.resize(size, Image.Resampling.NEAREST).save(files[-1])
    return files


@pytest.fixture(scope="session")
def make_export(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_export("onnx", **config)` exports the checkpoint of `make_checkpoint(**config)` and returns the folder."""

    @cache
    def make(format: str = "onnx", **config) -> Path:
        for package in {"onnx": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "onnxscript")}[format]:
            pytest.importorskip(package, reason=f'pip install "hf_attncap[{format}]"')
        from hf_attncap.export import export_checkpoint

        return export_checkpoint(make_checkpoint(**config), tmp_path_factory.mktemp("export") / "out", format)

    return make


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Headless Chromium, for one test file."""
    with start_chromium() as browser:
        yield browser


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., WatchedPage]]:
    """`open_page(address, **options)` opens a page in Chromium; see `browser.open_pages`."""
    with open_pages(chromium) as open_page:
        yield open_page


@pytest.fixture(scope="session")
def onnxruntime_web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The .tgz file of ONNX Runtime Web, from npm's cache: tests do not use the network."""
    from hf_attncap.export_web import PACKAGE, VERSION

    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("npm")
    done = subprocess.run([npm, "pack", f"{PACKAGE}@{VERSION}", "--offline"], cwd=folder, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"npm's cache has no {PACKAGE}: run `npm cache add {PACKAGE}@{VERSION}`")
    (file,) = folder.glob("*.tgz")
    return file
