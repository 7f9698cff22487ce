"""The benchmarks of many images run on a few small ones."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from pages import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import bulk_memory, bulk_throughput


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory(tmp_path, capsys):
    output = tmp_path / "memory.json"
    bulk_memory.main(["--images", "40", "--every", "20", "--batch-size", "8", "--format", "csv", "--output", str(output)])
    found = json.loads(output.read_text())
    assert [row["images"] for row in found["rows"]] == [20, 40, 40]
    assert all(row["memory_mib"] > 100 for row in found["rows"]) and found["rows"][0]["images_per_second"] > 0
    assert "| images | resident memory, MiB |" in capsys.readouterr().out


def test_throughput(tiny_checkpoint, pictures, tmp_path, capsys):
    for path in pictures:
        shutil.copy(path, tmp_path / path.name)
    output = tmp_path.with_suffix(".json")
    words = [str(tmp_path), "--checkpoint", str(tiny_checkpoint), "--rounds", "2", "--batch", "2", "--workers", "0", "1"]
    bulk_throughput.main([*words, "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [(row["name"], row["batch"], row["workers"]) for row in rows] == [
        (bulk_throughput.SINGLE, 1, 0),
        (bulk_throughput.FOLDER, 2, 0),
        (bulk_throughput.FOLDER, 2, 1),
        (bulk_throughput.PIPELINE, 1, 0),
        (bulk_throughput.PIPELINE, 2, 0),
    ]
    assert rows[0]["times_as_fast"] == 1 and all(len(row["seconds"]) == 2 and row["images_per_second"] > 0 for row in rows)
    (tmp_path / "broken.jpg").touch()
    with pytest.raises(Exception, match=r"broken\.jpg|cannot be captioned"):
        bulk_throughput.main([*words, "--rounds", "1"])
    assert os.listdir(tmp_path) and "| way |" in capsys.readouterr().out
