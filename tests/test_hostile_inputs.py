"""Each hostile input is read or refused with a message that names it, within the memory and time of docs/inputs.md."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import PIL
import pytest
from PIL import Image

from hf_attncap.images import ImageError, load_image
from tests.hostile_inputs import INPUTS, READ, SLOW, png, table
from tests.pages import ROOT, read

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures with /proc")


def read_all(numbers: list[int], folder: Path) -> list[dict]:
    """What one process with limited memory reports of these inputs."""
    command = [sys.executable, "-m", "tests.hostile_inputs", str(folder), *map(str, numbers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {found[-1:]}: {done.returncode} {done.stderr[-2000:]}"
    return found


def check(numbers: list[int], folder: Path) -> None:
    wrong = []
    for number, found in zip(numbers, read_all(numbers, folder), strict=True):
        item = INPUTS[number]
        if item.outcome != READ:
            expected = f"'?{re.escape(found['source'])}'? {item.outcome}"
            fits = re.fullmatch(expected, found["outcome"], re.S)
        else:
            fits = found["outcome"] == READ
        if not fits or found["megabytes"] > item.megabytes or found["seconds"] > item.seconds:
            wrong.append(found)
    assert not wrong


@pytest.mark.skipif(int(PIL.__version__.partition(".")[0]) < 13, reason="earlier versions of Pillow lack limits")
def test_hostile_inputs_within_their_limits(tmp_path):
    check([number for number, item in enumerate(INPUTS) if item.seconds < SLOW], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [number for number, item in enumerate(INPUTS) if item.seconds == SLOW])
def test_large_images_within_their_limits(number, tmp_path):
    check([number], tmp_path)
    shutil.rmtree(tmp_path)


def test_the_page_has_the_table_of_these_inputs():
    assert table() in read("docs/inputs.md")


def test_pixels_are_limited_where_pillow_was_told_not_to(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="has far too many pixels"):
        load_image(png(10**5, 10**5, pixels=False))


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_pixels_that_pillow_warns_of_where_warnings_are_errors():
    with pytest.raises(ImageError, match="has far too many pixels"):
        load_image(png(10_000, 10_000, pixels=False))


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root reads everything")
def test_file_in_a_folder_without_permission(tmp_path):
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "a.png").write_bytes(b"")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(ImageError, match=r"a\.png cannot be opened .*Permission denied"):
            load_image(str(tmp_path / "closed" / "a.png"))
    finally:
        (tmp_path / "closed").chmod(0o700)
