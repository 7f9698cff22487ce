"""A run that is killed with SIGKILL at random moments and repeated gives the output of an uninterrupted run.

The runs are forks of one process that has imported torch, which saves seconds per run.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
FORMATS = ["jsonl", "csv", "parquet", "coco", "txt"]
ROOT = Path(__file__).parent.parent
# Prints how many runs were killed, and the exit code of the run that was not. A run is killed after a share of the time of a whole
# run, which is measured first on another output.
DRIVER = """
import json, os, random, signal, sys, threading, time
import pyarrow.parquet, torch, transformers
from hf_attncap import Captioner
from hf_attncap.cli import main

whole, repeated, kills, seed = *map(json.loads, sys.argv[1:3]), int(sys.argv[3]), int(sys.argv[4])
random.seed(seed)

def run(folder, argv, seconds=None):
    child = os.fork()
    if not child:
        os.chdir(folder)
        sys.stderr = open(os.devnull, "w")
        os._exit(main(argv))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

start = time.perf_counter()
assert run(*whole) == 1
spent = time.perf_counter() - start
codes = []
while codes.count(-signal.SIGKILL) < kills:
    codes.append(run(*repeated, random.uniform(0.2, 1.1) * spent / 3))
    if codes[-1] != -signal.SIGKILL:
        break
print(json.dumps([codes, run(*repeated)]))
"""


def make_images(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / "in" / f"{number % 5}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pixels.resize((90, 60), Image.Resampling.NEAREST).save(path)
    (folder / "in" / "3" / "broken.jpg").write_bytes(b"no image")


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, without those of journals."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".attncap" not in str(path.parent)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def check(format: str, images: int, kills: int, checkpoint: Path, folder: Path) -> list[int]:
    """Kills runs, and compares what they leave with an uninterrupted run; returns the exit codes of the killed runs."""
    argv = ["caption", "in", "--model", str(checkpoint), "--batch-size", "4", "--format", format]
    argv += [] if format == "txt" else ["--output", "out"]
    runs = []
    for name in ("whole", "repeated"):
        (folder / name).mkdir()
        make_images(folder / name, images)
        runs.append(json.dumps([str(folder / name), argv]))
    command = [sys.executable, "-c", DRIVER, *runs, str(kills), str(random.Random(format).randrange(1000))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr
    codes, last = json.loads(done.stdout)
    assert last == 1, "of the broken image"
    found, expected = contents(folder / "repeated"), contents(folder / "whole")
    assert found.keys() == expected.keys() and len(found) > images
    assert found == expected
    return codes


def test_runs_that_are_killed_a_few_times(tiny_checkpoint, tmp_path):
    check("jsonl", 40, 4, tiny_checkpoint, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_runs_that_are_killed_twenty_times(format, tiny_checkpoint, tmp_path):
    codes = check(format, 160, 20, tiny_checkpoint, tmp_path)
    assert codes.count(-9) >= 10, "it went on until the end, or was killed twenty times"
